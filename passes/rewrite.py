"""Rewrite: puts selectors and sampled products where the plan says, on the same parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, fx, nn

from fx_approx._compat import children_of
from fx_approx.capture.records import META_KEY, SECTION, Capture, owner
from fx_approx.core.candidates import Role
from fx_approx.ops.base import SAMPLING_ARGUMENTS
from fx_approx.ops.channel_slices import narrow, slice_weights, spread
from fx_approx.ops.narrow_calls import SLICED_CONVOLUTIONS
from fx_approx.ops.sliced_linear import sliced_linear
from fx_approx.passes.channel_flow import Flow
from fx_approx.passes.channel_liveness import ChannelAnalysis
from fx_approx.passes.channel_spaces import Segment
from fx_approx.passes.find_candidates import CandidateSite
from fx_approx.passes.graph_head import GraphHead, make_resample
from fx_approx.passes.mask_tokens import mask_tokens
from fx_approx.passes.narrow_graph import NarrowGraph
from fx_approx.passes.sample_tokens import SampleTokens, TokenStretch
from fx_approx.runtime.graph_program import PROLOGUE, GraphProgram
from fx_approx.runtime.graph_runtime import Runtime, selector_target
from fx_approx.runtime.guards import Guards
from fx_approx.runtime.layers import is_swapped, swap
from fx_approx.runtime.selector import Selector, Site


def make_selectors(root: nn.Module, runtime: Runtime, found: list[CandidateSite], analysis: ChannelAnalysis) -> None:
    """Gives the runtime a selector for each sampled product, and ``root`` sampled layers on the same parameters.

    A layer becomes its sampled subclass, at its path. Selections that are made ahead are made together.
    """
    places = {one.candidate.name: place for place, one in enumerate(found)}
    chosen = _chosen(runtime, found)
    for name, one in chosen.items():
        _select(root, runtime, one, places[name], len(found))
    make_resample(runtime, analysis.sharing)
    runtime.lay_out()
    for path, value in runtime.program.capture.constants.items():
        runtime.register_buffer(f"c{path}", value, persistent=False)
    runtime.sampling_swapped = any(not one.candidate.node for one in chosen.values())


def sampled_graph(
    root: nn.Module,
    runtime: Runtime,
    found: list[CandidateSite],
    analysis: ChannelAnalysis,
    flow: Flow | None,
    stretches: Sequence[TokenStretch],
    prune: bool,
    masked: bool = False,
) -> fx.Graph:
    """The captured graph with sampled products that read selections.

    A functional call becomes a call of our op. Selections are values of the graph: a selector makes one, the sampled
    product takes it. Those that read no activation stand at the beginning, in one node behind the prologue that hands
    out the step.

    Args:
        root: The model, with its sampled layers.
        runtime: The selectors, and what was captured.
        found: All candidates.
        analysis: Which of them share selections, and which channels anyone reads.
        flow: Where the channels lie in each value; None where that is not known.
        stretches: Blocks that compute some tokens only.
        prune: Compute the channels only that anyone reads.
        masked: Compute all tokens, and mask those that are left out.
    """
    captured = runtime.program.capture.graph
    assert captured is not None
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(captured, copies)
    graph.output(output)
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in runtime.program.capture.constants:
            node.target = f"{PROLOGUE}.c{node.target}"
    chosen = _chosen(runtime, found)
    if not chosen and not stretches:
        return graph
    weights = {name: one.weight for name, one in chosen.items() if one.weight is not None}
    header = GraphHead(graph, runtime, analysis.sharing, weights)
    by_name = {node.name: node for node in captured.nodes}
    for one in chosen.values():
        if one.candidate.node:
            node = by_name[one.candidate.node]
            copies[node] = _SampledNode(root, runtime, header, flow, one, node).sample(copies[node])
    _keep_exact(chosen, {node.name: copy for node, copy in copies.items()})
    whole_of: dict[fx.Node, fx.Node] = {}
    if prune and flow is not None and analysis.demand is not None:
        narrowed = NarrowGraph(flow, analysis.demand, header, copies, runtime)
        narrowed.run()
        whole_of = narrowed.whole_of
    for number, stretch in enumerate(stretches):
        if masked:
            mask_tokens(graph, copies, stretch, number, header.key)
            continue
        learns = runtime.tokens[number].follows_gradient
        SampleTokens(graph, copies, whole_of, stretch, number, header.key, learns).run()
    # By their mark: in place of a layer's value a part of it may stand in ``copies``, or nothing any more.
    calls = {name: node for node in graph.nodes for name in node.meta.get(META_KEY, ())}
    for one in chosen.values():
        if one.candidate.node:
            node = by_name[one.candidate.node]
            _SampledNode(root, runtime, header, flow, one, node).observe(calls[one.candidate.name])
    return graph


def guard_graph(root: nn.Module, program: GraphProgram) -> None:
    """Tells ``program`` what its graph, or each section of it, depends on."""
    captured = program.capture
    sections = captured.sections or (program.whole,)
    program.guards = {section.path: _guards(root, captured, section.path) for section in sections}


def _chosen(runtime: Runtime, found: list[CandidateSite]) -> dict[str, CandidateSite]:
    return {one.candidate.name: one for one in found if runtime.record.plan[one.candidate.name].roles}


def _guards(root: nn.Module, captured: Capture, path: str) -> Guards:
    """Flags, attributes, and the children of what was traced through."""
    paths = [section.path for section in captured.sections]
    number = paths.index(path) if path in paths else None
    own = captured if number is None else captured.each[number]
    readers = own.readers or ((path,) if own.branching else ())
    through = {path}
    for node in captured.graph.nodes if captured.graph is not None else ():
        if number is None or node.meta.get(SECTION) == number:
            place = owner(node)
            while place and place not in through:
                through.add(place)
                place = place.rpartition(".")[0]
    traced = [root.get_submodule(one) for one in sorted(through)]
    inside = {id(module) for module in traced}
    return Guards(
        root.get_submodule(path),
        tuple(root.get_submodule(one) for one in readers),
        bool(own.branching),
        tuple((root.get_submodule(one), name, value) for one, name, value in own.frozen),
        own.granted.of(root),
        tuple((module, _children(module, inside)) for module in traced),
    )


def _children(module: nn.Module, inside: set[int]) -> tuple[tuple[str, nn.Module | None], ...]:
    """Names of the children, with those that the graph cannot do without: sampled, or traced through themselves.

    Any other layer may be replaced, such as a classifier that stays exact.
    """
    return tuple(
        (name, child if is_swapped(child) or id(child) in inside else None)
        for name, child in children_of(module).items()
    )


def _select(root: nn.Module, runtime: Runtime, one: CandidateSite, place: int, places: int) -> None:
    """Makes the selectors of a candidate, one for each role; all of a model have numbers of their own."""
    assert one.op is not None
    owner = root.get_submodule(one.owner)
    candidate = one.candidate
    decision = runtime.record.plan[candidate.name]
    selectors = {}
    for number, role in enumerate(Role):
        spec = decision.roles.get(role)
        if spec is None:
            continue
        pairs, groups = candidate.pairs, candidate.groups
        if role is not Role.OUTPUT:
            weight = owner.weight if one.module is not None else None
            known = role is Role.GRAD_INPUT and isinstance(weight, Tensor)
            pairs = weight.shape[0] // groups if known and isinstance(weight, Tensor) else None
        site = place + number * places
        selectors[role] = Selector(one.op.kind, one.op_kwargs, spec, site, pairs, owner, groups, role)
        runtime.add(candidate.name, selectors[role])
    if one.module is not None:
        swap(owner, Site(selectors, decision.straight_through, runtime))


def _keep_exact(chosen: Mapping[str, CandidateSite], by_name: Mapping[str, fx.Node]) -> None:
    """Other calls of a sampled layer say that they are exact: left alone, the layer would take its own sample."""
    sampled = {one.candidate.node for one in chosen.values()}
    layers = {one.module for one in chosen.values() if one.module is not None}
    for name, node in by_name.items():
        if node.op == "call_module" and node.target in layers and name not in sampled:
            node.args, node.kwargs = (node.args[0] if node.args else next(iter(node.kwargs.values())), None), {}


class _SampledNode:
    """One sampled candidate of a graph that is being rewritten."""

    def __init__(
        self,
        root: nn.Module,
        runtime: Runtime,
        header: GraphHead,
        flow: Flow | None,
        one: CandidateSite,
        captured: fx.Node,
    ) -> None:
        self.root, self.runtime, self.header, self.flow = root, runtime, header, flow
        self.graph, self.one, self.captured = header.graph, one, captured

    def sample(self, node: fx.Node) -> fx.Node:
        """Makes ``node`` a product of selections; returns the node that is."""
        one, graph = self.one, self.graph
        assert one.op is not None
        bound = one.op.bind(node.args, dict(node.kwargs)) if one.module is None else {}
        lhs = bound[one.op.lhs] if bound else node.args[0] if node.args else next(iter(node.kwargs.values()))
        rhs = bound.get(one.op.rhs)
        choices: dict[Role, fx.Node | None] = dict.fromkeys(Role)
        for role in Role:
            selector = self.runtime.selectors.get((one.candidate.name, role))
            if selector is None:
                continue
            if role is Role.OUTPUT and self._ahead:
                choices[role] = self._shared()
                continue
            with graph.inserting_before(node):
                weight = graph.create_node("get_attr", f"{one.module}.weight") if rhs is None else rhs
                operands = None if selector.ahead else lhs, weight, self.header.key
                choices[role] = graph.call_module(selector_target(selector), operands)
        straight_through = self.runtime.record.plan[one.candidate.name].straight_through
        if one.module is not None:
            node.args, node.kwargs = (lhs, *choices.values(), straight_through), {}
            return node
        how = dict(zip(SAMPLING_ARGUMENTS, (*choices.values(), straight_through), strict=True))
        with graph.inserting_before(node):
            sampled = graph.call_function(one.op.function, node.args, {**node.kwargs, **how})
        sampled.meta = dict(node.meta)
        node.replace_all_uses_with(sampled)
        graph.erase_node(node)
        return sampled

    @property
    def _ahead(self) -> bool:
        sharing = self.header.sharing
        return self.captured in sharing.reads or self.captured in sharing.loose

    def _shared(self) -> fx.Node | None:
        sharing = self.header.sharing
        if self.captured in sharing.loose:
            return self.header.units(sharing.loose[self.captured])
        assert self.flow is not None
        segments = self.flow.readers[self.captured][1].segments
        return self.header.positions(segments, sharing.reads[self.captured], self.one.candidate.groups)

    def observe(self, node: fx.Node) -> None:
        """Lets scores that learn see what the layer reads."""
        sharing, one = self.header.sharing, self.one
        if not self._ahead:
            return
        if self.captured in sharing.loose:
            places: tuple[int, ...] = (sharing.loose[self.captured],)
            known = sharing.classes[places[0]]
            segments: tuple[Segment, ...] = (Segment(-1, known.units, 1),)
        else:
            assert self.flow is not None
            places, segments = sharing.reads[self.captured], self.flow.readers[self.captured][1].segments
        dim = {"conv1d": -2, "conv2d": -3, "conv3d": -4}.get(one.candidate.kind, -1)
        target = self.header.observer(one, segments, places, dim)
        if target is None:
            return
        input = node.args[0] if node.args else node.kwargs["input"]
        assert isinstance(input, fx.Node)
        narrowed = node.target in (sliced_linear, *SLICED_CONVOLUTIONS.values()) or _slices(node)
        with self.graph.inserting_before(node):
            if not narrowed:
                chosen = self.header.positions(segments, places)
                if self.captured in sharing.loose and one.candidate.groups > 1:
                    chosen = self.graph.call_function(spread, (chosen, one.candidate.pairs))
                input = self.graph.call_function(narrow, (input, dim, chosen, sum(part.entries for part in segments)))
            self.graph.call_module(target, (input, *(self.header.units(place) for place in places)))


def _slices(node: fx.Node) -> bool:
    given = node.args[1] if len(node.args) > 1 else None
    return isinstance(given, fx.Node) and given.target is slice_weights
