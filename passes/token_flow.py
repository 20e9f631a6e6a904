"""Tokens: along which axis of each value they lie, where they mix, and which stretches of blocks can run on some only.

The machinery is that of the channels (``channel_flow.py``) with the rules of ``token_rules.py``. It begins at the first
value from which queries, keys and values of an attention come, along the axis that becomes theirs. A *cut value* is one
through which all that follows from it passes, such as a residual stream between two layers: there tokens may leave or
come back. A *block* reaches from the cut value before an attention to that before the next one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import networkx as nx
import torch.nn.functional as F
from torch import fx, nn

from fx_approx.capture.records import owner
from fx_approx.core.values import Values
from fx_approx.passes.channel_flow import Flow, Step, argument, reads_shape_only
from fx_approx.passes.channel_rules import handle
from fx_approx.passes.channel_spaces import Layout
from fx_approx.passes.find_candidates import FUSED_KEY
from fx_approx.passes.node_words import place
from fx_approx.passes.token_checks import are_rows
from fx_approx.passes.token_rules import rule_of_call, rule_of_module
from fx_approx.passes.token_scores import Attention, are_scores, begins_scores, find_attention
from fx_approx.passes.token_words import block_names, kind, unseen_attention

_OUTPUT = "output"
_NOWHERE = "no value before it has its tokens along one axis, as where attention is in windows"


@dataclasses.dataclass(frozen=True)
class Block:
    """An attention with what follows it, up to the next one.

    Attributes:
        start: The cut value before it.
        end: The cut value behind it.
        inside: All values that are computed between, ``end`` included.
        stops: Why it cannot run on some tokens only; empty if it can.
        name: The module that it is.
    """

    start: fx.Node
    end: fx.Node
    inside: frozenset[fx.Node]
    stops: tuple[str, ...]
    name: str = ""


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """The tokens of one stack of blocks, such as an encoder's.

    Attributes:
        flow: Where the tokens lie in each value.
        origin: The value where they begin.
        kept: Spaces of tokens that are always kept.
        blocks: In order.
        tail: Values behind the last block in which tokens lie, and what reads them.
        needs: Why all positions are needed behind the last block; empty if some serve.
    """

    flow: Flow
    origin: fx.Node
    kept: frozenset[int]
    blocks: tuple[Block, ...]
    tail: frozenset[fx.Node]
    needs: tuple[str, ...]


def find_tokens(root: nn.Module, graph: fx.Graph, values: Values, keep: int = 0) -> tuple[list[TokenStream], list[str]]:
    """The stacks of blocks of ``graph`` in which tokens can be sampled, and why there are no more.

    Args:
        root: The model.
        graph: Its captured graph.
        values: The shapes of all values.
        keep: Tokens at the beginning that are always kept.
    """
    streams: list[TokenStream] = []
    reasons: list[str] = []
    seen: set[fx.Node] = set()
    main = _carriers(graph, values)
    for one in find_attention(root, graph, values):
        if one.node in seen:
            continue
        seen.add(one.node)
        if any(streams_have(streams, operand) for operand in one.operands):
            continue  # attention of one stack to another
        found, why = None, _NOWHERE
        for origin, dim, stop in _origins(root, graph, values, main, one):
            tokens = (values.of(origin) or ())[dim]
            if not stop and keep >= tokens:
                why = f"keep={keep}, and it has {tokens} tokens"
                break
            found = None if stop else _stream(root, graph, values, origin, dim, keep)
            if found is not None:
                streams.append(found)
                seen |= {node for node in graph.nodes if found.flow.layout(node) is not None}
                break
            why = stop or "no value between the layers holds all that follows"
        if found is None:
            reasons.append(f"{owner(one.node) or place(one.node)}: {why}")
    if not seen:
        fused = [f"{node.target}: {node.meta[FUSED_KEY]}" for node in graph.nodes if FUSED_KEY in node.meta]
        known = "torch.nn.functional.scaled_dot_product_attention, or a softmax between two products"
        nothing = f"no attention that can be followed ({known}) is in the graph"
        reasons.append("; ".join(filter(None, [nothing, unseen_attention(graph), *fused])))
    return streams, reasons


def streams_have(streams: Iterable[TokenStream], node: fx.Node) -> bool:
    """Whether ``node`` holds the tokens of one of ``streams``."""
    return any(stream.flow.layout(node) is not None for stream in streams)


def _carriers(graph: fx.Graph, values: Values) -> nx.DiGraph:
    """Which tensor is made of which, from the inputs of the graph on; sizes are left out."""
    found = nx.DiGraph()
    for node in graph.nodes:
        if node.op == "placeholder":
            found.add_node(node)
        elif node.op != "output" and node.name in values.shapes:
            for source in node.all_input_nodes:
                if source in found and not reads_shape_only(node, source):
                    found.add_edge(source, node)
    return found


def _origins(
    root: nn.Module, graph: fx.Graph, values: Values, main: nx.DiGraph, attention: Attention
) -> Iterator[tuple[fx.Node, int, str]]:
    """Values before ``attention`` from which its three operands come, the axis of tokens, and what stops them.

    The first one comes first; those through which everything leads come before those through which all leads that is
    made of one input, such as the images beside the time steps of a diffusion model.
    """
    node, operands = attention.node, attention.operands
    if any(one not in main for one in operands):
        return
    inner = nx.DiGraph(main.subgraph(set().union(*({one} | nx.ancestors(main, one) for one in operands))))
    inputs = [one for one in list(inner) if not inner.pred[one]]
    inner.add_edges_from((_OUTPUT, one) for one in inputs)
    inner.add_edges_from((one, node) for one in operands)
    chains = (_dominators(inner, start, node)[1:-1] for start in (_OUTPUT, *(inputs if len(inputs) > 1 else ())))
    for origin in dict.fromkeys(one for chain in chains for one in chain):
        for dim, size in enumerate(values.of(origin) or ()):
            if not 1 < size <= attention.tokens:
                continue
            flow = _flow(root, graph, values, origin, dim, until=node)
            layouts = [flow.layout(one) for one in (*operands, node)]
            if all(one is not None and _single(one) for one in layouts):
                yield origin, dim, ""
            elif dim and all(layouts[:-1]):
                yield origin, dim, _between_products(flow, attention)


def _between_products(flow: Flow, attention: Attention) -> str:
    """What stops the tokens between the operands of an attention and what it puts out."""
    behind = set(attention.operands)
    for node in flow.graph.nodes:
        if any(source in behind for source in node.all_input_nodes) and node.name in flow.values.shapes:
            if flow.layout(node) is None:
                return flow.stopped.get(node, f"{place(node)} mixes positions{kind(flow, node)}")
            behind.add(node)
        if node is attention.node:
            break
    return _NOWHERE


def _single(layout: Layout) -> bool:
    """Whether a unit is one token."""
    return all(segment.block == 1 for segment in layout.segments)


def _dominators(graph: nx.DiGraph, source: object, sink: object) -> list[fx.Node]:
    """The nodes through which every way from ``source`` to ``sink`` leads, in order, both included."""
    above = nx.immediate_dominators(graph, source)
    chain = [sink]
    while chain[-1] != source:
        chain.append(above[chain[-1]])
    return chain[::-1]  # type: ignore[return-value]


def _flow(
    root: nn.Module,
    graph: fx.Graph,
    values: Values,
    origin: fx.Node,
    dim: int,
    keep: int = 0,
    until: fx.Node | None = None,
) -> Flow:
    """Where the tokens of axis ``dim`` of ``origin`` lie in each value behind it."""
    behind = {origin}
    order = list(graph.nodes)
    last = len(order) if until is None else order.index(until) + 1
    for node in order[:last]:
        if any(source in behind for source in node.all_input_nodes):
            behind.add(node)

    def step_of(flow: Flow, node: fx.Node) -> Step | None:
        if node is origin:
            shape = values.of(origin)
            assert shape is not None
            if 0 < keep < shape[dim]:
                flow.spaces.cuts.setdefault(node, set()).add(keep)
            return Step(flow.spaces.new(node, dim, shape[dim]))
        if node not in behind or (until is not None and node in flow.steps):
            return None
        return handle(flow, node, rule_of_module, rule_of_call)

    return Flow(root, graph, values, step_of)


def _stream(
    root: nn.Module, graph: fx.Graph, values: Values, origin: fx.Node, dim: int, keep: int
) -> TokenStream | None:
    """The blocks behind ``origin``; None if there is no cut value between them."""
    flow = _flow(root, graph, values, origin, dim, keep)
    below = _below(graph, flow, origin)
    chain = [node for node in _dominators(below, origin, _OUTPUT) if isinstance(node, fx.Node)]
    tokens = flow.layout(origin)
    assert tokens is not None
    cuts = [node for node in chain if _holds(flow, node, tokens)]
    position = {node: place for place, node in enumerate(graph.nodes)}
    marks: list[fx.Node] = []
    for attention in below:
        if not isinstance(attention, fx.Node) or not attends_itself(flow, attention):
            continue
        before = [cut for cut in cuts if position[cut] < position[attention]]
        if before and before[-1] not in marks:
            marks.append(before[-1])
    blocks = []
    for number, start in enumerate(marks):
        # The last block ends at the first cut value behind all that its residual stream takes up.
        end = marks[number + 1] if number + 1 < len(marks) else _last(flow, cuts, start, position)
        if end is not None and end is not start:
            inside = _between(below, start, end)
            blocks.append(Block(start, end, inside, tuple(_stops(flow, inside, end))))
    if not blocks:
        return None
    names = block_names([_first_attention(flow, block.inside) for block in blocks], [list(b.inside) for b in blocks])
    blocks = [dataclasses.replace(block, name=name) for block, name in zip(blocks, names, strict=True)]
    reached = {one for one in nx.descendants(below, blocks[-1].end) if isinstance(one, fx.Node)}
    tail = frozenset(one for one in reached if flow.layout(one) is not None)
    needs = tuple(dict.fromkeys(_needs(flow, {blocks[-1].end, *tail})))
    kept = frozenset({flow.spaces.find(tokens.segments[0].space)} if keep else ())
    return TokenStream(flow, origin, kept, tuple(blocks), tail, needs)


def _first_attention(flow: Flow, inside: frozenset[fx.Node]) -> fx.Node:
    found: fx.Node = next(node for node in flow.graph.nodes if node in inside and attends_itself(flow, node))
    return found


def attends_itself(flow: Flow, node: fx.Node) -> bool:
    """Whether ``node`` is an attention whose keys are tokens of the queries' stack."""
    if begins_scores(flow, node):
        return True
    return node.target is F.scaled_dot_product_attention and flow.layout(argument(node, 1, "key")) is not None


