"""Sampling a linear regression adds a penalty on the weights, in expectation: a dynamic L2 term.

Loss ‖Y − XW‖², the product XW sampled, s_j = ‖X_j‖‖W_j‖ (column j of X, row j of W). Then

    Bernoulli-CRS   E[loss] = ‖Y − XW‖² + Σ_j (1 − p_j)/p_j · s_j²
    CRS, k draws    E[loss] = ‖Y − XW‖² + (Σ_j s_j²/p_j − ‖XW‖²)/k

and with p held fixed the expected gradient is that of this regularised loss. Bernoulli's penalty is a sum over the
rows of W: L2, with a factor for every row that follows data and weights. The draws of CRS depend on each other, which
brings in ‖XW‖²: rows are coupled, and what is penalised is not only the size of weights. That led the paper to the
Bernoulli variant. With p = the best probabilities (epsilon 0) even their dependence on W changes nothing: they
minimise the penalty, so its derivative with respect to them is zero along Σ p_j = k. The penalty is then
(Σ_j s_j)²/k − Σ_j s_j² (while no p_j is 1), which presses the rows of features that matter little to zero.

Source: Adelman et al., NeurIPS 2021 (arXiv 1805.08079), analysis of linear regression; docs/estimators.md.

    python examples/theory/linear_regression.py --out docs/figures
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from _shared import COLOURS, Outcomes, bernoulli_outcomes, crs_outcomes, options, save_figure, weights
from tabulate import tabulate
from torch import Tensor

from fx_approx.ops import linear
from fx_approx.sampling import draw_probabilities, get_sampler, inclusion_probabilities

K, DRAWS = 5, 2
EPSILON = 0.1
"""The library's default share of uniform probability."""


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """``X [8, K]`` with features of unequal size, weights ``W [K, 2]`` and ``Y = X W* + noise``."""
    generator = torch.Generator().manual_seed(seed)
    x, true, noise, w = (torch.randn(*s, generator=generator).double() for s in ((8, K), (K, 2), (8, 2), (K, 2)))
    x = x * torch.linspace(1.0, 0.4, K).double()
    return x, w, x @ true + 0.3 * noise


def scores(x: Tensor, w: Tensor) -> Tensor:
    """``s_j = ‖X_j‖‖W_j‖``; ``w`` is ``[..., K, n]``."""
    return x.norm(dim=0) * w.norm(dim=-1)


