"""When TopK is the best choice of k pairs, and when it is not.

The pairs P_1 … P_K are independent with mean zero, and k of them are kept, unscaled. Then the mean squared error is

    fixed subset S            E‖Σ_j P_j − Σ_{j in S} P_j‖² = Σ_{j not in S} E t_j²,   t_j = ‖P_j‖

least for the k largest E t_j²: TopK. Chosen anew from the *realised* t_j, TopK has error E Σ_{j left out} t_j², and
nothing that looks at sizes alone does better, if the pairs are also sign-symmetric (P_j and −P_j equally likely
whatever the others are). Not in general: of four pairs that are 2 with probability 1/3 and else −1, TopK keeps the 2s,
and the −1s left out add up. Nor with a mean: what TopK leaves out adds up to a bias, (Σ_{j left out} E P_j)², which
stays the same share of the product however many pairs there are. The error of Bernoulli-CRS falls as 1/K, so from some
K on it is the better one (figure).

Source: Adelman et al., NeurIPS 2021 (arXiv 1805.08079), TopK-CRS; docs/estimators.md.

    python examples/theory/topk_mse.py --out docs/figures
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from _shared import COLOURS, bernoulli_outcomes, options, save_figure, weights
from tabulate import tabulate
from torch import Tensor

from fx_approx.sampling import get_sampler, inclusion_probabilities

SIZES = (2.0, 1.5, 1.2, 0.9, 0.7, 0.5)
KEPT = 3
MEAN = 0.5
"""Of the pairs that have one, in standard deviations."""


class Pairs(NamedTuple):
    """Every outcome of K random pairs that are numbers: values ``[N, K]`` and the probability ``[N]`` of each."""

    values: Tensor
    probability: Tensor

    def mean(self, of: Tensor) -> Tensor:
        """Expectation of ``of [N, ...]``."""
        return torch.tensordot(self.probability, of, dims=1)


def pairs(values: Sequence[Sequence[float]], chances: Sequence[float]) -> Pairs:
    """Independent pairs: pair j is ``values[j][i]`` with probability ``chances[i]``."""
    places = list(itertools.product(range(len(chances)), repeat=len(values)))
    rows = [[values[j][i] for j, i in enumerate(row)] for row in places]
    probability = torch.tensor(chances, dtype=torch.float64)[torch.tensor(places)].prod(1)
    return Pairs(torch.tensor(rows, dtype=torch.float64), probability)


def symmetric(mean: float = 0.0) -> Pairs:
    """Pairs ``a_j (mean + z)``, z one of ±0.2 and ±1.4 (variance 1) with probability 1/4, a_j from 2 to 0.5."""
    return pairs([[a * (mean + z) for z in (-1.4, -0.2, 0.2, 1.4)] for a in SIZES], (0.25,) * 4)


def skewed(sizes: Sequence[float]) -> Pairs:
    """Pairs ``a_j · 2`` with probability 1/3, else ``−a_j``: mean zero, but not sign-symmetric."""
    return pairs([(-a, 2 * a) for a in sizes], (2 / 3, 1 / 3))


def topk(scores: Tensor, k: int) -> Tensor:
    """1 for what the library's TopK keeps of ``scores [N, K]``, 0 for the others."""
    return weights(get_sampler("topk").draw(scores, k, None, epsilon=0.0), scores.shape[1])


def mse(found: Pairs, kept: Tensor) -> float:
    """Mean squared error when the pairs are multiplied by ``kept``, ``[K]`` or ``[N, K]``."""
    return float(found.mean((found.values * (1 - kept)).sum(1).square()))


def left_out(found: Pairs, kept: Tensor) -> float:
    """The formula: the expected sum of the squares left out."""
    return float(found.mean((found.values.square() * (1 - kept)).sum(1)))


def fixed_topk(found: Pairs, k: int) -> Tensor:
    """TopK by ``E t_j²``."""
    return topk(found.mean(found.values.square()).sqrt()[None], k)[0]


