"""The one table of ops, samplers and dtypes that every contract test walks, with slow, independent oracles.

A new op or sampler is one row here; ``tests/ops/test_table.py`` fails until it has one. Nothing in this file calls the
code under test, save to look up a registered function.
"""

from __future__ import annotations

import collections
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from allpairspy import AllPairs
from torch import Tensor

from fx_approx.ops import OPS, ProductOp
from fx_approx.sampling import SAMPLERS, SamplerConfig, Selection

Operands = dict[str, Tensor]


def _turned(values: Tensor) -> Tensor:
    """The same values with the first and last axis swapped in memory."""
    return values.transpose(0, -1).contiguous().transpose(0, -1)


def _spaced(values: Tensor) -> Tensor:
    """The same values with gaps in memory."""
    return torch.stack([values, values + 1], -1)[..., 0]


def _channels_last(values: Tensor) -> Tensor:
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(values.dim(), torch.preserve_format)
    return values.clone(memory_format=memory_format)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda values: values,
    "turned": _turned,
    "spaced": _spaced,
    "channels_last": _channels_last,
}

#: Dtype -> the largest error allowed, as a share of the largest entry: a few roundings of that dtype.
DTYPES: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 6e-3,
    torch.bfloat16: 5e-2,
}


def some_selection(groups: int, pairs: int, scaled: bool, k: int | None = None, seed: int = 0) -> Selection:
    """A seeded selection of ``k`` pairs (default: about half), another in every group.

    The scales lie in [1/2, 5/2), and one entry is padding of scale 0.
    """
    k = k or (pairs + 1) // 2
    generator = torch.Generator().manual_seed(seed)
    rows = torch.stack([torch.randperm(pairs, generator=generator)[:k].sort().values for _ in range(groups)])
    scale = torch.rand(groups, k, generator=generator, dtype=torch.float64) * 2 + 0.5
    if k > 1:
        scale[0, -1] = 0.0
    return Selection(rows, scale if scaled else None)


def dense(selection: Selection, pairs: int) -> Tensor:
    """What every pair is multiplied with: ``[groups, pairs]``, 0 for those left out."""
    scale = selection.scale
    values = torch.ones_like(selection.indices, dtype=torch.float64) if scale is None else scale.double()
    return torch.zeros(len(values), pairs, dtype=torch.float64).scatter(1, selection.indices, values)


