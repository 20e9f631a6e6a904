"""The linear layer: ``input @ weight.T + bias``, sampled over in-features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_approx.candidate import GemmShape
from fx_approx.ops.base import ProductOp, norm, ones_like_scores, register_op, single
from fx_approx.ops.gather import gather, scaled
from fx_approx.sampling import ScoreKind, Selection


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, selection: Selection | None = None) -> Tensor:
    """A linear layer computed from the in-features of ``selection`` only (paper, section 2).

    Args:
        input: ``[..., K]``.
        weight: ``[n, K]``.
        bias: ``[n]`` or None; always added in full.
        selection: Indices and scale ``[1, k]``, or None for the exact layer.

    Returns:
        ``[..., n]``. The gradients of ``input`` and ``weight`` are zero outside the selection.
    """
    if selection is None:
        return F.linear(input, weight, bias)
    index, scale = single(selection)
    columns = gather(weight, 1, index)
    if scale is not None:
        columns = scaled(columns, scale)
    return F.linear(gather(input, -1, index), columns, bias)


def _geometry(lhs: torch.Size, rhs: torch.Size, static: Mapping[str, Any]) -> GemmShape:
    return GemmShape(m=math.prod(lhs[:-1]), n=math.prod(rhs[:-1]), k=lhs[-1])


def _pairs(lhs: Tensor | None, rhs: Tensor, static: Mapping[str, Any]) -> int:
    return rhs.shape[-1] if rhs.dim() > 1 and (lhs is None or lhs.dim() > 1) else 0


def _scores(lhs: Tensor | None, rhs: Tensor, kind: ScoreKind, static: Mapping[str, Any]) -> Tensor:
    """‖A[:,j]‖·‖B[j,:]‖ (paper, equation for the optimal sampling probabilities)."""
    scores = ones_like_scores(rhs, 1, rhs.shape[-1])
    if kind.reads_lhs and lhs is not None:
        scores = scores * norm(lhs, tuple(range(lhs.dim() - 1)))
    if kind.reads_rhs:
        scores = scores * norm(rhs, tuple(range(rhs.dim() - 1)))
    return scores


LINEAR = register_op(
    ProductOp(
        kind="linear",
        function=linear,
        lhs="input",
        rhs="weight",
        targets=(F.linear,),
        geometry=_geometry,
        pairs=_pairs,
        scores=_scores,
    )
)
