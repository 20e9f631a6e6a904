"""Convolutions in one, two and three dimensions, sampled over the input channels of each group."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_approx.core.candidates import GemmShape
from fx_approx.ops.base import OpKwargs, ProductOp, norm, ones_like_scores, register_op
from fx_approx.ops.conv_gradients import (
    ConvGeometry,
    ConvPairs,
    IntOrTuple,
    each_axis,
    output_size,
    sampled_convolution,
)
from fx_approx.ops.gather import has_channels, select_channels
from fx_approx.ops.gradient_selection import ProductSampling, SamplingKeywords, sampled_op
from fx_approx.sampling.scores import ScoreKind


def _make(exact: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    @sampled_op
    def conv(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: IntOrTuple = 1,
        padding: str | IntOrTuple = 0,
        dilation: IntOrTuple = 1,
        groups: int = 1,
        **keywords: Unpack[SamplingKeywords],
    ) -> Tensor:
        sampling = ProductSampling(**keywords)
        if has_channels(input, weight, groups):
            if sampling.gradients_apart:
                op_kwargs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
                return sampled_convolution(input, weight, bias, op_kwargs, sampling)
            if sampling.selection is not None:
                input, weight = select_channels(input, weight, groups, sampling.selection)
        return exact(input, weight, bias, stride, padding, dilation, groups)

    conv.__name__ = conv.__qualname__ = name
    conv.__doc__ = f"""A {name}, each of whose three products can be computed from a selection (paper, section 2.3).

    Args:
        input: ``[N, C, ...]`` or ``[C, ...]``; channels_last is kept.
        weight: ``[O, C / groups, ...]``.
        bias: ``[O]`` or None; always added in full, its gradient is always exact.
        stride: Steps between output positions, as in ``torch.nn.functional.{name}``.
        padding: Zeros on both sides of each axis, or ``"valid"`` or ``"same"``.
        dilation: Steps between the entries of the kernel.
        groups: Groups of channels; channels are chosen within each group.
        selection: Of the input channels, indices and scale ``[groups, k]``, for the output; None for the exact one.
        grad_input: Of the output channels, ``[groups, k]``, for the gradient of ``input``.
        grad_weight: Of the examples, ``[1, k]``, for the gradient of ``weight``; with
            ``ForwardDrawn(..., positions=True)`` of all output positions of all examples, those of an example one
            behind the other.
        straight_through: Gradients do not follow ``selection``, as if the output were exact.

    Returns:
        As the exact convolution. Unless ``straight_through``, the gradients of ``input`` and ``weight`` are zero
        outside ``selection``.
    """
    return conv


conv1d = _make(F.conv1d, "conv1d")
conv2d = _make(F.conv2d, "conv2d")
conv3d = _make(F.conv3d, "conv3d")


def output_positions(lhs: torch.Size, rhs: torch.Size, op_kwargs: OpKwargs) -> tuple[int, ...]:
    """Spatial size of a convolution's output, from the shapes of input and weight and the call's plain arguments."""
    spatial, padding = len(rhs) - 2, op_kwargs["padding"]
    if padding == "same":
        return tuple(lhs[-spatial:])
    stride, dilation = each_axis(op_kwargs["stride"], spatial), each_axis(op_kwargs["dilation"], spatial)
    padding = each_axis(0 if padding == "valid" else padding, spatial)
    return output_size(lhs, rhs[2:], ConvGeometry(stride, padding, dilation, groups=1))


def _fits(lhs: Tensor, rhs: Tensor, op_kwargs: OpKwargs) -> bool:
    return has_channels(lhs, rhs, op_kwargs["groups"])


def _geometry(lhs: torch.Size, rhs: torch.Size, op_kwargs: OpKwargs) -> GemmShape:
    groups, block = op_kwargs["groups"], math.prod(rhs[2:])
    examples = lhs[0] if len(lhs) == len(rhs) else 1
    positions = math.prod(output_positions(lhs, rhs, op_kwargs))
    return GemmShape(
        m=examples * positions,
        n=rhs[0] // groups,
        k=rhs[1] * block,
        groups=groups,
        block=block,
        row_block=positions,
    )


def _pairs(lhs: Tensor | None, rhs: Tensor, op_kwargs: OpKwargs) -> int:
    return rhs.shape[1]


def _scores(lhs: Tensor | None, rhs: Tensor, kind: ScoreKind, op_kwargs: OpKwargs) -> Tensor:
    """‖X[:,j]‖·‖W[:,j]‖ for input channel j: the paper's proxy for the norm of the pair's convolution."""
    groups, pairs = op_kwargs["groups"], rhs.shape[1]
    scores = ones_like_scores(rhs, groups, pairs)
    if "input" in kind.reads and lhs is not None:
        channel = lhs.dim() - (rhs.dim() - 1)
        scores = scores * norm(lhs, tuple(d for d in range(lhs.dim()) if d != channel)).view(groups, pairs)
    if "weight" in kind.reads:
        scores = scores * norm(rhs.reshape(groups, -1, pairs, math.prod(rhs.shape[2:])), (1, 3))
    return scores


for _exact, _sampled in ((F.conv1d, conv1d), (F.conv2d, conv2d), (F.conv3d, conv3d)):
    register_op(
        ProductOp(
            kind=_sampled.__name__,
            function=_sampled,
            lhs="input",
            rhs="weight",
            targets=(_exact,),
            geometry=_geometry,
            pairs=_pairs,
            scores=_scores,
            fits=_fits,
            roles=ConvPairs(),
            kwarg_names=("stride", "padding", "dilation", "groups"),
            keeps_both=True,
        )
    )
