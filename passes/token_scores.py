"""Attention that is written out: a product of queries and keys, a softmax, and a product with the values.

What stands between the two products are *scores*. They have the same tokens along two axes, as queries and as keys, and
a sample of the tokens narrows both. Masks and biases go along on both axes, as they do where
``F.scaled_dot_product_attention`` is called; whatever else reads scores stops the analysis.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fx_approx.core.layer_types import layer_type
from fx_approx.core.values import Values
from fx_approx.passes.channel_flow import Flow, Link, Step, argument, first, through
from fx_approx.passes.channel_spaces import Layout
from fx_approx.passes.elementwise_rules import along, pointwise

PRODUCTS = (torch.matmul, operator.matmul, torch.bmm, "matmul", "__matmul__", "bmm")
"""What multiplies two tensors over the last axis of the first."""

ADDED_PRODUCTS = (torch.baddbmm, "baddbmm")
"""The same with something that the product is added to."""

SOFTMAXES = (torch.softmax, torch.special.softmax, F.softmax, "softmax")


# Where attention is


@dataclasses.dataclass(frozen=True)
class Attention:
    """Where tokens mix.

    Attributes:
        node: What puts out the queries' tokens.
        operands: Queries, keys and values.
        tokens: How many queries there are, at most.
    """

    node: fx.Node
    operands: tuple[fx.Node, ...]
    tokens: int


def find_attention(root: nn.Module, graph: fx.Graph, values: Values) -> list[Attention]:
    """All attentions of ``graph``, in order."""
    found = {one.node: one for node in graph.nodes for one in _at(root, values, node)}
    return [found[node] for node in graph.nodes if node in found]


def _at(root: nn.Module, values: Values, node: fx.Node) -> Iterator[Attention]:
    sizes = values.of(node)
    if node.target is F.scaled_dot_product_attention:
        operands = [argument(node, place, name) for place, name in enumerate(("query", "key", "value"))]
        yield Attention(node, tuple(operands), 0 if sizes is None else sizes[-2])
    elif sizes is not None and len(sizes) > 2 and _is_softmax(root, node):
        before, behind = _before(values, node), _behind(values, node)
        if before is not None and behind is not None:
            yield Attention(behind[0], (*_factors(before), behind[1]), max(sizes[1:]))


def _is_softmax(root: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return layer_type(root.get_submodule(str(node.target))) is nn.Softmax
    return node.op in ("call_function", "call_method") and node.target in SOFTMAXES


def _before(values: Values, node: fx.Node) -> fx.Node | None:
    """The product that makes the scores of a softmax, among what is as large."""
    waiting, entries = [node], _entries(values, node)
    for found in waiting:  # grows meanwhile
        for source in found.all_input_nodes:
            if _entries(values, source) == entries and source not in waiting:
                if _factors(source):
                    return source
                waiting.append(source)
    return None


def _behind(values: Values, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The product that reads the weights of a softmax, and what it multiplies them with."""
    waiting, entries = [node], _entries(values, node)
    for found in waiting:  # grows meanwhile
        for user in found.users:
            if found in (factors := _factors(user)):
                return user, factors[1 - factors.index(found)]
            if _entries(values, user) == entries and user not in waiting:
                waiting.append(user)
    return None


def _entries(values: Values, node: fx.Node) -> int:
    sizes = values.of(node)
    return 0 if sizes is None else math.prod(sizes)


def _factors(node: fx.Node) -> list[fx.Node]:
    """The two tensors that ``node`` multiplies; empty if it is no product of two."""
    if node.op not in ("call_function", "call_method"):
        return []
    if node.target is torch.einsum:
        given = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (list, tuple)) else node.args[1:]
    elif node.target in PRODUCTS:
        given = (first(node), argument(node, 1, "mat2" if node.target in (torch.bmm, "bmm") else "other"))
    elif node.target in ADDED_PRODUCTS:
        given = (argument(node, 1, "batch1"), argument(node, 2, "batch2"))
    else:
        return []
    found = [one for one in given if isinstance(one, fx.Node)]
    return found if len(found) == len(given) == 2 else []


# What products do to tokens


@dataclasses.dataclass(frozen=True)
class _Factor:
    """An operand of a product: a name for each of its axes, and the axes along which its tokens lie."""

    node: fx.Node
    names: tuple[str, ...]
    layout: Layout | None
    tokens: tuple[str, ...]


def product(flow: Flow, node: fx.Node) -> Step | None:
    """``matmul``, ``bmm``, ``baddbmm``, ``einsum`` of two: row by row, or the first or second one of an attention."""
    found = _named(flow, node)
    if found is None:
        return None
    factors, result = found
    holding = [one for one in factors if one.layout is not None]
    if len(holding) == 1:
        return _row_by_row(flow, node, holding[0], factors[factors[0] is holding[0]], result)
    if len(holding) == 2 and all(len(one.tokens) == 1 for one in holding):
        return _scores(flow, node, holding[0], holding[1], result)
    weights = [one for one in holding if len(one.tokens) == 2]
    return _weighted(flow, node, weights[0], holding[holding[0] is weights[0]], result) if len(weights) == 1 else None


