"""Reads a part of a wide value: quickly where a step is trained, in torch's own operations where it is exported."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_approx.ops.gather import gather, tap
from fx_approx.ops.tapped_relu import tap_relu


def take_part(value: Tensor, dim: int, index: Tensor) -> Tensor:
    """The entries ``index`` of ``value`` along ``dim``, as ``torch.index_select`` gives them; keeps channels_last.

    ``index_select`` itself makes of a channels_last value a contiguous one, so that all layers behind would work in
    that layout, and its gradient takes atomics.

    Args:
        value: Any shape.
        dim: The axis.
        index: ``[k]`` int64, unique.
    """
    return torch.index_select(value, dim, index) if _plain() else gather(value, dim, index)


def tap_part(value: Tensor, dim: int, index: Tensor) -> tuple[Tensor, Tensor]:
    """``value`` and :func:`take_part` of it, where both are read: their gradients are added in one pass."""
    return (value, torch.index_select(value, dim, index)) if _plain() else tap(value, dim, index)


def tap_part_of_relu(value: Tensor, dim: int, index: Tensor, inplace: bool = False) -> tuple[Tensor, Tensor]:
    """:func:`tap_part` of ``F.relu(value, inplace)``; of the rest of it only the signs are kept for backward."""
    if not _plain():
        return tap_relu(value, dim, index, inplace)
    whole = F.relu(value, inplace)
    return whole, torch.index_select(whole, dim, index)


def _plain() -> bool:
    return torch.compiler.is_exporting() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
