"""What every product op tells the passes, and the registry of ops.

An op is one row of the registry. It says how the arguments are named, which two operands are multiplied, the GEMM that
this is, the scores of the column-row pairs, and the function that computes it from selections.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fx_approx.core.candidates import GemmShape, Role
from fx_approx.ops.gather import channels_last_order
from fx_approx.ops.gradient_selection import ProductSampling
from fx_approx.sampling.base import Selection
from fx_approx.sampling.scores import ScoreKind
from fx_approx.sampling.spec import SamplerConfig

SAMPLING_ARGUMENTS = ProductSampling._fields
"""Names of the keyword arguments that the functions of ops take beyond those of the exact call."""

OpKwargs = Mapping[str, Any]
"""The plain arguments of an op, such as stride and padding, by name."""


class Unsupported(ValueError):
    """This use of the op cannot be sampled; the message is the reason shown in plans and reports."""


class ScoreFunction(Protocol):
    """Scores ``[groups, pairs]`` of the pairs of a product; non-negative, float32 (float64 for float64)."""

    def __call__(self, lhs: Tensor | None, rhs: Tensor, kind: ScoreKind, op_kwargs: OpKwargs) -> Tensor:
        """The scores of ``kind`` for these operands."""
        ...


class RolePairs(Protocol):
    """The column-row pairs of the products that contract over something else than the op's own pairs.

    Those are the two gradients, and the output of a batched product whose members choose each for itself.
    """

    def count(self, role: Role, lhs: Tensor, rhs: Tensor, op_kwargs: OpKwargs, spec: SamplerConfig) -> tuple[int, int]:
        """Groups that choose apart from each other, and pairs of each; (1, 0) if they cannot be sampled."""
        ...

    def scores(
        self, role: Role, lhs: Tensor, rhs: Tensor, op_kwargs: OpKwargs, spec: SamplerConfig, running: Tensor | None
    ) -> Tensor:
        """Scores ``[groups, pairs]`` that do not read the gradient, see :class:`fx_approx.sampling.ScoreKind`.

        ``running`` are the norms of the gradient at each position, for scores that learn them.
        """
        ...

    def positions(self, lhs: Tensor, rhs: Tensor, op_kwargs: OpKwargs, spec: SamplerConfig) -> int:
        """How many consecutive rows of the weight gradient's contraction have a running norm of their own."""
        ...


