"""Matrix products of two tensors (matmul, mm, bmm, addmm, baddbmm), sampled over the contracted axis.

Batched products share one selection over the whole batch, where the score of pair j is √(Σ_b ‖A_b,j‖²·‖B_b,j‖²), or
each chooses its own.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor

from fx_approx.core.candidates import GemmShape
from fx_approx.ops.base import OpKwargs, ProductOp, Unsupported, register_op, single
from fx_approx.ops.gather import gather, scaled
from fx_approx.ops.gradient_selection import ProductSampling, SamplingKeywords, sampled_op
from fx_approx.ops.matmul_gradients import MatrixPairs, product, slice_scores
from fx_approx.sampling.scores import ScoreKind


def _multiply(exact: Callable[[Tensor, Tensor], Tensor], lhs: Tensor, rhs: Tensor, sampling: ProductSampling) -> Tensor:
    """``exact(lhs, rhs)``, each of its three products from its own selection; exact if one operand is sparse."""
    strided = lhs.layout is torch.strided and rhs.layout is torch.strided
    if not strided or not _fits(lhs, rhs, {}):
        return exact(lhs, rhs)
    if sampling.gradients_apart or sampling.per_batch:
        result = product(*_view(lhs, rhs, {}), None, sampling)
        lead = torch.broadcast_shapes(lhs.shape[:-2], rhs.shape[:-2])
        return result.view(*lead, lhs.shape[-2], rhs.shape[-1])
    if sampling.selection is not None:
        index, scale = single(sampling.selection)
        rhs = gather(rhs, -2, index)
        if scale is not None:
            rhs = scaled(rhs, scale.unsqueeze(-1))
        lhs = gather(lhs, -1, index)
    return exact(lhs, rhs)


def _fits(lhs: Tensor, rhs: Tensor, op_kwargs: OpKwargs) -> bool:
    return lhs.dim() < 2 or rhs.dim() < 2 or lhs.shape[-1] == rhs.shape[-2]


def _view(lhs: Tensor, rhs: Tensor, op_kwargs: OpKwargs) -> tuple[Tensor, Tensor]:
    """``x [m, K]`` and ``w [n, K]`` if the right operand is one matrix, else batches of such."""
    if rhs.dim() == 2:
        return lhs.reshape(-1, lhs.shape[-1]), rhs.mT
    lead = torch.broadcast_shapes(lhs.shape[:-2], rhs.shape[:-2])
    x = lhs.expand(*lead, *lhs.shape[-2:]).reshape(-1, *lhs.shape[-2:])
    w = rhs.mT.expand(*lead, rhs.shape[-1], rhs.shape[-2]).reshape(-1, rhs.shape[-1], rhs.shape[-2])
    return x, w


@sampled_op
def matmul(input: Tensor, other: Tensor, **keywords: Unpack[SamplingKeywords]) -> Tensor:
    """``input @ other``, each of its three products from its own selection; with None the exact product.

    Args:
        input: ``[..., m, K]``; leading dimensions broadcast.
        other: ``[..., K, n]``. The gradient of this right operand is the product called GRAD_WEIGHT.
        selection: Of the K pairs, indices and scale ``[1, k]``, shared over the batch, or ``[b, k]`` (b: all leading
            dimensions, broadcast and flattened), each product of the batch its own.
        grad_input: Of the n columns, likewise, for the gradient of ``input``.
        grad_weight: Of the m rows, likewise, for the gradient of ``other``. If ``other`` is one matrix, the rows are
            all axes of ``input`` but the last, flattened.
        straight_through: Gradients do not follow ``selection``, as if the product were exact.

    Returns:
        ``[..., m, n]``.
    """
    return _multiply(torch.matmul, input, other, ProductSampling(**keywords))


@sampled_op
def mm(input: Tensor, mat2: Tensor, **keywords: Unpack[SamplingKeywords]) -> Tensor:
    """As :func:`matmul` for two matrices ``[m, K]`` and ``[K, n]``."""
    return _multiply(torch.mm, input, mat2, ProductSampling(**keywords))


@sampled_op
def bmm(input: Tensor, mat2: Tensor, **keywords: Unpack[SamplingKeywords]) -> Tensor:
    """As :func:`matmul` for two batches ``[b, m, K]`` and ``[b, K, n]``."""
    return _multiply(torch.bmm, input, mat2, ProductSampling(**keywords))


@sampled_op
def addmm(
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    **keywords: Unpack[SamplingKeywords],
) -> Tensor:
    """``beta * input + alpha * (mat1 @ mat2)``, the product as :func:`mm`; the gradient of ``input`` is exact."""
    return _multiply_and_add(torch.mm, torch.addmm, input, mat1, mat2, beta, alpha, ProductSampling(**keywords))


@sampled_op
def baddbmm(
    input: Tensor,
    batch1: Tensor,
    batch2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    **keywords: Unpack[SamplingKeywords],
) -> Tensor:
    """``beta * input + alpha * (batch1 @ batch2)``, the product as :func:`bmm`; the gradient of ``input`` is exact."""
    return _multiply_and_add(torch.bmm, torch.baddbmm, input, batch1, batch2, beta, alpha, ProductSampling(**keywords))


def _multiply_and_add(
    multiply: Callable[[Tensor, Tensor], Tensor],
    fused: Callable[..., Tensor],
    input: Tensor,
    lhs: Tensor,
    rhs: Tensor,
    beta: float,
    alpha: float,
    sampling: ProductSampling,
) -> Tensor:
    """``beta * input + alpha * multiply(lhs, rhs)``, by ``fused`` where the product is one exact call on slices.

    Otherwise the sum is in the product's dtype, and a ``beta`` of 0 ignores ``input``, NaN and all.
    """
    if not (sampling.gradients_apart or sampling.per_batch):
        return _multiply(lambda x, w: fused(input, x, w, beta=beta, alpha=alpha), lhs, rhs, sampling)
    total = _multiply(multiply, lhs, rhs, sampling)
    total = total if alpha == 1 else alpha * total
    if beta == 0:
        return total
    return total + (input if beta == 1 else beta * input).to(total.dtype)


def _geometry(lhs: torch.Size, rhs: torch.Size, op_kwargs: OpKwargs) -> GemmShape:
    if len(lhs) < 2 or len(rhs) < 2:
        raise Unsupported("a product with a vector: bound by memory, nothing to gain")
    if len(rhs) == 2:
        return GemmShape(m=math.prod(lhs[:-1]), n=rhs[-1], k=lhs[-1])
    batch = math.prod(torch.broadcast_shapes(lhs[:-2], rhs[:-2]))
    return GemmShape(m=lhs[-2], n=rhs[-1], k=lhs[-1], batch=batch)


def _pairs(lhs: Tensor | None, rhs: Tensor, op_kwargs: OpKwargs) -> int:
    return rhs.shape[-2] if rhs.dim() > 1 and (lhs is None or lhs.dim() > 1) else 0


def _scores(lhs: Tensor | None, rhs: Tensor, kind: ScoreKind, op_kwargs: OpKwargs) -> Tensor:
    left = lhs if "input" in kind.reads else None
    return slice_scores(left, -1, rhs if "weight" in kind.reads else None, rhs, per_batch=False)


def _register(kind: str, function: Any, lhs: str, rhs: str, targets: tuple[Any, ...], methods: tuple[str, ...]) -> None:
    register_op(
        ProductOp(
            kind=kind,
            function=function,
            lhs=lhs,
            rhs=rhs,
            targets=targets,
            methods=methods,
            geometry=_geometry,
            pairs=_pairs,
            scores=_scores,
            fits=_fits,
            roles=MatrixPairs(_view),
        )
    )


_register(
    "matmul", matmul, "input", "other", (torch.matmul, torch.linalg.matmul, operator.matmul), ("matmul", "__matmul__")
)
_register("mm", mm, "input", "mat2", (torch.mm,), ("mm",))
_register("bmm", bmm, "input", "mat2", (torch.bmm,), ("bmm",))
_register("addmm", addmm, "mat1", "mat2", (torch.addmm,), ("addmm",))
_register("baddbmm", baddbmm, "batch1", "batch2", (torch.baddbmm,), ("baddbmm",))