@dataclasses.dataclass(frozen=True)
class OpCase:
    """One use of an op.

    Attributes:
        name: Name of the row.
        kind: The op, a key of ``OPS``.
        shapes: Shapes of the tensor arguments.
        axes: The axis of the pairs in the left and in the right operand.
        labels: Labels of the axes of the left operand, the right operand and the output, as einsum writes them. A batch
            that is broadcast has the same label in both.
        parts: Labels of the output that are the batch, the rows (of a convolution: examples) and the columns.
        op_kwargs: The plain arguments that are not the default.
        groups: Groups that choose their pairs apart from each other.
        batch: The axis of each argument that a batch of size 0 makes empty; {} where there is none.
        proxy: The online scores are not the norms of the terms but the products of the norms of their factors.
        vector: The left operand has no rows, so the selector leaves the product exact.
    """

    name: str
    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    axes: tuple[int, int]
    labels: tuple[str, str, str]
    parts: tuple[str, str, str]
    op_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    groups: int = 1
    batch: Mapping[str, int] = dataclasses.field(default_factory=dict)
    proxy: bool = False
    vector: bool = False

    @property
    def op(self) -> ProductOp:
        return OPS[self.kind]

    @property
    def pairs(self) -> int:
        """Column-row pairs of a group."""
        return self.shapes[self.op.rhs][self.axes[1]]

    @property
    def plain(self) -> dict[str, Any]:
        """All plain arguments that the op names, defaults included."""
        parameters = self.op.signature.parameters
        return {name: self.op_kwargs.get(name, parameters[name].default) for name in self.op.kwarg_names}

    def with_pairs(self, pairs: int) -> OpCase:
        """The same row with another number of pairs."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        shapes[self.op.lhs][self.axes[0]] = self.groups * pairs
        shapes[self.op.rhs][self.axes[1]] = pairs
        return dataclasses.replace(self, shapes={name: tuple(shape) for name, shape in shapes.items()})

    def operands(
        self, seed: int = 0, dtype: torch.dtype = torch.float64, layout: str = "plain", grad: bool = False
    ) -> Operands:
        """Seeded normal operands by argument name, drawn in float64 whatever the dtype."""
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for name, shape in self.shapes.items():
            values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            made[name] = LAYOUTS[layout](values).requires_grad_(grad)
        return made

    def empty(self) -> Operands:
        """Operands of a batch of size 0."""
        made = self.operands()
        for name, axis in self.batch.items():
            made[name] = made[name].narrow(axis, 0, 0)
        return {name: value.clone().requires_grad_() for name, value in made.items()}

    def selection(self, scaled: bool, k: int | None = None, seed: int = 0) -> Selection:
        """Of the output's pairs."""
        return some_selection(self.groups, self.pairs, scaled, k, seed)

    def call(self, function: Callable[..., Tensor], operands: Operands, **extra: Any) -> Tensor:
        """``function`` with the arguments in the order of the op's signature."""
        args, kwargs = [], {}
        given = {**self.op_kwargs, **operands}
        for parameter in self.op.signature.parameters.values():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                if parameter.name in given:
                    kwargs[parameter.name] = given[parameter.name]
            else:
                args.append(given.get(parameter.name, parameter.default))
        return function(*args, **kwargs, **extra)

    def sampled(self, operands: Operands, selection: Selection | None = None, **how: Any) -> Tensor:
        return self.call(self.op.function, operands, selection=selection, **how)

    def exact(self, operands: Operands) -> Tensor:
        return self.call(self.op.targets[0], operands)

    def weighted(self, operands: Operands, weights: Tensor) -> Tensor:
        """The exact product, the pairs of the left operand multiplied with ``weights [groups, pairs]``.

        A product is linear in its pairs, so this is the sum over the chosen pairs, and 0 weights read nothing.
        """
        lhs = operands[self.op.lhs]
        shape = [1] * lhs.dim()
        shape[self.axes[0]] = -1
        return self.exact({**operands, self.op.lhs: lhs * weights.to(lhs.dtype).reshape(shape)})

    def oracle(self, operands: Operands, selection: Selection) -> Tensor:
        """The sampled product."""
        return self.weighted(operands, dense(selection, self.pairs))

    def pairs_of(self, operands: Operands) -> Tensor:
        """Each pair alone, without what is added to the product: ``[groups, pairs, *output]``."""
        places = self.groups * self.pairs
        rest = self.weighted(operands, torch.zeros(places))
        each = [self.weighted(operands, one) - rest for one in torch.eye(places, dtype=torch.float64)]
        return torch.stack(each).unflatten(0, (self.groups, self.pairs))

    def factors(self, operands: Operands, group: int, j: int) -> tuple[Tensor, Tensor]:
        """What of the left and of the right operand the pair ``(group, j)`` reads."""
        rhs = operands[self.op.rhs].chunk(self.groups, 0)[group]
        return operands[self.op.lhs].select(self.axes[0], group * self.pairs + j), rhs.select(self.axes[1], j)

    def scores(self, operands: Operands, kind: str) -> Tensor:
        """The scores ``[groups, pairs]`` as a double loop: norms of terms or of factors, or ones."""
        wide = {name: value.detach().double() for name, value in operands.items()}
        if kind == "online" and not self.proxy:
            return self.pairs_of(wide).flatten(2).norm(dim=2) / abs(self.op_kwargs.get("alpha", 1))
        result = torch.ones(self.groups, self.pairs, dtype=torch.float64)
        reads = {"online": (0, 1), "input": (0,), "weight": (1,), "uniform": ()}[kind]
        for g, j in itertools.product(range(self.groups), range(self.pairs)):
            for side in reads:
                result[g, j] *= self.factors(wide, g, j)[side].square().sum().sqrt()
        return result