def _named(flow: Flow, node: fx.Node) -> tuple[list[_Factor], tuple[str, ...]] | None:
    """The factors of a product, and the names of the axes of its result."""
    operands, made = _factors(node), flow.shape(node)
    shapes = [flow.shape(one) for one in operands]
    if not operands or made is None or any(shape is None or len(shape) < 2 for shape in shapes):
        return None
    if node.target is torch.einsum:
        equation = str(node.args[0]).replace(" ", "")
        if "->" not in equation or "." in equation:
            return None
        given, _, result = equation.partition("->")
        names = [tuple(one) for one in given.split(",")]
        if any(len(set(one)) != len(one) for one in names):
            return None
        out = tuple(result)
    else:
        rank = len(made)
        batch = [tuple(f"batch {axis}" for axis in range(rank - len(shape or ()), rank - 2)) for shape in shapes]
        names = [(*batch[0], "row", "pair"), (*batch[1], "pair", "column")]
        out = (*(f"batch {axis}" for axis in range(rank - 2)), "row", "column")
    factors = []
    for one, axes in zip(operands, names, strict=True):
        layout, also = flow.layout(one), flow.steps[one].also
        places = [] if layout is None else [layout.dim, *([] if also is None else [also])]
        factors.append(_Factor(one, axes, layout, tuple(axes[place] for place in places)))
    return factors, out


def _row_by_row(flow: Flow, node: fx.Node, own: _Factor, other: _Factor, result: tuple[str, ...]) -> Step | None:
    """Tokens that are not contracted over; what has an entry for each of them goes along."""
    assert own.layout is not None
    if len(own.tokens) != 1 or own.tokens[0] not in result or node.target in ADDED_PRODUCTS:
        return None
    (name,) = own.tokens
    sizes = flow.shape(other.node)
    assert sizes is not None
    follow = [(other.node, axis) for axis, one in enumerate(other.names) if one == name and sizes[axis] != 1]
    step = through(own.node, own.layout, result.index(name))
    return dataclasses.replace(step, follow=tuple(follow))


def _scores(flow: Flow, node: fx.Node, query: _Factor, key: _Factor, result: tuple[str, ...]) -> Step | None:
    """Each token with each."""
    rows, columns = query.tokens[0], key.tokens[0]
    if rows == columns or rows in key.names or columns in query.names or not {rows, columns} <= set(result):
        return None
    if not _are_same(flow, query, key):
        return None
    assert query.layout is not None
    axes = result.index(rows), result.index(columns)
    links = tuple(Link(one.node, 0, 0, len(query.layout.segments)) for one in (query, key))
    follow: tuple[tuple[fx.Node, int], ...] = ()
    if node.target in ADDED_PRODUCTS:
        beside = _beside(flow, node, argument(node, 0, "input"), axes)
        if beside is None:
            return None
        follow = tuple(beside)
    return Step(Layout(axes[0], query.layout.segments), links, follow, "plain", also=axes[1])


def _weighted(flow: Flow, node: fx.Node, weights: _Factor, value: _Factor, result: tuple[str, ...]) -> Step | None:
    """Values of the tokens, weighted by a softmax: of those that are there."""
    axis = _normalised(flow, weights.node)
    if axis is None or len(value.tokens) != 1 or node.target in ADDED_PRODUCTS:
        return None
    keys = weights.names[axis]
    (rows,) = (name for name in weights.tokens if name != keys)
    if value.tokens[0] != keys or keys in result or rows in value.names or rows not in result:
        return None
    if not _are_same(flow, weights, value):
        return None
    assert weights.layout is not None
    links = tuple(Link(one.node, 0, 0, len(weights.layout.segments)) for one in (weights, value))
    return Step(Layout(result.index(rows), weights.layout.segments), links, (), "plain")


def _are_same(flow: Flow, one: _Factor, other: _Factor) -> bool:
    """Whether both hold the same tokens; they do from then on."""
    assert one.layout is not None and other.layout is not None
    segments = [*one.layout.segments, *other.layout.segments]
    if any(segment.block != 1 for segment in segments) or not _are_plain(flow, one) or not _are_plain(flow, other):
        return False
    if not flow.spaces.align(one.layout.segments, other.layout.segments):
        return False
    flow.spaces.merge(one.layout.segments, other.layout.segments)
    return True


def _are_plain(flow: Flow, one: _Factor) -> bool:
    """Whether no other axis, such as that of the examples, is one with that of the tokens."""
    sizes = flow.shape(one.node)
    assert sizes is not None and one.layout is not None
    return sizes[one.layout.dim] == one.layout.size


