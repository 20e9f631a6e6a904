"""What a row of the table in ``tests/families.py`` is: an op in use, with its slow, independent oracle.

The column-row pairs are written one by one from the formula. Nothing in this file calls the code under test, save to
look up a registered function.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_approx.ops import OPS, ProductOp
from fx_approx.sampling import Selection

Operands = dict[str, Tensor]
OpKwargs = Mapping[str, Any]
#: The pair ``(group, j)`` of a product, in the shape of its output.
Term = Callable[[Operands, OpKwargs, int, int], Tensor]
#: The output from the sum of the pairs: biases and the like.
Finish = Callable[[Operands, OpKwargs, Tensor], Tensor]


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


@dataclasses.dataclass(frozen=True)
class OpCase:
    """One use of an op.

    Attributes:
        name: Name of the row.
        kind: The op, a key of ``OPS``.
        shapes: Shapes of the tensor arguments.
        pairs: Column-row pairs of a group.
        axes: The axis of the pairs in the left and in the right operand.
        term: One pair of the product.
        finish: What is added to, or multiplied with, the sum of the pairs.
        op_kwargs: The plain arguments that are not the default.
        groups: Groups that choose their pairs apart from each other.
        batch: The axis of each argument that a batch of size 0 makes empty; {} where there is none.
        proxy: The online scores are not the norms of the terms but the products of the norms of their factors.
        vector: The left operand has no rows, so the selector leaves the product exact.
        labels: Labels of the axes of the left operand, the right operand and the output, as einsum writes them. A batch
            that is broadcast has the same label in both.
        parts: Labels of the output that are the batch, the rows (of a convolution: examples) and the columns.
    """

    name: str
    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    pairs: int
    axes: tuple[int, int]
    term: Term
    finish: Finish
    op_kwargs: OpKwargs = dataclasses.field(default_factory=dict)
    groups: int = 1
    batch: Mapping[str, int] = dataclasses.field(default_factory=dict)
    proxy: bool = False
    vector: bool = False
    labels: tuple[str, str, str] = ("", "", "")
    parts: tuple[str, str, str] = ("", "", "")

    @property
    def op(self) -> ProductOp:
        return OPS[self.kind]

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
        return dataclasses.replace(self, pairs=pairs, shapes={name: tuple(shape) for name, shape in shapes.items()})

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
        """A seeded selection of ``k`` pairs (default: about half), another in every group.

        The scales lie in [1/2, 5/2), and one entry is padding of scale 0.
        """
        k = k or (self.pairs + 1) // 2
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randperm(self.pairs, generator=generator)[:k].sort().values for _ in range(self.groups)]
        if not scaled:
            return Selection(torch.stack(rows), None)
        scale = torch.rand(self.groups, k, generator=generator, dtype=torch.float64) * 2 + 0.5
        if k > 1:
            scale[0, -1] = 0.0
        return Selection(torch.stack(rows), scale)

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

    def sampled(self, operands: Operands, selection: Selection | None) -> Tensor:
        return self.call(self.op.function, operands, selection=selection)

    def exact(self, operands: Operands) -> Tensor:
        return self.call(self.op.targets[0], operands)

    def pairs_of(self, operands: Operands) -> Tensor:
        """All pairs: ``[groups, pairs, *output]``."""
        every = [[self.term(operands, self.op_kwargs, g, j) for j in range(self.pairs)] for g in range(self.groups)]
        return torch.stack([torch.stack(row) for row in every])

    def factors(self, operands: Operands, group: int, j: int) -> tuple[Tensor, Tensor]:
        """What of the left and of the right operand the pair ``(group, j)`` reads."""
        rhs = operands[self.op.rhs].chunk(self.groups, 0)[group]
        return operands[self.op.lhs].select(self.axes[0], group * self.pairs + j), rhs.select(self.axes[1], j)

    def scores(self, operands: Operands, kind: str) -> Tensor:
        """The scores ``[groups, pairs]`` as a double loop: norms of terms or of factors, or ones."""
        result = torch.ones(self.groups, self.pairs, dtype=torch.float64)
        for g, j in itertools.product(range(self.groups), range(self.pairs)):
            lhs, rhs = (factor.detach().double() for factor in self.factors(operands, g, j))
            if kind in ("input", "weight"):
                result[g, j] = (lhs if kind == "input" else rhs).square().sum().sqrt()
            elif kind == "online" and self.proxy:
                result[g, j] = (lhs.square().sum() * rhs.square().sum()).sqrt()
            elif kind == "online":
                wide = {name: value.detach().double() for name, value in operands.items()}
                result[g, j] = self.term(wide, self.op_kwargs, g, j).square().sum().sqrt()
        return result

    def oracle(self, operands: Operands, selection: Selection) -> Tensor:
        """The sampled product as an explicit sum over the chosen pairs."""
        indices, scale = selection
        total: Any = 0
        for g, i in itertools.product(range(self.groups), range(indices.shape[1])):
            term = self.term(operands, self.op_kwargs, g, int(indices[g, i]))
            total = total + (term if scale is None else term * scale[g, i])
        return self.finish(operands, self.op_kwargs, total)


def _plus_bias(operands: Operands, op_kwargs: OpKwargs, total: Tensor) -> Tensor:
    return total + operands["bias"] if "bias" in operands else total


def _linear_term(operands: Operands, op_kwargs: OpKwargs, group: int, j: int) -> Tensor:
    return operands["input"][..., j, None] * operands["weight"][:, j]


def _matmul_term(lhs: str, rhs: str) -> Term:
    def term(operands: Operands, op_kwargs: OpKwargs, group: int, j: int) -> Tensor:
        return operands[lhs][..., :, j, None] * operands[rhs][..., j, None, :]

    return term


def _as_is(operands: Operands, op_kwargs: OpKwargs, total: Tensor) -> Tensor:
    return total


def _beta_alpha(operands: Operands, op_kwargs: OpKwargs, total: Tensor) -> Tensor:
    return op_kwargs.get("beta", 1) * operands["input"] + op_kwargs.get("alpha", 1) * total


def _conv_term(operands: Operands, op_kwargs: OpKwargs, group: int, j: int) -> Tensor:
    """One input channel convolved alone; zero in the output channels of the other groups."""
    input, weight = operands["input"], operands["weight"]
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.dim()]
    outputs, axis = weight.shape[0] // op_kwargs.get("groups", 1), input.dim() - weight.dim() + 1
    channel = input.narrow(axis, group * weight.shape[1] + j, 1)
    kernel = weight[group * outputs : (group + 1) * outputs, j : j + 1]
    plain = {name: value for name, value in op_kwargs.items() if name != "groups"}
    part = convolve(channel, kernel, **plain)
    shape = list(part.shape)
    shape[axis] = weight.shape[0]
    before = part.new_zeros([*shape[:axis], group * outputs, *shape[axis + 1 :]])
    after = part.new_zeros([*shape[:axis], weight.shape[0] - (group + 1) * outputs, *shape[axis + 1 :]])
    return torch.cat([before, part, after], axis)


def _conv_bias(operands: Operands, op_kwargs: OpKwargs, total: Tensor) -> Tensor:
    if "bias" not in operands:
        return total
    return total + operands["bias"].view(-1, *[1] * (operands["weight"].dim() - 2))


def _einsum_term(labels: str, pair: str) -> Term:
    """Entry ``j`` of label ``pair``: all labels broadcast against each other, then the others are summed.

    Args:
        labels: Labels of the left operand, the right operand and the output, such as ``"ik kj ij"``.
        pair: The label that is sampled.
    """
    lhs, rhs, output = labels.split()
    letters = sorted((set(lhs) | set(rhs)) - {pair})

    def spread(operand: Tensor, names: str, j: int) -> Tensor:
        chosen = operand.select(names.index(pair), j)
        left = names.replace(pair, "")
        ordered = chosen.permute([left.index(c) for c in letters if c in left])
        return ordered[tuple(slice(None) if c in left else None for c in letters)]

    def term(operands: Operands, op_kwargs: OpKwargs, group: int, j: int) -> Tensor:
        product = spread(operands["lhs"], lhs, j) * spread(operands["rhs"], rhs, j)
        for axis in reversed(range(len(letters))):
            if letters[axis] not in output:
                product = product.sum(axis)
        kept = [c for c in letters if c in output]
        return product.permute([kept.index(c) for c in output])

    return term


def linear_case(name: str, input: tuple[int, ...], weight: tuple[int, int], bias: bool, **more: Any) -> OpCase:
    shapes = {"input": input, "weight": weight} | ({"bias": weight[:1]} if bias else {})
    batch = {"input": 0} if len(input) > 1 else {}
    rows = "abcd"[: len(input) - 1]
    return OpCase(
        name,
        "linear",
        shapes,
        weight[1],
        (-1, -1),
        _linear_term,
        _plus_bias,
        batch=batch,
        labels=(f"{rows}k", "nk", f"{rows}n"),
        parts=("", rows, "n"),
        **more,
    )


def conv_case(
    name: str, input: tuple[int, ...], weight: tuple[int, ...], bias: bool = True, **op_kwargs: Any
) -> OpCase:
    shapes = {"input": input, "weight": weight} | ({"bias": weight[:1]} if bias else {})
    spatial, example = len(weight) - 2, "a" if len(input) == len(weight) else ""
    return OpCase(
        name,
        f"conv{spatial}d",
        shapes,
        weight[1],
        (1 - len(weight), 1),
        _conv_term,
        _conv_bias,
        op_kwargs,
        groups=op_kwargs.get("groups", 1),
        batch={"input": 0} if example else {},
        proxy=True,
        labels=(f"{example}i{'uvw'[:spatial]}", f"oj{'pqr'[:spatial]}", f"{example}o{'xyz'[:spatial]}"),
        parts=("", example, "o"),
    )


def _matrix_labels(lhs: int, rhs: int) -> dict[str, tuple[str, str, str]]:
    """Labels and parts of ``[..., m, k] @ [..., k, n]``, from the numbers of axes."""
    if rhs == 2:
        rows = "abcd"[: lhs - 2] + "m"
        return {"labels": (f"{rows}k", "kn", f"{rows}n"), "parts": ("", rows, "n")}
    batch = "abcd"[: max(lhs, rhs) - 2]
    left, right = batch[len(batch) + 2 - lhs :], batch[len(batch) + 2 - rhs :]
    return {"labels": (f"{left}mk", f"{right}kn", f"{batch}mn"), "parts": (batch, "m", "n")}


def product_case(kind: str, lhs: tuple[int, ...], rhs: tuple[int, ...], name: str = "", **batch: int) -> OpCase:
    names = {"matmul": ("input", "other")}.get(kind, ("input", "mat2"))
    shapes = dict(zip(names, (lhs, rhs), strict=True))
    return OpCase(
        name or kind,
        kind,
        shapes,
        lhs[-1],
        (-1, -2),
        _matmul_term(*names),
        _as_is,
        batch=batch or {"input": 0},
        **_matrix_labels(len(lhs), len(rhs)),
    )


def added_case(
    kind: str,
    input: tuple[int, ...],
    lhs: tuple[int, ...],
    rhs: tuple[int, ...],
    name: str,
    batch: dict[str, int],
    **op_kwargs: float,
) -> OpCase:
    names = {"addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2")}[kind]
    shapes = {"input": input, names[0]: lhs, names[1]: rhs}
    return OpCase(
        name,
        kind,
        shapes,
        lhs[-1],
        (-1, -2),
        _matmul_term(*names),
        _beta_alpha,
        op_kwargs,
        batch=batch,
        **_matrix_labels(len(lhs), len(rhs)),
    )


def einsum_case(
    name: str,
    equation: str,
    labels: str,
    pair: str,
    sizes: Mapping[str, int],
    batch: str,
    proxy: bool = False,
) -> OpCase:
    lhs, rhs, output = labels.split()
    shapes = {side: tuple(sizes[c] for c in names) for side, names in (("lhs", lhs), ("rhs", rhs))}
    shared = "".join(c for c in output if c in lhs and c in rhs)
    rows, columns = ("".join(c for c in side if c in output and c not in shared) for side in (lhs, rhs))
    return OpCase(
        name,
        "einsum",
        shapes,
        sizes[pair],
        (lhs.index(pair), rhs.index(pair)),
        _einsum_term(labels, pair),
        _as_is,
        {"equation": equation},
        batch={side: names.index(batch) for side, names in (("lhs", lhs), ("rhs", rhs)) if batch in names},
        proxy=proxy,
        labels=(lhs, rhs, output),
        parts=(shared, rows, columns),
    )


def upstream(output: Tensor, seed: int = 99) -> Tensor:
    """A seeded normal gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)


def gradients(output: Tensor, operands: Operands, seed: int = 99) -> Operands:
    """The gradients of the operands that need one, for a seeded gradient of the output."""
    towards = upstream(output, seed)
    wanted = {name: value for name, value in operands.items() if value.requires_grad}
    found = torch.autograd.grad(output, list(wanted.values()), towards)
    return dict(zip(wanted, found, strict=True))
