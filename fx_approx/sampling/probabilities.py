"""Probabilities from scores: for draws with replacement, and for inclusion in a sample of expected size k.

Everything here is vectorised over groups, has static shapes and never reads a value on the host. The
maths runs in float64: there are few pairs, and float32 scores may span 1e-30 to 1e30.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Guarded", "draw_probabilities", "guard_nonfinite", "inclusion_probabilities", "water_level"]

# Relative distance within which two sums count as equal: above the rounding of a running float64 sum of a million
# equal numbers, so that a tie is one on every device and in compiled runs, and far below what any error shows.
_TIE = 1e-10


class Guarded(NamedTuple):
    """Scores made safe for arithmetic.

    Attributes:
        scores: float64 ``[G, K]``, finite, the largest of a row is 1 (or all are 0).
        epsilon: float64 ``[G, 1]``, the share of uniform probability, 0 in forced rows.
        forced: bool ``[G, 1]``, rows in which exactly the non-finite pairs have score 1.
    """

    scores: Tensor
    epsilon: Tensor
    forced: Tensor


def guard_nonfinite(scores: Tensor, epsilon: float) -> Guarded:
    """Normalise scores by their row maximum, and make NaN and Inf pairs certain to be selected.

    A row with a NaN or Inf is replaced by the indicator of its non-finite entries, with epsilon 0: if
    there are at most k of them they are all selected, and the product is non-finite where the exact one is.

    Args:
        scores: ``[G, K]`` floating point, non-negative where finite.
        epsilon: share of uniform probability, in [0, 1).
    """
    nonfinite = ~torch.isfinite(scores)
    forced = nonfinite.any(-1, keepdim=True)
    wide = torch.where(forced, nonfinite.double(), scores.double())
    largest = wide.amax(-1, keepdim=True)
    # Dividing by the largest first keeps sums and ratios of extreme scores inside the range of float64.
    normal = wide / torch.where(largest > 0, largest, 1.0)
    return Guarded(normal, torch.where(forced, 0.0, torch.full_like(largest, epsilon)), forced)


def draw_probabilities(scores: Tensor, epsilon: float) -> Tensor:
    """Probabilities of a single draw: (1 - epsilon) s_j / S + epsilon / K.

    Args:
        scores: ``[G, K]`` floating point, non-negative. All zero means uniform.
        epsilon: share of uniform probability, in [0, 1).

    Returns:
        float64 ``[G, K]``, rows sum to 1.

    Source: norm-proportional probabilities minimise the error of column-row sampling (Drineas, Kannan and
    Mahoney 2006; section 2 of Adelman, Levy, Hakimi, Silberstein, NeurIPS 2021).
    """
    safe = guard_nonfinite(scores, epsilon)
    total = safe.scores.sum(-1, keepdim=True)
    uniform = 1.0 / scores.shape[-1]
    p = torch.where(total > 0, safe.scores / torch.where(total > 0, total, 1.0), uniform)
    return (1.0 - safe.epsilon) * p + safe.epsilon * uniform


def water_level(descending: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Count the largest scores that water-filling caps, and sum up the others.

    With R_c the sum of all but the c largest scores, the next score reaches the cap if
    (k - c) s_(c+1) >= R_c; the result is the first c for which it does not, or k - 1. As
    R_(c+1) / (k - c - 1) <= R_c / (k - c) is the same condition, this c also minimises R_c / (k - c). Of several
    such c, as with equal scores, it is the largest.

    Args:
        descending: float64 ``[G, K]``, non-negative, finite, each row sorted from the largest down.
        k: expected sample size, 1 <= k <= K.

    Returns:
        c, int64 ``[G, 1]`` with 0 <= c < k, and R_c, float64 ``[G, 1]``.
    """
    head = torch.arange(k - 1, device=descending.device, dtype=descending.dtype)
    # R_0 .. R_(k-1), added up from the smallest score so that a huge score cannot swallow the tail.
    tails = descending.flip(-1).cumsum(-1).flip(-1)[:, :k]
    reached = (k - head) * descending[:, : k - 1] >= (1.0 - _TIE) * tails[:, : k - 1]
    # `reached` is true for a prefix, up to rounding; the product keeps that prefix only.
    capped = reached.long().cumprod(-1).sum(-1, keepdim=True)
    return capped, tails.gather(-1, capped)


def inclusion_probabilities(scores: Tensor, k: int, epsilon: float) -> Tensor:
    """Inclusion probabilities (1 - epsilon) min(c s_j, 1) + epsilon k / K, with c such that they sum to k.

    Without mixing they minimise sum_j (1 - p_j) / p_j s_j**2 at expected size k. With t pairs capped at 1,
    c = (k - t) / R_t where R_t is the sum of all but the t largest scores; ``water_level`` finds t by one sort.
    With fewer than k non-zero scores those get 1 and the others share what remains uniformly.

    Args:
        scores: ``[G, K]`` floating point, non-negative.
        k: expected sample size, 1 <= k <= K.
        epsilon: share of uniform probability, in [0, 1).

    Returns:
        float64 ``[G, K]`` in [0, 1], rows sum to k.

    Source: Bernoulli-CRS, Adelman, Levy, Hakimi, Silberstein, NeurIPS 2021.
    """
    safe = guard_nonfinite(scores, epsilon)
    s, pairs = safe.scores, scores.shape[-1]
    capped, tail = water_level(s.sort(-1, descending=True).values, k)
    # s / tail before the factor: 1 / tail alone may overflow, and then 0 * inf would be NaN.
    filled = ((k - capped) * (s / torch.where(tail > 0, tail, 1.0))).clamp(max=1.0)
    nonzero = (s > 0).sum(-1, keepdim=True)
    share = (k - nonzero).double() / (pairs - nonzero).clamp(min=1)
    p = torch.where(nonzero >= k, filled, torch.where(s > 0, 1.0, share))
    return (1.0 - safe.epsilon) * p + safe.epsilon * (k / pairs)
