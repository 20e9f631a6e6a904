"""Tokens: has stretches of blocks compute some tokens only, in a graph that may have been narrowed already.

The tokens leave where a stretch begins, and everything that rides on them goes along: positions, rotary tables, masks
on both axes. With ``skip`` they come back where it ends; with ``drop`` they stay away.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx

from fx_approx.core.plan_effects import TokenShare
from fx_approx.core.token_sampling import TokenSampling
from fx_approx.ops.channel_slices import narrow, resize
from fx_approx.ops.token_scores import watch
from fx_approx.ops.token_slices import (
    entries,
    fewer_tokens,
    narrow_each,
    put_back,
    sampled_count,
    split_tokens,
    take_tokens,
    token_positions,
    told_size,
)
from fx_approx.passes.channel_flow import AS_ANOTHER, Flow, Link, asks_sizes
from fx_approx.passes.channel_spaces import Layout
from fx_approx.passes.node_words import place
from fx_approx.passes.reshape_rules import spelled_out
from fx_approx.passes.token_checks import Sum, are_rows, is_sized_once, misread, spelled_slice, sums_along
from fx_approx.passes.token_examples import Examples, choose, find_examples
from fx_approx.passes.token_flow import Block, TokenStream
from fx_approx.passes.token_scores import are_scores
from fx_approx.runtime.graph_program import PROLOGUE
from fx_approx.runtime.graph_runtime import Runtime
from fx_approx.runtime.token_selection import TokenSelection

_ACTIONS = ("plain", "resize", "rows", "split", "take", "given")


@dataclasses.dataclass(frozen=True)
class TokenStretch:
    """Blocks that compute some tokens only.

    Attributes:
        stream: The stack that they belong to.
        start: The value at which tokens leave.
        end: The value behind which they come back; None if they do not.
        inside: The values of which only the chosen tokens are computed.
        sampled: The space of the tokens that may be left out.
        sums: What is summed over values that go along, and goes along itself.
        examples: Where the examples lie, if each keeps tokens of its own.
    """

    stream: TokenStream
    start: fx.Node
    end: fx.Node | None
    inside: frozenset[fx.Node]
    sampled: int
    sums: tuple[Sum, ...] = ()
    examples: Examples | None = None

    @property
    def flow(self) -> Flow:
        """Where the tokens lie in each value."""
        return self.stream.flow

    def share(self, sampling: TokenSampling) -> TokenShare:
        """How many tokens there are."""
        layout = self.flow.layout(self.start)
        assert layout is not None
        others = sum(segment.count for segment in layout.segments if not self.is_sampled(segment.space))
        return TokenShare(sampling, others, layout.size - others, "" if self.end is None else self.end.name)

    def is_sampled(self, space: int) -> bool:
        """Whether tokens of ``space`` are left out."""
        return self.flow.spaces.find(space) == self.sampled


def choose_stretches(streams: Iterable[TokenStream], sampling: TokenSampling) -> tuple[list[TokenStretch], list[str]]:
    """Where tokens are sampled, and why not elsewhere."""
    found: list[TokenStretch] = []
    reasons: list[str] = []
    for stream in streams:
        dropped, why = (None, "") if sampling.mode == "skip" else drop(stream, sampling)
        if dropped is not None:
            made, more = [dropped], []
        elif sampling.mode == "drop":
            made, more = [], [why]
        else:
            made, more = _skip(stream, sampling)
        reasons += more
        for one in made:
            some, of = one.share(sampling).kept(sampling.ratio)
            if some < 2:
                why = f"ratio={sampling.ratio} keeps {some} of {of} tokens, and attention needs two"
                reasons.append(f"{place(stream.origin)}: {why}")
            elif any(one.inside & other.inside for other in found if other.stream is not stream):
                reasons.append(f"{place(stream.origin)}: its tokens are combined with those of another stack")
            else:
                found.append(_with_examples(one, sampling, reasons))
    return found, reasons


def _with_examples(stretch: TokenStretch, sampling: TokenSampling, reasons: list[str]) -> TokenStretch:
    examples, why = find_examples(
        stretch.flow, stretch.start, stretch.inside, stretch.sums, stretch.is_sampled, sampling
    )
    reasons += [why] if why else []
    return dataclasses.replace(stretch, examples=examples)


def drop(stream: TokenStream, sampling: TokenSampling) -> tuple[TokenStretch | None, str]:
    """The stretch from which on tokens are dropped, or why they cannot be."""
    blocks = stream.blocks[sampling.first :]
    if not blocks:
        return (
            None,
            f"{place(stream.origin)}: it has {len(stream.blocks)} blocks, and the first {sampling.first} are whole",
        )
    inside = frozenset().union(*(block.inside for block in blocks), stream.tail)
    flow, start = stream.flow, blocks[0].start
    sums = sums_along(flow, start, inside)
    stops = itertools.chain(
        (stop for block in blocks for stop in block.stops),
        stream.needs,
        (f"the model puts out all positions of {place(node)}" for node in inside if _is_output(node)),
        _odd(flow, inside),
        misread(flow, start, inside, sums),
    )
    if why := next(iter(stops), ""):
        return None, f"{place(stream.origin)}: tokens cannot be dropped: {why}"
    space = sampled_space(stream, inside)
    if space is None or not is_sized_once(flow, start):
        return None, f"{place(stream.origin)}: tokens cannot be dropped: tokens at different places are combined"
    if not all(_stays(stream.flow, node, space) for node in stream.flow.steps):
        return None, f"{place(stream.origin)}: tokens cannot be dropped: single ones are read between others"
    return TokenStretch(stream, start, None, inside, space, sums), ""


def _skip(stream: TokenStream, sampling: TokenSampling) -> tuple[list[TokenStretch], list[str]]:
    blocks = stream.blocks[sampling.first : len(stream.blocks) - sampling.last]
    name = place(stream.origin)
    if not blocks:
        whole = f"the first {sampling.first} and the last {sampling.last} are whole"
        return [], [f"{name}: it has {len(stream.blocks)} blocks, and {whole}"]
    runs: list[list[Block]] = [[]]
    reasons = []
    for block in blocks:
        why = unfit(stream.flow, block)
        if why:
            reasons.append(f"{block.name}: it is computed whole: {why}")
            runs.append([])
        else:
            runs[-1].append(block)
            if _is_output(block.end):
                runs.append([])
    parts = [[block] for run in runs for block in run] if sampling.per_layer else [run for run in runs if run]
    space = sampled_space(stream, frozenset())
    if space is None or not all(is_sized_once(stream.flow, part[0].start) for part in parts):
        return [], [*reasons, f"{name}: tokens at different places are combined"]
    found = [
        TokenStretch(stream, run[0].start, run[-1].end, frozenset().union(*(one.inside for one in run)), space)
        for run in parts
    ]
    return found, reasons


def unfit(flow: Flow, block: Block) -> str:
    """Why tokens cannot pass a block by; empty if they can."""
    first, last = flow.layout(block.start), flow.layout(block.end)
    if block.stops:
        return block.stops[0]
    if first != last or flow.shape(block.start) != flow.shape(block.end):
        return "what it puts out has another shape than what it reads"
    return next(iter((*_odd(flow, block.inside), *misread(flow, block.start, block.inside))), "")


def _is_output(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _odd(flow: Flow, inside: frozenset[fx.Node]) -> list[str]:
    """What in a stretch cannot be made to work on some tokens."""
    return [
        f"{place(node)} has parameters or sizes for each token"
        for node in inside
        if flow.steps[node].action not in _ACTIONS
        or (node.target in AS_ANOTHER and node.op == "call_method" and node.args[1] not in inside)
        or ((are_rows(flow, node) or are_scores(flow, node)) and any(map(asks_sizes, node.users)))
    ]


def sampled_space(stream: TokenStream, inside: frozenset[fx.Node]) -> int | None:
    """The space of which tokens may be left out: the longest that no one picks single tokens of."""
    flow = stream.flow
    picked = {
        flow.spaces.find(segment.space)
        for node, step in flow.steps.items()
        if step.action == "pick"
        for link in step.links
        if link.source in inside
        for segment in _linked(flow, link)
    }
    layout = flow.layout(stream.origin)
    assert layout is not None
    roots = [root for s in layout.segments if (root := flow.spaces.find(s.space)) not in picked | stream.kept]
    return max(roots, key=lambda root: flow.spaces.counts[root], default=None)


def _stays(flow: Flow, node: fx.Node, space: int) -> bool:
    """Whether a token that ``node`` picks by its number has the same number where those of ``space`` are left out."""
    step = flow.steps[node]
    if step.action != "pick":
        return True
    link = step.links[0]
    layout, sizes = flow.layout(link.source), flow.shape(link.source)
    assert layout is not None and sizes is not None
    places = spelled_out(node.args[1], len(sizes))
    assert places is not None
    others = layout.segments[: link.start] if places[layout.dim] >= 0 else layout.segments[link.start + 1 :]
    return all(flow.spaces.find(segment.space) != space for segment in others)


def _linked(flow: Flow, link: Link) -> Sequence[Any]:
    layout = flow.layout(link.source)
    return () if layout is None else layout.segments[link.start : link.start + link.count]


def make_token_selections(
    runtime: Runtime, stretches: Sequence[TokenStretch], sampling: TokenSampling, root: Any
) -> None:
    """Gives the runtime a selection for each stretch."""
    for number, stretch in enumerate(stretches):
        layout = stretch.flow.layout(stretch.start)
        assert layout is not None
        share, start = stretch.share(sampling), 0
        for segment in layout.segments:
            if stretch.is_sampled(segment.space):
                break
            start += segment.count
        site = -1 - number  # those of layers count up
        own = stretch.examples
        batch, examples = (None, 1) if own is None else (own.axis, own.count)
        mask = None if own is None or own.padding is None else (own.padding.axis, own.padding.start)
        which = layout.dim, start, share.others, share.tokens
        runtime.add_tokens(TokenSelection(sampling, *which, site, root, batch, examples, mask))


class SampleTokens:
    """Rewrites one graph for one stretch.

    Args:
        graph: Rewritten so far.
        copies: Captured node -> its value in ``graph``.
        whole_of: A node of ``graph`` that takes a part of the channels of a value -> the node that makes it.
        stretch: What is to compute some tokens only.
        number: Of the stretch.
        key: The prologue's node.
        learns: Whether the gradient of the tokens is looked at.
    """

    def __init__(
        self,
        graph: fx.Graph,
        copies: dict[fx.Node, fx.Node],
        whole_of: Mapping[fx.Node, fx.Node],
        stretch: TokenStretch,
        number: int,
        key: fx.Node,
        learns: bool = False,
    ) -> None:
        self.graph, self.copies, self.whole_of = graph, copies, whole_of
        self.stretch, self.flow, self.examples = stretch, stretch.flow, stretch.examples
        self.running = f"{PROLOGUE}.t{number}.running" if learns else None
        self.chosen = choose(graph, copies, stretch.start, stretch.examples, number, key)
        layout = self.flow.layout(stretch.start)
        assert layout is not None
        self.layout: Layout = layout
        self._behind = self.chosen
        self._made: dict[Any, fx.Node] = {}
        self._narrowed: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        """Rewrites every node of the stretch, in order."""
        sums = {one.node: one for one in self.stretch.sums}
        for node in self.flow.graph.nodes:
            if node in self.stretch.inside:
                self._narrow(node)
            elif node in sums:
                self._sum(sums[node])
        for node in self.stretch.inside:
            self._tell_sizes(node)
        if self.stretch.end is not None:
            self._put_back(self.stretch.end)

    def _narrow(self, node: fx.Node) -> None:
        step, own = self.flow.steps[node], self._made_by(self.copies[node])
        assert step.layout is not None
        for source in dict.fromkeys(link.source for link in step.links):
            layout = self.flow.layout(source)
            if source not in self.stretch.inside and layout is not None:
                self._replace(own, source, layout.dim, self._index(layout), node)
                if (also := self.flow.steps[source].also) is not None:
                    self._replace(own, source, also, self._index(layout), node)
        for operand, axis in step.follow:
            self._replace(own, operand, axis, self._index(step.layout), node)
        if step.action in ("resize", "rows"):
            self._resize(node, own)
        elif step.action == "split":
            self._split(node, own)
        elif step.action == "take":
            self._take(node, own)

    def _index(self, layout: Layout) -> fx.Node | None:
        """The chosen entries of an axis; None if all are there."""
        parts = self._parts(layout)
        if all(chosen is None for chosen, _, _ in parts):
            return None
        if len(parts) == 1 and parts[0][2] == 1:
            return self.chosen
        return self._once(("positions", parts), lambda: self.graph.call_function(token_positions, (parts,)))

    def _parts(self, layout: Layout) -> tuple[tuple[fx.Node | None, Any, int], ...]:
        return tuple(
            (self.chosen, self._count(), s.block) if self.stretch.is_sampled(s.space) else (None, s.count, s.block)
            for s in layout.segments
        )

    def _count(self) -> fx.Node:
        """How many tokens of this call may be left out."""
        own = self.layout.segments
        others = sum(segment.count for segment in own if not self.stretch.is_sampled(segment.space))
        given = self.copies[self.stretch.start], self.layout.dim, others
        return self._once("count", lambda: self.graph.call_function(sampled_count, given))

    def _once(self, what: Any, make: Any) -> fx.Node:
        """A node behind the selection, made once."""
        if what not in self._made:
            with self.graph.inserting_after(self._behind):
                self._made[what] = self._behind = make()
        return self._made[what]

    def _replace(self, own: fx.Node, source: fx.Node, dim: int, index: fx.Node | None, reader: fx.Node) -> None:
        """Takes the chosen tokens of all that ``own``, made of ``reader``, reads of ``source`` or of its channels."""
        if index is None:
            return
        base = self._made_by(self.copies[source])
        function: Any = narrow
        axes: tuple[int, ...] = (dim,)
        if self.examples is not None:
            rank = len(self.flow.shape(source) or ())
            function, axes = narrow_each, (dim - rank, *self.examples.place(source, reader))
        for operand in list(own.all_input_nodes):
            if self._made_by(operand) is not base:
                continue
            key = operand, axes, index
            if key not in self._made:
                with self.graph.inserting_before(own):
                    made = self.graph.call_function(function, (operand, *axes, index))
                self._made[key] = self._watched(made, own) if source is self.stretch.start else made
                self._narrowed[self._made[key]] = operand
            own.replace_input_with(operand, self._made[key])

    def _watched(self, made: fx.Node, own: fx.Node) -> fx.Node:
        """What the stretch reads, with its gradient looked at if the scores follow that."""
        if self.running is None:
            return made
        before = itertools.takewhile(lambda s: not self.stretch.is_sampled(s.space), self.layout.segments)
        start, batch = sum(s.entries for s in before), None if self.examples is None else self.examples.axis
        with self.graph.inserting_before(own):
            running = self.graph.create_node("get_attr", self.running)
            return self.graph.call_function(watch, (made, self.layout.dim, start, batch, self.chosen, running))

    def _sum(self, one: Sum) -> None:
        layout = self.flow.layout(one.reader)
        assert layout is not None
        self._replace(self.copies[one.node], one.rider, one.axis, self._index(layout), one.reader)

    def _made_by(self, node: fx.Node) -> fx.Node:
        """The node that makes the value of which ``node`` is a part of the channels, or of the tokens."""
        while (known := self._narrowed.get(node) or self.whole_of.get(node)) is not None:
            node = known
        return node

    def _resize(self, node: fx.Node, own: fx.Node) -> None:
        step = self.flow.steps[node]
        assert step.layout is not None
        if node.op == "call_method" and node.target in AS_ANOTHER:
            return  # the other has as many tokens
        parts = self._parts(step.layout)
        given = own.args[1:2] if own.target is resize else own.args[1:]
        name = "shape" if "shape" in own.kwargs else "size"
        sizes = given[0] if len(given) == 1 else given if given else own.kwargs[name]
        with self.graph.inserting_before(own):
            fewer = self.graph.call_function(fewer_tokens, (sizes, step.axis, parts))
            if step.also is not None:
                fewer = self.graph.call_function(fewer_tokens, (fewer, step.also, parts))
        if own.target is resize:
            own.args = (own.args[0], fewer, *own.args[2:])
        elif given:
            own.args = (own.args[0], fewer)
        else:
            own.kwargs = {**own.kwargs, name: fewer}

    def _split(self, node: fx.Node, own: fx.Node) -> None:
        step = self.flow.steps[node]
        assert step.layout is not None
        parts = self._parts(step.layout)
        sections = tuple(parts[start:end] for start, end in step.sections)
        name = node.target if isinstance(node.target, str) else node.target.__name__
        with self.graph.inserting_before(own):
            given = (own.args[0], sections, step.layout.dim, step.layout.size)
            how = (name, tuple(own.args[1:]), dict(own.kwargs))
            new = self.graph.call_function(split_tokens, (*given, *how))
        self._take_over(node, own, new)

    def _take(self, node: fx.Node, own: fx.Node) -> None:
        step = self.flow.steps[node]
        link = step.links[0]
        source = self.flow.layout(link.source)
        assert step.layout is not None and source is not None
        parts = self._parts(source)
        before, taken = parts[: link.start], parts[link.start : link.start + link.count]
        sizes = self.flow.shape(link.source)
        assert sizes is not None
        if node.target is operator.getitem:
            places = spelled_out(node.args[1], len(sizes))
        else:
            places = [*[slice(None)] * source.dim, spelled_slice(node)]
        assert places is not None
        axes = [at for at, place in enumerate(places) if place is not None]
        given = (own.args[0], source.dim, before, taken, tuple(places), axes[source.dim])
        with self.graph.inserting_before(own):
            new = self.graph.call_function(take_tokens, given)
        self._take_over(node, own, new)

    def _take_over(self, node: fx.Node, own: fx.Node, new: fx.Node) -> None:
        new.meta = dict(own.meta)
        own.replace_all_uses_with(new)
        self.graph.erase_node(own)
        self.copies[node] = new

    def _tell_sizes(self, node: fx.Node) -> None:
        """Whoever asks a value of the stretch for its sizes is told those of all tokens, as reshapes expect them."""
        layout = self.flow.layout(node)
        assert layout is not None
        for user in node.users:
            if not asks_sizes(user):
                continue
            own = self.copies[user]
            which = user.args[1] if user.op == "call_method" and len(user.args) > 1 else None
            rank = len(self.flow.shape(node) or ())
            if isinstance(which, int):
                if which % rank == layout.dim:
                    own.replace_all_uses_with(self._tokens(layout))
                continue
            tokens = self._tokens(layout)
            readers = list(own.users)
            with self.graph.inserting_after(own):
                new = self.graph.call_function(told_size, (own, layout.dim, tokens))
            for reader in readers:
                reader.replace_input_with(own, new)

    def _tokens(self, layout: Layout) -> Any:
        """How many tokens an axis has in this call where all are there."""
        if layout.segments != self.layout.segments:
            parts = self._parts(layout)
            return self._once(("entries", parts), lambda: self.graph.call_function(entries, (parts,)))
        start = self.copies[self.stretch.start]
        call = lambda: self.graph.call_method("size", (start, self.layout.dim))  # noqa: E731
        return self._once("tokens", call)

    def _put_back(self, end: fx.Node) -> None:
        """Behind the stretch every position is there again."""
        own, start = self.copies[end], self.copies[self.stretch.start]
        index = self._index(self.layout)
        with self.graph.inserting_after(own):
            how = () if self.examples is None else (self.examples.axis,)
            whole = self.graph.call_function(put_back, (start, own, self.layout.dim, index, *how))
        whole.meta = dict(own.meta)
        own.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not whole)
        self.copies[end] = whole
