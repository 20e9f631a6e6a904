"""Bernoulli-CRS: every pair decides independently whether it takes part."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from fx_approx.sampling.base import Sampler, Selection, register_sampler, select
from fx_approx.sampling.probabilities import inclusion_probabilities

__all__ = ["Bernoulli", "capacity"]

_OVERFLOW = 1e-9


def capacity(pairs: int, k: int) -> int:
    """Return how many entries a draw of fixed shape and expected size ``k`` reserves: min(K, k + ceil(t)).

    The count N is a sum of K independent Bernoulli variables with mean k and variance
    v = sum p_j (1 - p_j) <= k (1 - k / K), by concavity at equal p_j. Bernstein's inequality,
    P(N - k >= t) <= exp(-t**2 / (2 (v + t / 3))), is at most 1e-9 for the t that solves
    t**2 = 2 L (v + t / 3) with L = ln(1e9), that is t = L / 3 + sqrt(L**2 / 9 + 2 L v).
    One row in a thousand million draws then loses its last pairs; that bias is far below rounding.
    """
    if k >= pairs:
        return pairs
    log = -math.log(_OVERFLOW)
    variance = k * (1 - k / pairs)
    excess = log / 3 + math.sqrt(log**2 / 9 + 2 * log * variance)
    return min(pairs, k + math.ceil(excess))


@register_sampler
class Bernoulli(Sampler):
    """Unbiased sampling of k pairs on average, each independently with its inclusion probability p_j.

    The scale is 1 / p_j; the expected squared error is sum_j (1 - p_j) / p_j s_j**2.

    The count is random. Eager (``fixed_shape=False``) the Selection has as many columns as the fullest
    group, which is read on the host, and at least one: an empty draw is one entry of scale 0, so it stays
    unbiased and a convolution still has a channel. With ``fixed_shape=True`` it has ``capacity(K, k)``
    columns. Either way other rows are padded with pairs that were not drawn, at scale 0.

    Source: Adelman, Levy, Hakimi, Silberstein, NeurIPS 2021.
    """

    name: ClassVar[str] = "bernoulli"
    unbiased: ClassVar[bool] = True
    fixed_size: ClassVar[bool] = False
    random: ClassVar[bool] = True
    default_epsilon: ClassVar[float] = 0.1

    def uniforms(self, pairs: int, k: int) -> int:
        """Return ``pairs``: one uniform per pair."""
        return pairs

    def _draw(self, scores: Tensor, k: int, uniforms: Tensor, epsilon: float, fixed_shape: bool) -> Selection:
        p = inclusion_probabilities(scores, k, epsilon)
        drawn = uniforms.double() < p
        count = capacity(scores.shape[1], k) if fixed_shape else max(1, int(drawn.sum(-1).max()))
        return select(torch.where(drawn, 1.0 / p, 0.0), count, scores.dtype)
