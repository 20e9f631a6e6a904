"""What reads the tokens of a stretch in a way that some of them cannot serve, though each step alone could.

A size that is used as a number, a count over a mask, a value that is changed later: no rule of a single operation sees
these. What is found here leaves a stretch whole, and the report says why.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from fx_approx.passes.aliasing import changes_in_place, same_memory
from fx_approx.passes.channel_flow import AS_ANOTHER, Flow, argument, asks_sizes, first, reads_shape_only
from fx_approx.passes.node_words import place
from fx_approx.passes.reshape_rules import RESHAPES

_SUMS = (*("sum", "mean", "amax", "amin"), torch.sum, torch.mean, torch.amax, torch.amin)


@dataclasses.dataclass(frozen=True)
class Sum:
    """A sum or mean over what goes along with the tokens, which goes along itself: ``mask.sum(1)`` below a mean.

    Attributes:
        node: The sum.
        rider: What is summed.
        axis: Where it has an entry for each token.
        reader: A value of the stretch that reads it, too.
    """

    node: fx.Node
    rider: fx.Node
    axis: int
    reader: fx.Node


def sums_along(flow: Flow, start: fx.Node, inside: Iterable[fx.Node]) -> tuple[Sum, ...]:
    """The sums over values that go along, where the tokens do not come back."""
    among = set(inside)
    order = {node: at for at, node in enumerate(flow.graph.nodes)}
    found = []
    for rider, ways in _riders(flow, among).items():
        axes = {axis for axis, _ in ways}
        for user in rider.users if len(axes) == 1 else ():
            if user in among or order[user] < order[start] or first(user) is not rider or user.target not in _SUMS:
                continue
            if _sums_over(flow, user, ways[0][0]):
                found.append(Sum(user, rider, *ways[0]))
    return tuple(found)


def _sums_over(flow: Flow, node: fx.Node, axis: int) -> bool:
    given, sizes = argument(node, 1, "dim"), flow.shape(first(node))
    axes = (given,) if isinstance(given, int) else given
    if sizes is None or not isinstance(axes, (tuple, list)) or not all(isinstance(one, int) for one in axes):
        return False
    return axis in {one % len(sizes) for one in axes}


def _riders(flow: Flow, inside: set[fx.Node]) -> dict[fx.Node, list[tuple[int, fx.Node]]]:
    """What goes along with the tokens: at which axis, and who reads it."""
    found: dict[fx.Node, list[tuple[int, fx.Node]]] = {}
    for node in flow.graph.nodes:
        for operand, axis in flow.steps[node].follow if node in inside else ():
            found.setdefault(operand, []).append((axis, node))
    return found


def misread(
    flow: Flow, start: fx.Node, inside: Iterable[fx.Node], sums: Collection[Sum] | None = None
) -> Iterator[str]:
    """Why the tokens between ``start`` and the end of a stretch are all needed; nothing if some serve.

    Args:
        flow: Where the tokens lie in each value.
        start: The value at which they would leave.
        inside: The values of which only some tokens would be computed.
        sums: Those of :func:`sums_along` where they do not come back, so that all that is made of them counts.
    """
    among = set(inside)
    behind = among if sums is None else _behind(flow, start)
    riders = _riders(flow, among)
    for node in flow.graph.nodes:
        if node in behind and node.op != "output":
            yield from _counted(flow, start, node)
        if node in among:
            yield from _as_wide(node, among)
            if flow.steps[node].follow and _in_blocks(flow, node):
                yield f"{place(node)} reads values for tokens and examples together"
    yield from _changed(flow, start, riders)
    yield from _summed(flow, start, {*riders, *(one.node for one in sums or ())}, behind)


def _behind(flow: Flow, start: fx.Node) -> set[fx.Node]:
    found = {start}
    for node in flow.graph.nodes:
        if any(source in found and not reads_shape_only(node, source) for source in node.all_input_nodes):
            found.add(node)
    return found - {start}


def _counted(flow: Flow, start: fx.Node, node: fx.Node) -> Iterator[str]:
    """The number of tokens as a factor or a bound, as in ``x.sum(1) / x.shape[1]``."""
    if node.target in RESHAPES:
        return
    for operand in node.all_input_nodes:
        if operand.name not in flow.values.shapes and _counts_tokens(flow, start, operand):
            yield f"{place(node)} computes with the number of tokens"
            return


def _counts_tokens(flow: Flow, start: fx.Node, number: fx.Node) -> bool:
    """Whether a number is made of the length of an axis of tokens, or of one as long where that is not known."""
    waiting, seen = [number], {number}
    while waiting:
        found = waiting.pop()
        asked = first(found)
        if asks_sizes(found) and found.op == "call_method" and len(found.args) > 1:
            if _is_tokens(flow, start, asked, found.args[1]):
                return True
        elif found.target is operator.getitem and isinstance(asked, fx.Node) and asks_sizes(asked):
            if _is_tokens(flow, start, first(asked), found.args[1]):
                return True
        elif asks_sizes(found) and found is not number:
            if _is_tokens(flow, start, asked, slice(None)):
                return True
        elif found.op == "placeholder":
            return True  # a number that is handed in may be any size
        elif not asks_sizes(found):
            more = {one for one in found.all_input_nodes if one.name not in flow.values.shapes} - seen
            seen |= more
            waiting += more
    return False


def _is_tokens(flow: Flow, start: fx.Node, value: object, axis: Any) -> bool:
    sizes, layout = flow.shape(value), flow.layout(value)
    if sizes is None:
        return False
    asked = range(len(sizes))[axis] if isinstance(axis, (int, slice)) else range(len(sizes))
    axes = [asked] if isinstance(asked, int) else list(asked)
    return layout.dim in axes if layout is not None else any(sizes[one] in _lengths(flow, start) for one in axes)


def _lengths(flow: Flow, start: fx.Node) -> set[int]:
    """How long an axis is that has an entry for each token: all of them, or those beside a class token."""
    layout = flow.layout(start)
    assert layout is not None
    counts = [segment.count for segment in layout.segments]
    ends = range(len(counts) + 1)
    runs = [counts[first:last] for first in ends for last in ends[first:]]
    return {sum(run) for run in runs if max(counts) in run}


def _as_wide(node: fx.Node, inside: set[fx.Node]) -> Iterator[str]:
    """Another value that is made as large as one of which some tokens are there."""
    for user in node.users:
        if user.op == "call_method" and user.target in AS_ANOTHER and user not in inside and user.args[0] is not node:
            yield f"{place(user)} takes its size from {place(node)}"


def _in_blocks(flow: Flow, node: fx.Node) -> bool:
    layout = flow.layout(node)
    return layout is not None and any(segment.block > 1 for segment in layout.segments)


def _changed(flow: Flow, start: fx.Node, riders: Iterable[fx.Node]) -> Iterator[str]:
    """What goes along with the tokens is gathered once, so it must stay as it is."""
    order = {node: at for at, node in enumerate(flow.graph.nodes)}
    for rider in riders:
        for value in same_memory(flow, rider):
            for user in value.users:
                if first(user) is value and order[user] > order[start] and changes_in_place(flow, user):
                    yield f"{place(user)} changes {place(rider)} in place, which goes along with the tokens"


def _summed(flow: Flow, start: fx.Node, riders: Iterable[fx.Node], behind: set[fx.Node]) -> Iterator[str]:
    """A sum over what goes along, read beside the tokens: the number of ones in a padding mask, for a mean."""
    lengths, along = _lengths(flow, start), set(riders)
    others = [
        node
        for node in flow.graph.nodes
        if node not in behind and node not in along and flow.layout(node) is None and node.name in flow.values.shapes
    ]
    family, told = _family(flow, along, lengths, behind), _told(flow, start, others)
    for node in others:
        known = [one for one in node.all_input_nodes if one in family]
        fewer = known and _times(flow, node, lengths) < max(_times(flow, one, lengths) for one in known)
        counts = node in told and flow.shape(node) is not None and not _times(flow, node, lengths)
        if (fewer or counts) and any(user in behind for user in _beside(flow, node, along, behind)):
            what = "all tokens' entries of what goes along with them" if fewer else "the number of tokens"
            yield f"{place(node)} is made of {what}"


def _told(flow: Flow, start: fx.Node, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Tensors that are made of the number of tokens, as ``torch.ones(tokens)`` is, and what these alone become."""
    found: set[fx.Node] = set()
    for node in nodes:
        given = [one for one in node.all_input_nodes if one.op != "get_attr" and one.name in flow.values.shapes]
        if (given and found.issuperset(given)) or next(_counted(flow, start, node), None) is not None:
            found.add(node)
    return found


