"""The three products of a row of the table, each sampled in its own way, with slow, independent oracles.

A sampled output is the exact product with its pairs multiplied by the scales of the sample, zero outside it. A gradient
is linear in the gradient of the output, every entry of which belongs to one pair: an out-feature or output channel for
the gradient of the left operand, a row, an example or an output position for that of the right one. So a sampled
gradient is what autograd makes, in float64, of the exact product and a gradient of the output multiplied by the scales.
Nothing in this file calls the code under test, save to look up a registered function.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fx_approx.core.candidates import Role
from fx_approx.ops import ForwardDrawn
from fx_approx.sampling import Selection
from tests.families import (
    OP_CASES,
    OpCase,
    Operands,
    conv_case,
    dense,
    einsum_case,
    linear_case,
    pairwise,
    product_case,
    some_selection,
)

#: torch says so, once, of ``padding="same"`` with a kernel of even size.
EVEN = "ignore:Using padding='same' with even kernel lengths"

#: Rows that matter to gradients only.
MORE: tuple[OpCase, ...] = (
    linear_case("linear-wide", (2, 3, 2), (5, 2)),
    # Three zeros in all, so one more behind than before.
    conv_case("conv1d-same-even", (2, 3, 6), (4, 3, 4), padding="same"),
    conv_case("conv2d-same-even-grouped", (2, 4, 4, 5), (4, 2, 2, 3), padding="same", groups=2, dilation=(1, 2)),
    conv_case("conv3d-same-even-unbatched", (3, 2, 3, 4), (4, 3, 2, 1, 4), padding="same", bias=False),
    # The last row and the last two columns are read by no output position.
    conv_case("conv2d-left-over", (3, 3, 6, 7), (4, 3, 2, 2), stride=3, padding=(0, 0)),
    conv_case("conv2d-one-number", (3, 2, 5, 4), (4, 2, 2, 3), stride=(2,), padding=(1,), dilation=(1,)),
    conv_case("conv2d-depthwise", (3, 2, 4, 4), (6, 1, 3, 3), groups=2, padding=1, dilation=(1, 2)),
    conv_case("conv3d-unbatched-grouped", (4, 3, 4, 3), (4, 2, 2, 2, 1), groups=2, stride=(2, 1, 2), padding=(0, 1, 0)),
    product_case("matmul", (3, 5), (2, 5, 4), name="matmul-lhs-shared", batch="1"),
    einsum_case("batch-block", "bqhd,bhdk->bqk", "bqhd bhdk bqk", "h", "b2 q3 h4 d2 k3", "b", proxy=True),
    einsum_case("batch-turned", "hbqd,kbhd->qbkh", "hbqd kbhd qbkh", "d", "h2 b3 q3 d4 k2", "b"),
    einsum_case("two-columns", "bi,iho->boh", "bi iho boh", "i", "b3 i2 h2 o3", "b"),
)

#: Operands whose norms are read, by kind of scores and role.
READS: Mapping[Role, Mapping[str, str]] = {
    Role.OUTPUT: {"online": "input weight", "input": "input", "weight": "weight", "uniform": ""},
    Role.GRAD_INPUT: {"online": "gradient weight", "gradient": "gradient", "weight": "weight", "uniform": ""},
    Role.GRAD_WEIGHT: {
        "online": "gradient input",
        "gradient": "gradient",
        "input": "input",
        "ema": "input",
        "uniform": "",
    },
}


def numbered(labels: str, sizes: Mapping[str, int], wanted: str) -> Tensor:
    """For each entry of a tensor with these labels: its place along ``wanted``, flattened in that order."""
    result = torch.zeros([sizes[label] for label in labels], dtype=torch.int64)
    for label in wanted:
        place = torch.arange(sizes[label])
        result = result * sizes[label] + place.view([-1 if other == label else 1 for other in labels])
    return result


def _norms(values: Tensor, labels: str, sizes: Mapping[str, int], wanted: str) -> Tensor:
    """The norms of all slices, one after the other."""
    squares = torch.zeros(math.prod(sizes[label] for label in wanted), dtype=torch.float64)
    for place, value in zip(numbered(labels, sizes, wanted).flatten().tolist(), values.flatten().tolist(), strict=True):
        squares[place] += value * value
    return squares.sqrt()


def _spread(values: Tensor, labels: str, batch: str, sizes: Mapping[str, int]) -> tuple[Tensor, str]:
    """A copy for each product of a batch that is broadcast."""
    missing = "".join(label for label in batch if label not in labels)
    labels = missing + labels
    values = values[(None,) * len(missing)]
    return values.expand([sizes[c] if c in batch else n for c, n in zip(labels, values.shape, strict=True)]), labels


@dataclasses.dataclass(frozen=True)
class RoleCase:
    """One product of a row.

    Attributes:
        case: The row.
        role: Which product.
        per_batch: Each product of the batch chooses for itself.
        positions: The rows are the output positions of a convolution.
    """

    case: OpCase
    role: Role
    per_batch: bool = False
    positions: bool = False

    @property
    def name(self) -> str:
        return f"{self.case.name}-{self.role.value}" + "-each" * self.per_batch + "-positions" * self.positions

    @property
    def argument(self) -> str:
        """The op's argument for the selection."""
        return "selection" if self.role is Role.OUTPUT else self.role.value

    @property
    def operand(self) -> str:
        """The argument whose gradient this product is."""
        return self.case.op.rhs if self.role is Role.GRAD_WEIGHT else self.case.op.lhs

    @property
    def other(self) -> str:
        """The other factor of the gradient, beside the gradient of the output."""
        return self.case.op.lhs if self.role is Role.GRAD_WEIGHT else self.case.op.rhs

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Of all labels."""
        with warnings.catch_warnings():
            warnings.filterwarnings(*EVEN.split(":"))
            output = self.case.exact(self.case.operands())
        result = dict(zip(self.case.labels[2], output.shape, strict=True))
        for name, labels in zip((self.case.op.lhs, self.case.op.rhs), self.case.labels[:2], strict=True):
            for label, size in zip(labels, self.case.shapes[name], strict=True):
                result.setdefault(label, size)
        return result

    @property
    def _batch(self) -> str:
        return self.case.parts[0]

    @property
    def _own(self) -> str:
        """Labels of the pairs."""
        _, rows, columns = self.case.parts
        if self.role is Role.GRAD_INPUT:
            return columns
        if self.role is Role.GRAD_WEIGHT:
            return "".join(c for c in self.case.labels[2] if c not in columns) if self.positions else rows
        lhs, rhs, output = self.case.labels
        return "".join(c for c in lhs if c in rhs and c not in output)

    def _count(self, labels: str) -> int:
        return math.prod(self.sizes[label] for label in labels)

    @property
    def groups(self) -> int:
        if self.per_batch:
            return self._count(self._batch)
        return 1 if self.role is Role.GRAD_WEIGHT else self.case.groups

    @property
    def pairs(self) -> int:
        if self.role is Role.OUTPUT:
            return self.case.pairs
        return self._count(self._own) // (1 if self.per_batch else self.groups)

    @property
    def places(self) -> Tensor:
        """The pair, counted over all groups, of each entry of the output."""
        return numbered(self.case.labels[2], self.sizes, self._batch * self.per_batch + self._own)

    def selection(self, scaled: bool, k: int | None = None, seed: int = 0) -> Selection:
        return some_selection(self.groups, self.pairs, scaled, k, seed)

    def given(self, selection: Selection) -> dict[str, Any]:
        """The op's argument for ``selection``."""
        return {self.argument: ForwardDrawn(selection, positions=True) if self.positions else selection}

    def masked(self, towards: Tensor, selection: Selection) -> Tensor:
        """The gradient of the output, multiplied by the scales of a sampled gradient, zero outside the sample."""
        return towards * dense(selection, self.pairs).flatten()[self.places].to(towards.dtype)

    def oracle(self, output: Tensor, operand: Tensor, towards: Tensor, selection: Selection, **how: bool) -> Tensor:
        """The sampled gradient of ``operand``.

        Args:
            output: Of the exact product, or of a forward that is sampled itself.
            operand: The operand that it was computed from.
            towards: The gradient of the output.
            selection: The pairs.
            how: Of ``torch.autograd.grad``.
        """
        (found,) = torch.autograd.grad(output, operand, self.masked(towards, selection), **{"retain_graph": True} | how)
        return found

    def output(self, operands: Operands, selection: Selection) -> Tensor:
        """The sampled output, of a selection for each product of the batch too."""
        if not self.per_batch:
            return self.case.oracle(operands, selection)
        lhs, labels = _spread(operands[self.case.op.lhs], self.case.labels[0], self._batch, self.sizes)
        place = numbered(labels, self.sizes, self._batch + self._own)
        blocks = self._count(self._own) // self.pairs  # a pair of several entries
        scale = dense(selection, self.pairs).repeat_interleave(blocks, 1).flatten()[place]
        return self.case.exact({**operands, self.case.op.lhs: lhs * scale.to(lhs.dtype)})

    def scores(
        self, operands: Operands, towards: Tensor | None, kind: str, running: Sequence[float] | None = None
    ) -> Tensor:
        """Scores ``[groups, pairs]``: √(Σ_b ‖left_b,j‖²·‖right_b,j‖²) over the products b of a batch, or of each."""
        shared = self.role is Role.OUTPUT and not self.per_batch
        of_factors = shared and kind == "online" and self.case.proxy and self._batch
        if shared and not of_factors:
            return self.case.scores(operands, kind)
        reads = READS[self.role][kind].split()
        if not reads:
            return torch.ones(self.groups, self.pairs, dtype=torch.float64)
        factors = []
        if "gradient" in reads and towards is not None:
            factors.append(_norms(towards, self.case.labels[2], self.sizes, self._batch + self._own))
        for name, label, operand in zip(
            ("input", "weight"), self.case.labels[:2], (self.case.op.lhs, self.case.op.rhs), strict=True
        ):
            if name in reads:
                factors.append(self._factor(operands[operand], label))
        products = torch.ones(self._count(self._batch), self._count(self._own), dtype=torch.float64)
        if of_factors:  # each side of a pair of several entries as a whole
            products = products.unflatten(-1, (self.pairs, -1))[..., 0]
            factors = [factor.view(len(products), self.pairs, -1).norm(dim=-1) for factor in factors]
        for factor in factors:
            products = products * factor.view_as(products)
        if self.role is Role.OUTPUT:
            products = products.unflatten(-1, (self.pairs, -1)).square().sum(-1).sqrt()
        if not self.per_batch:
            products = products.square().sum(0).sqrt().view(self.groups, self.pairs)
        if running is not None:
            factors = [running[i % len(running)] for i in range(self.pairs)]
            products = products * torch.tensor(factors, dtype=torch.float64)
        return products

    def row_norms(self, towards: Tensor) -> Tensor:
        """Norms of the rows of the gradient of the product: all that is no column, batch and rows first."""
        batch, rows, columns = self.case.parts
        rest = "".join(label for label in self.case.labels[2] if label not in batch + rows + columns)
        factor = float(self.case.op_kwargs.get("alpha", 1))  # what is added to the product has no part in it
        return _norms(towards * factor, self.case.labels[2], self.sizes, batch + rows + rest)

    def _factor(self, operand: Tensor, labels: str) -> Tensor:
        """Norms of the slices of an operand."""
        if self.positions:
            return self._patch_norms(operand)
        values, labels = _spread(operand.detach(), labels, self._batch, self.sizes)
        if self.case.kind == "einsum":  # sums up what only one operand has
            alone = [c for c in labels if sum(c in others for others in self.case.labels) == 1]
            values = values.sum([labels.index(c) for c in alone]) if alone else values
            labels = "".join(c for c in labels if c not in alone)
        sizes = {**self.sizes, **dict(zip(labels, values.shape, strict=True))}
        return _norms(values, labels, sizes, self._batch + self._own)

    def _patch_norms(self, input: Tensor) -> Tensor:
        """What an output position reads is where its gradient is not zero, for a weight of ones."""
        leaf = torch.ones(input.shape, dtype=torch.float64, requires_grad=True)
        weight = torch.ones(self.case.shapes["weight"], dtype=torch.float64)
        output = self.case.call(self.case.op.targets[0], {"input": leaf, "weight": weight})
        norms = []
        for place in range(self.pairs):
            (read,) = torch.autograd.grad(output[self.places == place].sum(), leaf, retain_graph=True)
            norms.append(input.detach().double()[read != 0].square().sum().sqrt())
        return torch.stack(norms)


