"""A linear layer on a slice of its weight that is taken again in the backward pass, and not kept until then."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_approx.ops.channel_slices import Slices, check_width
from fx_approx.ops.gather import gather, is_batched, is_opaque, scaled
from fx_approx.ops.sampled_function import gradients


class _SlicedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        whole: Tensor,
        inputs: Tensor | None,
        scale: Tensor | None,
        outputs: Tensor | None,
    ) -> Tensor:
        return F.linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, _, _, *rest = inputs
        ctx.save_for_backward(input, *rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, whole, inputs, scale, outputs = ctx.saved_tensors
        to_input, to_weight, to_bias = ctx.needs_input_grad[:3]
        grad_input = grad_weight = grad_bias = None
        if to_input:
            grad_input = grad @ _slice(whole, inputs, scale, outputs, grad)
        if to_weight:
            grad_weight = grad.t() @ input
        if to_bias:
            grad_bias = grad.sum(0)
        return gradients(ctx, grad_input, grad_weight, grad_bias)


def sliced_linear(input: Tensor, weight: Tensor, bias: Tensor | None, slices: Slices | None) -> Tensor:
    """``input [..., k] @ weight.T + bias`` with the slices, or the whole layer without.

    For the gradient of the input the weight is sliced again, so that no slice is kept for the backward pass. (Under
    autocast it is kept, in the smaller dtype.)

    Args:
        input: ``[..., k]``.
        weight: The whole weight ``[out_features, in_features]``.
        bias: The whole bias ``[out_features]`` or None.
        slices: Of both; see :func:`fx_approx.ops.channel_slices.slice_weights`.

    Raises:
        WidthError: The input has other features than the slice.
    """
    if slices is None:
        return F.linear(input, weight, bias)
    check_width(input, -1, slices.weight.shape[1])
    kept = not (torch.is_grad_enabled() and input.requires_grad)
    if kept or torch.is_autocast_enabled(input.device.type) or is_batched(input):
        return F.linear(input, slices.weight, slices.bias)
    inputs, outputs = (None if chosen is None else chosen.indices[0] for chosen in (slices.inputs, slices.outputs))
    scale = None if slices.inputs is None or slices.inputs.scale is None else slices.inputs.scale[0]
    # By rows: a product of more axes gives a view on CPUs, which no one behind a Function may change in place.
    rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    result: Tensor = _SlicedLinear.apply(  # type: ignore[no-untyped-call]
        rows, slices.weight, slices.bias, weight, inputs, scale, outputs
    )
    return result if input.dim() == 2 else result.view(*input.shape[:-1], result.shape[-1])


def _slice(whole: Tensor, inputs: Tensor | None, scale: Tensor | None, outputs: Tensor | None, after: Tensor) -> Tensor:
    """The slice again, from a gradient on, or the compiler would find that it has it and keep it."""
    result = whole
    for dim, index in ((0, outputs), (1, inputs)):
        if index is not None:
            first = result is whole and is_opaque(whole)
            result = take_again(result, dim, index, after) if first else gather(result, dim, index)
    return result if scale is None else scaled(result, scale)


_LIBRARY = torch.library.Library("fx_approx", "FRAGMENT")
_LIBRARY.define("take_again(Tensor source, int dim, Tensor index, Tensor after) -> Tensor")


def take_again(source: Tensor, dim: int, index: Tensor, after: Tensor) -> Tensor:
    """:func:`fx_approx.ops.gather.take` in the backward pass: ``after`` is a gradient, and not read."""
    result: Tensor = torch.ops.fx_approx.take_again(source, dim, index, after)
    return result


def _take_again(source: Tensor, dim: int, index: Tensor, after: Tensor) -> Tensor:
    result: Tensor = torch.ops.fx_approx.take(source, dim, index)
    return result


_LIBRARY.impl("take_again", _take_again, "CompositeExplicitAutograd")
torch.library.register_fake("fx_approx::take_again", _take_again, lib=_LIBRARY)
