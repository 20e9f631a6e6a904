"""What operations do to tokens: the rules of channels, but where a token is a row and not a column.

A linear layer contracts over its last axis, so that it works on each token by itself. Attention is the one place where
tokens mix and a sample of them serves: its keys and values are those of the tokens that are there. Everything else that
mixes positions has no rule and stops the analysis.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fx_approx.core.layer_types import PRODUCT_LAYERS
from fx_approx.passes import token_scores
from fx_approx.passes.channel_flow import Flow, Handler, Link, Step, argument, first, through
from fx_approx.passes.channel_spaces import Layout, regroup, stretch
from fx_approx.passes.elementwise_rules import coupled, elementwise, pointwise
from fx_approx.passes.layer_rules import CONVOLUTIONS, TRANSPOSED
from fx_approx.passes.node_words import place
from fx_approx.passes.operations import BY_NAME, FUNCTIONS, MODULES
from fx_approx.passes.reshape_rules import RESHAPES, spelled_out
from fx_approx.passes.token_checks import are_rows


def row_wise(flow: Flow, node: fx.Node) -> Step | None:
    """A linear layer or ``F.linear``: over the last axis, which must not be the tokens'."""
    source, result = first(node), flow.shape(node)
    layout, shape = flow.layout(source), flow.shape(source)
    if layout is None or shape is None or result is None or layout.dim == len(shape) - 1:
        return None
    if len(result) != len(shape) or any(flow.layout(other) is not None for other in node.all_input_nodes[1:]):
        return None
    return through(source, layout)


def on_scores(handler: Handler) -> Handler:
    """``handler``, but of scores of attention what is known to serve both of their axes."""

    def handle(flow: Flow, node: fx.Node) -> Step | None:
        if not any(token_scores.are_scores(flow, source) for source in node.all_input_nodes):
            return handler(flow, node)
        own = _ON_SCORES.get(handler)
        step = None if own is None else own(flow, node)
        if step is None:
            flow.stopped[node] = f"{place(node)} reads scores of attention, and is not known to serve some of them"
        return step

    return handle


def affine(flow: Flow, node: fx.Node) -> Step | None:
    """``torch.addmm(bias, rows, weight)``."""
    bias, rows = argument(node, 0, "input"), argument(node, 1, "mat1")
    layout, shape, result = flow.layout(rows), flow.shape(rows), flow.shape(node)
    given = flow.shape(bias)
    if layout is None or shape is None or result is None or layout.dim != 0 or given is None or len(given) != 1:
        return None
    if flow.layout(argument(node, 2, "mat2")) is not None:
        return None
    return through(rows, layout)


def embedding(flow: Flow, node: fx.Node) -> Step | None:
    """A row of a table for each token."""
    layout = flow.layout(first(node))
    return None if layout is None else through(first(node), layout)


def attention(flow: Flow, node: fx.Node) -> Step | None:
    """``F.scaled_dot_product_attention``: puts out the queries' tokens; keys and values come from any tokens.

    Keys and values of the same tokens as the queries are those that are chosen; a mask goes along on both axes.
    """
    query, key, value = (argument(node, at, name) for at, name in enumerate(("query", "key", "value")))
    mask, result = argument(node, 3, "attn_mask"), flow.shape(node)
    layouts = [flow.layout(one) for one in (query, key, value)]
    shapes = [flow.shape(one) for one in (query, key, value)]
    if result is None or any(shape is None for shape in shapes):
        return None
    for layout, shape in zip(layouts, shapes, strict=True):
        if layout is not None and shape is not None and layout.dim != len(shape) - 2:
            return None
    queries, keys, values = layouts
    if (keys is None) != (values is None):
        return None
    if queries is None and keys is not None and mask is None and not argument(node, 5, "is_causal", False):
        return _looked_at(flow, node)
    if queries is None or (keys is not None and argument(node, 5, "is_causal", False) and keys.size != queries.size):
        return None
    links = [Link(query, 0, 0, len(queries.segments))]
    for operand, layout in ((key, keys), (value, values)):
        if layout is not None:
            if not flow.spaces.align(queries.segments, layout.segments):
                return None
            flow.spaces.merge(queries.segments, layout.segments)
            links.append(Link(operand, 0, 0, len(layout.segments)))
    if keys is None and argument(node, 5, "is_causal", False):
        return None
    follow = [] if mask is None else _mask(flow, mask, queries, keys)
    if follow is None:
        flow.stopped[node] = f"{place(node)} has a mask or bias that is made of the tokens, or has no axis for them"
        return None
    return Step(Layout(len(result) - 2, queries.segments), tuple(links), tuple(follow), "plain")


