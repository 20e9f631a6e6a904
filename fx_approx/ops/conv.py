"""Convolutions in one, two and three dimensions, sampled over the input channels of each group."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_approx.candidate import GemmShape
from fx_approx.ops.base import ProductOp, norm, ones_like_scores, register_op
from fx_approx.ops.gather import flat_indices, gather, scaled
from fx_approx.sampling import ScoreKind, Selection

IntOrTuple = int | tuple[int, ...]


def select_channels(input: Tensor, weight: Tensor, groups: int, selection: Selection) -> tuple[Tensor, Tensor]:
    """The chosen input channels of ``input`` and ``weight``, each group its own; the scale goes into the weight.

    Args:
        input: ``[N, C, ...]`` or ``[C, ...]``.
        weight: ``[O, C / groups, ...]``.
        groups: Groups of the convolution.
        selection: ``[groups, k]`` positions within each group's ``C / groups`` channels.

    Returns:
        Input with ``groups * k`` channels and weight ``[O, k, ...]``, ready for the same convolution.
    """
    pairs = weight.shape[1]
    index = flat_indices(selection, pairs)
    channels = gather(input, 1 - weight.dim(), index)
    if groups == 1:
        rows = gather(weight, 1, index)
        scale = None if selection.scale is None else selection.scale[0]
        return channels, rows if scale is None else scaled(rows, scale.view(-1, *[1] * (weight.dim() - 2)))
    # [G, O/G, C/G, S] -> [G * C/G, O/G, S], so that one index serves all groups, and back.
    outputs, positions = weight.shape[0] // groups, weight.shape[2:]
    flat = weight.reshape(groups, outputs, pairs, -1).transpose(1, 2).flatten(0, 1)
    rows = gather(flat, 0, index)
    if selection.scale is not None:
        rows = scaled(rows, selection.scale.reshape(-1, 1, 1))
    rows = rows.unflatten(0, (groups, -1)).transpose(1, 2)
    return channels, rows.reshape(groups * outputs, selection.indices.shape[1], *positions)


def _make(exact: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    def conv(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: IntOrTuple = 1,
        padding: str | IntOrTuple = 0,
        dilation: IntOrTuple = 1,
        groups: int = 1,
        *,
        selection: Selection | None = None,
    ) -> Tensor:
        if selection is not None:
            input, weight = select_channels(input, weight, groups, selection)
        return exact(input, weight, bias, stride, padding, dilation, groups)

    conv.__name__ = conv.__qualname__ = name
    conv.__doc__ = f"""A {name} computed from the input channels of ``selection`` only (paper, section 2.3).

    Args:
        input: ``[N, C, ...]`` or ``[C, ...]``; channels_last is kept.
        weight: ``[O, C / groups, ...]``.
        bias: ``[O]`` or None; always added in full.
        stride: As in ``torch.nn.functional.{name}``.
        padding: As there.
        dilation: As there.
        groups: As there; channels are chosen within each group.
        selection: Indices and scale ``[groups, k]``, or None for the exact convolution.

    Returns:
        As the exact convolution. Gradients of ``input`` and ``weight`` are zero outside the selection.
    """
    return conv


conv1d = _make(F.conv1d, "conv1d")
conv2d = _make(F.conv2d, "conv2d")
conv3d = _make(F.conv3d, "conv3d")


def _tuple(value: IntOrTuple, length: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * length
    return tuple(value) * (length if len(value) == 1 else 1)


def output_positions(lhs: torch.Size, rhs: torch.Size, static: Mapping[str, Any]) -> tuple[int, ...]:
    """Spatial size of a convolution's output, from the shapes of input and weight and the call's plain arguments."""
    spatial = len(rhs) - 2
    stride, dilation = _tuple(static["stride"], spatial), _tuple(static["dilation"], spatial)
    padding = static["padding"]
    if padding == "same":
        return tuple(lhs[-spatial:])
    pads = (0,) * spatial if padding == "valid" else _tuple(padding, spatial)
    return tuple(
        (lhs[i - spatial] + 2 * pads[i] - dilation[i] * (rhs[2 + i] - 1) - 1) // stride[i] + 1 for i in range(spatial)
    )


def _geometry(lhs: torch.Size, rhs: torch.Size, static: Mapping[str, Any]) -> GemmShape:
    groups, block = static["groups"], math.prod(rhs[2:])
    examples = lhs[0] if len(lhs) == len(rhs) else 1
    return GemmShape(
        m=examples * math.prod(output_positions(lhs, rhs, static)),
        n=rhs[0] // groups,
        k=rhs[1] * block,
        groups=groups,
        block=block,
    )


def _pairs(lhs: Tensor | None, rhs: Tensor, static: Mapping[str, Any]) -> int:
    return rhs.shape[1]


def _scores(lhs: Tensor | None, rhs: Tensor, kind: ScoreKind, static: Mapping[str, Any]) -> Tensor:
    """‖X[:,j]‖·‖W[:,j]‖ for input channel j: the paper's proxy for the norm of the pair's convolution."""
    groups, pairs = static["groups"], rhs.shape[1]
    scores = ones_like_scores(rhs, groups, pairs)
    if kind.reads_lhs and lhs is not None:
        channel = lhs.dim() - (rhs.dim() - 1)
        scores = scores * norm(lhs, tuple(d for d in range(lhs.dim()) if d != channel)).view(groups, pairs)
    if kind.reads_rhs:
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
            static=("stride", "padding", "dilation", "groups"),
            keeps_both=True,
        )
    )
