"""``torch.einsum`` of two operands, sampled over one contracted label."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Unpack

import torch
from torch import Tensor

from fx_approx.core.candidates import GemmShape, Role
from fx_approx.ops.base import OpKwargs, ProductOp, Unsupported, norm, ones_like_scores, register_op, single
from fx_approx.ops.gather import gather, scaled
from fx_approx.ops.gradient_selection import ProductSampling, SamplingKeywords, sampled_op
from fx_approx.ops.matmul_gradients import MatrixPairs, product
from fx_approx.sampling.base import Selection
from fx_approx.sampling.scores import ScoreKind
from fx_approx.sampling.spec import SamplerConfig


@dataclasses.dataclass(frozen=True)
class _Equation:
    """A parsed equation."""

    lhs: str
    rhs: str
    output: str

    @property
    def contracted(self) -> str:
        """Labels of both operands that the output lacks."""
        return "".join(c for c in self.lhs if c in self.rhs and c not in self.output)

    @property
    def pair(self) -> str:
        """The label that is sampled: the contracted one that comes first on the left."""
        return self.contracted[0]

    @property
    def batch(self) -> str:
        """Labels of both operands and the output."""
        return "".join(c for c in self.output if c in self.lhs and c in self.rhs)

    @property
    def rows(self) -> str:
        """Labels of the left operand and the output only."""
        return "".join(c for c in self.lhs if c in self.output and c not in self.rhs)

    @property
    def columns(self) -> str:
        """Labels of the right operand and the output only."""
        return "".join(c for c in self.rhs if c in self.output and c not in self.lhs)


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
    parsed = _Equation(lhs, rhs, output)
    if not parsed.contracted:
        raise Unsupported(f"einsum {equation!r} contracts nothing")
    return parsed


@sampled_op
def einsum(equation: str, lhs: Tensor, rhs: Tensor, **keywords: Unpack[SamplingKeywords]) -> Tensor:
    """``torch.einsum(equation, lhs, rhs)``, each of its three products from its own selection; None is exact.

    Args:
        equation: Two operands, no diagonal. With several contracted labels the first of the left operand is sampled.
        lhs: Left operand.
        rhs: Right operand.
        selection: Indices and scale along the sampled label: ``[1, k]``, shared over all other labels, or ``[b, k]``,
            one for each value of the labels that both operands and the output share.
        grad_input: For the gradient of ``lhs``, likewise of the labels that only ``rhs`` has, flattened.
        grad_weight: For the gradient of ``rhs``, likewise of the labels that only ``lhs`` has, flattened.
        straight_through: Gradients do not follow ``selection``, as if the product were exact.
    """
    sampling = ProductSampling(**keywords)
    selection = sampling.selection
    if sampling.gradients_apart or sampling.per_batch:
        parsed = _parse(equation)
        x, w = _view(lhs, rhs, {"equation": equation})
        if selection is not None:
            block = x.shape[-1] // lhs.shape[parsed.lhs.index(parsed.pair)]
            sampling = sampling._replace(selection=_blocks(selection, block))
        sizes = _sizes(parsed, lhs.shape, rhs.shape)
        labels = parsed.batch + parsed.rows + parsed.columns
        result = product(x, w, None, sampling).reshape([sizes[label] for label in labels])
        return result.permute([labels.index(label) for label in parsed.output])
    if selection is not None:
        parsed = _parse(equation)
        index, scale = single(selection)
        axis = parsed.rhs.index(parsed.pair)
        lhs = gather(lhs, parsed.lhs.index(parsed.pair), index)
        rhs = gather(rhs, axis, index)
        if scale is not None:
            rhs = scaled(rhs, scale.view(-1, *[1] * (rhs.dim() - 1 - axis)))
    return torch.einsum(equation, lhs, rhs)


def _blocks(selection: Selection, block: int) -> Selection:
    """A selection of blocks of ``block`` consecutive entries, as one of entries."""
    if block == 1:
        return selection
    indices, scale = selection
    entries = (indices.unsqueeze(-1) * block + torch.arange(block, device=indices.device)).flatten(-2)
    return Selection(entries, None if scale is None else scale.repeat_interleave(block, -1))


def _view(lhs: Tensor, rhs: Tensor, op_kwargs: OpKwargs) -> tuple[Tensor, Tensor]:
    """``x [m, K]`` and ``w [n, K]``, or ``[b, ...]`` if labels are shared; K has the sampled label first."""
    parsed = _parse(op_kwargs["equation"])

    def matrix(operand: Tensor, labels: str, own: str) -> Tensor:
        wanted = parsed.batch + own + parsed.contracted
        alone = [axis for axis, label in enumerate(labels) if label not in wanted]
        if alone:
            operand = operand.sum(alone)
            labels = "".join(label for label in labels if label in wanted)
        ordered = operand.permute([labels.index(label) for label in wanted])
        sizes = [
            math.prod([ordered.shape[i] for i, label in enumerate(wanted) if label in part])
            for part in (parsed.batch, own, parsed.contracted)
        ]
        return ordered.reshape(sizes if parsed.batch else sizes[1:])

    return matrix(lhs, parsed.lhs, parsed.rows), matrix(rhs, parsed.rhs, parsed.columns)


class _EinsumPairs(MatrixPairs):
    """Entries of the sampled label are pairs of the output, the other contracted labels their block."""

    def count(self, role: Role, lhs: Tensor, rhs: Tensor, op_kwargs: OpKwargs, spec: SamplerConfig) -> tuple[int, int]:
        """Groups that choose apart from each other, and the pairs of each."""
        groups, pairs = super().count(role, lhs, rhs, op_kwargs, spec)
        return groups, _pairs(lhs, rhs, op_kwargs) if role is Role.OUTPUT else pairs

    def positions(self, lhs: Tensor, rhs: Tensor, op_kwargs: OpKwargs, spec: SamplerConfig) -> int:
        """The last of the labels that only ``lhs`` has, if there is another one before it."""
        parsed = _parse(op_kwargs["equation"])
        return lhs.shape[parsed.lhs.index(parsed.rows[-1])] if len(parsed.batch + parsed.rows) > 1 else 1

    def scores(
        self, role: Role, lhs: Tensor, rhs: Tensor, op_kwargs: OpKwargs, spec: SamplerConfig, running: Tensor | None
    ) -> Tensor:
        """Scores ``[groups, pairs]``, without reading the gradient. A block scores √Σ s² of its entries."""
        scores = super().scores(role, lhs, rhs, op_kwargs, spec, running)
        if role is not Role.OUTPUT:
            return scores
        return norm(scores.unflatten(-1, (_pairs(lhs, rhs, op_kwargs), -1)), (-1,))


def _sizes(parsed: _Equation, lhs: torch.Size, rhs: torch.Size) -> dict[str, int]:
    return dict(zip(parsed.lhs, lhs, strict=True)) | dict(zip(parsed.rhs, rhs, strict=True))


def _geometry(lhs: torch.Size, rhs: torch.Size, op_kwargs: OpKwargs) -> GemmShape:
    """Labels in both operands and the output are batch, in one operand only are rows or columns."""
    parsed = _parse(op_kwargs["equation"])
    sizes = _sizes(parsed, lhs, rhs)

    def size(labels: str) -> int:
        return math.prod(sizes[label] for label in labels)

    contracted = size(parsed.contracted)
    return GemmShape(
        m=size(parsed.rows),
        n=size(parsed.columns),
        k=contracted,
        batch=size(parsed.batch),
        block=contracted // sizes[parsed.pair],
    )


def _pairs(lhs: Tensor | None, rhs: Tensor, op_kwargs: OpKwargs) -> int:
    parsed = _parse(op_kwargs["equation"])
    return rhs.shape[parsed.rhs.index(parsed.pair)]


def _check(op_kwargs: OpKwargs) -> None:
    _parse(op_kwargs["equation"])


def _scores(lhs: Tensor | None, rhs: Tensor, kind: ScoreKind, op_kwargs: OpKwargs) -> Tensor:
    """√(Σ_b ‖A_b,j‖²·‖B_b,j‖²) over the labels b that both operands share and the output keeps."""
    parsed = _parse(op_kwargs["equation"])
    if not ({"input", "weight"} & kind.reads):
        return ones_like_scores(rhs, 1, _pairs(lhs, rhs, op_kwargs))
    kept = parsed.batch + parsed.pair
    wide = torch.float64 if rhs.dtype == torch.float64 else torch.float32
    sides = [(parsed.rhs, rhs)] * ("weight" in kind.reads)
    if "input" in kind.reads and lhs is not None:
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
        roles=_EinsumPairs(_view),
        kwarg_names=("equation",),
    )
)