# What stands between the products


def are_scores(flow: Flow, node: Any) -> bool:
    """Whether ``node`` has tokens along two axes."""
    return isinstance(node, fx.Node) and node in flow.steps and flow.steps[node].also is not None


def begins_scores(flow: Flow, node: fx.Node) -> bool:
    """Whether ``node`` multiplies queries with keys of the same tokens."""
    return are_scores(flow, node) and not any(are_scores(flow, source) for source in node.all_input_nodes)


def mixes(flow: Flow, node: fx.Node) -> bool:
    """Whether ``node`` is the first or the second product of an attention that is written out."""
    ends = any(are_scores(flow, source) for source in node.all_input_nodes) and not are_scores(flow, node)
    return begins_scores(flow, node) or (ends and flow.layout(node) is not None)


def each(flow: Flow, node: fx.Node) -> Step | None:
    """Scores one by one."""
    source = first(node)
    step = pointwise(flow, node) if are_scores(flow, source) else None
    return None if step is None else dataclasses.replace(step, also=flow.steps[source].also)


def combined(flow: Flow, node: fx.Node) -> Step | None:
    """Scores with others of the same tokens, or with what goes along: a mask or a bias, on both axes."""
    tensors = [one for one in node.all_input_nodes if flow.shape(one) is not None]
    lead, result = next(one for one in tensors if are_scores(flow, one)), flow.shape(node)
    layout, sizes, also = flow.layout(lead), flow.shape(lead), flow.steps[lead].also
    assert layout is not None and sizes is not None and also is not None
    if result != sizes:
        return None
    links, follow = [], []
    for one in tensors:
        if are_scores(flow, one):
            own = flow.layout(one)
            assert own is not None
            if (own.dim, flow.steps[one].also) != (layout.dim, also):
                return None
            if not flow.spaces.align(layout.segments, own.segments):
                return None
            flow.spaces.merge(layout.segments, own.segments)
            links.append(Link(one, 0, 0, len(layout.segments)))
            continue
        beside = _beside(flow, node, one, (layout.dim, also))
        if beside is None:
            return None
        follow += beside
    return Step(layout, tuple(links), tuple(follow), "plain", also=also)


def _beside(flow: Flow, node: fx.Node, operand: Any, axes: Sequence[int]) -> list[tuple[fx.Node, int]] | None:
    """The axes of ``operand`` that go along with the tokens of scores; None if it holds tokens itself."""
    sizes, result = flow.shape(operand), flow.shape(node)
    if sizes is None or result is None or flow.layout(operand) is not None:
        return None
    own = [axis - len(result) + len(sizes) for axis in axes]
    return [(operand, axis) for axis in own if axis >= 0 and sizes[axis] != 1]


def softmax(flow: Flow, node: fx.Node) -> Step | None:
    """Along an axis that is not the tokens'; of scores along one of their two."""
    source = first(node)
    if not are_scores(flow, source):
        return along(1)(flow, node)
    layout, also = flow.layout(source), flow.steps[source].also
    assert layout is not None
    return each(flow, node) if _axis(flow, node) in (layout.dim, also) else None


def _axis(flow: Flow, node: fx.Node) -> int | None:
    """Along which a softmax goes."""
    module, sizes = flow.module(node), flow.shape(node)
    given = argument(node, 1, "dim") if module is None else getattr(module, "dim", None)
    return given % len(sizes) if isinstance(given, int) and sizes is not None else None


def _normalised(flow: Flow, weights: fx.Node) -> int | None:
    """Along which axis ``weights`` went through a softmax; None if they did not."""
    node, sizes = weights, flow.shape(weights)
    while are_scores(flow, node):
        if node.target in SOFTMAXES or (node.op == "call_module" and isinstance(flow.module(node), nn.Softmax)):
            axis, own = _axis(flow, node), flow.shape(node)
            return None if axis is None or own is None or sizes is None else axis - len(own) + len(sizes)
        node = next((one for one in node.all_input_nodes if are_scores(flow, one)), node.all_input_nodes[0])
    return None


def regrouped(flow: Flow, node: fx.Node) -> Step | None:
    """Reshapes that leave the last two axes, those of the tokens, as they are: heads and examples become one axis."""
    source = first(node)
    before, after = flow.shape(source), flow.shape(node)
    if not are_scores(flow, source) or before is None or after is None or before[-2:] != after[-2:]:
        return None
    layout, also = flow.layout(source), flow.steps[source].also
    assert layout is not None and also is not None
    moved = [axis - len(before) + len(after) for axis in (layout.dim, also)]
    if min(layout.dim, also) != len(before) - 2:
        return None
    action = "resize" if node.target in (torch.reshape, "view", "reshape") else "plain"
    step = through(source, layout, moved[0], action=action, axis=moved[0])
    return dataclasses.replace(step, also=moved[1])
