"""Examples: along which axis of each value of a stretch they lie, where each is to keep tokens of its own.

That is a flow like that of the tokens, along another axis. It has to reach every value of the stretch: what mixes
examples token by token, such as a mean over the batch, needs the same tokens of all of them.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import fx

from fx_approx.core.token_sampling import TokenSampling
from fx_approx.passes.aliasing import changes_in_place, same_memory
from fx_approx.passes.channel_flow import Flow, Step, argument, asks_sizes, first, reads_shape_only
from fx_approx.passes.channel_rules import handle as handle_by
from fx_approx.passes.node_words import place
from fx_approx.passes.operations import FUNCTIONS
from fx_approx.passes.token_checks import Sum, are_rows
from fx_approx.passes.token_rules import rule_of_call, rule_of_module
from fx_approx.passes.token_scores import are_scores
from fx_approx.runtime.graph_program import PROLOGUE

_LIKE = "one selection serves all examples"
_RANDOM = ("dropout", "rand", "bernoulli", "normal", "multinomial")


@dataclasses.dataclass(frozen=True)
class Padding:
    """The mask of the first attention of a stretch, which says what no query may attend to.

    Attributes:
        mask: The value.
        axis: Of the examples, counted from the end.
        start: Where along its last axis the tokens begin that may be left out.
        later: What it is made of behind the beginning of the stretch, in order; none of it is made of tokens.
    """

    mask: fx.Node
    axis: int
    start: int
    later: tuple[fx.Node, ...]


@dataclasses.dataclass(frozen=True)
class Examples:
    """Where the examples lie in a stretch.

    Attributes:
        flow: In each value.
        tokens: Where the tokens lie.
        start: What the stretch reads.
        padding: What tells padding; None if nothing does, or no one asks.
    """

    flow: Flow
    tokens: Flow
    start: fx.Node
    padding: Padding | None

    @property
    def axis(self) -> int:
        """That of what the stretch reads."""
        layout = self.flow.layout(self.start)
        assert layout is not None
        return layout.dim

    @property
    def count(self) -> int:
        """How many there are in the example."""
        layout = self.flow.layout(self.start)
        assert layout is not None
        return layout.size

    def place(self, source: fx.Node, reader: fx.Node) -> tuple[int, int]:
        """The axis of the examples in ``source``, from the end, and how many axes it needs to have it.

        What is not made of the stretch is broadcast to the value of its ``reader``.
        """
        own, sizes = self.flow.layout(source), self.flow.shape(source)
        assert sizes is not None
        if own is not None:
            return own.dim - len(sizes), len(sizes)
        layout, result = self.flow.layout(reader), self.flow.shape(reader)
        assert layout is not None and result is not None
        return layout.dim - len(result), max(len(result), len(sizes))

    def size(self, node: fx.Node) -> tuple[int, ...] | int | None:
        """What ``node`` asks for, the size of a value of the stretch: an axis of :attr:`start`, or a number.

        The axis is in a tuple of its own. None if it is not known.
        """
        asked = first(node)
        given = node.args[1] if len(node.args) > 1 else None
        if node.target is operator.getitem and isinstance(asked, fx.Node) and asks_sizes(asked):
            asked = first(asked)
        elif not (asks_sizes(node) and node.op == "call_method"):
            return None
        sizes, own, batch = self.flow.shape(asked), self.tokens.layout(asked), self.flow.layout(asked)
        whole = self.tokens.layout(self.start)
        if sizes is None or whole is None or own is None or batch is None or not isinstance(given, int):
            return None
        if own.dim == batch.dim:
            return None
        axis = given % len(sizes)
        if axis == own.dim:
            return (whole.dim,) if own.segments == whole.segments else None
        if axis == batch.dim:
            return (self.axis,) if batch.size == self.count else None
        return int(sizes[axis])


def find_examples(
    tokens: Flow,
    start: fx.Node,
    inside: Collection[fx.Node],
    sums: Sequence[Sum],
    is_sampled: Callable[[int], bool],
    sampling: TokenSampling,
) -> tuple[Examples | None, str]:
    """Where the examples lie in a stretch that is to choose for each; None where one selection serves all, and why.

    Args:
        tokens: Where the tokens lie in each value.
        start: What the stretch reads.
        inside: Its values.
        sums: What is summed over values that go along.
        is_sampled: Whether tokens of a space may be left out.
        sampling: What was asked for.
    """
    asked = sampling.per_example
    asks = sampling.padding == "first" and asked is not False
    attention = _masked(tokens, inside) if asks else None
    unread = _written_out(tokens, inside) if asks and attention is None else ""
    if asked is False or (asked is None and attention is None):
        return None, f"{place(start)}: padding is a token like any other: {unread}" if unread else ""
    found, why = _examples(tokens, start, inside, sums)
    if found is None:
        return None, f"{place(start)}: {_LIKE}: {why}"
    padding, why = (None, unread) if attention is None else _padding(tokens, found, attention, is_sampled)
    note = f"{place(start)}: padding is a token like any other: {why}" if why else ""
    if padding is None and asked is None:
        return None, note
    return dataclasses.replace(found, padding=padding), note


def _masked(tokens: Flow, inside: Collection[fx.Node]) -> fx.Node | None:
    """The first attention of a stretch with a mask that may say something of single examples."""
    attention: list[fx.Node] = [n for n in tokens.graph.nodes if n.target is F.scaled_dot_product_attention]
    for node in attention:
        if node not in inside:
            continue
        sizes = tokens.shape(argument(node, 3, "attn_mask"))
        if sizes is not None and len(sizes) > 2 and sizes[-1] > 1 and any(size > 1 for size in sizes[:-2]):
            return node
    return None


def _written_out(tokens: Flow, inside: Collection[fx.Node]) -> str:
    """Where attention that is written out has a mask or bias for each example, of which no one asks for padding."""
    for node in tokens.graph.nodes:
        if node not in inside or not are_scores(tokens, node):
            continue
        result = tokens.shape(node) or ()
        for operand, _ in tokens.steps[node].follow:
            sizes = tokens.shape(operand) or ()
            if len(sizes) == len(result) and sizes[0] > 1 and sizes[-1] > 1:
                return f"{place(node)} reads a mask or bias in attention that is written out"
    return ""


def _examples(
    tokens: Flow, start: fx.Node, inside: Collection[fx.Node], sums: Sequence[Sum]
) -> tuple[Examples | None, str]:
    sizes, layout = tokens.shape(start), tokens.layout(start)
    assert sizes is not None and layout is not None
    reasons = []
    for axis, size in enumerate(sizes):
        if axis == layout.dim or size == 1:
            continue
        found = Examples(_flow(tokens, start, axis), tokens, start, None)
        if why := _missed(tokens, found, inside, sums):
            reasons.append(why)
        else:
            return found, ""
    return None, reasons[0] if len(reasons) > 1 else "no axis of it holds several examples"


def _flow(tokens: Flow, start: fx.Node, axis: int) -> Flow:
    behind = {start}
    for node in tokens.graph.nodes:
        if any(source in behind for source in node.all_input_nodes):
            behind.add(node)

    def handle(flow: Flow, node: fx.Node) -> Step | None:
        if node is start:
            return Step(flow.spaces.new(node, axis, (flow.shape(node) or ())[axis]))
        if node not in behind:
            return None
        return handle_by(flow, node, rule_of_module, _rule_of_call)

    return Flow(tokens.root, tokens.graph, tokens.values, handle)


def _rule_of_call(target: Any) -> Any:
    """Products of batches keep examples apart, attention among them; all else is as for tokens."""
    return FUNCTIONS.get(target) if FUNCTIONS.get(target) is _PRODUCT else rule_of_call(target)


_PRODUCT = FUNCTIONS[F.scaled_dot_product_attention]


def _missed(tokens: Flow, found: Examples, inside: Collection[fx.Node], sums: Sequence[Sum]) -> str:
    """Where the examples could not be followed to; empty if to all values of a stretch."""
    flow = found.flow
    begin = flow.layout(found.start)
    assert begin is not None
    root = flow.spaces.find(begin.segments[0].space)
    for node in tokens.graph.nodes:
        if node not in inside:
            continue
        own = flow.layout(node)
        if own is None or len(own.segments) != 1 or flow.spaces.find(own.segments[0].space) != root:
            return f"{place(node)} does not keep them apart"
        step = tokens.steps[node]
        outside = [(link.source, tokens.layout(link.source)) for link in step.links if link.source not in inside]
        riders = [(operand, axis) for operand, axis in step.follow]
        riders += [(source, layout.dim) for source, layout in outside if layout is not None]
        for operand, axis in riders:
            if not _fits(tokens, found, operand, axis, node):
                return f"{place(node)} reads {place(operand)} in another way"
    for one in sums:
        if not _fits(tokens, found, one.rider, one.axis, one.reader):
            return f"{place(one.node)} is summed in another way"
        if found.place(one.rider, one.reader)[1] != len(tokens.shape(one.rider) or ()):
            return f"{place(one.node)} is the same for all of them"
    return ""


def _fits(tokens: Flow, found: Examples, operand: fx.Node, axis: int, reader: fx.Node) -> bool:
    """Whether each example can have its own tokens of what ``reader`` reads."""
    sizes, layout = tokens.shape(operand), found.flow.layout(reader)
    if sizes is None or layout is None or found.flow.shape(reader) is None or are_rows(tokens, operand):
        return False
    batch, _ = found.place(operand, reader)
    if batch == axis - len(sizes):
        return False
    return -batch > len(sizes) or sizes[batch] in (1, found.count, layout.size)


def _padding(
    tokens: Flow, found: Examples, attention: fx.Node, is_sampled: Callable[[int], bool]
) -> tuple[Padding | None, str]:
    mask = argument(attention, 3, "attn_mask")
    keys, sizes = tokens.layout(argument(attention, 1, "key")), tokens.shape(mask)
    if keys is None or sizes is None:
        return None, f"the keys of {place(attention)} are no tokens of its own"
    axis, _ = found.place(mask, attention)
    if -axis > len(sizes) or sizes[axis] == 1:
        return None, ""  # a mask that is the same for all examples
    places = [at for at, segment in enumerate(keys.segments) if is_sampled(segment.space)]
    if len(places) != 1 or keys.segments[places[0]].block != 1:
        return None, f"the keys of {place(attention)} are tokens in another order"
    later = _later(tokens, found, mask)
    if later is None:
        return None, f"the mask of {place(attention)} is made of tokens, or at random"
    start = sum(segment.entries for segment in keys.segments[: places[0]])
    return Padding(mask, axis, start, later), ""


def _later(tokens: Flow, found: Examples, mask: fx.Node) -> tuple[fx.Node, ...] | None:
    """What ``mask`` is made of behind the beginning of the stretch; None if it needs what the stretch computes."""
    order = {node: at for at, node in enumerate(tokens.graph.nodes)}
    needed: set[fx.Node] = set()
    waiting = [mask]
    while waiting:
        node = waiting.pop()
        if node in needed or order[node] <= order[found.start]:
            continue
        needed.add(node)
        if node.op == "get_attr" or _is_plain(tokens, node) or found.size(node) is not None:
            continue
        name = str(getattr(node.target, "__name__", node.target))
        if node.op not in ("call_function", "call_method") or any(word in name for word in _RANDOM):
            return None
        if tokens.layout(node) is not None:
            return None
        waiting += node.all_input_nodes
    if not all(_owned(tokens, node, needed) for node in needed):
        return None
    return tuple(sorted(needed, key=lambda node: order[node]))


def _owned(tokens: Flow, node: fx.Node, needed: set[fx.Node]) -> bool:
    """Whether all that is written into the memory of ``node`` is written there when ``needed`` is made again."""
    memory = list(same_memory(tokens, node))
    users = [(user, one) for one in memory for user in one.users]
    changers = {user for user, one in users if first(user) is one and changes_in_place(tokens, user)}
    return not changers or (memory[0] in needed and changers <= needed)


def _is_plain(tokens: Flow, node: fx.Node) -> bool:
    """Whether ``node`` asks a value of tokens for its number of axes, its dtype or its device."""
    asked = first(node)
    if tokens.layout(asked) is None or not reads_shape_only(node, asked):
        return False
    return not asks_sizes(node) and not any(isinstance(one, fx.Node) for one in node.args[1:])


def choose(
    graph: fx.Graph,
    copies: Mapping[fx.Node, fx.Node],
    start: fx.Node,
    examples: Examples | None,
    number: int,
    key: fx.Node,
) -> fx.Node:
    """Puts the selection of a stretch into a graph, behind what the stretch reads and the mask that tells padding.

    What that is made of later than the stretch begins is made once more.

    Args:
        graph: Rewritten so far.
        copies: Captured node -> its value in ``graph``.
        start: What the stretch reads.
        examples: Where the examples lie, if each keeps tokens of its own.
        number: Of the stretch.
        key: The prologue's node.
    """
    behind, given = copies[start], [key, copies[start]]
    if examples is not None and examples.padding is not None:
        made: dict[fx.Node, Any] = {}
        for node in examples.padding.later:
            with graph.inserting_after(behind):
                made[node] = _again(graph, copies, made, examples, node)
            behind = made[node] if isinstance(made[node], fx.Node) else behind
        given.append(made.get(examples.padding.mask, copies[examples.padding.mask]))
    with graph.inserting_after(behind):
        return graph.call_module(f"{PROLOGUE}.t{number}", tuple(given))


def _again(
    graph: fx.Graph, copies: Mapping[fx.Node, fx.Node], made: Mapping[fx.Node, Any], examples: Examples, node: fx.Node
) -> Any:
    start, size = copies[examples.start], examples.size(node)
    if isinstance(size, tuple):
        return graph.call_method("size", (start, *size))
    if size is not None:
        return size
    if _is_plain(examples.tokens, node):  # of another value of tokens; for a mask any will do
        name = str(node.target if node.op == "call_method" else node.args[1])
        if name in ("dim", "ndimension", "ndim"):
            return len(examples.tokens.shape(first(node)) or ())
        return graph.call_function(getattr, (start, name))
    if node.op == "get_attr":
        return graph.node_copy(copies[node])
    return graph.node_copy(node, lambda one: made.get(one, copies.get(one)))