def _holds(flow: Flow, node: fx.Node, tokens: Layout) -> bool:
    """Whether ``node`` holds all of ``tokens``, one by one."""
    layout = flow.layout(node)
    if layout is None or not _single(layout) or are_rows(flow, node) or are_scores(flow, node):
        return False
    own = {flow.spaces.find(segment.space) for segment in tokens.segments}
    return sum(s.count for s in layout.segments if flow.spaces.find(s.space) in own) == tokens.size


def _below(graph: fx.Graph, flow: Flow, origin: fx.Node) -> nx.DiGraph:
    """What is made of ``origin``, with an end behind all that nothing more is made of; sizes are left out."""
    below = nx.DiGraph()
    below.add_node(origin)
    for node in graph.nodes:
        for source in node.all_input_nodes:
            if source in below and node.op != "output" and not reads_shape_only(node, source):
                below.add_edge(source, node)
    for node in list(below):
        if isinstance(node, fx.Node) and not below.succ[node]:
            below.add_edge(node, _OUTPUT)
    return below


def _last(flow: Flow, cuts: Sequence[fx.Node], start: fx.Node, position: dict[fx.Node, int]) -> fx.Node | None:
    """The last cut value behind ``start`` that is a sum, which ends a residual stream; else the last of all."""
    behind = [cut for cut in cuts if position[cut] > position[start]]
    sums = [cut for cut in behind if len(flow.steps[cut].links) > 1]
    found = sums or behind
    return found[-1] if found else None