def _looked_at(flow: Flow, node: fx.Node) -> Step | None:
    """Attention of other tokens to these: it is to those that are there."""
    links = []
    for operand in (argument(node, at, name) for at, name in enumerate(("key", "value"), 1)):
        layout = flow.layout(operand)
        assert layout is not None
        links.append(Link(operand, 0, 0, len(layout.segments)))
    return Step(None, tuple(links), (), "pool")


def _mask(flow: Flow, mask: fx.Node, queries: Layout, keys: Layout | None) -> list[tuple[fx.Node, int]] | None:
    """The axes of a mask that go along; None if it is no plain one."""
    sizes = flow.shape(mask)
    if sizes is None or flow.layout(mask) is not None or len(sizes) < 2:
        return None
    axes = []
    if sizes[-2] != 1:
        axes.append((mask, len(sizes) - 2))
    if keys is not None and sizes[-1] != 1:
        axes.append((mask, len(sizes) - 1))
    return axes


def joined(flow: Flow, node: fx.Node) -> Step | None:
    """Concatenation; an empty tensor before the tokens, as of a cache that holds nothing yet, adds none."""
    operands, dim, result = argument(node, 0, "tensors"), argument(node, 1, "dim", 0), flow.shape(node)
    if isinstance(operands, (tuple, list)) and isinstance(dim, int) and result is not None:
        filled = [one for one in operands if math.prod(flow.shape(one) or (1,))]
        layout = flow.layout(filled[0]) if len(filled) == 1 else None
        if layout is not None and layout.dim == dim % len(result):
            return through(filled[0], layout)
    return RESHAPES[torch.cat](flow, node)


def item(flow: Flow, node: fx.Node) -> Step | None:
    """Indexing; one token by its number is a token that must be there."""
    if are_rows(flow, first(node)):
        return None
    step = RESHAPES[operator.getitem](flow, node)
    if step is not None:
        return step
    source, place = node.args
    layout, shape = flow.layout(source), flow.shape(source)
    if layout is None or shape is None or not isinstance(source, fx.Node):
        return None
    if (axis := _listed_axis(place, len(shape))) is not None:
        return None if axis == layout.dim else through(source, layout)
    places = spelled_out(place, len(shape))
    if places is None or any(p is None for p in places[: layout.dim + 1]) or len(places) <= layout.dim:
        return None
    number = places[layout.dim]
    if isinstance(number, bool) or not isinstance(number, int) or not -layout.size <= number < layout.size:
        return None
    number %= layout.size
    ends = stretch(flow.spaces, layout.segments, number, number + 1)
    if ends is None:
        return None
    return Step(None, (Link(source, ends[0], 0, ends[1] - ends[0]),), (), "pick")


def _listed_axis(place: Any, dims: int) -> int | None:
    """The one axis of which a list of numbers takes entries, beside whole axes; None for any other index."""
    places = list(place) if isinstance(place, tuple) else [place]
    lists = [one for one in places if isinstance(one, (list, tuple))]
    whole = spelled_out(tuple(slice(None) if one in lists else one for one in places), dims)
    if len(lists) != 1 or whole is None or any(one != slice(None) for one in whole):
        return None
    at = places.index(lists[0])
    return dims - len(places) + at if ... in places[:at] else at


def pooled(flow: Flow, node: fx.Node) -> Step | None:
    """A mean, maximum or sum: along other axes as ever; along the tokens' it is over those that are there."""
    usual = FUNCTIONS.get(node.target)
    step = None if usual is None else usual(flow, node)
    if step is not None:
        return step
    source = first(node)
    layout, shape = flow.layout(source), flow.shape(source)
    if node.target in ("max", torch.max) and not all(map(_reads_values, node.users)):
        return None  # places would be counted among those that are there
    given = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    axes = (given,) if isinstance(given, int) else given
    if layout is None or shape is None or not isinstance(axes, (tuple, list)):
        return None
    if not all(isinstance(axis, int) for axis in axes) or layout.dim not in {axis % len(shape) for axis in axes}:
        return None
    return Step(None, (Link(source, 0, 0, len(layout.segments)),), (), "pool")


def _reads_values(user: fx.Node) -> bool:
    """Whether ``user`` takes the values of a maximum with its places."""
    return user.target in (operator.getitem, getattr) and user.args[1] in (0, "values")


