"""Candidates: the nodes of a graph that multiply, with the shape of their product."""

from __future__ import annotations

import dataclasses
import enum
import fnmatch
from collections.abc import Mapping
from typing import Any


class Role(enum.StrEnum):
    """One of the three products of a candidate in a training step."""

    OUTPUT = "output"
    GRAD_INPUT = "grad_input"
    GRAD_WEIGHT = "grad_weight"


class Frontend(enum.StrEnum):
    """How a candidate is reached: as a node of the traced graph, or as a module swapped in place."""

    GRAPH = "graph"
    SWAP = "swap"


Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class GemmShape:
    """The product seen as ``batch * groups`` matrix products of ``[m, k] @ [k, n]``.

    A column-row pair is ``block`` consecutive entries of the contraction: 1 for a matrix product, the
    number of kernel positions for a convolution (whose pairs are input channels).

    Attributes:
        m: Rows (for a convolution: batch size times output positions; summed over repeated calls).
        n: Columns of one group.
        k: Contraction length of one group, ``pairs * block``.
        groups: Groups of a convolution, else 1.
        batch: Independent products of a batched product, else 1.
        block: Contraction entries of one pair.
        row_block: Consecutive rows that a sample of the weight gradient takes together: output positions of one example
            of a convolution, else 1.
    """

    m: int
    n: int
    k: int
    groups: int = 1
    batch: int = 1
    block: int = 1
    row_block: int = 1

    @property
    def pairs(self) -> int:
        """Column-row pairs of one group: what a sampler of the output chooses from."""
        return self.k // self.block

    def role_pairs(self, role: Role, positions: bool = False) -> int:
        """What a sampler of ``role`` chooses from: pairs, columns, or rows (single ones if ``positions``)."""
        rows = self.m if positions else self.m // self.row_block
        return {Role.OUTPUT: self.pairs, Role.GRAD_INPUT: self.n, Role.GRAD_WEIGHT: rows}[role]

    def flops(self, pairs: int | None = None, *, m: int | None = None, n: int | None = None) -> int:
        """Floating-point operations of one role with ``pairs`` pairs, ``m`` rows, ``n`` columns (default: all).

        A multiply-add is two operations, as torch's ``FlopCounterMode`` counts.
        """
        kept = self.pairs if pairs is None else pairs
        rows, columns = self.m if m is None else m, self.n if n is None else n
        return 2 * self.batch * self.groups * rows * columns * kept * self.block


@dataclasses.dataclass(frozen=True)
class RoleFlops:
    """Floating-point operations of one training step of one candidate, by role."""

    output: int = 0
    grad_input: int = 0
    grad_weight: int = 0

    @property
    def total(self) -> int:
        """All three roles together."""
        return self.output + self.grad_input + self.grad_weight

    def __add__(self, other: RoleFlops) -> RoleFlops:
        return RoleFlops(
            self.output + other.output, self.grad_input + other.grad_input, self.grad_weight + other.grad_weight
        )


@dataclasses.dataclass(frozen=True)
class CallShapes:
    """The operands of a product, as far as its time depends on them.

    Attributes:
        lhs: Shape of the left operand.
        rhs: Shape of the right operand.
        op_kwargs: The plain arguments that are not operands, such as ``("stride", (2, 2))``.
        channels_last: The left operand lies in memory with its channels last.
    """

    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    op_kwargs: tuple[tuple[str, Any], ...] = ()
    channels_last: bool = False


@dataclasses.dataclass(frozen=True)
class ProductFacts:
    """What is known of a product once shapes are known.

    Attributes:
        shape: The GEMM shape; None for a blocked multiply that is no single GEMM (LSTM, attention).
        flops: Exact operations of a training step, by role; a role that autograd never runs counts 0.
        dtype: Data type of the left operand, such as ``"torch.float32"``.
        device: Device of the left operand.
        lhs_bytes: Bytes of the left operand.
        rhs_bytes: Bytes of the right operand (a weight).
        lhs_kept: The left operand is kept for backward: the right one needs a gradient (or either, for a convolution).
        rhs_kept: The right operand is kept for backward: the left one needs a gradient (or either, for a convolution).
        rhs_is_parameter: The right operand is a parameter, whose bytes exist anyway.
        call: The operands; None where several calls are counted together, or where there is no single product.
    """

    shape: GemmShape | None
    flops: RoleFlops
    dtype: str
    device: str
    lhs_bytes: int = 0
    rhs_bytes: int = 0
    lhs_kept: bool = False
    rhs_kept: bool = False
    rhs_is_parameter: bool = True
    call: CallShapes | None = None


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A multiply of the model.

    Attributes:
        name: Unique name: ``fqn``, with ``#2``, ``#3`` ... for further calls of the same thing.
        fqn: Fully-qualified name: the module's path, or ``owner.kind`` for a functional call.
        kind: ``linear``, ``conv2d``, ``matmul`` ...
        frontend: Node of the graph, or module swapped inside a part that cannot be traced.
        node: Name of the graph node ("" in a swapped part).
        pairs: Column-row pairs per group, where known.
        groups: Groups of a convolution, else 1.
        first: No other candidate lies between the model's inputs and this one.
        last: No other candidate lies between this one and the model's outputs.
        blocked: Why it must stay exact, or None.
        facts: Shapes and counts, once known.
    """

    name: str
    fqn: str
    kind: str
    frontend: Frontend = Frontend.GRAPH
    node: str = ""
    pairs: int | None = None
    groups: int = 1
    first: bool = False
    last: bool = False
    blocked: str | None = None
    facts: ProductFacts | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What a plan compares to see whether it was made for this model."""
        return {"kind": self.kind, "pairs": self.pairs, "groups": self.groups}


def matches(pattern: str, candidate: Candidate) -> bool:
    """Whether a glob matches the candidate's unique name or its fully-qualified name."""
    return fnmatch.fnmatchcase(candidate.name, pattern) or fnmatch.fnmatchcase(candidate.fqn, pattern)


def with_facts(candidates: tuple[Candidate, ...], facts: Mapping[str, ProductFacts]) -> tuple[Candidate, ...]:
    """The same candidates with ``facts`` (by candidate name) filled in, and ``pairs`` where it was unknown."""
    filled = []
    for candidate in candidates:
        found = facts.get(candidate.name)
        if found is not None:
            pairs = candidate.pairs
            if pairs is None and found.shape is not None:
                pairs = found.shape.pairs
            candidate = dataclasses.replace(candidate, facts=found, pairs=pairs)
        filled.append(candidate)
    return tuple(filled)