def linear_case(name: str, input: tuple[int, ...], weight: tuple[int, int], bias: bool = True) -> OpCase:
    shapes = {"input": input, "weight": weight} | ({"bias": weight[:1]} if bias else {})
    rows = "abcd"[: len(input) - 1]
    labels, batch = (f"{rows}k", "nk", f"{rows}n"), {"input": 0} if rows else {}
    return OpCase(name, "linear", shapes, (-1, -1), labels, ("", rows, "n"), batch=batch, vector=not rows)


def conv_case(
    name: str, input: tuple[int, ...], weight: tuple[int, ...], bias: bool = True, **op_kwargs: Any
) -> OpCase:
    shapes = {"input": input, "weight": weight} | ({"bias": weight[:1]} if bias else {})
    spatial, example = len(weight) - 2, "a" if len(input) == len(weight) else ""
    labels = (f"{example}i{'uvw'[:spatial]}", f"oj{'pqr'[:spatial]}", f"{example}o{'xyz'[:spatial]}")
    batch, groups = {"input": 0} if example else {}, op_kwargs.get("groups", 1)
    axes, parts = (1 - len(weight), 1), ("", example, "o")
    return OpCase(name, f"conv{spatial}d", shapes, axes, labels, parts, op_kwargs, groups, batch, proxy=True)


def product_case(kind: str, *shapes: tuple[int, ...], name: str = "", batch: str = "0", **op_kwargs: float) -> OpCase:
    """``[..., m, k] @ [..., k, n]``, with what is added to it first; ``batch``: which arguments have one, as axis 0."""
    names = {"addmm": ("input", "mat1", "mat2"), "baddbmm": ("input", "batch1", "batch2"), "matmul": ("input", "other")}
    named = dict(zip(names.get(kind, ("input", "mat2")), shapes, strict=True))
    lhs, rhs = (len(shape) for shape in shapes[-2:])
    letters = "abcd"[: max(lhs, rhs) - 2]
    left, right = letters[len(letters) + 2 - lhs :], letters[len(letters) + 2 - rhs :]
    parts = ("", f"{left}m", "n") if rhs == 2 else (letters, "m", "n")
    empties = {list(named)[int(place)]: 0 for place in batch}
    labels = (f"{left}mk", f"{right}kn", f"{letters}mn")
    return OpCase(name or kind, kind, named, (-1, -2), labels, parts, op_kwargs, batch=empties)


def einsum_case(
    name: str, equation: str, labels: str, pair: str, sizes: str, batch: str, proxy: bool = False
) -> OpCase:
    """Sizes as ``"b2 t3"``; ``pair``: the label that is sampled."""
    size = {one[0]: int(one[1:]) for one in sizes.split()}
    lhs, rhs, output = labels.split()
    shapes = {side: tuple(size[c] for c in names) for side, names in (("lhs", lhs), ("rhs", rhs))}
    shared = "".join(c for c in output if c in lhs and c in rhs)
    rows, columns = ("".join(c for c in side if c in output and c not in shared) for side in (lhs, rhs))
    return OpCase(
        f"einsum-{name}",
        "einsum",
        shapes,
        (lhs.index(pair), rhs.index(pair)),
        (lhs, rhs, output),
        (shared, rows, columns),
        {"equation": equation},
        batch={side: names.index(batch) for side, names in (("lhs", lhs), ("rhs", rhs)) if batch in names},
        proxy=proxy,
    )


