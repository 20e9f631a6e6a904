"""What sampling a layer is predicted to do to it: the variance formulas on the norms of its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fx_approx.core.plan_effects import TokenShare
from fx_approx.sampling.base import get_sampler
from fx_approx.sampling.probabilities import inclusion_probabilities
from fx_approx.sampling.spec import SamplerConfig


def predicted_error(norms: Tensor | None, spec: SamplerConfig, pairs: int) -> float:
    """Squared error of a sampled product as a share of its squared size, E‖Ĉ − C‖² / ‖C‖².

    Columns of the input are taken to be alike, and pairs to be independent with zero mean: ‖C‖² is then the sum of the
    squared scores, TopK loses those that it leaves out, and an unbiased sampler adds (1 - p) / p of each
    (docs/estimators.md). Scores that read more than the weight are taken to be like its norms.

    Args:
        norms: Of the weight by pair, ``[groups, pairs]``; None: all alike.
        spec: How it is sampled.
        pairs: Pairs of a group.

    Returns:
        0 if all pairs are kept.
    """
    k = spec.count(pairs)
    if k >= pairs:
        return 0.0
    scores = torch.ones(1, pairs) if norms is None or not bool(norms.any()) else norms.double()
    squares = scores.square()
    if not get_sampler(spec.name).unbiased:
        left_out = squares.sort(dim=1).values[:, : pairs - k] if spec.scores != "uniform" else squares * (1 - k / pairs)
        return float(left_out.sum() / squares.sum())
    drawn = torch.ones_like(scores) if spec.scores == "uniform" else scores
    p = inclusion_probabilities(drawn, k, spec.effective_epsilon).clamp(min=1e-12)
    return float(((1 - p) / p * squares).sum() / squares.sum())


def token_error(stretches: Sequence[TokenShare], ratio: float) -> float:
    """What leaving tokens out costs, in the unit in which the errors of layers are added up: -log of the share kept.

    A gradient is a sum over tokens, and of tokens that are alike a share of 1 - r is lost, once for all layers of a
    stretch. That attention sees fewer keys, and that a skipped token is left as it was, is not counted.
    """
    shares = [one.kept(ratio) for one in stretches]
    return -sum(math.log(some / of) for some, of in shares)
