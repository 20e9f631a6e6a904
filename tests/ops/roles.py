"""The gradients of a row of the table as sampled products of their own, each with its slow, independent oracle.

A gradient is linear in the gradient of the output, every entry of which belongs to one pair: an out-feature or output
channel for the gradient of the left operand, a row, an example or an output position for that of the right one. So a
pair contributes what autograd makes, in float64, of the exact product and a gradient of the output that is zero save in
that pair; and the sampled gradient is the sum over the chosen pairs. Nothing in this file calls the code under test,
save to look up a registered function.
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
from tests.families import OP_CASES, OpCase, Operands
from tests.op_case import conv_case, einsum_case, linear_case, product_case

#: torch says so, once, of ``padding="same"`` with a kernel of even size.
EVEN = "ignore:Using padding='same' with even kernel lengths"

#: Rows that matter to gradients only.
MORE: tuple[OpCase, ...] = (
    linear_case("linear-wide", (2, 3, 2), (5, 2), bias=True),
    # Three zeros in all, so one more behind than before.
    conv_case("conv1d-same-even", (2, 3, 6), (4, 3, 4), padding="same"),
    conv_case("conv2d-same-even-grouped", (2, 4, 4, 5), (4, 2, 2, 3), padding="same", groups=2, dilation=(1, 2)),
    conv_case("conv3d-same-even-unbatched", (3, 2, 3, 4), (4, 3, 2, 1, 4), padding="same", bias=False),
    # The last row and the last two columns are read by no output position.
    conv_case("conv2d-left-over", (3, 3, 6, 7), (4, 3, 2, 2), stride=3, padding=(0, 0)),
    conv_case("conv2d-one-number", (3, 2, 5, 4), (4, 2, 2, 3), stride=(2,), padding=(1,), dilation=(1,)),
    conv_case("conv2d-depthwise", (3, 2, 4, 4), (6, 1, 3, 3), groups=2, padding=1, dilation=(1, 2)),
    conv_case("conv3d-unbatched-grouped", (4, 3, 4, 3), (4, 2, 2, 2, 1), groups=2, stride=(2, 1, 2), padding=(0, 1, 0)),
    product_case("matmul", (3, 5), (2, 5, 4), "matmul-lhs-shared", other=0),
    einsum_case(
        "einsum-batch-block",
        "bqhd,bhdk->bqk",
        "bqhd bhdk bqk",
        "h",
        {"b": 2, "q": 3, "h": 4, "d": 2, "k": 3},
        "b",
        proxy=True,
    ),
    einsum_case(
        "einsum-batch-turned",
        "hbqd,kbhd->qbkh",
        "hbqd kbhd qbkh",
        "d",
        {"h": 2, "b": 3, "q": 3, "d": 4, "k": 2},
        "b",
    ),
    einsum_case("einsum-two-columns", "bi,iho->boh", "bi iho boh", "i", {"b": 3, "i": 2, "h": 2, "o": 3}, "b"),
)

#: Operands whose norms are read, by kind of scores and role; G is the gradient.
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
        """As :meth:`OpCase.selection`, of the pairs of this product."""
        rows = dataclasses.replace(self.case, groups=self.groups, pairs=self.pairs)
        return rows.selection(scaled, k, seed)

    def given(self, selection: Selection) -> dict[str, Any]:
        """The op's argument for ``selection``."""
        if self.role is Role.OUTPUT:
            return {"selection": selection}
        return {self.role.value: ForwardDrawn(selection, positions=True) if self.positions else selection}

    def oracle(self, output: Tensor, operand: Tensor, towards: Tensor, selection: Selection) -> Tensor:
        """The sampled gradient of ``operand`` as an explicit sum over the chosen pairs.

        Args:
            output: Of the exact product, or of a forward that is sampled itself.
            operand: The operand that it was computed from.
            towards: The gradient of the output.
            selection: The pairs.
        """
        indices, scale = selection
        total, places = torch.zeros_like(operand), self.places
        for g, i in itertools.product(range(self.groups), range(indices.shape[1])):
            alone = torch.where(places == g * self.pairs + int(indices[g, i]), towards, 0.0)
            (part,) = torch.autograd.grad(output, operand, alone, retain_graph=True)
            total = total + (part if scale is None else part * scale[g, i])
        return total

    def output(self, operands: Operands, selection: Selection) -> Tensor:
        """The sampled output, of a selection for each product of the batch too."""
        if not self.per_batch:
            return self.case.oracle(operands, selection)
        scale = torch.ones_like(selection.indices, dtype=torch.float64) if selection.scale is None else selection.scale
        dense = torch.zeros(self.groups, self.pairs, dtype=torch.float64).scatter(1, selection.indices, scale.double())
        batch = numbered(self.case.labels[2], self.sizes, self._batch)
        total: Any = 0
        for j in range(self.pairs):
            total = total + self.case.term(operands, self.case.op_kwargs, 0, j) * dense[:, j][batch]
        return self.case.finish(operands, self.case.op_kwargs, total)

    def scores(
        self, operands: Operands, towards: Tensor | None, kind: str, running: Sequence[float] | None = None
    ) -> Tensor:
        """Scores ``[groups, pairs]``: √(Σ_b ‖left_b,j‖²·‖right_b,j‖²) over the products b of a batch, or of each."""
        reads = READS[self.role][kind].split()
        if not reads:
            return torch.ones(self.groups, self.pairs, dtype=torch.float64)
        products = torch.ones(self._count(self._batch), self._count(self._own), dtype=torch.float64)
        if "gradient" in reads and towards is not None:
            products = products * _norms(towards, self.case.labels[2], self.sizes, self._batch + self._own).view_as(
                products
            )
        for name, label, operand in zip(
            ("input", "weight"), self.case.labels[:2], (self.case.op.lhs, self.case.op.rhs), strict=True
        ):
            if name in reads:
                products = products * self._factor(operands[operand], label).view_as(products)
        if self.role is Role.OUTPUT:  # of a pair of several entries
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


def _variants(case: OpCase) -> list[RoleCase]:
    found = [RoleCase(case, Role.GRAD_INPUT), RoleCase(case, Role.GRAD_WEIGHT)]
    if case.parts[0]:
        found += [RoleCase(case, Role.GRAD_INPUT, per_batch=True), RoleCase(case, Role.GRAD_WEIGHT, per_batch=True)]
    if case.kind.startswith("conv"):
        found.append(RoleCase(case, Role.GRAD_WEIGHT, positions=True))
    return found


#: Every row, and those that matter to gradients only.
ROWS: dict[str, OpCase] = {**OP_CASES, **{case.name: case for case in MORE}}
#: Both gradients of every row, with all ways to form their pairs.
ROLE_CASES: dict[str, RoleCase] = {one.name: one for case in ROWS.values() for one in _variants(case)}
#: Outputs of batched products, each of which chooses for itself.
EACH_OUTPUT: dict[str, RoleCase] = {
    one.name: one for case in ROWS.values() if case.parts[0] for one in [RoleCase(case, Role.OUTPUT, per_batch=True)]
}