#: Every row, and those that matter to gradients only.
ROWS: dict[str, OpCase] = {**OP_CASES, **{case.name: case for case in MORE}}


def products_of(case: OpCase) -> dict[Role, list[RoleCase]]:
    """All ways to form the pairs of each product of a row, by product."""
    each = (False, True) if case.parts[0] else (False,)
    found = {role: [RoleCase(case, role, per_batch=one) for one in each] for role in Role}
    if case.kind.startswith("conv"):
        found[Role.GRAD_WEIGHT].append(RoleCase(case, Role.GRAD_WEIGHT, positions=True))
    return found


#: All products of all rows, with all ways to form their pairs.
PRODUCTS: dict[str, RoleCase] = {
    one.name: one for case in ROWS.values() for ways in products_of(case).values() for one in ways
}


#: Those that have more than one pair, so that something can be left out.
CHOOSING = [one for one in PRODUCTS.values() if one.pairs > 1 and not one.case.vector]
#: One of them for each op, role and way to form pairs.
TYPES = list({(o.case.kind, o.role, o.per_batch, o.positions): o for o in reversed(CHOOSING)}.values())


@dataclasses.dataclass(frozen=True)
class Way:
    """One call of a row's op: some of its products sampled, each in its own way.

    Attributes:
        case: The row.
        samples: The products that are sampled, with their selections.
        straight_through: The gradients do not follow the sample of the output.
    """

    case: OpCase
    samples: tuple[tuple[RoleCase, Selection], ...]
    straight_through: bool = False

    @property
    def given(self) -> dict[str, Any]:
        """The op's sampling arguments."""
        found: dict[str, Any] = {"straight_through": self.straight_through}
        for one, selection in self.samples:
            found |= one.given(selection)
        return found

    def call(self, operands: Operands) -> Tensor:
        return self.case.call(self.case.op.function, operands, **self.given)

    def oracle(self, operands: Operands) -> tuple[Tensor, Tensor]:
        """The output, and what its gradients are those of."""
        exact = self.case.exact(operands)
        output = next((one.output(operands, chosen) for one, chosen in self.samples if one.role is Role.OUTPUT), exact)
        return output, exact if self.straight_through else output

    def gradients(self, source: Tensor, operands: Operands, towards: Tensor, **how: bool) -> Operands:
        """Of the operands that need one."""
        wanted = {name: value for name, value in operands.items() if value.requires_grad}
        found = torch.autograd.grad(source, list(wanted.values()), towards, **{"retain_graph": True} | how)
        result = dict(zip(wanted, found, strict=True))
        for one, selection in self.samples:
            if one.role is not Role.OUTPUT and one.operand in result:
                result[one.operand] = one.oracle(source, operands[one.operand], towards, selection, **how)
        return result


