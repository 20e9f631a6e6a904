"""A matrix product whose two gradients are sampled each in its own way.

All matrix products are brought to one form: ``x [m, K]`` times the transpose of ``w [n, K]``, or a batch of such,
``x [b, m, K]`` and ``w [b, n, K]``. The gradient of ``x`` contracts over n (out-features), that of ``w`` over m (rows).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_approx.core.candidates import Role
from fx_approx.ops.base import norm, ones_like_scores
from fx_approx.ops.functorch_guard import refuse_vmap
from fx_approx.ops.gather import scaled
from fx_approx.ops.grad_norm_ema import refresh, weighted
from fx_approx.ops.gradient_selection import (
    BackwardDrawn,
    ForwardDrawn,
    ProductSampling,
    Rule,
    amp,
    draw_late,
    flat,
    for_backward,
    pick,
    spread,
)
from fx_approx.sampling.base import Selection
from fx_approx.sampling.scores import get_score
from fx_approx.sampling.spec import SamplerConfig


def slice_scores(left: Tensor | None, axis: int, right: Tensor | None, like: Tensor, per_batch: bool) -> Tensor:
    """Scores ``[groups, pairs]``, √(Σ_b ‖left_b,j‖²·‖right_b,j‖²), or one group for each b.

    Args:
        left: ``[m, n]`` or ``[b, m, n]`` with the pairs along ``axis`` (-1 or -2), or None if its norms are not read.
        axis: Where the pairs of ``left`` are.
        right: ``[pairs, K]`` or ``[b, pairs, K]``, or None if its norms are not read.
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
    return norm(products.double(), (0,)).unsqueeze(0).to(products.dtype)


