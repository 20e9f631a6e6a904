"""The linear layer: ``input @ weight.T + bias``, sampled over in-features."""

from __future__ import annotations

import math
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_approx.core.candidates import GemmShape
from fx_approx.ops.base import OpKwargs, ProductOp, norm, ones_like_scores, register_op, single
from fx_approx.ops.gather import gather, scaled
from fx_approx.ops.gradient_selection import ProductSampling, SamplingKeywords, sampled_op
from fx_approx.ops.matmul_gradients import MatrixPairs, product
from fx_approx.sampling.scores import ScoreKind


@sampled_op
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, **keywords: Unpack[SamplingKeywords]) -> Tensor:
    """A linear layer, each of whose three products can be computed from a selection (paper, section 2).

    Args:
        input: ``[..., K]``.
        weight: ``[n, K]``.
        bias: ``[n]`` or None; always added in full, its gradient is always exact.
        selection: Of the in-features, indices and scale ``[1, k]``, for the output; None for the exact one.
        grad_input: Of the out-features, ``[1, k]``, for the gradient of ``input``.
        grad_weight: Of the rows (all axes of ``input`` but the last, flattened), ``[1, k]``, for that of ``weight``.
        straight_through: Gradients do not follow ``selection``, as if the output were exact.

    Returns:
        ``[..., n]``. Unless ``straight_through``, both gradients are zero outside ``selection``.
    """
    sampling = ProductSampling(**keywords)
    if _fits(input, weight, {}):
        if sampling.gradients_apart:
            rows = product(*_view(input, weight, {}), bias, sampling)
            return rows.view(*input.shape[:-1], weight.shape[0])
        if sampling.selection is not None:
            index, scale = single(sampling.selection)
            weight = gather(weight, 1, index)
            weight = weight if scale is None else scaled(weight, scale)
            input = gather(input, -1, index)
    return F.linear(input, weight, bias)


def _view(lhs: Tensor, rhs: Tensor, op_kwargs: OpKwargs) -> tuple[Tensor, Tensor]:
    return lhs.reshape(-1, lhs.shape[-1]), rhs


def _fits(lhs: Tensor, rhs: Tensor, op_kwargs: OpKwargs) -> bool:
    return isinstance(lhs, Tensor) and lhs.dim() > 0 and lhs.shape[-1] == rhs.shape[-1]


def _geometry(lhs: torch.Size, rhs: torch.Size, op_kwargs: OpKwargs) -> GemmShape:
    return GemmShape(m=math.prod(lhs[:-1]), n=math.prod(rhs[:-1]), k=lhs[-1])


def _pairs(lhs: Tensor | None, rhs: Tensor, op_kwargs: OpKwargs) -> int:
    return rhs.shape[-1] if rhs.dim() > 1 and (lhs is None or lhs.dim() > 1) else 0


def _scores(lhs: Tensor | None, rhs: Tensor, kind: ScoreKind, op_kwargs: OpKwargs) -> Tensor:
    """‖A[:,j]‖·‖B[j,:]‖ (paper, equation for the optimal sampling probabilities)."""
    scores = ones_like_scores(rhs, 1, rhs.shape[-1])
    if "input" in kind.reads and lhs is not None:
        scores = scores * norm(lhs, tuple(range(lhs.dim() - 1)))
    if "weight" in kind.reads:
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
        fits=_fits,
        roles=MatrixPairs(_view),
    )
)