def bernoulli_mse(found: Pairs, k: int) -> tuple[float, float]:
    """Bernoulli-CRS by ``(E t_j²)^½``: enumerated over masks and pairs, and Σ (1 − p_j)/p_j E t_j²."""
    squares = found.mean(found.values.square())
    outcomes = bernoulli_outcomes(squares.sqrt(), k)
    masks = outcomes.weights(len(squares))
    errors = torch.stack([found.mean((found.values * (1 - mask)).sum(1).square()) for mask in masks])
    p = inclusion_probabilities(squares.sqrt()[None], k, 0.0)[0]
    return float(outcomes.probability @ errors), float(((1 - p) / p * squares).sum())


def with_mean(repeats: int, mean: float) -> tuple[float, float, float]:
    """Errors of fixed TopK and Bernoulli-CRS, and ``E(Σ P_j)²``, when every pair of ``symmetric`` comes repeatedly."""
    a, k = torch.tensor(SIZES, dtype=torch.float64).repeat(repeats), KEPT * repeats
    out, p = 1 - topk(a[None], k)[0], inclusion_probabilities(a[None], k, 0.0)[0]
    error, product = (
        (a.square() * part).sum() + (mean * a * part).sum().square() for part in (out, torch.ones_like(a))
    )
    return float(error), float(((1 - p) / p * (1 + mean**2) * a.square()).sum()), float(product)


def plot(left: Any, right: Any) -> None:
    """Left: every subset and what TopK chooses; right: the error as more and more pairs have a mean."""
    found = symmetric()
    subsets = torch.tensor([row for row in itertools.product((0.0, 1.0), repeat=len(SIZES)) if sum(row) == KEPT])
    errors = sorted(mse(found, kept) for kept in subsets.double())
    left.plot(errors, "o", color=COLOURS[1], label=f"all {len(errors)} fixed subsets")
    for label, kept, colour, style in (
        ("TopK by E t²", fixed_topk(found, KEPT), COLOURS[0], "-"),
        ("TopK by realised t", topk(found.values.abs(), KEPT), COLOURS[2], "--"),
    ):
        left.axhline(mse(found, kept), color=colour, linestyle=style, label=label)
    left.set(xlabel="subset, by its error", ylabel="mean squared error", ylim=(0, None), title="Pairs of mean zero")
    left.legend(fontsize=8)
    counts = [2**i for i in range(9)]
    for mean, style in ((0.0, "--"), (MEAN, "-")):
        errors_at = [with_mean(each, mean) for each in counts]
        for i, (name, marker) in enumerate((("TopK", "o"), ("Bernoulli-CRS", "s"))):
            heights = [each[i] / each[2] for each in errors_at]
            label = f"{name}, {'mean zero' if mean == 0 else f'mean {mean:g} σ'}"
            right.loglog([len(SIZES) * c for c in counts], heights, style, marker=marker, color=COLOURS[i], label=label)
    right.set(xlabel="pairs K (half of them kept)", ylabel="error / E‖Σ P$_j$‖²", title="Pairs with and without a mean")
    right.legend(fontsize=8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    out = options(__doc__, arguments).out
    rows = []
    for name, found, k in (
        ("sign-symmetric, unequal", symmetric(), KEPT),
        ("skewed, unequal", skewed(SIZES), KEPT),
        ("skewed, K = 4, k = 2", skewed((1.0,) * 4), 2),
        (f"mean {MEAN:g} σ, unequal", symmetric(MEAN), KEPT),
    ):
        fixed, realised = fixed_topk(found, k), topk(found.values.abs(), k)
        numbers = [f(found, kept) for kept in (fixed, realised) for f in (mse, left_out)]
        rows.append([name, *numbers, bernoulli_mse(found, k)[0]])
    heads = ["pairs", "TopK, fixed", "formula", "TopK, realised", "formula", "Bernoulli-CRS"]
    print("Mean squared error, over all outcomes\n\n" + tabulate(rows, heads, floatfmt=".4f"))
    return save_figure(out, "topk_mse", 2, plot)


if __name__ == "__main__":
    sys.exit(main())
