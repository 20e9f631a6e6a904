"""Share: which readers draw one selection, and the graph of what is coupled with what.

A reader is a linear or convolution layer whose output is sampled ahead. Those with scope ``value`` share with all that
read the same space, seen through channelwise operations; those with scope ``group`` also with the readers of spaces
that additions couple, such as a residual stream. Readers of one sampler and ratio share; the others stay apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import networkx as nx
from torch import fx

from fx_approx.core.candidates import Role
from fx_approx.core.plan import Decision, Plan
from fx_approx.core.plan_effects import GroupMember, SelectionGroup
from fx_approx.passes.channel_flow import Flow
from fx_approx.passes.find_candidates import CandidateSite
from fx_approx.sampling.spec import SamplerConfig


@dataclasses.dataclass
class Sharing:
    """All selections of a plan that are made ahead.

    Attributes:
        classes: In the order in which they are drawn.
        reads: Reader -> class of each segment of its input.
        loose: Reader whose input's channels are not known -> class of its own.
        coupling: Spaces with their readers; edges are the additions that couple them.
        notes: What was not done, and why.
    """

    classes: list[SelectionGroup]
    reads: dict[fx.Node, tuple[int, ...]]
    loose: dict[fx.Node, int]
    coupling: nx.Graph
    notes: list[str]


def ahead(decision: Decision) -> bool:
    """Whether OUTPUT is sampled from a selection that can be made before the input exists."""
    spec = decision.roles.get(Role.OUTPUT)
    return spec is not None and spec.ahead


def follows(decision: Decision) -> bool:
    """Whether all three products read the sampled channels only, so that the others need not be there."""
    return set(decision.roles) == {Role.OUTPUT} and not decision.straight_through


def share(
    flow: Flow | None, graph: fx.Graph, found: list[CandidateSite], plan: Plan, apart: frozenset[int] = frozenset()
) -> Sharing:
    """Groups the readers of ``graph`` by the selection that they draw.

    Args:
        flow: Who reads what; None if shapes are not known, so that every reader draws for itself.
        graph: The captured graph.
        found: Its candidates.
        plan: What is sampled, and with whom it is shared.
        apart: Coupled groups of spaces that are not to share beyond the value, by their representative.
    """
    nodes = {node.name: node for node in graph.nodes}
    sharing = Sharing([], {}, {}, nx.Graph(), [])
    keys: dict[Any, int] = {}
    groups = {} if flow is None else flow.spaces.groups()
    strata = {} if flow is None else flow.spaces.strata_of(groups)
    for one in found:
        name, decision = one.candidate.name, plan[one.candidate.name]
        node = nodes.get(one.candidate.node)
        if node is None or not ahead(decision) or one.weight is None:
            continue
        spec = decision.roles[Role.OUTPUT]
        layout = flow.readers[node][1] if flow is not None and node in flow.readers else None
        segments = () if layout is None else layout.segments
        if flow is None or not segments or (decision.scope == "layer" and len(segments) > 1):
            sharing.loose[node] = _loose(sharing, one, spec)
            continue
        roots = [flow.spaces.find(segment.space) for segment in segments]
        if any(strata[root] == 0 for root in roots):
            sharing.notes.append(f"{name}: the groups of the convolutions around it do not fit together")
            sharing.loose[node] = _loose(sharing, one, spec)
            continue
        places, offset = [], 0
        for segment, root in zip(segments, roots, strict=True):
            scope = decision.scope
            whom: Any = root if scope == "value" else name
            if scope == "group":
                whom = root if groups[root] in apart else groups[root]
            place = keys.setdefault((whom, scope, spec), len(sharing.classes))
            if place == len(sharing.classes):
                sharing.classes.append(SelectionGroup(segment.count, strata[root], spec, scope))
            sharing.classes[place].readings.append(GroupMember(name, offset, segment.block))
            places.append(place)
            offset += segment.entries
        sharing.reads[node] = tuple(places)
    if flow is not None:
        sharing.coupling = coupling_graph(flow, {node: name for name, node in _readers(found, nodes)})
    return sharing


def _readers(found: list[CandidateSite], nodes: Mapping[str, fx.Node]) -> list[tuple[str, fx.Node]]:
    return [(one.candidate.name, nodes[one.candidate.node]) for one in found if one.candidate.node in nodes]


def _loose(sharing: Sharing, one: CandidateSite, spec: SamplerConfig) -> int:
    candidate = one.candidate
    assert candidate.pairs is not None
    own = SelectionGroup(candidate.pairs * candidate.groups, candidate.groups, spec, "layer", known=False)
    own.readings.append(GroupMember(candidate.name, 0, 1))
    sharing.classes.append(own)
    return len(sharing.classes) - 1


def coupling_graph(flow: Flow, names: Mapping[fx.Node, str]) -> nx.Graph:
    """The spaces of a graph, and the additions that couple them.

    A node of the result is the name of the graph node where the space begins, with attributes ``units``, ``begins``
    (all values where it begins) and ``readers`` (the layers that contract over it). An edge has the addition as
    ``by``. Its connected components are what scope ``group`` shares over.
    """
    spaces = flow.spaces
    label = {}
    result = nx.Graph()
    for root in spaces.groups():
        begins = [origin.node.name + (f"[{origin.start}:]" if origin.start else "") for origin in spaces.origins[root]]
        label[root] = begins[0]
        result.add_node(begins[0], units=spaces.counts[root], begins=begins, readers=[])
    for node, (_, layout) in flow.readers.items():
        for segment in layout.segments:
            result.nodes[label[spaces.find(segment.space)]]["readers"].append(names.get(node, node.name))
    for a, b, node in spaces.joins:
        result.add_edge(label[spaces.find(a)], label[spaces.find(b)], by=node.name)
    return result