def penalty(method: str, x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    """What sampling adds to the loss, in expectation, at probabilities ``p``: the formulas above."""
    squares = scores(x, w).square()
    if method == "bernoulli":
        return ((1 - p) / p * squares).sum(-1)
    return ((squares / p).sum(-1) - (x @ w).square().sum((-2, -1))) / DRAWS


def probabilities(method: str, s: Tensor, epsilon: float = EPSILON) -> Tensor:
    """The library's probabilities for scores ``s [..., K]``."""
    rows = s.detach().reshape(-1, K)
    p = inclusion_probabilities(rows, DRAWS, epsilon) if method == "bernoulli" else draw_probabilities(rows, epsilon)
    return p.view_as(s)


def enumerated(x: Tensor, w: Tensor, y: Tensor, outcomes: Outcomes) -> tuple[float, Tensor]:
    """Expected loss and gradient: the library's product for every outcome, weighted by its probability."""
    w = w.clone().requires_grad_()
    loss = sum(chance * (y - linear(x, w.T, selection=each)).square().sum() for each, chance in outcomes)
    loss.backward()
    return float(loss.detach()), w.grad


def predicted(method: str, x: Tensor, w: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """The regularised loss and its gradient with p held fixed."""
    w = w.clone().requires_grad_()
    loss = (y - x @ w).square().sum() + penalty(method, x, w, probabilities(method, scores(x, w)))
    loss.backward()
    return float(loss.detach()), w.grad


def train(
    method: str, sampled: bool, uniform: bool = False, runs: int = 1, steps: int = 400, rate: float = 0.001
) -> Tensor:
    """Gradient descent from the weights of :func:`problem`: ``[steps + 1, runs, K, 2]``.

    Args:
        method: ``exact``, ``bernoulli`` or ``crs``.
        sampled: Draw a new sample in every step; else descend the exact loss plus the penalty.
        uniform: Equal scores instead of ``s_j``: then p is fixed, and the mean of the sampled weights is exactly
            the other's weights, step for step, since the gradient is linear in them.
        runs: Independent runs.
        steps: Steps of each.
        rate: Step size.
    """
    x, w, y = problem()
    generator = torch.Generator().manual_seed(1)
    path = [w.expand(runs, -1, -1)]
    for _ in range(steps):
        w = path[-1].clone().requires_grad_()
        s = torch.ones(runs, K).double() if uniform else scores(x, w)
        if sampled:
            sampler = get_sampler(method)
            numbers = torch.rand(runs, sampler.uniforms(K, DRAWS), generator=generator)
            chosen = weights(sampler.draw(s, DRAWS, numbers, epsilon=EPSILON), K)
            loss = (y - (x * chosen[:, None]) @ w).square().sum()
        else:
            loss = (y - x @ w).square().sum()
            if method != "exact":
                loss = loss + penalty(method, x, w, probabilities(method, s)).sum()
        path.append((w - rate * torch.autograd.grad(loss, w)[0]).detach())
    return torch.stack(path)


def plot(norms: dict[str, Tensor], path_axis: Any, row_axis: Any) -> None:
    """Left: the size of the weights over the steps; right: of each row at the end."""
    for label, w in norms.items():
        colour = COLOURS[0 if label == "exact" else 1 if label.startswith("Bernoulli") else 2]
        look = (
            {"linewidth": 5, "alpha": 0.35} if "sampled" in label else {"linestyle": "-" if label == "exact" else "--"}
        )
        path_axis.plot(w.norm(dim=(1, 2)), color=colour, label=label, **look)
        row_axis.plot(range(1, K + 1), w[-1].norm(dim=1), color=colour, marker="o", **look)
    path_axis.set(xlabel="step", ylabel="‖mean W‖", title="Sampling shrinks weights as its penalty does")
    path_axis.legend(fontsize=8)
    row_axis.set(xlabel="feature j", ylabel="‖mean W$_j$‖ at the end", title="row by row", xticks=range(1, K + 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    out = options(__doc__, arguments).out
    x, w, y = problem()
    exact = float((y - x @ w).square().sum())
    rows = []
    for method, outcomes in (("bernoulli", bernoulli_outcomes), ("crs", crs_outcomes)):
        loss, gradient = enumerated(x, w, y, outcomes(scores(x, w), DRAWS, EPSILON))
        formula, slope = predicted(method, x, w, y)
        rows.append([method, exact, formula - exact, formula, loss, float((gradient - slope).abs().max())])
    heads = ["", "exact loss", "+ penalty", "= formula", "enumerated", "largest difference of gradients"]
    print(tabulate(rows, heads, floatfmt=(None, ".6f", ".6f", ".6f", ".6f", ".0e")))
    paths = {"exact": train("exact", False)}
    for method, name in (("bernoulli", "Bernoulli-CRS"), ("crs", "CRS")):
        paths[f"{name}, sampled (mean of 100)"] = train(method, True, runs=100)
        paths[f"{name}, its penalty"] = train(method, False)
    means = {label: path.mean(1) for label, path in paths.items()}
    print(
        "\n" + tabulate([[k, float(v[-1].norm())] for k, v in means.items()], ["training", "‖mean W‖"], floatfmt=".3f")
    )
    return save_figure(out, "linear_regression", 2, lambda *axes: plot(means, *axes))


if __name__ == "__main__":
    sys.exit(main())
