"""SGD with sampled gradients, under an exact forward pass, converges as SGD does: the same rate, a larger constant.

The paper's guarantees: sampling only the backward pass, with bounded weights, converges as SGD does; sampling only the
gradients of weights, with bounded activation functions, needs no bound on weights. Here on a problem whose constants
are known: two linear layers, f(W) = E_i ‖V W x_i − y_i‖²/2 over n examples, V fixed, least at W*, where the residuals
ε_i are left. A step takes b random examples. GRAD_WEIGHT of the first layer keeps rows with probability p, GRAD_INPUT
of the second (the first has none) out-features with probability q, both by Bernoulli-CRS with equal scores. The sampled
gradient G is unbiased, and in closed form, with residuals r_i and R = E_i r_i x_iᵀ,

    E‖G‖² = E_i ‖x_i‖² N(r_i) / (bp) + (1 − 1/b) N(R),    N(r) = ‖Vᵀr‖² + (1/q − 1) Σ_o ‖V_o‖²‖r_o‖²

With a, λ any eigenvalues of VᵀV and of E_i x_i x_iᵀ, g = max ‖x_i‖²/(bp), c = (1/q − 1) max ‖V_o‖², and step size η

    E‖W' − W*‖² ≤ max (1 − 2ηaλ + η² aλ (a + c)(λ + g)) · ‖W − W*‖² + η² g E_i (‖Vᵀε_i‖² + c‖ε_i‖²)

SGD itself is p = q = 1. With η = 2/(μ(t + t0)), μ = min aλ, every case falls as 1/t. Sampled rows act as a batch of bp
examples would, through the size of *activations*; sampled input gradients add c, the size of *weights*: hence the two
conditions. (In one layer, sampling rows with equal scores is a smaller batch, at the price of a full forward pass.)

Source: Adelman et al., NeurIPS 2021 (arXiv 1805.08079), approximate backpropagation; docs/estimators.md.

    python examples/theory/convergence.py --out docs/figures
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from _shared import COLOURS, options, save_figure
from tabulate import tabulate
from torch import Tensor

from fx_approx.ops import linear
from fx_approx.sampling import Selection, get_sampler

MODES = {"exact": (1.0, 1.0), "weight gradient only": (0.5, 1.0), "backward": (0.5, 0.5)}
"""p and q."""
EVERY = 10
"""Steps between two points of a curve."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Least squares through a fixed second layer: ``x [n, d]``, ``y [n, o]``, ``v [o, h]``, and ``w_best [h, d]``."""

    x: Tensor
    y: Tensor
    v: Tensor
    w_best: Tensor
    batch: int

    @functools.cached_property
    def curvatures(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues a and λ, as a column and a row."""
        moment = self.x.T @ self.x / len(self.x)
        return torch.linalg.eigvalsh(self.v.T @ self.v)[:, None], torch.linalg.eigvalsh(moment)[None]

    def constants(self, p: float, q: float) -> tuple[float, float, float]:
        """``g``, ``c`` and ``E_i (‖Vᵀε_i‖² + c‖ε_i‖²)``."""
        g = float(self.x.square().sum(1).max()) / (self.batch * p)
        c = (1 / q - 1) * float(self.v.square().sum(1).max())
        noise = self.x @ (self.v @ self.w_best).T - self.y
        return g, c, float(((noise @ self.v).square().sum(1) + c * noise.square().sum(1)).mean())

    def contraction(self, p: float, q: float, rate: float) -> tuple[float, float]:
        """The two numbers of the bound: factor of ``‖W − W*‖²``, and what is added."""
        (a, curvature), (g, c, noise) = self.curvatures, self.constants(p, q)
        factor = 1 - 2 * rate * a * curvature + rate**2 * a * curvature * (a + c) * (curvature + g)
        return float(factor.max()), rate**2 * g * noise

    def rates(self, steps: int) -> Tensor:
        """``η_t = 2/(μ(t + t0))``; t0 such that even backward mode contracts from the first step."""
        (a, curvature), (g, c, _) = self.curvatures, self.constants(*MODES["backward"])
        start = 2 * float(((a + c) * (curvature + g)).max() / (a * curvature).min())
        return 2 / (float((a * curvature).min()) * (torch.arange(steps).double() + start))


def problem(seed: int = 0, n: int = 256, d: int = 8, h: int = 6, o: int = 12, batch: int = 16) -> Problem:
    """A random problem, well conditioned; its noise is orthogonal to the inputs, so ``w_best`` is the minimum."""
    generator = torch.Generator().manual_seed(seed)
    x, v, w, noise = (torch.randn(*s, generator=generator).double() for s in ((n, d), (o, h), (h, d), (n, o)))
    x, v = x * (d**0.5 / x.norm(dim=1, keepdim=True)), torch.linalg.qr(v).Q * (o / h) ** 0.5
    noise = noise - x @ torch.linalg.lstsq(x, noise).solution
    return Problem(x, x @ (v @ w).T + noise, v, w, batch)


def sample(share: float, pairs: int, generator: torch.Generator) -> Selection | None:
    """Bernoulli-CRS with equal scores; None for all pairs."""
    if share == 1:
        return None
    numbers = torch.rand(1, pairs, generator=generator)
    return get_sampler("bernoulli").draw(torch.ones(1, pairs).double(), round(share * pairs), numbers, epsilon=0.0)


def gradient(w: Tensor, x: Tensor, y: Tensor, v: Tensor, rows: Selection | None, outs: Selection | None) -> Tensor:
    """The gradient of a batch's loss, from chosen rows and out-features; the loss itself is exact."""
    w = w.clone().requires_grad_()
    output = linear(linear(x, w, grad_weight=rows), v, grad_input=outs)
    ((output - y).square().sum() / (2 * len(x))).backward()
    return w.grad


def second_moment(given: Problem, w: Tensor, p: float, q: float) -> float:
    """``E‖G‖²`` at ``w``, over batches and samples: the first formula above."""
    residuals, c = given.x @ (given.v @ w).T - given.y, 1 / q - 1

    def spread(r: Tensor) -> Tensor:
        return (r @ given.v).square().sum(-1) + c * (r.square() @ given.v.square().sum(1))

    each = (given.x.square().sum(1) * spread(residuals)).mean()
    mean = residuals.T @ given.x / len(given.x)
    return float(each / (given.batch * p) + (1 - 1 / given.batch) * spread(mean.T).sum())


def bound(given: Problem, p: float, q: float, steps: int) -> Tensor:
    """The bound of ``E‖W_t − W*‖²`` from ``W_0 = 0``, at every ``EVERY``-th step."""
    values = [float(given.w_best.square().sum())]
    for rate in given.rates(steps).tolist():
        factor, added = given.contraction(p, q, rate)
        values.append(factor * values[-1] + added)
    return torch.tensor(values, dtype=torch.float64)[::EVERY]


def train(given: Problem, p: float, q: float, steps: int, seed: int) -> Tensor:
    """``‖W_t − W*‖²`` at every ``EVERY``-th step of one run of SGD from zero."""
    generator = torch.Generator().manual_seed(seed)
    w, distances = torch.zeros_like(given.w_best), []
    for step, rate in enumerate([*given.rates(steps).tolist(), 0.0]):
        if step % EVERY == 0:
            distances.append((w - given.w_best).square().sum())
        batch = torch.randint(len(given.x), (given.batch,), generator=generator)
        rows, outs = sample(p, given.batch, generator), sample(q, len(given.v), generator)
        w = w - rate * gradient(w, given.x[batch], given.y[batch], given.v, rows, outs)
    return torch.stack(distances)


def slope(curve: Tensor) -> float:
    """The power of t with which ``curve`` falls over the last nine tenths of its steps."""
    late = torch.arange(len(curve) // 10, len(curve)).double()
    design = torch.stack([late.log(), torch.ones_like(late)], 1)
    return float(torch.linalg.lstsq(design, curve[late.long()].log()[:, None]).solution[0])


def plot(curves: dict[str, tuple[Tensor, Tensor]], axis: Any) -> None:
    """Measured distances, solid, below their bounds, dashed."""
    for (name, (measured, above)), colour, marker in zip(curves.items(), COLOURS, "os^", strict=False):
        steps = EVERY * torch.arange(len(measured))
        axis.loglog(steps, measured, color=colour, marker=marker, markevery=0.15, label=name)
        axis.loglog(steps, above, "--", color=colour, label="its bound")
    axis.set(xlabel="step t", ylabel="E ‖W$_t$ − W*‖²", title="SGD with sampled gradients, and bounds")
    axis.legend(fontsize=8, loc="upper right")


def main(arguments: Sequence[str] | None = None, steps: int = 600, runs: int = 6) -> int:
    """Prints the table; returns the exit code."""
    out = options(__doc__, arguments).out
    given, rows, curves = problem(), [], {}
    for name, (p, q) in MODES.items():
        measured = torch.stack([train(given, p, q, steps, seed) for seed in range(runs)]).mean(0)
        curves[name] = measured, bound(given, p, q, steps)
        end = [float(curve[-len(curve) // 4 :].mean()) for curve in curves[name]]
        rows.append([name, p, q, *given.constants(p, q)[:2], *end, *(slope(curve) for curve in curves[name])])
    heads = ["sampled", "p", "q", "g", "c", "last quarter", "its bound", "power of t", "bound's"]
    curvature = given.curvatures[0] * given.curvatures[1]
    print(f"μ = {float(curvature.min()):.2f}, L = {float(curvature.max()):.2f}; {runs} runs of {steps} steps\n")
    print(tabulate(rows, heads, floatfmt=("", ".1f", ".1f", ".2f", ".2f", ".4f", ".4f", ".2f", ".2f")))
    return save_figure(out, "convergence", 1, lambda axis: plot(curves, axis))


if __name__ == "__main__":
    sys.exit(main())
