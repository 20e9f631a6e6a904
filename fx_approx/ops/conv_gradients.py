"""A convolution whose two gradients are sampled each in its own way.

The gradient of the input contracts over the output channels of each group. That of the weight contracts over examples
and output positions: a sample takes whole examples, or single positions of single examples.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_approx.core.candidates import Role
from fx_approx.ops.base import OpKwargs, norm, ones_like_scores
from fx_approx.ops.functorch_guard import refuse_vmap
from fx_approx.ops.gather import flat_indices, gather, scaled, select_channels
from fx_approx.ops.grad_norm_ema import weighted
from fx_approx.ops.gradient_selection import ForwardDrawn, ProductSampling
from fx_approx.ops.sampled_function import (
    amp,
    draw,
    gradients,
    pack,
    refresh_running,
    restore,
    rows_for_backward,
    save,
    unpack,
)
from fx_approx.sampling.base import Selection
from fx_approx.sampling.scores import get_score
from fx_approx.sampling.spec import SamplerConfig

_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_TRANSPOSED = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


IntOrTuple = int | tuple[int, ...]


def each_axis(value: IntOrTuple, axes: int) -> tuple[int, ...]:
    """One number for each spatial axis."""
    if isinstance(value, int):
        return (value,) * axes
    return tuple(value) * (axes if len(value) == 1 else 1)


class ConvGeometry(NamedTuple):
    """The plain arguments of a convolution, one number for each spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def canonical(x: Tensor, w: Tensor, op_kwargs: OpKwargs) -> tuple[Tensor, ConvGeometry]:
    """A batch and numeric arguments for any way to call a convolution; pads beforehand where the sides differ."""
    spatial = w.dim() - 2
    if x.dim() < w.dim():
        x = x.unsqueeze(0)

    dilation, padding = each_axis(op_kwargs["dilation"], spatial), op_kwargs["padding"]
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [gap * (size - 1) for gap, size in zip(dilation, w.shape[2:], strict=True)]
        padding = tuple(both // 2 for both in total)
        if any(both % 2 for both in total):
            sides = [(both // 2, both - both // 2) for both in reversed(total)]
            x, padding = F.pad(x, [side for pair in sides for side in pair]), 0
    return x, ConvGeometry(
        each_axis(op_kwargs["stride"], spatial), each_axis(padding, spatial), dilation, op_kwargs["groups"]
    )


def output_size(x: torch.Size, kernel: torch.Size, geometry: ConvGeometry) -> tuple[int, ...]:
    """Spatial size of the output from an input ``[N, C, ...]`` or ``[C, ...]``."""
    spatial = zip(x[-len(kernel) :], kernel, *geometry[:3], strict=True)
    return tuple(
        (size + 2 * padding - dilation * (width - 1) - 1) // stride + 1
        for size, width, stride, padding, dilation in spatial
    )


def _patches(x: Tensor, kernel: torch.Size, geometry: ConvGeometry, indices: Tensor) -> Tensor:
    """What the output positions ``indices`` read.

    Args:
        x: ``[N, C, ...]``.
        kernel: Sizes of the kernel.
        geometry: The convolution.
        indices: ``[k]`` numbers of output positions, those of an example one behind the other.

    Returns:
        ``[k, prod(kernel), C]``. Its gradient keeps ``indices`` only.
    """
    result: Tensor = _Patches.apply(x, kernel, geometry, indices)  # type: ignore[no-untyped-call]
    return result


class _Patches(torch.autograd.Function):
    """See :func:`_patches`. The gradient adds up where patches overlap."""

    @staticmethod
    def forward(x: Tensor, kernel: torch.Size, geometry: ConvGeometry, indices: Tensor) -> Tensor:
        padded = F.pad(x, _sides(geometry))
        return padded.movedim(1, -1)[_places(x.shape, kernel, geometry, indices)]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.kernel, ctx.geometry, indices = inputs
        ctx.size = x.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return gradients(ctx)
        (indices,) = ctx.saved_tensors
        sides = _sides(ctx.geometry)
        spatial = [n + 2 * amount for n, amount in zip(ctx.size[2:], ctx.geometry.padding, strict=True)]
        padded = grad.new_zeros(ctx.size[0], *spatial, ctx.size[1])
        places = _places(ctx.size, ctx.kernel, ctx.geometry, indices)
        padded = padded.index_put(places, grad, accumulate=True).movedim(-1, 1)
        return gradients(ctx, F.pad(padded, [-side for side in sides]))


def _sides(geometry: ConvGeometry) -> list[int]:
    return [side for amount in reversed(geometry.padding) for side in (amount, amount)]


def _places(size: torch.Size, kernel: torch.Size, geometry: ConvGeometry, indices: Tensor) -> tuple[Tensor, ...]:
    """Example and spatial indices of the padded input that the output positions ``indices`` read, ``[k, kernel]``."""
    sizes = output_size(size, kernel, geometry)
    rest, offsets = indices, torch.arange(math.prod(kernel), device=indices.device)
    places: list[Tensor] = []
    for axis in reversed(range(len(kernel))):
        at = (rest % sizes[axis]) * geometry.stride[axis]
        within = (offsets % kernel[axis]) * geometry.dilation[axis]
        places.insert(0, at.unsqueeze(1) + within)
        rest, offsets = rest // sizes[axis], offsets // kernel[axis]
    return (rest.unsqueeze(1), *places)


def _patch_norms(x: Tensor, kernel: torch.Size, geometry: ConvGeometry) -> Tensor:
    """``[N * positions]`` norms of what each output position reads."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    squares = x.to(wide).square().sum(1, keepdim=True)
    ones = squares.new_ones(1, 1, *kernel)
    sums: Tensor = _CONV[x.dim()](squares, ones, None, geometry.stride, geometry.padding, geometry.dilation)
    return sums.clamp(min=0).sqrt().flatten()


def _beyond(tensor: Tensor, first: int) -> tuple[int, ...]:
    return tuple(range(first, tensor.dim()))


class _Scores(NamedTuple):
    """The factors of a score: of the gradient and of the other operand, each None if it is not read."""

    grad: Tensor | None
    other: Tensor | None

    def product(self, like: Tensor, groups: int, pairs: int) -> Tensor:
        scores = ones_like_scores(like, groups, pairs)
        for factor in self:
            if factor is not None:
                scores = scores * factor.view(groups, pairs)
        return scores


def _channel_scores(grad: Tensor | None, w: Tensor, reads_w: bool, groups: int) -> Tensor:
    """``[groups, O / groups]``: ‖dY[:,o]‖·‖W[o]‖."""
    over = None if grad is None else norm(grad, (0, *_beyond(grad, 2)))
    return _Scores(over, norm(w, _beyond(w, 1)) if reads_w else None).product(w, groups, w.shape[0] // groups)


def _row_scores(
    grad: Tensor | None, x: Tensor, reads_x: bool, kernel: torch.Size, geometry: ConvGeometry, positions: bool
) -> Tensor:
    """``[1, N]``: ‖dY[i]‖·‖X[i]‖, or ``[1, N * positions]`` with the norm of the patch that a position reads."""
    if positions:
        over = None if grad is None else norm(grad, (1,)).flatten()
        factors = _Scores(over, _patch_norms(x, kernel, geometry) if reads_x else None)
        return factors.product(x, 1, x.shape[0] * math.prod(output_size(x.shape, kernel, geometry)))
    over = None if grad is None else norm(grad, _beyond(grad, 1))
    return _Scores(over, norm(x, _beyond(x, 1)) if reads_x else None).product(x, 1, x.shape[0])


@dataclasses.dataclass(frozen=True)
class ConvPairs:
    """The pairs of a convolution's gradients; see :class:`fx_approx.ops.base.RolePairs`."""

    def count(self, role: Role, lhs: Tensor, rhs: Tensor, op_kwargs: OpKwargs, spec: SamplerConfig) -> tuple[int, int]:
        """Groups that choose apart from each other, and the pairs of each."""
        if role is Role.OUTPUT:
            return op_kwargs["groups"], rhs.shape[1]
        if role is Role.GRAD_INPUT:
            return op_kwargs["groups"], rhs.shape[0] // op_kwargs["groups"]
        examples = lhs.shape[0] if lhs.dim() == rhs.dim() else 1
        return 1, examples * (self.positions(lhs, rhs, op_kwargs, spec) if spec.positions else 1)

    def scores(
        self, role: Role, lhs: Tensor, rhs: Tensor, op_kwargs: OpKwargs, spec: SamplerConfig, running: Tensor | None
    ) -> Tensor:
        """Scores ``[groups, pairs]`` for one of the two gradients, without reading the gradient."""
        kind = get_score(spec.scores)
        x, geometry = canonical(lhs, rhs, op_kwargs)
        if role is Role.GRAD_INPUT:
            return _channel_scores(None, rhs, "weight" in kind.reads, geometry.groups)
        scores = _row_scores(None, x, "input" in kind.reads, rhs.shape[2:], geometry, spec.positions)
        return weighted(scores, running)

    def positions(self, lhs: Tensor, rhs: Tensor, op_kwargs: OpKwargs, spec: SamplerConfig) -> int:
        """The output positions of an example, where each is a row."""
        if not spec.positions:
            return 1
        x, geometry = canonical(lhs, rhs, op_kwargs)
        return math.prod(output_size(x.shape, rhs.shape[2:], geometry))


class _Conv(torch.autograd.Function):
    """A convolution with sampled gradients; see :func:`sampled_convolution`."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        x, w, bias, _, output, _, _, (geometry,) = unpack(inputs)
        if output.drawn is not None:
            x, w = select_channels(x, w, geometry.groups, output.drawn)
        result: Tensor = _CONV[w.dim()](x, w, bias, *geometry)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        arguments = unpack(inputs)
        save(ctx, arguments, keep_w=True)
        (ctx.geometry,), ctx.size = arguments.own, arguments.x.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return gradients(ctx)
        refuse_vmap(grad)
        x, w, kept, grad_input, grad_weight = restore(ctx)
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        geometry: ConvGeometry = ctx.geometry
        kernel, positions = w.shape[2:], grad_weight.positions
        grad_x = grad_w = grad_bias = None
        if needs_x:
            chosen = draw(
                grad_input, grad, lambda read, rule: _channel_scores(read, w, rule.reads_operand, geometry.groups)
            )
            grad_x = _grad_input(grad, w, chosen, geometry, ctx.size)
        if needs_w:
            chosen = draw(
                grad_weight,
                grad,
                lambda read, rule: _row_scores(read, x, rule.reads_operand, kernel, geometry, positions),
            )
            refresh_running(grad_weight, grad, 1)
            if chosen is not None and positions:
                patches = x if kept else _patches(x, kernel, geometry, chosen.indices[0])
                grad_w = _grad_weight_at(grad, patches, w.shape, geometry.groups, chosen)
            else:
                grad_w = _grad_weight(grad, x, w, geometry, chosen, kept)
        if needs_bias:
            grad_bias = grad.sum((0, *_beyond(grad, 2)))
        return gradients(ctx, grad_x, grad_w, grad_bias)


def _grad_input(grad: Tensor, w: Tensor, chosen: Selection | None, geometry: ConvGeometry, size: torch.Size) -> Tensor:
    if chosen is not None:
        index = flat_indices(chosen.indices, w.shape[0] // geometry.groups)
        grad, w = gather(grad, 1, index), gather(w, 0, index)
        if chosen.scale is not None:
            w = scaled(w, chosen.scale.reshape(-1, *[1] * (w.dim() - 1)))
    missing = []
    for axis, (stride, padding, dilation) in enumerate(zip(*geometry[:3], strict=True)):
        reached = (grad.shape[2 + axis] - 1) * stride - 2 * padding + dilation * (w.shape[2 + axis] - 1) + 1
        missing.append(size[2 + axis] - reached)
    result: Tensor = _TRANSPOSED[w.dim()](
        grad, w, None, geometry.stride, geometry.padding, missing, geometry.groups, geometry.dilation
    )
    return result


def _grad_weight(
    grad: Tensor, x: Tensor, w: Tensor, geometry: ConvGeometry, chosen: Selection | None, kept: bool
) -> Tensor:
    """From whole examples: all, or those of ``chosen``; ``kept`` says that ``x`` holds the chosen ones only."""
    if chosen is not None:
        index = chosen.indices[0]
        grad = gather(grad, 0, index)
        x = x if kept else gather(x, 0, index)
        if chosen.scale is not None:
            grad = scaled(grad, chosen.scale[0].view(-1, *[1] * (grad.dim() - 1)))
    nowhere = [0] * len(geometry.stride)
    mask = [False, True, False]
    result: Tensor = torch.ops.aten.convolution_backward(
        grad, x, w, None, geometry.stride, geometry.padding, geometry.dilation, False, nowhere, geometry.groups, mask
    )[1]
    return result


def _grad_weight_at(grad: Tensor, patches: Tensor, shape: torch.Size, groups: int, chosen: Selection) -> Tensor:
    """From single positions: ``patches`` is ``[k, prod(kernel), C]``, what those of ``chosen`` read."""
    rows = gather(grad.movedim(1, -1).flatten(0, -2), 0, chosen.indices[0])
    if chosen.scale is not None:
        rows = scaled(rows, chosen.scale[0].unsqueeze(-1))
    k, places = patches.shape[:2]
    left = rows.view(k, groups, -1).permute(1, 2, 0)
    right = patches.view(k, places, groups, -1).permute(2, 0, 1, 3).reshape(groups, k, -1)
    products = (left @ right).view(groups, -1, places, shape[1])
    return products.transpose(2, 3).reshape(shape)


def sampled_convolution(
    x: Tensor, w: Tensor, bias: Tensor | None, op_kwargs: OpKwargs, sampling: ProductSampling
) -> Tensor:
    """A convolution, each of its three products from its own selection.

    If the selection for the gradient of ``w`` was drawn in the forward pass, only what it needs of ``x`` is kept for
    the backward pass: the chosen examples; for single positions the patches they read, if those are smaller than ``x``.

    Args:
        x: ``[N, C, ...]`` or ``[C, ...]``.
        w: ``[O, C / groups, ...]``.
        bias: ``[O]`` or None. It is always added in full, and its gradient is always exact.
        op_kwargs: ``stride``, ``padding``, ``dilation`` and ``groups`` as in torch.
        sampling: Selections: of the input channels ``[groups, k]``, of the output channels ``[groups, k]``, of the
            examples or of the output positions ``[1, k]``.
    """
    batched = x.dim() == w.dim()
    x, w, bias = amp(x, w, bias)
    with torch.autocast(x.device.type, enabled=False):
        if sampling.selection is not None and not sampling.straight_through:
            x, w = select_channels(x, w, op_kwargs["groups"], sampling.selection)
            sampling = sampling._replace(selection=None)
        x, geometry = canonical(x, w, op_kwargs)
        rows = rows_for_backward(w, sampling.grad_weight, lambda made: _kept(x, w.shape, geometry, made))
        result: Tensor = _Conv.apply(*pack(x, w, bias, rows, sampling, geometry))  # type: ignore[no-untyped-call]
        return result if batched else result.squeeze(0)


def _kept(x: Tensor, weight: torch.Size, geometry: ConvGeometry, made: ForwardDrawn) -> Tensor | None:
    """The part of ``x`` that a selection needs, or None if ``x`` is smaller."""
    index = made.selection.indices[0]
    if not made.positions:
        return gather(x, 0, index)
    if index.shape[0] * math.prod(weight[2:]) * x.shape[1] >= x.numel():
        return None
    return _patches(x, weight[2:], geometry, index)
