"""Systematic π-ps sampling: unbiased, and exactly k different pairs every time."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fx_approx.sampling.base import Sampler, Selection, register_sampler, select
from fx_approx.sampling.probabilities import inclusion_probabilities

__all__ = ["Systematic", "systematic_draw"]


def systematic_draw(pi: Tensor, k: int, uniforms: Tensor, dtype: torch.dtype) -> Selection:
    """Draw exactly ``k`` different pairs with inclusion probabilities ``pi``; the scale is 1 / π_j.

    Args:
        pi: float64 ``[G, K]`` in [0, 1], rows sum to ``k``.
        k: pairs to draw.
        uniforms: ``[G, K + 1]``: the first K put the pairs in order, the last is the offset.
        dtype: dtype of the scale.
    """
    order = uniforms[:, :-1].argsort(dim=-1, stable=True)
    offset = uniforms[:, -1:].double()
    ends = pi.gather(-1, order).cumsum(-1)
    # Integers up to each end, the same rounded numbers on both sides of every boundary: the
    # differences telescope to k, so neither a gap nor an overlap can arise between neighbours.
    passed = (ends - offset).ceil()
    hit_in_order = passed.diff(dim=-1, prepend=torch.zeros_like(offset)) >= 1
    hit = torch.zeros_like(hit_in_order).scatter(-1, order, hit_in_order)
    # π = 0 cannot be hit, save by a cumulative sum that rounds unevenly on a parallel device.
    weights = torch.where(hit & (pi > 0), 1.0 / pi, 0.0)
    return select(weights, k, dtype)


@register_sampler
class Systematic(Sampler):
    """Unbiased sampling of exactly k different pairs with given inclusion probabilities π_j.

    The pairs are put in random order and laid end to end as intervals of length π_j on [0, k]; the
    pairs on which u, u + 1, ..., u + k - 1 fall are selected, with one uniform u. The scale is 1 / π_j. No
    interval is longer than 1, so none is hit twice. The expected squared error is
    sum_jl (π_jl / (π_j π_l) - 1) <P_j, P_l> with the joint inclusion probabilities π_jl.

    Source: W. G. Madow, "On the theory of systematic sampling, II", 1949; random order as in Hartley and
    Rao 1962; π from the water-filling of Bernoulli-CRS (Adelman et al., NeurIPS 2021).
    """

    name: ClassVar[str] = "systematic"
    unbiased: ClassVar[bool] = True
    fixed_size: ClassVar[bool] = True
    random: ClassVar[bool] = True
    default_epsilon: ClassVar[float] = 0.1

    def uniforms(self, pairs: int, k: int) -> int:
        """Return ``pairs + 1``: the first ``pairs`` order the pairs, the last is the offset."""
        return pairs + 1

    def _draw(self, scores: Tensor, k: int, uniforms: Tensor, epsilon: float, fixed_shape: bool) -> Selection:
        return systematic_draw(inclusion_probabilities(scores, k, epsilon), k, uniforms, scores.dtype)
