"""``torch.einsum`` of two operands, sampled over one contracted label."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fx_approx.candidate import GemmShape
from fx_approx.ops.base import ProductOp, Unsupported, ones_like_scores, register_op, single
from fx_approx.ops.gather import gather, scaled
from fx_approx.sampling import ScoreKind, Selection


@dataclasses.dataclass(frozen=True)
class _Equation:
    """A parsed equation; ``pair`` is the label that is sampled, the contracted label that comes first on the left."""

    lhs: str
    rhs: str
    output: str
    pair: str


def _parse(equation: Any) -> _Equation:
    if not isinstance(equation, str):
        raise Unsupported("einsum in the sublist format")
    if "." in equation:
        raise Unsupported("einsum with an ellipsis")
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    if len(operands) != 2:
        raise Unsupported(f"einsum of {len(operands)} operands, not two")
    lhs, rhs = operands
    if not arrow:
        output = "".join(sorted(c for c in set(lhs + rhs) if (lhs + rhs).count(c) == 1))
    if any(len(set(operand)) < len(operand) for operand in operands):
        raise Unsupported(f"einsum {equation!r} takes a diagonal")
    contracted = [c for c in lhs if c in rhs and c not in output]
    if not contracted:
        raise Unsupported(f"einsum {equation!r} contracts nothing")
    return _Equation(lhs, rhs, output, contracted[0])


def einsum(equation: str, lhs: Tensor, rhs: Tensor, *, selection: Selection | None = None) -> Tensor:
    """``torch.einsum(equation, lhs, rhs)`` from the pairs of ``selection`` only; with None the exact product.

    Args:
        equation: Two operands, no diagonal. With several contracted labels the first of the left operand is sampled.
        lhs: Left operand.
        rhs: Right operand.
        selection: Indices and scale ``[1, k]`` along the sampled label, shared over all other labels.
    """
    if selection is not None:
        parsed = _parse(equation)
        index, scale = single(selection)
        axis = parsed.rhs.index(parsed.pair)
        lhs = gather(lhs, parsed.lhs.index(parsed.pair), index)
        rhs = gather(rhs, axis, index)
        if scale is not None:
            rhs = scaled(rhs, scale.view(-1, *[1] * (rhs.dim() - 1 - axis)))
    return torch.einsum(equation, lhs, rhs)


def _geometry(lhs: torch.Size, rhs: torch.Size, static: Mapping[str, Any]) -> GemmShape:
    """Labels in both operands and the output are batch, in one operand only are rows or columns."""
    parsed = _parse(static["equation"])
    sizes = dict(zip(parsed.lhs, lhs, strict=True)) | dict(zip(parsed.rhs, rhs, strict=True))
    both = set(parsed.lhs) & set(parsed.rhs)

    def size(labels: set[str]) -> int:
        return math.prod(sizes[label] for label in labels)

    summed = both - set(parsed.output)
    block = size(summed - {parsed.pair})
    return GemmShape(
        m=size((set(parsed.lhs) - both) & set(parsed.output)),
        n=size((set(parsed.rhs) - both) & set(parsed.output)),
        k=sizes[parsed.pair] * block,
        batch=size(both - summed),
        block=block,
    )


def _pairs(lhs: Tensor | None, rhs: Tensor, static: Mapping[str, Any]) -> int:
    parsed = _parse(static["equation"])
    return rhs.shape[parsed.rhs.index(parsed.pair)]


def _check(static: Mapping[str, Any]) -> None:
    _parse(static["equation"])


def _scores(lhs: Tensor | None, rhs: Tensor, kind: ScoreKind, static: Mapping[str, Any]) -> Tensor:
    """√(Σ_b ‖A_b,j‖²·‖B_b,j‖²) over the labels b that both operands share and the output keeps."""
    parsed = _parse(static["equation"])
    if not (kind.reads_lhs or kind.reads_rhs):
        return ones_like_scores(rhs, 1, _pairs(lhs, rhs, static))
    shared = "".join(c for c in parsed.lhs if c in parsed.rhs and c in parsed.output)
    kept = shared + parsed.pair
    wide = torch.float64 if rhs.dtype == torch.float64 else torch.float32
    sides = [(parsed.rhs, rhs)] * kind.reads_rhs
    if kind.reads_lhs and lhs is not None:
        sides.append((parsed.lhs, lhs))
    # In float64: squares, and products of squares, leave the range of float32 long before the operands do.
    squares = [torch.einsum(f"{labels}->{kept}", side.double().square()) for labels, side in sides]
    product = math.prod(squares[1:], start=squares[0])
    return product.reshape(-1, product.shape[-1]).sum(0, keepdim=True).sqrt().to(wide)


EINSUM = register_op(
    ProductOp(
        kind="einsum",
        function=einsum,
        lhs="lhs",
        rhs="rhs",
        targets=(torch.einsum,),
        geometry=_geometry,
        pairs=_pairs,
        check=_check,
        scores=_scores,
        static=("equation",),
    )
)
