"""CRS: column-row sampling with replacement."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fx_approx.sampling.base import Sampler, Selection, register_sampler, select
from fx_approx.sampling.probabilities import draw_probabilities, guard_nonfinite

__all__ = ["Crs", "count_draws"]


def count_draws(weights: Tensor, points: Tensor) -> Tensor:
    """Count how often each pair is drawn, with replacement and with probabilities proportional to weights.

    Args:
        weights: float64 ``[G, K]``, non-negative. A row of zeros draws nothing.
        points: float64 ``[G, n]``, one uniform in (0, 1) per draw; a point above 1 draws nothing.

    Returns:
        int64 ``[G, K]``.
    """
    cdf = weights.cumsum(-1)
    # The last value becomes exactly 1, so that every uniform falls on some pair.
    cdf = cdf / torch.where(cdf[:, -1:] > 0, cdf[:, -1:], 1.0)
    # Draws that fall on pairs 0..j are the points below cdf_j: differences count each pair's draws,
    # deterministically, where adding ones into a histogram would need atomics.
    below = torch.searchsorted(points.sort(-1).values, cdf)
    return below.diff(dim=-1, prepend=torch.zeros_like(below[:, :1]))


@register_sampler
class Crs(Sampler):
    """Unbiased sampling of k pairs with replacement, p_j = (1 - epsilon) s_j / S + epsilon / K.

    A pair drawn c times is one entry of scale c / (k p_j): the sampled product is that of k separate
    draws, but every index occurs once and the shape is always ``[G, k]``; the entries that repeats leave
    over are padded with pairs that were not drawn, at scale 0. With epsilon = 0 and exact scores the
    expected squared error is (S**2 - ||AB||**2) / k. "Uniform CRS" is this sampler on equal scores.

    Source: Drineas, Kannan and Mahoney 2006; Adelman, Levy, Hakimi, Silberstein, NeurIPS 2021.
    """

    name: ClassVar[str] = "crs"
    unbiased: ClassVar[bool] = True
    fixed_size: ClassVar[bool] = True
    random: ClassVar[bool] = True
    default_epsilon: ClassVar[float] = 0.1

    def uniforms(self, pairs: int, k: int) -> int:
        """Return ``k``: one uniform per draw."""
        return k

    def _draw(self, scores: Tensor, k: int, uniforms: Tensor, epsilon: float, fixed_shape: bool) -> Selection:
        p = draw_probabilities(scores, epsilon)
        # k independent draws from the non-finite pairs could miss one of them; an even grid of k points
        # cannot, since each of at most k such pairs owns an interval of length >= 1 / k.
        grid = (torch.arange(k, device=scores.device, dtype=torch.float64) + 0.5) / k
        forced = guard_nonfinite(scores, epsilon).forced
        points = torch.where(forced, grid, uniforms.double())
        # p = 0 cannot be drawn, save by a cumulative sum that rounds unevenly on a parallel device.
        weights = torch.where(p > 0, count_draws(p, points) / (k * p), 0.0)
        return select(weights, k, scores.dtype)