def _between(below: nx.DiGraph, start: fx.Node, end: fx.Node) -> frozenset[fx.Node]:
    found = nx.descendants(below, start) & (nx.ancestors(below, end) | {end})
    return frozenset(node for node in found if isinstance(node, fx.Node))


def _stops(flow: Flow, inside: frozenset[fx.Node], end: fx.Node) -> Iterator[str]:
    """What in a block mixes tokens, or hands some of them out."""
    for node in flow.graph.nodes:
        if node not in inside:
            continue
        if flow.layout(node) is None:
            if any(flow.layout(source) is not None for source in node.all_input_nodes):
                yield flow.stopped.get(node, f"{place(node)} mixes positions{kind(flow, node)}")
        elif node is not end and any(user.op == "output" for user in node.users):
            yield f"{place(node)} leaves the model, as a cache of keys and values does"


def _needs(flow: Flow, values: set[fx.Node]) -> Iterator[str]:
    """Who reads ``values`` and cannot do with some tokens."""
    for node in flow.graph.nodes:
        if node not in values:
            continue
        for user in node.users:
            if user in values or reads_shape_only(user, node):
                continue
            if user.op == "output":
                yield "the model puts out every position"
            elif flow.layout(user) is None and flow.steps[user].action not in ("pick", "pool"):
                yield f"{place(user)} reads every position{kind(flow, user)}"