def way_of(case: OpCase, names: Mapping[Role, str], scaled: bool = True, k: str = "half") -> Way:
    """By the way of each product: ``exact``, ``shared``, ``each`` or ``positions``; ``k`` is one, half or all.

    The output's may be straight through.
    """
    samples = []
    for seed, (role, words) in enumerate(names.items()):
        name = words.split(",")[0]
        if name != "exact":
            one = RoleCase(case, role, per_batch=name == "each", positions=name == "positions")
            count = {"one": 1, "half": None, "all": one.pairs}[k]
            samples.append((one, one.selection(scaled, count, seed)))
    return Way(case, tuple(samples), names.get(Role.OUTPUT, "").endswith("straight through"))


def ways(cases: Sequence[OpCase], **parameters: Sequence[Any]) -> list[dict[str, Any]]:
    """Pairs of rows, ways to sample each product and other parameters; ways that a row has not are left out."""
    found = []
    for spatial, batched in itertools.product((True, False), repeat=2):
        of_class = [c for c in cases if c.kind.startswith("conv") == spatial and bool(c.parts[0]) == batched]
        if of_class:
            every = ("shared", "exact", *("each",) * batched)
            rows = (*every, *("positions",) * spatial)
            outputs = (*every, *(f"{way}, straight through" for way in every if way != "exact"))
            found += pairwise(case=of_class, output=outputs, grad_input=every, grad_weight=rows, **parameters)
    return found


def name_of(one: Mapping[str, Any]) -> str:
    return "-".join(getattr(value, "name", str(value)) for value in one.values())