def _times(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = F.linear(x, w, bias) if x.dim() == 2 else torch.bmm(x, w.mT)
    return result


def _contract(
    grad: Tensor, axis: int, other: Tensor, indices: Tensor, scale: Tensor | None, kept: bool
) -> tuple[Tensor, Tensor]:
    """The chosen slices of both factors, the smaller one scaled; ``kept`` says that ``other`` holds the chosen only."""
    left = pick(grad, axis, indices)
    right = other if kept else pick(other, -2, indices)
    if scale is not None:
        if left.numel() <= right.numel():
            left = scaled(left, spread(scale, axis))
        else:
            right = scaled(right, spread(scale, -2))
    return left, right


View = Callable[[Tensor, Tensor, Mapping[str, Any]], tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class MatrixPairs:
    """The pairs of an op that is a matrix product: out-features and rows; see :class:`fx_approx.ops.base.RolePairs`.

    Attributes:
        view: ``(lhs, rhs, op_kwargs) -> (x, w)``, the operands in the form of this file.
    """

    view: View

    def count(
        self, role: Role, lhs: Tensor, rhs: Tensor, op_kwargs: Mapping[str, Any], spec: SamplerConfig
    ) -> tuple[int, int]:
        """As the protocol says."""
        x, w = self.view(lhs, rhs, op_kwargs)
        pairs = {Role.OUTPUT: x.shape[-1], Role.GRAD_INPUT: w.shape[-2], Role.GRAD_WEIGHT: x.shape[-2]}[role]
        return (x.shape[0] if spec.per_batch and x.dim() == 3 else 1), pairs

    def scores(
        self,
        role: Role,
        lhs: Tensor,
        rhs: Tensor,
        op_kwargs: Mapping[str, Any],
        spec: SamplerConfig,
        running: Tensor | None,
    ) -> Tensor:
        """As the protocol says."""
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

    def positions(self, lhs: Tensor, rhs: Tensor, op_kwargs: Mapping[str, Any], spec: SamplerConfig) -> int:
        """The second axis of an input ``[batch, positions, features]``."""
        x, _ = self.view(lhs, rhs, op_kwargs)
        return lhs.shape[-2] if lhs.dim() > 2 or x.dim() > 2 else 1


class _Product(torch.autograd.Function):
    """``x @ w.mT + bias`` with sampled gradients; see :func:`product`."""

    @staticmethod
    def forward(
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        out_indices: Tensor | None,
        out_scale: Tensor | None,
        in_indices: Tensor | None,
        in_scale: Tensor | None,
        in_numbers: Tensor | None,
        in_rule: Rule | None,
        w_indices: Tensor | None,
        w_scale: Tensor | None,
        w_numbers: Tensor | None,
        w_rule: Rule | None,
        w_running: Tensor | None,
    ) -> Tensor:
        if out_indices is not None:
            x, w = _sliced(x, w, out_indices, out_scale)
        return _times(x, w, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, _bias, rows, _, _, in_indices, in_scale, in_numbers, ctx.in_rule, *last = inputs
        # Not among the saved tensors: a second backward pass may find it refreshed.
        w_indices, w_scale, w_numbers, ctx.w_rule, ctx.w_running = last
        ctx.set_materialize_grads(False)
        needs_x, needs_w = ctx.needs_input_grad[:2]
        ctx.kept = rows is not None
        ctx.save_for_backward(
            w if needs_x else None,
            *((in_indices, in_scale, in_numbers) if needs_x else (None, None, None)),
            (x if rows is None else rows) if needs_w else None,
            *((w_indices, w_scale, w_numbers) if needs_w else (None, None, None)),
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 15
        refuse_vmap(grad)
        w, in_indices, in_scale, in_numbers, x, w_indices, w_scale, w_numbers = ctx.saved_tensors
        w_running: Tensor | None = ctx.w_running
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad_w = grad_bias = None
        if needs_x:
            left, right = grad, w
            if ctx.in_rule is not None:
                in_indices, in_scale = _drawn(ctx.in_rule, in_numbers, grad, -1, w)
            if in_indices is not None:
                left, right = _contract(grad, -1, w, in_indices, in_scale, False)
            grad_x = left @ right
        if needs_w:
            left, right = grad, x
            if ctx.w_rule is not None:
                w_indices, w_scale = _drawn(ctx.w_rule, w_numbers, grad, -2, x)
            if w_running is not None:
                refresh(w_running, norm(grad.detach(), (-1,)).flatten())
            if w_indices is not None:
                left, right = _contract(grad, -2, x, w_indices, w_scale, ctx.kept)
            grad_w = left.mT @ right
        if needs_bias:
            grad_bias = grad.sum(0)
        return grad_x, grad_w, grad_bias, *(None,) * 12


def _drawn(rule: Rule, numbers: Tensor | None, grad: Tensor, axis: int, other: Tensor) -> Selection:
    with torch.no_grad():
        left = grad if rule.reads_gradient else None
        right = other if rule.reads_operand else None
        return draw_late(rule, numbers, slice_scores(left, axis, right, other, rule.per_batch))


def product(x: Tensor, w: Tensor, bias: Tensor | None, how: ProductSampling) -> Tensor:
    """``x @ w.mT + bias``, each of its three products from its own selection.

    If the selection of the gradient of ``w`` was made in the forward pass, only the chosen rows of ``x`` are kept for
    backward.

    Args:
        x: ``[m, K]`` or ``[b, m, K]``.
        w: ``[n, K]`` or ``[b, n, K]``.
        bias: ``[n]``, or None as for every batch; always added in full, its gradient is always exact.
        how: Selections ``[1, k]``, or ``[b, k]`` for one in each product of a batch: of the K pairs of the output, of
            the n pairs of the gradient of ``x``, of the m pairs of the gradient of ``w``.
    """
    x, w, bias = amp(x, w, bias)
    selection, grad_input, grad_weight, straight_through = how
    with torch.autocast(x.device.type, enabled=False):
        if selection is not None and not straight_through:
            x, w, selection = *_sliced(x, w, *selection), None
        if selection is None and grad_input is None and grad_weight is None:
            return _times(x, w, bias)
        rows = None
        if (
            grad_weight is not None
            and not isinstance(grad_weight, BackwardDrawn)
            and torch.is_grad_enabled()
            and w.requires_grad
        ):
            chosen = grad_weight.selection if isinstance(grad_weight, ForwardDrawn) else grad_weight
            rows = for_backward(lambda: pick(x, -2, chosen.indices))
        out_indices, out_scale = (None, None) if selection is None else selection
        result: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x, w, bias, rows, out_indices, out_scale, *flat(grad_input)[:-1], *flat(grad_weight)
        )
        return result


def _sliced(x: Tensor, w: Tensor, indices: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The chosen columns of both factors, those of ``w`` scaled."""
    columns = pick(w, -1, indices)
    return pick(x, -1, indices), columns if scale is None else scaled(columns, spread(scale, -1))
