"""TopK-CRS: the k pairs with the largest scores, unscaled."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fx_approx.sampling.base import Sampler, Selection, register_sampler
from fx_approx.sampling.probabilities import guard_nonfinite

__all__ = ["TopK"]


@register_sampler
class TopK(Sampler):
    """Biased, deterministic selection of the k largest scores; equal scores go to the lower index.

    Among fixed unscaled subsets of k pairs it has the least mean squared error when pairs are independent
    with zero mean and the scores are E t_j**2. Ties are broken by index so that data-parallel workers with
    equal scores choose the same subset.

    Source: Adelman, Levy, Hakimi, Silberstein, NeurIPS 2021.
    """

    name: ClassVar[str] = "topk"
    unbiased: ClassVar[bool] = False
    fixed_size: ClassVar[bool] = True
    random: ClassVar[bool] = False
    default_epsilon: ClassVar[float] = 0.0

    def uniforms(self, pairs: int, k: int) -> int:
        """Return 0: nothing is random."""
        return 0

    def _draw(self, scores: Tensor, k: int, uniforms: Tensor, epsilon: float, fixed_shape: bool) -> Selection:
        safe = guard_nonfinite(scores, epsilon).scores
        largest = safe.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        return Selection(largest.sort(-1).values, None)