@dataclasses.dataclass(frozen=True)
class ProductOp:
    """One sampled product.

    Attributes:
        kind: Its name in candidates, such as ``"conv2d"``.
        function: ``function(*args, selection=..., grad_input=..., grad_weight=..., straight_through=...)``, the exact
            call's signature plus how each of the three products is sampled; without those it is the exact call.
        lhs: Argument name of the left operand (the activation).
        rhs: Argument name of the right operand (the weight).
        targets: The exact functions that a graph may call.
        methods: The tensor methods that a graph may call.
        kwarg_names: Names of the arguments that are plain values and that ``geometry`` and ``scores`` read.
        geometry: ``(lhs_shape, rhs_shape, op_kwargs) -> GemmShape``; raises :class:`Unsupported`.
        pairs: Pairs per group of two operands (the left one may be None), 0 if they cannot be sampled; plain integers,
            so that it traces.
        scores: Scores of the pairs.
        roles: The same for the gradients.
        keeps_both: Whether autograd keeps both operands whichever of them needs a gradient (one backward function makes
            both gradients), instead of each for the gradient of the other.
        fits: Whether two operands have as many entries to contract over; where not, the exact call is made, which
            raises torch's own error.
        check: Raises :class:`Unsupported` for plain arguments that cannot be sampled whatever the shapes.
    """

    kind: str
    function: Callable[..., Tensor]
    lhs: str
    rhs: str
    targets: tuple[Callable[..., Any], ...]
    geometry: Callable[[torch.Size, torch.Size, OpKwargs], GemmShape]
    pairs: Callable[[Tensor | None, Tensor, OpKwargs], int]
    scores: ScoreFunction
    roles: RolePairs
    check: Callable[[OpKwargs], None] = lambda op_kwargs: None
    fits: Callable[[Tensor, Tensor, OpKwargs], bool] = lambda lhs, rhs, op_kwargs: True
    methods: tuple[str, ...] = ()
    kwarg_names: tuple[str, ...] = ()
    keeps_both: bool = False

    @property
    def signature(self) -> inspect.Signature:
        """The signature of the exact call."""
        full = inspect.signature(self.function)
        return full.replace(parameters=[p for p in full.parameters.values() if p.name not in SAMPLING_ARGUMENTS])

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, defaults filled in; :class:`Unsupported` if they do not fit."""
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise Unsupported(f"called with arguments that are not understood ({error})") from None
        bound.apply_defaults()
        return dict(bound.arguments)


OPS: dict[str, ProductOp] = {}
_BY_TARGET: dict[Any, ProductOp] = {}


def register_op(op: ProductOp) -> ProductOp:
    """Adds ``op`` to the table that the passes read; ValueError if its kind or a target is taken."""
    keys = [*op.targets, *op.methods]
    taken = [str(key) for key in keys if key in _BY_TARGET] + [op.kind] * (op.kind in OPS)
    if taken:
        raise ValueError(f"op: already registered: {', '.join(taken)}")
    OPS[op.kind] = op
    _BY_TARGET.update(dict.fromkeys(keys, op))
    return op


def find_op(target: Any) -> ProductOp | None:
    """The op of a graph node's target (a function, or a method's name), or None."""
    try:
        return _BY_TARGET.get(target)
    except TypeError:  # an unhashable target is nobody's
        return None


_LONG = 32  # entries that lie together, from which on their norms are worth a pass of their own
_STRETCHES = 64  # of the rows of a matrix, whose columns are summed up in two steps


def norm(operand: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Euclidean norms over ``dims``, accumulated in float32, or in float64 for float64 operands.

    On CPUs ``vector_norm`` is slow unless what it reduces lies together in memory: there the norms over the last axes
    come first, or else the squares are added up. Compiled code adds up the columns of a matrix at half the speed of the
    memory, unless it is done in two steps.
    """
    dtype = torch.float64 if operand.dtype == torch.float64 else torch.float32
    columns = operand.dim() > 1 and {axis % operand.dim() for axis in dims} == set(range(operand.dim() - 1))
    if operand.device.type == "cpu" and not torch.compiler.is_compiling():
        count = operand.dim()
        rest, last = [axis % count for axis in dims], count
        order = channels_last_order(operand)
        if order is not None and (1 in rest or set(range(2, count)) <= set(rest)):
            return norm(operand.permute(order), tuple(order.index(axis) for axis in rest))
        while last - 1 in rest:
            last -= 1
            rest.remove(last)
        if math.prod(operand.shape[last:]) == 1 or not operand.is_contiguous():
            return operand.to(dtype).square().sum(dims).sqrt()
        if rest and math.prod(operand.shape[last:]) >= _LONG:
            return norm(torch.linalg.vector_norm(operand, dim=tuple(range(last, count)), dtype=dtype), tuple(rest))
    if operand.device.type == "cpu" and columns and operand.is_contiguous():
        rows = operand.reshape(-1, operand.shape[-1])
        if rows.shape[0] % _STRETCHES == 0:
            squares = rows.to(dtype).square().view(_STRETCHES, -1, rows.shape[1])
            return squares.sum(1).sum(0).sqrt()
    result: Tensor = torch.linalg.vector_norm(operand, dim=dims, dtype=dtype)
    return result


def ones_like_scores(reference: Tensor, groups: int, pairs: int) -> Tensor:
    """Uniform scores ``[groups, pairs]`` on the reference's device."""
    dtype = torch.float64 if reference.dtype == torch.float64 else torch.float32
    return torch.ones(groups, pairs, dtype=dtype, device=reference.device)


def single(selection: Selection) -> tuple[Tensor, Tensor | None]:
    """The indices and scale of a selection with one group."""
    return selection.indices[0], None if selection.scale is None else selection.scale[0]


def op_kwargs_of(module: nn.Module, kind: str) -> dict[str, Any]:
    """The plain arguments of a layer's product that its op names, such as stride and padding."""
    return {name: getattr(module, name) for name in OPS[kind].kwarg_names}
