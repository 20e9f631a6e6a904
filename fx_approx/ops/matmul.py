"""Matrix products of two tensors (matmul, mm, bmm, addmm, baddbmm), sampled over the contracted axis.

Batched products share one selection over the whole batch: the score of pair j is √(Σ_b ‖A_b,j‖²·‖B_b,j‖²).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fx_approx.candidate import GemmShape
from fx_approx.ops.base import ProductOp, Unsupported, norm, ones_like_scores, register_op, single
from fx_approx.ops.gather import gather, scaled
from fx_approx.sampling import ScoreKind, Selection


def _select_pairs(lhs: Tensor, rhs: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """The chosen columns of ``lhs`` and rows of ``rhs``, the rows scaled; all of them if one is sparse."""
    if lhs.layout is not torch.strided or rhs.layout is not torch.strided:
        return lhs, rhs
    index, scale = single(selection)
    rows = gather(rhs, -2, index)
    if scale is not None:
        rows = scaled(rows, scale.unsqueeze(-1))
    return gather(lhs, -1, index), rows


def matmul(input: Tensor, other: Tensor, *, selection: Selection | None = None) -> Tensor:
    """``input @ other`` from the pairs of ``selection`` only; with None the exact product.

    Args:
        input: ``[..., m, K]``; leading dimensions broadcast.
        other: ``[..., K, n]``.
        selection: Indices and scale ``[1, k]``, shared over the batch.

    Returns:
        ``[..., m, n]``.
    """
    if selection is not None:
        input, other = _select_pairs(input, other, selection)
    return torch.matmul(input, other)


def mm(input: Tensor, mat2: Tensor, *, selection: Selection | None = None) -> Tensor:
    """As :func:`matmul` for two matrices ``[m, K]`` and ``[K, n]``."""
    if selection is not None:
        input, mat2 = _select_pairs(input, mat2, selection)
    return torch.mm(input, mat2)


def bmm(input: Tensor, mat2: Tensor, *, selection: Selection | None = None) -> Tensor:
    """As :func:`matmul` for two batches ``[b, m, K]`` and ``[b, K, n]``."""
    if selection is not None:
        input, mat2 = _select_pairs(input, mat2, selection)
    return torch.bmm(input, mat2)


def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, selection: Selection | None = None
) -> Tensor:
    """``beta * input + alpha * (mat1 @ mat2)``, the product from the pairs of ``selection`` only."""
    if selection is not None:
        mat1, mat2 = _select_pairs(mat1, mat2, selection)
    return torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha)


def baddbmm(
    input: Tensor,
    batch1: Tensor,
    batch2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    selection: Selection | None = None,
) -> Tensor:
    """``beta * input + alpha * (batch1 @ batch2)``, the product from the pairs of ``selection`` only."""
    if selection is not None:
        batch1, batch2 = _select_pairs(batch1, batch2, selection)
    return torch.baddbmm(input, batch1, batch2, beta=beta, alpha=alpha)


def _geometry(lhs: torch.Size, rhs: torch.Size, static: Mapping[str, Any]) -> GemmShape:
    if len(lhs) < 2 or len(rhs) < 2:
        raise Unsupported("a product with a vector: bound by memory, nothing to gain")
    batch = math.prod(torch.broadcast_shapes(lhs[:-2], rhs[:-2]))
    return GemmShape(m=lhs[-2], n=rhs[-1], k=lhs[-1], batch=batch)


def _pairs(lhs: Tensor | None, rhs: Tensor, static: Mapping[str, Any]) -> int:
    return rhs.shape[-2] if rhs.dim() > 1 and (lhs is None or lhs.dim() > 1) else 0


def _scores(lhs: Tensor | None, rhs: Tensor, kind: ScoreKind, static: Mapping[str, Any]) -> Tensor:
    if not (kind.reads_lhs or kind.reads_rhs):
        return ones_like_scores(rhs, 1, rhs.shape[-2])
    factors = [norm(lhs, (-2,))] if kind.reads_lhs and lhs is not None else []
    factors += [norm(rhs, (-1,))] if kind.reads_rhs else []
    products = math.prod(factors[1:], start=factors[0])
    if products.dim() == 1:
        return products.unsqueeze(0)
    # In float64: the squares of products of norms leave the range of float32 long before the norms do.
    return norm(products.double(), tuple(range(products.dim() - 1))).unsqueeze(0).to(products.dtype)


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
        )
    )


_register(
    "matmul", matmul, "input", "other", (torch.matmul, torch.linalg.matmul, operator.matmul), ("matmul", "__matmul__")
)
_register("mm", mm, "input", "mat2", (torch.mm,), ("mm",))
_register("bmm", bmm, "input", "mat2", (torch.bmm,), ("bmm",))
_register("addmm", addmm, "mat1", "mat2", (torch.addmm,), ("addmm",))
_register("baddbmm", baddbmm, "batch1", "batch2", (torch.baddbmm,), ("baddbmm",))