def pieces(flow: Flow, node: fx.Node) -> Step | None:
    """Splits and stretches; not of rows, which begin anew with each example."""
    return None if are_rows(flow, first(node)) else RESHAPES[node.target](flow, node)


def reshaped(flow: Flow, node: fx.Node) -> Step | None:
    """Reshapes; examples and tokens may become rows together, and rows examples and tokens again."""
    source = first(node)
    layout, before, after = flow.layout(source), flow.shape(source), flow.shape(node)
    if layout is None or before is None or after is None:
        return None
    sized = node.target in _SIZED
    if layout.dim == 1 and len(before) == 3 and len(after) == 2 and after == (before[0] * before[1], before[2]):
        return through(source, Layout(0, layout.segments), action="rows" if sized else "plain")
    if are_rows(flow, source):
        if sized and layout.dim == 0 and len(after) == 3 and after[:2] == (before[0] // layout.size, layout.size):
            return through(source, Layout(1, layout.segments), action="resize", axis=1)
        return None
    if _is_grid(layout, before, after):
        flow.stopped[node] = f"{place(node)} takes tokens for places of a grid"
        return None
    return RESHAPES[node.target if node.op != "call_module" else torch.reshape](flow, node)


def _is_grid(layout: Layout, before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether the axis of the tokens becomes several, as rows and columns of an image."""
    for old, new in regroup(tuple(before), tuple(after)):
        wide = [axis for axis in new if after[axis] != 1]
        if layout.dim in old and len(wide) > 1:
            inner = math.prod(after[axis] for axis in wide[1:])
            return any(segment.block != inner for segment in layout.segments)
    return False


_ON_SCORES: dict[Handler, Handler] = {
    pointwise: token_scores.each,
    **dict.fromkeys((elementwise, coupled), token_scores.combined),
    reshaped: token_scores.regrouped,
    **{handler: handler for handler in (token_scores.softmax, token_scores.product)},
}
"""By what an operation does to tokens, what it does to scores; nothing else is known to serve both of their axes."""

_SIZED = (torch.reshape, "view", "reshape")
"""Reshapes that are told the size of every axis of the result."""

_POOLS = ("mean", "amax", "max", "sum", "amin")
_LINEAR = tuple(kind for kind in PRODUCT_LAYERS if issubclass(kind, nn.Linear))

TOKEN_MODULES: dict[type[nn.Module], Handler | None] = {
    **dict.fromkeys(PRODUCT_LAYERS),
    **dict.fromkeys(_LINEAR, row_wise),
    nn.Embedding: embedding,
    nn.Softmax: token_scores.softmax,
    **dict.fromkeys((nn.Flatten, nn.Unflatten), reshaped),
}
"""By type of a layer, where it differs from what it does to channels; None for what mixes tokens."""

TOKEN_FUNCTIONS: dict[Any, Handler | None] = {
    **dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED)),
    F.linear: row_wise,
    **dict.fromkeys((torch.einsum, *token_scores.PRODUCTS, *token_scores.ADDED_PRODUCTS), token_scores.product),
    **dict.fromkeys(token_scores.SOFTMAXES, token_scores.softmax),
    **dict.fromkeys((torch.addmm, "addmm"), affine),
    F.embedding: embedding,
    F.scaled_dot_product_attention: attention,
    **dict.fromkeys((operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub), elementwise),
    **dict.fromkeys(("add", "add_", "sub", "__add__", "__radd__", "__sub__", "__rsub__"), elementwise),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), joined),
    operator.getitem: item,
    **dict.fromkeys((torch.chunk, torch.split, torch.tensor_split, "chunk", "split", "tensor_split"), pieces),
    **dict.fromkeys((torch.narrow, "narrow"), pieces),
    **dict.fromkeys((*_POOLS, *(getattr(torch, name) for name in _POOLS)), pooled),
    **{call: reshaped for call, usual in RESHAPES.items() if usual in (RESHAPES[torch.reshape], RESHAPES["view_as"])},
}
"""The same, by function or name of a method."""


def rule_of_module(kind: type[nn.Module]) -> Handler | None:
    """What a layer does to tokens."""
    found = TOKEN_MODULES[kind] if kind in TOKEN_MODULES else MODULES.get(kind)
    return None if found is None else on_scores(found)


def rule_of_call(target: Any) -> Handler | None:
    """What a function, or the method of a name, does to tokens."""
    if target in TOKEN_FUNCTIONS:
        found = TOKEN_FUNCTIONS[target]
    else:
        found = FUNCTIONS.get(target) or BY_NAME.get(getattr(target, "__name__", ""))
    return None if found is None else on_scores(found)
