"""Reads a part of a wide value, or writes one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from fx_approx._compat import is_transformed
from fx_approx.ops.gather import channels_last_order, gather, scatter


def take_part(value: Tensor, dim: int, index: Tensor) -> Tensor:
    """The entries ``index`` of ``value`` along ``dim``, as ``torch.index_select`` gives them; keeps channels_last.

    Args:
        value: Any shape.
        dim: The axis.
        index: ``[k]`` int64, unique.
    """
    dim %= value.dim()
    if torch.compiler.is_exporting():
        return torch.index_select(value, dim, index)
    if not _in_plain_operations(value):
        return gather(value, dim, index)
    if channels_last_order(value) is None:
        return torch.index_select(value, dim, index)
    return torch.index_select(value.movedim(dim, -1), -1, index).movedim(-1, dim)


def put_part(part: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    """Zeros with ``part`` at the entries ``index`` along ``dim``; keeps channels_last.

    Args:
        part: Any shape, ``k`` long along ``dim``.
        dim: The axis.
        index: ``[k]`` int64, unique.
        size: How long the result is along ``dim``.
    """
    dim %= part.dim()
    if not _in_plain_operations(part):
        return scatter(part, dim, index, size)
    moved = part if channels_last_order(part) is None else part.movedim(dim, -1)
    axis = dim if moved is part else part.dim() - 1
    made = moved.new_zeros((*moved.shape[:axis], size, *moved.shape[axis + 1 :])).index_copy(axis, index, moved)
    return made if moved is part else made.movedim(-1, dim)


def _in_plain_operations(value: Tensor) -> bool:
    """Whether only operations of torch will do: in exports, under ``torch.func`` and in forward-mode derivatives."""
    if torch.compiler.is_exporting():
        return True
    if torch.compiler.is_compiling():
        return False
    traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return bool(traced) or is_transformed(value) or unpack_dual(value).tangent is not None
