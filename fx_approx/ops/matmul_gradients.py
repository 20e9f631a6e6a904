"""A matrix product whose two gradients are sampled each in its own way.

All matrix products are brought to one form: ``x [m, K]`` times the transpose of ``w [n, K]``, or a batch of such,
``x [b, m, K]`` and ``w [b, n, K]``. The gradient of ``x`` contracts over n (out-features), that of ``w`` over m (rows).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_approx.core.candidates import Role
from fx_approx.ops.base import OpKwargs, norm, ones_like_scores
from fx_approx.ops.functorch_guard import refuse_vmap
from fx_approx.ops.gather import gather, scaled
from fx_approx.ops.grad_norm_ema import weighted
from fx_approx.ops.gradient_selection import ProductSampling, Rule
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


def slice_scores(left: Tensor | None, axis: int, right: Tensor | None, like: Tensor, per_batch: bool) -> Tensor:
    """Scores ``[groups, pairs]``, √(Σ_b ‖left_b,j‖²·‖right_b,j‖²), or one group for each b.

    Args:
        left: ``[..., m, n]`` with the pairs along ``axis`` (-1 or -2), or None if its norms are not read.
        axis: Where the pairs of ``left`` are.
        right: ``[..., pairs, K]``, or None if its norms are not read.
        like: Any tensor of the shape of ``right``.
        per_batch: Whether each product of the batch has scores of its own.
    """
    factors = [] if left is None else [norm(left, (-3 - axis,))]
    if right is not None:
        factors.append(norm(right, (-1,)))
    if not factors:
        return ones_like_scores(like, like.shape[0] if per_batch and like.dim() == 3 else 1, like.shape[-2])
    products = math.prod(factors[1:], start=factors[0])
    if products.dim() == 1:
        return products.unsqueeze(0)
    if per_batch:
        return products
    # In float64: the squares of products of norms leave the range of float32 long before the norms do.
    return norm(products.double(), tuple(range(products.dim() - 1))).unsqueeze(0).to(products.dtype)


def _times(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = F.linear(x, w, bias) if x.dim() == 2 else torch.bmm(x, w.mT)
    return result


def _pick(source: Tensor, dim: int, indices: Tensor) -> Tensor:
    """The entries ``indices`` of ``source`` along ``dim``, differentiable.

    Args:
        source: Any shape if ``indices`` has one group, else ``[groups, ...]``.
        dim: The axis, negative; -1 or -2 if there are several groups.
        indices: ``[groups, k]``, unique in each group.
    """
    if indices.shape[0] == 1:
        return gather(source, dim, indices[0])
    if dim == -1:
        return _pick(source.mT, -2, indices).mT
    return gather(source, -2, indices)


def _times_scale(operand: Tensor, scale: Tensor, dim: int) -> Tensor:
    """``operand`` times a scale ``[groups, k]`` along axis ``dim`` (-1 or -2) of a matrix or a batch."""
    column = scale.unsqueeze(-1) if dim == -2 else scale.unsqueeze(-2)
    return scaled(operand, column[0] if scale.shape[0] == 1 else column)


def _contract(grad: Tensor, axis: int, other: Tensor, chosen: Selection | None, kept: bool) -> tuple[Tensor, Tensor]:
    """The chosen slices of both factors, the smaller one scaled; ``kept`` says that ``other`` holds the chosen only."""
    if chosen is None:
        return grad, other
    left = _pick(grad, axis, chosen.indices)
    right = other if kept else _pick(other, -2, chosen.indices)
    if chosen.scale is not None:
        if left.numel() <= right.numel():
            left = _times_scale(left, chosen.scale, axis)
        else:
            right = _times_scale(right, chosen.scale, -2)
    return left, right


View = Callable[[Tensor, Tensor, OpKwargs], tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class MatrixPairs:
    """The pairs of an op that is a matrix product: out-features and rows; see :class:`fx_approx.ops.base.RolePairs`.

    Attributes:
        view: ``(lhs, rhs, op_kwargs) -> (x, w)``, the operands in the form of this file.
    """

    view: View

    def count(self, role: Role, lhs: Tensor, rhs: Tensor, op_kwargs: OpKwargs, spec: SamplerConfig) -> tuple[int, int]:
        """Groups that choose apart from each other, and the pairs of each."""
        x, w = self.view(lhs, rhs, op_kwargs)
        pairs = {Role.OUTPUT: x.shape[-1], Role.GRAD_INPUT: w.shape[-2], Role.GRAD_WEIGHT: x.shape[-2]}[role]
        return (x.shape[0] if spec.per_batch and x.dim() == 3 else 1), pairs

    def scores(
        self, role: Role, lhs: Tensor, rhs: Tensor, op_kwargs: OpKwargs, spec: SamplerConfig, running: Tensor | None
    ) -> Tensor:
        """Scores ``[groups, pairs]``, without reading the gradient."""
        x, w = self.view(lhs, rhs, op_kwargs)
        kind = get_score(spec.scores)
        read_x, read_w = ("input" in kind.reads, "weight" in kind.reads)
        if role is Role.OUTPUT:
            x, w = x.mT, w.mT
            return slice_scores(x if read_x else None, -2, w if read_w else None, w, spec.per_batch)
        if role is Role.GRAD_INPUT:
            return slice_scores(None, -1, w if read_w else None, w, spec.per_batch)
        scores = slice_scores(None, -2, x if read_x else None, x, spec.per_batch)
        return weighted(scores, running)

    def positions(self, lhs: Tensor, rhs: Tensor, op_kwargs: OpKwargs, spec: SamplerConfig) -> int:
        """The second axis of an input ``[batch, positions, features]``."""
        x, _ = self.view(lhs, rhs, op_kwargs)
        return lhs.shape[-2] if lhs.dim() > 2 or x.dim() > 2 else 1


class _Product(torch.autograd.Function):
    """``x @ w.mT + bias`` with sampled gradients; see :func:`product`."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        x, w, bias, _, output, *_ = unpack(inputs)
        return _times(*_sliced(x, w, output.drawn), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        save(ctx, unpack(inputs))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return gradients(ctx)
        refuse_vmap(grad)
        x, w, kept, grad_input, grad_weight = restore(ctx)
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad_w = grad_bias = None
        if needs_x:
            chosen = draw(grad_input, grad, lambda read, rule: _late_scores(read, -1, w, rule))
            left, right = _contract(grad, -1, w, chosen, False)
            grad_x = left @ right
        if needs_w:
            chosen = draw(grad_weight, grad, lambda read, rule: _late_scores(read, -2, x, rule))
            refresh_running(grad_weight, grad, -1)
            left, right = _contract(grad, -2, x, chosen, kept)
            grad_w = left.mT @ right
        if needs_bias:
            grad_bias = grad.sum(0)
        return gradients(ctx, grad_x, grad_w, grad_bias)


def _late_scores(grad: Tensor | None, axis: int, other: Tensor, rule: Rule) -> Tensor:
    return slice_scores(grad, axis, other if rule.reads_operand else None, other, rule.per_batch)


def product(x: Tensor, w: Tensor, bias: Tensor | None, sampling: ProductSampling) -> Tensor:
    """``x @ w.mT + bias``, each of its three products from its own selection.

    If the selection for the gradient of ``w`` was drawn in the forward pass, only the chosen rows of ``x`` are kept for
    the backward pass.

    Args:
        x: ``[m, K]`` or ``[b, m, K]``.
        w: ``[n, K]`` or ``[b, n, K]``.
        bias: ``[n]``, or None as for every batch. It is always added in full, and its gradient is always exact.
        sampling: Selections ``[1, k]``, or ``[b, k]`` for one in each product of a batch: of the K pairs of the output,
            of the n pairs of the gradient of ``x``, of the m pairs of the gradient of ``w``.
    """
    x, w, bias = amp(x, w, bias)
    with torch.autocast(x.device.type, enabled=False):
        if not sampling.straight_through:
            x, w = _sliced(x, w, sampling.selection)
            sampling = sampling._replace(selection=None)
        if not sampling.gradients_apart:
            return _times(x, w, bias)
        rows = rows_for_backward(w, sampling.grad_weight, lambda made: _pick(x, -2, made.selection.indices))
        result: Tensor = _Product.apply(*pack(x, w, bias, rows, sampling))  # type: ignore[no-untyped-call]
        return result


def _sliced(x: Tensor, w: Tensor, chosen: Selection | None) -> tuple[Tensor, Tensor]:
    """The chosen columns of both factors, those of ``w`` scaled; both as they are without a selection."""
    if chosen is None:
        return x, w
    columns = _pick(w, -1, chosen.indices)
    return _pick(x, -1, chosen.indices), columns if chosen.scale is None else _times_scale(columns, chosen.scale, -1)
