"""Functions with parameters for each channel, on the demanded channels only; what a graph calls in their place.

Each has the arguments of the function of ``torch.nn.functional``, and

- ``chosen``: ``[1, k]`` of the channels, of which ``input`` ``[N, k, ...]`` holds those only; None for all;
- ``channels``: how many there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_approx.ops.channel_slices import Slices
from fx_approx.ops.gather import gather
from fx_approx.sampling.base import Selection


def _part(tensor: Tensor | None, chosen: Selection) -> Tensor | None:
    return None if tensor is None else gather(tensor, 0, chosen.indices[0])


def _read(buffer: Tensor | None, chosen: Selection) -> Tensor | None:
    return None if buffer is None else buffer.index_select(0, chosen.indices[0])


def _write(buffer: Tensor | None, part: Tensor | None, chosen: Selection) -> None:
    if buffer is not None and part is not None:
        with torch.no_grad():
            buffer.index_copy_(0, chosen.indices[0], part)


def _with_statistics(
    exact: Callable[..., Tensor],
    chosen: Selection | None,
    input: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *settings: Any,
) -> Tensor:
    """A norm with running statistics; the first of ``settings`` says whether it updates them."""
    if chosen is None:
        return exact(input, mean, variance, weight, bias, *settings)
    own_mean, own_variance = _read(mean, chosen), _read(variance, chosen)
    result = exact(input, own_mean, own_variance, _part(weight, chosen), _part(bias, chosen), *settings)
    if settings[0]:
        _write(mean, own_mean, chosen)
        _write(variance, own_variance, chosen)
    return result


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    chosen: Selection | None,
    channels: int,
) -> Tensor:
    """``F.batch_norm``; the running statistics of the other channels stay as they are."""
    settings = training, momentum, eps
    return _with_statistics(F.batch_norm, chosen, input, running_mean, running_var, weight, bias, *settings)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    chosen: Selection | None,
    channels: int,
) -> Tensor:
    """``F.instance_norm``; the running statistics of the other channels stay as they are."""
    settings = use_input_stats, momentum, eps
    return _with_statistics(F.instance_norm, chosen, input, running_mean, running_var, weight, bias, *settings)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    chosen: Selection | None,
    channels: int,
) -> Tensor:
    """``F.group_norm``; ``chosen`` has whole groups."""
    if chosen is None:
        return F.group_norm(input, num_groups, weight, bias, eps)
    groups = chosen.indices.shape[1] * num_groups // channels
    return F.group_norm(input, groups, _part(weight, chosen), _part(bias, chosen), eps)


def _transposed(exact: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def conv_transpose(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
        *,
        chosen: Selection | None,
        channels: int,
    ) -> Tensor:
        if chosen is not None:
            weight, bias, groups = gather(weight, 0, chosen.indices[0]), _part(bias, chosen), chosen.indices.shape[1]
        return exact(input, weight, bias, stride, padding, output_padding, groups, dilation)

    conv_transpose.__name__ = conv_transpose.__qualname__ = exact.__name__
    conv_transpose.__doc__ = f"``F.{exact.__name__}`` with one kernel for each channel."
    return conv_transpose


def _sliced(exact: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def sliced_conv(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        slices: Slices | None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        if slices is not None:
            weight, bias, groups = slices.weight, slices.bias, slices.groups
        return exact(input, weight, bias, stride, padding, dilation, groups)

    sliced_conv.__name__ = sliced_conv.__qualname__ = f"sliced_{exact.__name__}"
    sliced_conv.__doc__ = f"""``F.{exact.__name__}`` with the slices of its weight and bias, or the whole of it without.

    Args:
        input: ``[N, k, ...]``, the channels that the slices read.
        weight: The whole weight ``[O, C / groups, ...]``.
        bias: The whole bias ``[O]`` or None.
        slices: Of both; see :func:`fx_approx.ops.channel_slices.slice_weights`.
        stride: Steps between output positions.
        padding: Zeros on both sides of each axis, or ``"valid"`` or ``"same"``.
        dilation: Steps between the entries of the kernel.
        groups: Of the whole convolution.
    """
    return sliced_conv


sliced_conv1d = _sliced(F.conv1d)
sliced_conv2d = _sliced(F.conv2d)
sliced_conv3d = _sliced(F.conv3d)

SLICED_CONVOLUTIONS: dict[Any, Callable[..., Tensor]] = {
    F.conv1d: sliced_conv1d,
    F.conv2d: sliced_conv2d,
    F.conv3d: sliced_conv3d,
}
"""Exact convolution -> the same with slices."""

conv_transpose1d = _transposed(F.conv_transpose1d)
conv_transpose2d = _transposed(F.conv_transpose2d)
conv_transpose3d = _transposed(F.conv_transpose3d)

NARROW_CALLS: dict[Any, Callable[..., Tensor]] = {
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.group_norm: group_norm,
    F.conv_transpose1d: conv_transpose1d,
    F.conv_transpose2d: conv_transpose2d,
    F.conv_transpose3d: conv_transpose3d,
}
"""Exact function -> what does the same on some channels."""
