"""What the theory examples share: every outcome of a draw with its probability, options, figures."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fx_approx.sampling import Selection, draw_probabilities, get_sampler, inclusion_probabilities

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
"""Told apart by colour-blind readers too (Okabe and Ito); lines differ in style as well."""


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """Every outcome of a draw: Selections ``[N, k]`` and the probability ``[N]`` of each; they sum to 1."""

    selection: Selection
    probability: Tensor

    def __iter__(self) -> Iterator[tuple[Selection, Tensor]]:
        """One outcome after the other: a Selection ``[1, k]`` and its probability."""
        indices, scale = self.selection
        assert scale is not None
        for i, chance in enumerate(self.probability):
            yield Selection(indices[i : i + 1], scale[i : i + 1]), chance

    def weights(self, pairs: int) -> Tensor:
        """What each of the ``pairs`` is multiplied by, ``[N, pairs]``; 0 where it is not chosen."""
        return weights(self.selection, pairs)


def weights(selection: Selection, pairs: int) -> Tensor:
    """``[G, pairs]`` from a Selection ``[G, k]``: its scale, 0 where a pair is not chosen."""
    indices, scale = selection
    ones = torch.ones_like(indices, dtype=torch.float64) if scale is None else scale
    return ones.new_zeros(len(indices), pairs).scatter(1, indices, ones)


def bernoulli_outcomes(scores: Tensor, k: int, epsilon: float = 0.0) -> Outcomes:
    """All 2^K masks of the library's Bernoulli-CRS on ``scores [K]``, those of probability 0 left out."""
    p = inclusion_probabilities(scores[None], k, epsilon)[0]
    masks = torch.tensor(list(itertools.product((1.0, 0.0), repeat=len(p))), dtype=torch.float64)
    probability = torch.where(masks > 0, p, 1 - p).prod(1)
    masks, probability = masks[probability > 0], probability[probability > 0]
    uniforms = torch.where(masks > 0, p / 2, (1 + p) / 2)  # below p: taken
    rows = scores.expand(len(masks), -1)
    return Outcomes(get_sampler("bernoulli").draw(rows, k, uniforms, epsilon=epsilon), probability)


def crs_outcomes(scores: Tensor, k: int, epsilon: float = 0.0) -> Outcomes:
    """All K^k sequences of draws of the library's CRS on ``scores [K]``."""
    p = draw_probabilities(scores[None], epsilon)[0]
    draws = torch.tensor(list(itertools.product(range(len(p)), repeat=k)))
    uniforms = (p.cumsum(0) - p / 2)[draws]  # the middle of each pair's interval
    rows = scores.expand(len(draws), -1)
    return Outcomes(get_sampler("crs").draw(rows, k, uniforms, epsilon=epsilon), p[draws].prod(1))


def options(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line of every theory example: ``--out DIR``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="save the figure in this folder; needs matplotlib")
    return parser.parse_args(arguments)


def save_figure(out: Path | None, name: str, panels: int, plot: Callable[..., None]) -> int:
    """Saves ``out/theory_<name>.png``, drawn by ``plot(*axes)``; returns the exit code."""
    if out is None:
        print("\nFor the figure: --out DIR")
        return 0
    try:
        from matplotlib.figure import Figure  # only the figure needs it
    except ImportError:
        print("\nThe figure needs matplotlib (pip install matplotlib); the table above does not.", file=sys.stderr)
        return 1
    figure = Figure(figsize=(4.2 * panels, 3.4), dpi=90, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    plot(*axes)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"theory_{name}.png"
    figure.savefig(path, metadata={"Software": None})  # the same file from the same numbers
    print(f"\n{path}")
    return 0
