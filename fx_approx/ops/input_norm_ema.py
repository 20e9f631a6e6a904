"""Running norms of a reader's input channels, refreshed on the channels that a step has computed."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_approx._compat import in_backward

_MOMENTUM = 0.9
_FRESH = 0.995


def aged(scores: Tensor, age: Tensor) -> Tensor:
    """Scores that rise toward the largest the longer a unit was not chosen, so that none is left out for good.

    Those that are not finite stay, so that samplers choose them.

    After 138 steps half of the distance is gone, after 920 steps 99 % of it.

    Args:
        scores: ``[units]``.
        age: ``[units]`` steps since each was last chosen.
    """
    weight = 1 - torch.pow(_FRESH, age.to(scores.dtype))
    finite = torch.isfinite(scores)
    most = torch.where(finite, scores, 0).max()
    return torch.where(finite, scores + (most - scores) * weight, scores)


@torch.library.custom_op("fx_approx::observe", mutates_args=("running", "age"))
def observe(running: Tensor, age: Tensor, norms: Tensor, index: Tensor | None, place: int) -> None:
    """Moves running norms toward those of this step; a first norm is taken as it is. Nothing in a recomputation.

    Args:
        running: ``[members, units]`` float32, row ``place`` is changed in place.
        age: ``[units]`` int64: one more for all, 0 for those of ``index``; counted by the first member only.
        norms: ``[k]`` float32; those that are not finite (an overflow) change nothing.
        index: ``[k]`` units that the norms belong to; None for all.
        place: Which member.
    """
    if in_backward():
        return
    row = running[place]
    before = row if index is None else row[index]
    moved = torch.where(before < 0, norms, _MOMENTUM * before + (1 - _MOMENTUM) * norms)
    moved = torch.where(torch.isfinite(moved), moved, before)
    if index is None:
        row.copy_(moved)
    else:
        row.index_copy_(0, index, moved)
    if place == 0:
        age.add_(1)
        if index is None:
            age.zero_()
        else:
            age.index_fill_(0, index, 0)


@observe.register_fake
def _(running: Tensor, age: Tensor, norms: Tensor, index: Tensor | None, place: int) -> None:
    return None
