"""Taking the chosen channels of a tensor, with a gradient that needs no atomics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fx_approx._compat import is_batched as is_under_vmap
from fx_approx._compat import is_transformed
from fx_approx.sampling.base import Selection

Order = tuple[int, ...] | None
"""What :func:`channels_last_order` gives."""
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _keep_index(ctx: Any, inputs: tuple[Tensor, int, Tensor], output: Any) -> None:
    source, ctx.dim, index = inputs
    ctx.size, ctx.order = source.shape[ctx.dim], channels_last_order(source)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(index)


class _Gather(torch.autograd.Function):
    """``index_select`` whose backward is ``index_copy``: indices are unique, so nothing is accumulated.

    The derivative of ``index_select`` in torch is ``index_add``: atomics, slow and not deterministic
    (pytorch#15245, #41162).
    """

    @staticmethod
    def forward(source: Tensor, dim: int, index: Tensor) -> Tensor:
        return select(source, dim, index)

    setup_context = staticmethod(_keep_index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        (index,) = ctx.saved_tensors
        return _scatter(grad, ctx.dim, index, ctx.size, ctx.order), None, None


def gather(source: Tensor, dim: int, index: Tensor) -> Tensor:
    """The entries ``index`` of ``source`` along ``dim``; keeps channels_last.

    Args:
        source: Any shape and strides; ``[groups, rows, columns]`` for an index of several groups.
        dim: The axis, negative counted from the end; -2 for an index of several groups.
        index: ``[k]`` int64, unique, or ``[groups, k]``, unique in each group.

    Returns:
        ``source`` with ``k`` entries along ``dim``. Its gradient is zero outside ``index``.
    """
    if not (torch.is_grad_enabled() and source.requires_grad):
        return select(source, dim % source.dim(), index)
    result: Tensor = _Gather.apply(source, dim % source.dim(), index)  # type: ignore[no-untyped-call]
    return result


class _Scatter(torch.autograd.Function):
    """The reverse of :class:`_Gather`."""

    @staticmethod
    def forward(part: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
        return _scatter(part, dim, index, size, channels_last_order(part))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, Tensor, int], output: Any) -> None:
        _, ctx.dim, index, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        return None if grad is None else gather(grad, ctx.dim, *ctx.saved_tensors), None, None, None


def scatter(part: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    """Zeros but for ``part`` at the entries ``index`` along ``dim``; keeps channels_last.

    Args:
        part: Any shape, ``k`` long along ``dim``.
        dim: The axis, negative counted from the end.
        index: ``[k]`` int64, unique.
        size: How long the result is along ``dim``.
    """
    result: Tensor = _Scatter.apply(part, dim % part.dim(), index, size)  # type: ignore[no-untyped-call]
    return result


def flat_indices(indices: Tensor, pairs: int) -> Tensor:
    """``[groups * k]`` positions in the flattened ``groups * pairs`` channels, of ``indices [groups, k]``."""
    groups = indices.shape[0]
    if groups == 1:
        return indices[0]
    offsets = torch.arange(groups, device=indices.device).unsqueeze(1) * pairs
    return (indices + offsets).reshape(-1)


def scaled(operand: Tensor, scale: Tensor) -> Tensor:
    """``operand * scale`` in the operand's dtype; the product itself is taken in the wider of the two."""
    return (operand * scale).to(operand.dtype)


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
    index = flat_indices(selection.indices, weight.shape[1])
    return gather(input, 1 - weight.dim(), index), select_weight(weight, groups, selection, index)


def has_channels(input: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether ``input`` has the channels that a convolution by ``weight`` reads."""
    axes = weight.dim() - 1
    return isinstance(input, Tensor) and input.dim() >= axes and input.shape[-axes] == weight.shape[1] * groups


def select_weight(weight: Tensor, groups: int, selection: Selection, index: Tensor | None = None) -> Tensor:
    """The chosen input channels of a weight ``[O, C / groups, ...]``, each group its own, times the scale.

    Args:
        weight: A linear layer's (groups 1) or a convolution's.
        groups: Groups of the convolution.
        selection: ``[groups, k]`` positions within each group's ``C / groups`` channels.
        index: The same among all C channels, ``[groups * k]``, where it is there already.

    Returns:
        ``[O, k, ...]``.
    """
    if groups == 1:
        rows = gather(weight, 1, selection.indices[0])
        scale = None if selection.scale is None else selection.scale[0]
        return rows if scale is None else scaled(rows, scale.view(-1, *[1] * (weight.dim() - 2)))
    # [G, O/G, C/G, S] -> [G * C/G, O/G, S], so that one index serves all groups, and back.
    pairs = weight.shape[1]
    outputs, positions = weight.shape[0] // groups, weight.shape[2:]
    flat = weight.reshape(groups, outputs, pairs, -1).transpose(1, 2).flatten(0, 1)
    rows = gather(flat, 0, flat_indices(selection.indices, pairs) if index is None else index)
    if selection.scale is not None:
        rows = scaled(rows, selection.scale.reshape(-1, 1, 1))
    rows = rows.unflatten(0, (groups, -1)).transpose(1, 2)
    result: Tensor = rows.reshape(groups * outputs, selection.indices.shape[1], *positions)
    return result


def channels_last_order(source: Tensor) -> Order:
    """The permutation that makes a channels_last tensor contiguous, or None for another layout."""
    channels_last = _CHANNELS_LAST.get(source.dim())
    if channels_last is None or is_under_vmap(source) or source.is_contiguous():
        return None
    if not source.is_contiguous(memory_format=channels_last):
        return None
    return (0, *range(2, source.dim()), 1)


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes ``order``."""
    return tuple(order.index(axis) for axis in range(len(order)))


def is_opaque(tensor: Tensor) -> bool:
    """Whether a gather is to stay a call of its own in compiled code.

    On GPUs the compiler makes it part of what reads it. On CPUs the loop that comes of that is not vectorised and takes
    three to five times as long as torch's own kernel (docs/results.md).
    """
    return torch.compiler.is_compiling() and tensor.device.type == "cpu"


def is_batched(tensor: Tensor) -> bool:
    """Whether vmap runs over ``tensor``: it cannot be written into one that it does not run over."""
    if torch.compiler.is_compiling():
        return False
    return is_transformed(tensor)


def select(source: Tensor, dim: int, index: Tensor) -> Tensor:
    """:func:`gather` without a gradient."""
    return take(source, dim, index) if is_opaque(source) else _selected(source, dim, index)


def _scatter(grad: Tensor, dim: int, index: Tensor, size: int, order: Order) -> Tensor:
    """``order`` is that of the value; compiled code follows it.

    There a gradient must not be asked for its own: Dynamo would trace the backward pass anew, with gradients that it
    makes contiguous first, and each convolution behind would bring them back to channels_last.
    """
    if is_opaque(grad):
        return put(grad, dim, index, size)
    if torch.compiler.is_compiling():
        return _spread(grad, dim, index, size, order)
    return _scattered(grad, dim, index, size)


# Defined by hand and not by `custom_op`, whose wrapper takes longer than a small gather.
_LIBRARY = torch.library.Library("fx_approx", "FRAGMENT")
_LIBRARY.define("take(Tensor source, int dim, Tensor index) -> Tensor")
_LIBRARY.define("put(Tensor grad, int dim, Tensor index, SymInt size) -> Tensor")
_LIBRARY.define("add_at(Tensor(a!) total, int dim, Tensor index, Tensor grad) -> ()")


def take(source: Tensor, dim: int, index: Tensor) -> Tensor:
    """The entries ``index`` of ``source`` along ``dim``, as :func:`gather`; opaque for the compiler."""
    result: Tensor = torch.ops.fx_approx.take(source, dim, index)
    return result


def put(grad: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    """The inverse of :func:`take`: zeros but for the entries ``index`` of ``size`` along ``dim``; opaque, too."""
    result: Tensor = torch.ops.fx_approx.put(grad, dim, index, size)
    return result


def add_at(total: Tensor, dim: int, index: Tensor, grad: Tensor) -> None:
    """Adds ``grad`` to the entries ``index`` of ``total`` along ``dim``, in place; indices are unique; opaque, too."""
    torch.ops.fx_approx.add_at(total, dim, index, grad)


def _fake_take(source: Tensor, dim: int, index: Tensor) -> Tensor:
    if index.dim() == 2:
        return source.new_empty(*index.shape, source.shape[2])
    return _empty(source, dim, index.shape[0])


def _fake_put(grad: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    if index.dim() == 2:
        return grad.new_empty(index.shape[0], size, grad.shape[2])
    return _empty(grad, dim, size)


def _fake_add_at(total: Tensor, dim: int, index: Tensor, grad: Tensor) -> None:
    return None


def _add_at(total: Tensor, dim: int, index: Tensor, grad: Tensor) -> None:
    order = channels_last_order(total)
    if order is not None:
        total, grad, dim = total.permute(order), grad.permute(order), order.index(dim)
    total.index_add_(dim, index, grad.to(total.dtype))


def _empty(like: Tensor, dim: int, size: int) -> Tensor:
    """``like`` with another size along ``dim``; contiguous, or channels_last where ``like`` is; no view."""
    shape = [*like.shape[:dim], size, *like.shape[dim + 1 :]]
    layout = torch.contiguous_format if channels_last_order(like) is None else _CHANNELS_LAST[like.dim()]
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


class _Tap(torch.autograd.Function):
    """A value and some of its entries; the gradients come together in one pass over the whole."""

    @staticmethod
    def forward(source: Tensor, dim: int, index: Tensor) -> tuple[Tensor, Tensor]:
        return source.view_as(source), select(source, dim, index)

    setup_context = staticmethod(_keep_index)

    @staticmethod
    def backward(ctx: Any, whole: Tensor | None, part: Tensor | None) -> tuple[Tensor | None, None, None]:
        (index,) = ctx.saved_tensors
        return together(whole, part, ctx.dim, index, ctx.size, ctx.order), None, None


def together(
    whole: Tensor | None, part: Tensor | None, dim: int, index: Tensor, size: int, order: Order
) -> Tensor | None:
    """The gradient of a value, whose layout is ``order``, from those of the whole and of a part; see :func:`tap`."""
    if part is None:
        return whole
    if whole is None:
        return _scatter(part, dim, index, size, order)
    if (
        is_batched(whole)
        or is_batched(part)
        or (torch.is_grad_enabled() and (whole.requires_grad or part.requires_grad))
        or (torch.compiler.is_compiling() and not is_opaque(whole))
    ):
        return whole + _scatter(part, dim, index, size, order)
    total = whole.clone()
    if is_opaque(whole):
        add_at(total, dim, index, part)
    else:
        _add_at(total, dim, index, part)
    return total


def tap(source: Tensor, dim: int, index: Tensor) -> tuple[Tensor, Tensor]:
    """``source`` itself, and its entries ``index`` along ``dim``, for a value that is read both ways.

    As ``source`` and :func:`gather`, but in the backward pass the gradient of the entries is added to that of the
    whole, instead of being written out among zeros first.

    Args:
        source: Any shape.
        dim: The axis.
        index: ``[k]`` int64, unique.
    """
    if not (torch.is_grad_enabled() and source.requires_grad):
        return source, select(source, dim % source.dim(), index)
    result: tuple[Tensor, Tensor] = _Tap.apply(source, dim % source.dim(), index)  # type: ignore[no-untyped-call]
    return result


def _selected(source: Tensor, dim: int, index: Tensor) -> Tensor:
    if index.dim() == 2:
        flat = _rows(source.flatten(0, 1), 0, flat_indices(index, source.shape[1]))
        return flat.view(*index.shape, -1)
    order = channels_last_order(source)
    if _writes_into_memory(source):
        made = _empty(source, dim, index.shape[0])
        if order is None:
            _rows(source, dim, index, made)
        else:
            _rows(source.permute(order), order.index(dim), index, made.permute(order))
        return made
    if order is None:
        return _rows(source, dim, index)
    return _rows(source.permute(order), order.index(dim), index).permute(inverse(order))


def _writes_into_memory(tensor: Tensor) -> bool:
    """Whether a result may be memory of its own that operations with ``out=`` fill.

    Such a result is no view, so that what follows may change it in place without the detour that autograd makes there.
    """
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter) or is_transformed(tensor):
        return False
    return not (torch.is_grad_enabled() and tensor.requires_grad)


def _rows(source: Tensor, dim: int, index: Tensor, out: Tensor | None = None) -> Tensor:
    """``source.index_select(dim, index)`` through whole rows of memory: 2 to 5 times as fast on CPUs."""
    if not source.is_contiguous() or source.numel() == 0:
        return torch.index_select(source, dim, index, out=out)
    outer, size, inner = math.prod(source.shape[:dim]), source.shape[dim], math.prod(source.shape[dim + 1 :])
    shape = (*source.shape[:dim], index.shape[0], *source.shape[dim + 1 :])
    if inner == 1:
        rows = None if out is None else out.view(outer, index.shape[0])
        return _columns(source.reshape(outer, size), index, rows).reshape(shape)
    starts = torch.arange(outer, device=index.device).unsqueeze(1) * size
    rows = None if out is None else out.view(-1, inner)
    found = torch.index_select(source.reshape(outer * size, inner), 0, (starts + index).reshape(-1), out=rows)
    return found.reshape(shape)


def _columns(source: Tensor, index: Tensor, out: Tensor | None) -> Tensor:
    """``[rows, k]`` of ``[rows, columns]``; on CPUs ``gather`` takes 0.3 to 0.9 of the time of ``index_select``."""
    if source.device.type == "cpu":
        return torch.gather(source, 1, index.expand(source.shape[0], -1), out=out)
    return torch.index_select(source, 1, index, out=out)


def _scattered(grad: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    if index.dim() == 2:
        flat = _scattered(grad.flatten(0, 1), 0, flat_indices(index, size), index.shape[0] * size)
        return flat.view(index.shape[0], size, -1)
    order = channels_last_order(grad)
    if _writes_into_memory(grad):
        made = _empty(grad, dim, size).zero_()
        if order is None:
            _write(made, dim, index, grad)
        else:
            _write(made.permute(order), order.index(dim), index, grad.permute(order))
        return made
    if order is not None:
        grad, dim = grad.permute(order), order.index(dim)
    full = grad.new_zeros((*grad.shape[:dim], size, *grad.shape[dim + 1 :])).index_copy(dim, index, grad)
    return full if order is None else full.permute(inverse(order))


def _write(full: Tensor, dim: int, index: Tensor, part: Tensor) -> None:
    """Writes ``part`` at the entries ``index``; along the innermost axis ``scatter_`` is faster for 32 bits or more."""
    if dim == full.dim() - 1 and full.device.type == "cpu" and full.element_size() >= 4:
        full.scatter_(dim, index.expand(part.shape), part)
    else:
        full.index_copy_(dim, index, part)


def _spread(grad: Tensor, dim: int, index: Tensor, size: int, order: Order) -> Tensor:
    """The same read the other way, for compiled code: every entry fetches its gradient, or is zero.

    That is element by element, so the compiler makes it part of whatever reads the result, where a scatter would be a
    pass of its own over the whole tensor.
    """
    if index.dim() == 2:
        flat = _spread(grad.flatten(0, 1), 0, flat_indices(index, size), index.shape[0] * size, None)
        return flat.view(index.shape[0], size, -1)
    if order is not None:
        grad, dim = grad.permute(order), order.index(dim)
    places = torch.zeros(size, dtype=torch.int64, device=index.device)
    places = places.index_copy(0, index, torch.arange(1, index.shape[0] + 1, device=index.device))
    there = (places > 0).view(-1, *[1] * (grad.dim() - 1 - dim))
    full = torch.where(there, grad.index_select(dim, (places - 1).clamp(min=0)), 0)
    return full if order is None else full.permute(inverse(order))


for _name, _kernel, _fake in (
    ("take", _selected, _fake_take),
    ("put", _scattered, _fake_put),
    ("add_at", _add_at, _fake_add_at),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fx_approx::{_name}", _fake, lib=_LIBRARY)
