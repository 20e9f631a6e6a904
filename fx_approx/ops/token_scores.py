"""What tokens are chosen by: which of them anyone attends to, and running norms of the gradient by position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fx_approx.sampling.base import Selection

NOT_SEEN = -1000.0
"""An entry of an additive mask from which on a key has no weight, in any dtype."""
_MOMENTUM = 0.9


def attended(mask: Tensor, batch: int, examples: int) -> Tensor:
    """Whether any query of an example may attend to a key; a key for which that is false is padding.

    Args:
        mask: Of ``F.scaled_dot_product_attention``: boolean, True for what is attended to, or added to the products.
        batch: Its axis of the examples, counted from the end; of each it may hold several, one behind the other.
        examples: How many there are.

    Returns:
        Boolean ``[examples, keys]``.
    """
    mask = mask.detach().movedim(batch, 0)
    for axis in range(1, mask.dim() - 1):
        if mask.stride(axis) == 0:  # an axis that was only expanded
            mask = mask.narrow(axis, 0, 1)
    seen = mask if mask.dtype is torch.bool else mask > NOT_SEEN
    return seen.reshape(examples, -1, mask.shape[-1]).any(1)


def learn(running: Tensor, fresh: Tensor, known: Tensor) -> None:
    """Moves running scores toward those of a step, where there are any; a first one is taken as it is.

    Args:
        running: ``[positions]`` float32, changed in place; negative where nothing is known yet.
        fresh: ``[positions]``; what is not finite (an overflow) changes nothing.
        known: Boolean ``[positions]``, where ``fresh`` says something.
    """
    moved = torch.where(running < 0, fresh, _MOMENTUM * running + (1 - _MOMENTUM) * fresh)
    running.copy_(torch.where(known & torch.isfinite(moved), moved, running))


@torch.library.custom_op("fx_approx::learn_positions", mutates_args=("running",))
def learn_positions(running: Tensor, squares: Tensor, index: Tensor) -> None:
    """Running norms by position: the root of the mean over the rows that hold a position.

    Args:
        running: ``[positions]`` float32, changed in place; negative where nothing is known yet.
        squares: ``[rows, k]`` of a gradient; zeros, as of padding, say nothing.
        index: ``[rows, k]``, at which position each stands, none twice in a row; those beyond the end are left out.
    """
    there = (index < running.shape[0]) & (squares > 0)
    index = torch.where(there, index, running.shape[0])
    # Each row apart, and then their sum: several rows in one scatter would be added up in any order.
    spread = squares.new_zeros(2, index.shape[0], running.shape[0] + 1, dtype=torch.float32)
    spread[0].scatter_(1, index, squares.float())
    spread[1].scatter_(1, index, 1.0)
    sums, counts = spread[..., :-1].sum(1)
    learn(running, (sums / counts.clamp(min=1)).sqrt(), counts > 0)


@learn_positions.register_fake
def _(running: Tensor, squares: Tensor, index: Tensor) -> None:
    return None


class _Watch(torch.autograd.Function):
    """A value as it is; its gradient is looked at."""

    @staticmethod
    def forward(value: Tensor, dim: int, start: int, batch: int | None, index: Tensor, running: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        # ``running`` is not among the saved tensors: a second backward pass may find it refreshed.
        _, ctx.dim, ctx.start, ctx.batch, index, ctx.running = inputs
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        squares = grad.detach().narrow(ctx.dim, ctx.start, index.shape[1]).float().square()
        axes = (ctx.dim,) if ctx.batch is None else (ctx.batch, ctx.dim)
        squares = squares.movedim(axes, tuple(range(len(axes))))
        learn_positions(ctx.running, squares.reshape(*index.shape, -1).mean(2), index)
        return grad, None, None, None, None, None


def watch(value: Tensor, dim: int, start: int, batch: int | None, chosen: Selection | None, running: Tensor) -> Tensor:
    """``value``, the gradient of whose chosen tokens will refresh ``running``, see :func:`learn_positions`.

    Args:
        value: What a stretch reads, with the chosen tokens only.
        dim: Their axis.
        start: Where there those begin that were chosen.
        batch: The axis of the examples, where each has tokens of its own.
        chosen: ``[1, k]`` or ``[examples, k]``; None if all are there, and nothing is learnt.
        running: By position, counted as ``chosen`` counts.
    """
    if chosen is None or not (torch.is_grad_enabled() and value.requires_grad):
        return value
    result: Tensor = _Watch.apply(value, dim, start, batch, chosen.indices, running)  # type: ignore[no-untyped-call]
    return result
