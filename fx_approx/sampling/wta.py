"""WTA-CRS: the largest pairs are kept for certain, the others are sampled."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fx_approx.sampling.base import Sampler, Selection, register_sampler, select
from fx_approx.sampling.crs import count_draws
from fx_approx.sampling.probabilities import draw_probabilities, inclusion_probabilities, water_level
from fx_approx.sampling.systematic import systematic_draw

__all__ = ["Wta", "WtaUnique"]


@register_sampler
class Wta(Sampler):
    """Unbiased: the c most probable pairs unscaled, and k - c draws with replacement from the others.

    With the draw probabilities p_j of CRS and R_c = 1 - (sum of the c largest), c minimises R_c / (k - c),
    0 <= c < k. A pair of the tail drawn t times is one entry of scale t R_c / ((k - c) p_j); what repeats leave
    over is padded at scale 0, as in CRS. The expected squared error is that of CRS with k - c draws on
    the product of the tail alone, (R_c sum_tail s_j**2 / p_j - ||sum_tail P_j||**2) / (k - c).

    It is never more than that of CRS with k draws from the same p. With n = k - c, q the share of the next
    pair P in the tail, T the sum of the terms behind it and t = ||T||, s = ||P||, keeping that pair lowers the
    error by at least (t sqrt(q / (1 - q)) - s sqrt((1 - q) / q))**2 / n as long as n q >= 1, and the criterion
    stops just where n q < 1. It looks at p alone and so does not find the least error: c = k - 1 is often better.
    Of several c that minimise it the largest is taken, which by the same inequality is the best of them: so k
    non-zero scores are kept exactly, and equal probabilities are all kept or all left to the draws.

    Source: Liu et al., "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language
    Model", NeurIPS 2023.
    """

    name: ClassVar[str] = "wta"
    unbiased: ClassVar[bool] = True
    fixed_size: ClassVar[bool] = True
    random: ClassVar[bool] = True
    default_epsilon: ClassVar[float] = 0.1

    def uniforms(self, pairs: int, k: int) -> int:
        """Return ``k``: one uniform per draw if no pair is kept; of a group that keeps c, the last c are unread."""
        return k

    def _draw(self, scores: Tensor, k: int, uniforms: Tensor, epsilon: float, fixed_shape: bool) -> Selection:
        p = draw_probabilities(scores, epsilon)
        ranked = p.sort(dim=-1, descending=True, stable=True)
        kept, _ = water_level(ranked.values, k)
        places = torch.arange(p.shape[-1], device=p.device).expand_as(p)
        certain = torch.zeros_like(places).scatter(-1, ranked.indices, places) < kept
        tail = torch.where(certain, 0.0, p)
        # The number of draws differs by group but the shape may not: points above 1 draw nothing.
        draws = k - kept
        unread = torch.arange(k, device=p.device) >= draws
        counts = count_draws(tail, torch.where(unread, 2.0, uniforms.double()))
        # A tail of one pair has q = 1 and so scale 1, bitwise. NaN without mass in the tail: nothing reads it.
        q = tail / tail.sum(-1, keepdim=True)
        weights = torch.where(tail > 0, counts / (draws * q), (certain & (p > 0)).double())
        return select(weights, k, scores.dtype)


@register_sampler
class WtaUnique(Sampler):
    """Unbiased: the pairs that ``wta`` keeps, and k - c different ones of the tail by systematic π-ps sampling.

    The inclusion probabilities of the tail are π_j = (k - c) p_j / R_c with the p, c and R_c of ``wta``, the scale
    is 1 / π_j. The c of ``wta`` is the number of pairs that water-filling p caps at 1 (``water_level``), so no π_j of
    the tail exceeds 1, and the whole is one systematic sample with the water-filled p as its π: an interval
    of length 1 is always hit and shifts the others by an integer, which moves none of their hits. At
    epsilon = 0 this is ``systematic`` itself. Mixing tells them apart: here it is p that is mixed, before the
    water-filling, and large pairs stay certain; there it is π, and none does.

    Source: Liu et al., "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language
    Model", NeurIPS 2023, for the kept pairs; see ``Systematic`` for the rest.
    """

    name: ClassVar[str] = "wta_unique"
    unbiased: ClassVar[bool] = True
    fixed_size: ClassVar[bool] = True
    random: ClassVar[bool] = True
    default_epsilon: ClassVar[float] = 0.1

    def uniforms(self, pairs: int, k: int) -> int:
        """Return ``pairs + 1``: the first ``pairs`` order the pairs, the last is the offset."""
        return pairs + 1

    def _draw(self, scores: Tensor, k: int, uniforms: Tensor, epsilon: float, fixed_shape: bool) -> Selection:
        pi = inclusion_probabilities(draw_probabilities(scores, epsilon), k, 0.0)
        return systematic_draw(pi, k, uniforms, scores.dtype)
