"""Reads a part of a wide value: quickly where a step is trained, in torch's own operations where it is exported."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_approx.ops.gather import gather


def take_part(value: Tensor, dim: int, index: Tensor) -> Tensor:
    """The entries ``index`` of ``value`` along ``dim``, as ``torch.index_select`` gives them; keeps channels_last.

    ``index_select`` itself makes of a channels_last value a contiguous one, so that all layers behind would work in
    that layout, and its gradient adds where there is nothing to add to.

    Args:
        value: Any shape.
        dim: The axis.
        index: ``[k]`` int64, unique.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return torch.index_select(value, dim, index)
    return gather(value, dim, index)
