"""Sampling beside Dropout: what is equal, what is not, and that the two go together.

Bernoulli-CRS with equal scores multiplies the in-features of a linear layer by z_j/p, z_j = 1 with probability p = k/K:
inverted Dropout with rate 1 − p, but one mask for all rows, where torch's Dropout draws a mask for every row.

    equal       both are unbiased, and the output has the same expected squared error (1 − p)/p · Σ_j ‖X_j‖²‖W_j‖²
    not equal   the errors of rows are independent with Dropout, and go together with one mask. The weight's gradient
                sums over rows (D: gradient of the output, n x m, taken as given), and there it shows:
                    Dropout (1 − p)/p · Σ_j Σ_i X_ij²‖D_i‖²,   one mask (1 − p)/p · Σ_j ‖Σ_i X_ij D_i‖²
                so Dropout averages out over a batch as far as its rows pull the same way, and one mask does not. One
                mask leaves out whole columns, hence operations; Dropout saves none. And a sampler may prefer large
                pairs (online scores): that is for the output, and here the error of the input's gradient grows.
    together    Dropout of the input (rate 1 − q), then sampling: unbiased in the output of the layer and, for given D,
                in its gradients. With equal scores the error is (1/(pq) − 1) Σ_j ‖X_j‖²‖W_j‖². Both are off in eval().

Unbiased in one layer's output is all that holds: through what comes after, a loss included, both are biased.

Source: Adelman et al., NeurIPS 2021 (arXiv 1805.08079); Srivastava et al., JMLR 2014; docs/estimators.md.

    python examples/theory/dropout.py --out docs/figures
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from _shared import COLOURS, Outcomes, bernoulli_outcomes, options, save_figure
from tabulate import tabulate
from torch import Tensor

from fx_approx.ops import linear
from fx_approx.sampling import Selection

K, KEPT, KEEP = 3, 2, 0.75
"""In-features, how many sampling keeps on average, and the share of elements that Dropout keeps."""


def problem(rows: int = 2, outputs: int = 3, alike: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Input ``[rows, K]``, weight ``[outputs, K]``, gradient of the output ``[rows, outputs]``.

    Args:
        rows: Examples.
        outputs: Out-features.
        alike: How much the examples have in common.
        seed: Of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    x, w, d = (
        torch.randn(*shape, generator=generator).double() for shape in ((rows, K), (outputs, K), (rows, outputs))
    )
    common = [torch.randn(1, size, generator=generator).double() for size in (K, outputs)]
    return x + alike * common[0], w * torch.linspace(2, 0.5, K).double(), d + alike * common[1]


def scores(x: Tensor, w: Tensor) -> Tensor:
    """``s_j = ‖X_j‖‖W_j‖``."""
    return x.norm(dim=0) * w.norm(dim=0)


def dropout_outcomes(x: Tensor, keep: float) -> Iterator[tuple[Tensor, float]]:
    """What Dropout multiplies ``x`` by: all masks of its elements over ``keep``, each with its probability."""
    if keep == 1:
        yield torch.ones_like(x), 1.0
        return
    for mask in itertools.product((1.0, 0.0), repeat=x.numel()):
        ones = sum(mask)
        yield torch.tensor(mask).double().view_as(x) / keep, keep**ones * (1 - keep) ** (len(mask) - ones)


def sampling_outcomes(x: Tensor, w: Tensor, how: str) -> Outcomes | list[tuple[Selection | None, float]]:
    """Every outcome of sampling the in-features; ``how`` is ``none``, ``uniform`` or ``online``."""
    if how == "none":
        return [(None, 1.0)]
    return bernoulli_outcomes(scores(x, w) if how == "online" else torch.ones(K).double(), KEPT)


def moments(x: Tensor, w: Tensor, d: Tensor, keep: float, how: str) -> tuple[list[Tensor], list[float]]:
    """Means and expected squared errors of the output, the weight's gradient and the input's, over all outcomes."""
    exact = [x @ w.T, d.T @ x, d @ w]
    means, errors = [torch.zeros_like(each) for each in exact], [0.0] * 3
    for factor, chance in dropout_outcomes(x, keep):
        for selection, given in sampling_outcomes(x * factor, w, how):
            leaf, weight = x.clone().requires_grad_(), w.clone().requires_grad_()
            y = linear(leaf * factor, weight, selection=selection)
            y.backward(d)
            for i, value in enumerate((y.detach(), weight.grad, leaf.grad)):
                means[i] += chance * given * value
                errors[i] += float(chance * given * (value - exact[i]).square().sum())
    return means, errors


def output_error(x: Tensor, w: Tensor, share: float) -> float:
    """``(1 − share)/share · Σ_j ‖X_j‖²‖W_j‖²``, for either mask, or both with ``share = p q``."""
    return float((1 / share - 1) * scores(x, w).square().sum())


def gradient_error(x: Tensor, d: Tensor, share: float, one_mask: bool) -> float:
    """Expected squared error of the weight's gradient ``dᵀ x̂``: one mask for all rows, or one for each."""
    signal = (d.T @ x).square().sum()
    rows = (x.square().sum(1) * d.square().sum(1)).sum()
    return float((1 / share - 1) * (signal if one_mask else rows))


def plot(axis: Any) -> None:
    """Error of the weight's gradient, relative, by batch size; the output's is the same for both."""
    sizes = [2**i for i in range(9)]
    for one_mask, alike, label, colour, style in (
        (True, 1.0, "sampling: one mask", COLOURS[2], "s-"),
        (False, 0.0, "Dropout, rows have nothing in common", COLOURS[3], "^:"),
        (False, 1.0, "Dropout, rows with a common part", COLOURS[1], "o--"),
    ):
        heights = []
        for rows in sizes:
            drawn = [problem(rows, alike=alike, seed=seed) for seed in range(30)]
            error = sum(gradient_error(x, d, 0.5, one_mask) for x, _, d in drawn)
            heights.append(error / sum(float((d.T @ x).square().sum()) for x, _, d in drawn))
        axis.loglog(sizes, heights, style, color=colour, label=label)
    axis.set(
        xlabel="rows of the batch",
        ylabel="error / ‖gradient‖²",
        title="Gradient of the weight, p = 1/2",
        ylim=(5e-3, 3),
    )
    axis.legend(fontsize=8)


CASES = (
    ("Dropout alone, p", KEPT / K, "none"),
    ("sampling alone, equal scores", 1.0, "uniform"),
    ("sampling alone, online scores", 1.0, "online"),
    ("Dropout q, sampling equal", KEEP, "uniform"),
    ("Dropout q, sampling online", KEEP, "online"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    out = options(__doc__, arguments).out
    x, w, d = problem()
    exact, rows = [x @ w.T, d.T @ x, d @ w], []
    for name, keep, how in CASES:
        means, errors = moments(x, w, d, keep, how)
        share = keep * (KEPT / K if how == "uniform" else 1.0)
        formula = "" if how == "online" else output_error(x, w, share)
        bias = max(float((mean - value).abs().max()) for mean, value in zip(means, exact, strict=True))
        rows.append([name, bias, errors[0], formula, *errors[1:]])
    print(f"Expected squared errors over all outcomes; p = {KEPT}/{K}, q = {KEEP:g}\n")
    heads = ["", "largest bias", "output", "formula", "weight gradient", "input gradient"]
    print(tabulate(rows, heads, floatfmt=("", ".0e", ".3f", ".3f", ".3f", ".3f")))
    return save_figure(out, "dropout", 1, plot)


if __name__ == "__main__":
    sys.exit(main())
