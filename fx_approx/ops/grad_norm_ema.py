"""Running norms of a gradient's rows, refreshed in the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

UNKNOWN = -1.0
_MOMENTUM = 0.9


def new_running(positions: int, device: torch.device) -> Tensor:
    """``[positions]`` float32, not known yet."""
    return torch.full((positions,), UNKNOWN, device=device)


def weighted(scores: Tensor, running: Tensor | None) -> Tensor:
    """Scores ``[..., rows]`` times the running norms of their positions, if any are kept.

    Before the first backward pass all positions count the same.
    """
    if running is None:
        return scores
    factors = torch.where(running < 0, 1.0, running).to(scores.dtype)
    products: Tensor = scores.unflatten(-1, (-1, factors.shape[0])) * factors
    return products.flatten(-2)


@torch.library.custom_op("fx_approx::refresh", mutates_args=("running",))
def refresh(running: Tensor, norms: Tensor) -> None:
    """Moves ``running`` toward the norms of this step; the first step's are taken as they are.

    Args:
        running: ``[positions]`` float32, changed in place.
        norms: ``[rows]`` norms of the rows of a gradient, of which row i stands at position i modulo ``positions``.
            Each position gets the root of its mean square; norms that are not finite (an overflow) change nothing.
    """
    squares = norms.float().view(-1, running.shape[0]).square().mean(0).sqrt()
    moved = torch.where(running < 0, squares, _MOMENTUM * running + (1 - _MOMENTUM) * squares)
    running.copy_(torch.where(torch.isfinite(moved), moved, running))


@refresh.register_fake
def _(running: Tensor, norms: Tensor) -> None:
    return None