def _family(flow: Flow, along: set[fx.Node], tokens: set[int], behind: set[fx.Node]) -> set[fx.Node]:
    """What goes along, what it is made of, and what else that becomes, as far as it has an axis as long."""
    waiting, found = list(along), set(along)
    while waiting:
        node = waiting.pop()
        for one in (*node.all_input_nodes, *node.users):
            if one not in found and one not in behind and flow.layout(one) is None and _times(flow, one, tokens):
                found.add(one)
                waiting.append(one)
    return found


def _times(flow: Flow, node: fx.Node, tokens: set[int]) -> int:
    """How many axes are as long as there are tokens."""
    return sum(size in tokens for size in flow.shape(node) or ())


def _beside(flow: Flow, node: fx.Node, along: set[fx.Node], behind: set[fx.Node]) -> set[fx.Node]:
    """Who reads what is made of ``node``, other than by way of what goes along, or of tokens before a stretch."""
    waiting, found = [node], set()
    while waiting:
        for user in waiting.pop().users:
            if user not in found and user not in along:
                found.add(user)
                if user not in behind and user.op != "output" and flow.layout(user) is None:
                    waiting.append(user)
    return found


def are_rows(flow: Flow, value: object) -> bool:
    """Whether examples and tokens are one axis of ``value``."""
    layout, shape = flow.layout(value), flow.shape(value)
    return layout is not None and shape is not None and shape[layout.dim] != layout.size


def is_sized_once(flow: Flow, value: fx.Node) -> bool:
    """Whether no two stretches of the tokens of ``value`` are one space, as where a token is added to its neighbour."""
    layout = flow.layout(value)
    assert layout is not None
    roots = [flow.spaces.find(segment.space) for segment in layout.segments]
    return len(roots) == len(set(roots))


def spelled_slice(node: fx.Node) -> slice:
    """The index that ``narrow(dim, start, length)`` stands for, along its axis."""
    start, length = argument(node, 2, "start"), argument(node, 3, "length")
    return slice(start, None if start < 0 and start + length == 0 else start + length)
