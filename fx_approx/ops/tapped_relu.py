"""A ReLU whose value is read whole and in part: one bit for each entry is kept of it, and not the value."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_approx.ops.gather import channels_last_order, inverse, is_batched, is_opaque, select, together

_GATHER_BITS = 0x0102040810204080
"""Times eight bytes of 0 or 1, as one integer: its highest byte has them as bits."""


class _TappedReLU(torch.autograd.Function):
    @staticmethod
    def forward(source: Tensor, dim: int, index: Tensor, done: bool) -> tuple[Tensor, Tensor, Tensor]:
        whole = source.view_as(source) if done else torch.relu(source)
        return whole, select(whole, dim, index), _signs(whole)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, int, Tensor, bool], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        _, ctx.dim, index, _ = inputs
        whole, _, signs = output
        ctx.size, ctx.order = whole.shape[ctx.dim], channels_last_order(whole) or ()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(signs)
        ctx.save_for_backward(index, signs)

    @staticmethod
    def backward(
        ctx: Any, whole: Tensor | None, part: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        index, signs = ctx.saved_tensors
        total = together(whole, part, ctx.dim, index, ctx.size, ctx.order or None)
        if total is None:
            return None, None, None, None
        positive = signs.to(total.dtype) if signs.dtype is torch.bool else unpack_signs(signs, total, ctx.order)
        if total is whole or torch.is_grad_enabled() or torch.compiler.is_compiling() or is_batched(total):
            return torch.ops.aten.threshold_backward(total, positive, 0), None, None, None
        return torch.ops.aten.threshold_backward.grad_input(total, positive, 0, grad_input=total), None, None, None


def tap_relu(source: Tensor, dim: int, index: Tensor, inplace: bool = False) -> tuple[Tensor, Tensor]:
    """``relu(source)`` and its entries ``index`` along ``dim``; see :func:`fx_approx.ops.gather.tap`.

    A ReLU of its own keeps its result for the backward pass. Here the entries are what a layer keeps of it, and of the
    rest only the signs are needed: one bit each on CPUs, where packing them takes less time than the compiler's loop
    that would write bytes, and one byte on other devices.

    Args:
        source: Any shape.
        dim: The axis.
        index: ``[k]`` int64, unique.
        inplace: The value overwrites ``source``, as in ``F.relu(source, inplace=True)``; compiled code plans memory
            by itself.
    """
    dim %= source.dim()
    inplace = inplace and not torch.compiler.is_compiling()
    if not (torch.is_grad_enabled() and source.requires_grad):
        whole = F.relu(source, inplace)
        return whole, select(whole, dim, index)
    if inplace:
        with torch.no_grad():  # the derivative of this is that of the node below
            source.relu_()
    whole, part, _ = _TappedReLU.apply(source, dim, index, inplace)  # type: ignore[no-untyped-call]
    return whole, part


def _signs(whole: Tensor) -> Tensor:
    if whole.device.type != "cpu" or is_batched(whole):
        return whole.bool()
    return pack_signs(whole)


_LIBRARY = torch.library.Library("fx_approx", "FRAGMENT")
_LIBRARY.define("pack_signs(Tensor values) -> Tensor")
_LIBRARY.define("unpack_signs(Tensor signs, Tensor like, int[] order) -> Tensor")


def pack_signs(values: Tensor) -> Tensor:
    """Which entries of ``values``, none of them negative, are above zero: ``[ceil(numel / 8)]`` uint8, as in memory."""
    if not is_opaque(values):
        return _pack(values)
    result: Tensor = torch.ops.fx_approx.pack_signs(values)
    return result


def unpack_signs(signs: Tensor, like: Tensor, order: Sequence[int]) -> Tensor:
    """The inverse of :func:`pack_signs`, as 0 and 1.

    Args:
        signs: What :func:`pack_signs` made of values of the shape of ``like``.
        like: Gives shape and dtype. As it is a gradient, the compiler cannot unpack in the forward pass already.
        order: The permutation that made the values contiguous; empty if they were.
    """
    if not is_opaque(like):
        return _unpack(signs, like, order)
    result: Tensor = torch.ops.fx_approx.unpack_signs(signs, like, order)
    return result


def _pack(values: Tensor) -> Tensor:
    order = channels_last_order(values)
    dense = values.contiguous() if order is None else values.permute(order)
    positive = dense.bool().view(-1)
    positive = F.pad(positive, (0, -positive.shape[0] % 8)) if positive.shape[0] % 8 else positive
    # In place: every pass over these bytes counts, docs/results.md.
    return positive.view(torch.int64).mul_(_GATHER_BITS).bitwise_right_shift_(56).to(torch.uint8)


def _unpack(signs: Tensor, like: Tensor, order: Sequence[int]) -> Tensor:
    places = torch.arange(8) if sys.byteorder == "little" else torch.arange(7, -1, -1)
    table = ((torch.arange(256).unsqueeze(1) >> places) & 1).to(like.dtype)
    flat = table.index_select(0, signs.to(torch.int32)).view(-1)[: like.numel()]
    if not order:
        return flat.view(like.shape)
    return flat.view([like.shape[axis] for axis in order]).permute(inverse(order))


def _fake_pack(values: Tensor) -> Tensor:
    return values.new_empty((values.numel() + 7) // 8, dtype=torch.uint8)


def _fake_unpack(signs: Tensor, like: Tensor, order: Sequence[int]) -> Tensor:
    if not order:
        return like.new_empty(like.shape)
    return like.new_empty([like.shape[axis] for axis in order]).permute(inverse(order))


for _name, _kernel, _fake in (("pack_signs", _pack, _fake_pack), ("unpack_signs", _unpack, _fake_unpack)):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fx_approx::{_name}", _fake, lib=_LIBRARY)