OP_CASES: dict[str, OpCase] = {
    case.name: case
    for case in (
        linear_case("linear", (3, 6), (4, 6)),
        linear_case("linear-no-bias-4d", (2, 1, 3, 5), (4, 5), bias=False),
        linear_case("linear-1d", (6,), (4, 6)),
        conv_case("conv1d", (2, 5, 7), (4, 5, 3), stride=2, padding=1),
        conv_case("conv1d-unbatched-grouped", (6, 8), (4, 3, 3), groups=2, dilation=2),
        conv_case("conv2d-grouped", (2, 8, 5, 5), (4, 4, 3, 3), groups=2, stride=(2, 1), padding=(1, 0)),
        conv_case("conv2d", (2, 5, 5, 4), (3, 5, 3, 2)),
        conv_case("conv2d-1x1", (2, 6, 3, 3), (4, 6, 1, 1), bias=False),
        conv_case("conv2d-same", (2, 4, 5, 4), (3, 4, 3, 3), padding="same", dilation=(1, 2)),
        conv_case("conv2d-unbatched", (4, 5, 4), (3, 4, 2, 3), stride=2, padding=1, dilation=(2, 1)),
        conv_case("conv3d", (1, 4, 4, 3, 4), (2, 4, 2, 3, 1), padding="valid", stride=(1, 1, 2)),
        conv_case("conv3d-grouped", (2, 6, 3, 3, 3), (4, 3, 2, 2, 2), bias=False, groups=2, padding=1, stride=2),
        product_case("matmul", (3, 6), (6, 2)),
        product_case("matmul", (2, 3, 5), (5, 4), name="matmul-folded"),
        product_case("matmul", (2, 1, 3, 5), (4, 5, 2), name="matmul-broadcast"),
        product_case("mm", (3, 6), (6, 2)),
        product_case("bmm", (3, 2, 5), (3, 5, 4), batch="01"),
        product_case("addmm", (3, 2), (3, 5), (5, 2), batch="01", beta=0.5, alpha=-1.5),
        product_case("addmm", (2,), (3, 5), (5, 2), name="addmm-bias", batch="1"),
        product_case("baddbmm", (2, 3, 2), (2, 3, 5), (2, 5, 2), batch="012", beta=-0.5, alpha=2.0),
        einsum_case("linear", "bti,oi->bto", "bti oi bto", "i", "b2 t3 i5 o4", "b"),
        einsum_case("batch", "bhqd,bhkd->bhqk", "bhqd bhkd bhqk", "d", "b2 h2 q3 k2 d5", "b"),
        einsum_case("two-contracted", "bhd,hdo->bo", "bhd hdo bo", "h", "b3 h5 d2 o4", "b", proxy=True),
        einsum_case("implicit-turned", "ki, jk", "ki jk ij", "k", "k6 i3 j2", "i"),
        einsum_case("row-summed", "bik,kj->jb", "bik kj jb", "k", "b3 i2 k5 j2", "b", proxy=True),
    )
}


@dataclasses.dataclass(frozen=True)
class SamplerCase:
    """One way to sample, with the share of the pairs left to the test."""

    name: str
    sampler: str
    scores: str = "online"

    @property
    def unbiased(self) -> bool:
        return SAMPLERS[self.sampler].unbiased

    def spec(self, ratio: float = 0.5) -> SamplerConfig:
        return SamplerConfig(self.sampler, ratio, scores=self.scores)


SAMPLER_CASES: dict[str, SamplerCase] = {
    case.name: case
    for case in (
        SamplerCase("crs", "crs"),
        SamplerCase("crs-uniform", "crs", "uniform"),
        SamplerCase("bernoulli", "bernoulli"),
        SamplerCase("bernoulli-input", "bernoulli", "input"),
        SamplerCase("systematic", "systematic"),
        SamplerCase("systematic-weight", "systematic", "weight"),
        SamplerCase("wta", "wta"),
        SamplerCase("wta-unique", "wta_unique"),
        SamplerCase("topk", "topk"),
    )
}

#: Those that only gradients have; every row above whose scores a gradient has applies to it too.
GRADIENT_CASES: dict[str, SamplerCase] = {
    case.name: case
    for case in (
        SamplerCase("wta-gradient", "wta", "gradient"),
        SamplerCase("systematic-stale", "systematic", "ema"),
    )
}


def upstream(output: Tensor, seed: int = 99) -> Tensor:
    """A seeded normal gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)


def gradients(output: Tensor, operands: Operands, towards: Tensor | None = None, **how: bool) -> Operands:
    """The gradients of the operands that need one, for a seeded gradient of the output."""
    wanted = {name: value for name, value in operands.items() if value.requires_grad}
    found = torch.autograd.grad(output, list(wanted.values()), upstream(output) if towards is None else towards, **how)
    return dict(zip(wanted, found, strict=True))


def pairwise(**parameters: Sequence[Any]) -> list[dict[str, Any]]:
    """Few combinations, among which each value of every parameter meets each value of every other."""
    return [one._asdict() for one in AllPairs(collections.OrderedDict(parameters))]
