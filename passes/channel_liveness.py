"""Demand: which channels of each value anyone will read, by a walk from the outputs back.

The demand at a value is one class for each segment of its channels, or FULL. Readers that agree keep it; where they
differ the value is whole, and those that want less take their part of it. It ends at a linear or convolution layer,
which then computes only what is demanded, and at everything that mixes channels, which needs all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import networkx as nx
from torch import fx

from fx_approx.core.plan import Plan
from fx_approx.core.plan_effects import FULL
from fx_approx.passes.aliasing import changes_in_place
from fx_approx.passes.channel_flow import Flow, Link, first, reads_shape_only
from fx_approx.passes.find_candidates import CandidateSite
from fx_approx.passes.gradient_readers import asked_inside
from fx_approx.passes.node_words import place
from fx_approx.passes.share_selections import Sharing, follows, share

Stop = tuple[fx.Node | None, str]

_UNUSED = -2


@dataclasses.dataclass
class Demand:
    """Where the demand goes.

    Attributes:
        have: Node -> class of each segment of its channels that the node computes, FULL for all of them.
        wants: Node -> the same, as its users would have it; more than it can do where it is ``given``.
        stops: Node -> why its value is whole although some reader needs a part only: who reads it, if that is why, and
            what is said of that.
    """

    have: dict[fx.Node, tuple[int, ...]]
    wants: dict[fx.Node, tuple[int, ...]]
    stops: dict[fx.Node, tuple[Stop, ...]]

    def wanted(self, links: Sequence[Link], node: fx.Node) -> dict[fx.Node, list[int]]:
        """What ``node``, with ``links``, reads of each operand: class of each segment, as :attr:`have`."""
        found: dict[fx.Node, list[int]] = {}
        for link in links:
            wants = found.setdefault(link.source, list(self.have[link.source]))
            wants[link.start : link.start + link.count] = self.have[node][link.place : link.place + link.count]
        return found


def propagate_demand(
    flow: Flow, sharing: Sharing, follow: frozenset[fx.Node], rigid: frozenset[fx.Node] = frozenset()
) -> Demand:
    """The demand at every value.

    Args:
        flow: What operations do to channels.
        sharing: What readers read.
        follow: Readers that read nothing but the selected channels.
        rigid: Layers that compute all of their outputs.
    """
    closed = set(rigid)
    while True:
        demand = _once(flow, sharing, follow, closed)
        found = {node for node in demand.have if node not in closed and _for_nothing(flow, demand, node)}
        if not found:
            return demand
        closed |= found


def _once(flow: Flow, sharing: Sharing, follow: frozenset[fx.Node], closed: set[fx.Node]) -> Demand:
    demand = Demand({}, {}, {})
    for node in reversed(flow.graph.nodes):
        step = flow.steps[node]
        if step.layout is None:
            continue
        wants = [_UNUSED] * len(step.layout.segments)
        stops: list[Stop] = []
        for user in node.users:
            _read(flow, sharing, follow, demand, node, user, wants, stops)
        wants = [FULL if want == _UNUSED else want for want in wants]
        demand.wants[node] = tuple(wants)
        can = step.action != "given" and node not in closed
        have = [want if can and _fits(flow, sharing, node, want) else FULL for want in wants]
        demand.have[node] = tuple(have)
        if stops:
            demand.stops[node] = tuple(dict.fromkeys(stops))
        elif any(want != FULL and got == FULL for want, got in zip(wants, have, strict=True)):
            given = step.action == "given"
            why = "made by what computes all channels" if given else "nothing would be saved"
            demand.stops[node] = ((None, why),)
    return demand


def _fits(flow: Flow, sharing: Sharing, node: fx.Node, want: int) -> bool:
    """A grouped convolution computes as many channels of each group."""
    step = flow.steps[node]
    return want == FULL or step.action != "produce" or sharing.classes[want].groups % step.groups == 0


def _read(
    flow: Flow,
    sharing: Sharing,
    follow: frozenset[fx.Node],
    demand: Demand,
    node: fx.Node,
    user: fx.Node,
    wants: list[int],
    stops: list[Stop],
) -> None:
    if flow.shape(node) is not None and reads_shape_only(user, node):
        return
    if user in sharing.reads and user in follow and flow.readers[user][0] is node:
        for place, wanted in enumerate(sharing.reads[user]):
            _join(wants, place, wanted, stops, user)
        return
    links = [link for link in flow.steps[user].links if link.source is node]
    for link in links:
        for step in range(link.count):
            _join(wants, link.start + step, demand.have[user][link.place + step], stops, user)
    if not links:
        for place in range(len(wants)):
            _join(wants, place, FULL, stops, user)


def _join(wants: list[int], place: int, wanted: int, stops: list[Stop], user: fx.Node) -> None:
    before = wants[place]
    if before in (_UNUSED, wanted):
        wants[place] = wanted
    else:
        wants[place] = FULL
    if wanted == FULL:
        stops.append((user, "reads all of it"))
    elif before not in (_UNUSED, FULL, wanted):
        stops.append((user, "reads other channels of it"))


def _for_nothing(flow: Flow, demand: Demand, node: fx.Node) -> bool:
    """Whether following the demand costs a gather too many, or cannot be done.

    That is where every operand of an operation of several would have to be narrowed for it, where an operation in place
    would change a copy instead, and where the operand is a tuple of parts, of which nothing can be gathered.
    """
    step = flow.steps[node]
    if any(flow.shape(link.source) is None and not _agree(demand, node, link) for link in step.links):
        return True
    if changes_in_place(flow, node):
        changed = [link for link in step.links if link.source is first(node)]
        if not all(_agree(demand, node, link) for link in changed):
            return True
        if not changed and any(have != FULL for have in demand.have[node]):  # of an operand that is always whole
            return True
    operands = len(step.links) + sum(other not in flow.constants for other, _ in step.follow)
    if operands < 2 or len({link.source for link in step.links}) != len(step.links) or len(step.links) < 1:
        return False
    if all(have == FULL for have in demand.have[node]) or any(link.place for link in step.links):
        return False
    return all(_full(demand, link) for link in step.links)


def _agree(demand: Demand, node: fx.Node, link: Link) -> bool:
    own, other = demand.have[node], demand.have[link.source]
    return own[link.place : link.place + link.count] == other[link.start : link.start + link.count]


def _full(demand: Demand, link: Link) -> bool:
    return all(have == FULL for have in demand.have[link.source][link.start : link.start + link.count])


def share_and_find_live(flow: Flow, graph: fx.Graph, found: list[CandidateSite], plan: Plan) -> tuple[Sharing, Demand]:
    """Shares as the plan says, but not over additions whose result is whole all the same."""
    apart: frozenset[int] = frozenset()
    names = {one.candidate.node: one.candidate.name for one in found if one.candidate.node}
    decisions = {node: plan[names[node.name]] for node in graph.nodes if node.name in names}
    # A sampled product of two activations chooses by what they hold: with fewer heads it would choose others.
    layers = {node for node in decisions if flow.steps[node].action == "produce"}
    follow = frozenset(node for node, decision in decisions.items() if follows(decision) and node in layers)
    rigid = frozenset(node for node, decision in decisions.items() if decision.roles and node not in follow)
    rigid |= asked_inside(flow)
    while True:
        sharing = share(flow, graph, found, plan, apart)
        demand = propagate_demand(flow, sharing, follow, rigid)
        whole = _whole_groups(flow, sharing, demand) - apart
        if not whole:
            for group in apart:
                begins = place(flow.spaces.origins[group][0].node)
                sharing.notes.append(f"{begins}: not shared over additions, since their result is needed whole")
            return sharing, demand
        apart |= whole


def _whole_groups(flow: Flow, sharing: Sharing, demand: Demand) -> frozenset[int]:
    """Coupled groups that scope ``group`` shares over although an addition in them computes all channels."""
    groups = flow.spaces.groups()
    shared = {
        groups[flow.spaces.find(segment.space)]
        for node, places in sharing.reads.items()
        for segment, place in zip(flow.readers[node][1].segments, places, strict=True)
        if sharing.classes[place].scope == "group"
    }
    whole = set()
    for space, _, node in flow.spaces.joins:
        group = groups[flow.spaces.find(space)]
        if group in shared and FULL in _of_space(flow, demand, node, group, groups):
            whole.add(group)
    return frozenset(whole)


def _of_space(flow: Flow, demand: Demand, node: fx.Node, group: int, groups: dict[int, int]) -> Sequence[int]:
    layout = flow.layout(node)
    assert layout is not None
    return [
        have
        for segment, have in zip(layout.segments, demand.have[node], strict=True)
        if groups[flow.spaces.find(segment.space)] == group
    ]


@dataclasses.dataclass(frozen=True)
class ChannelAnalysis:
    """What the passes found: the shared selections, and the demand (None if shapes are not known)."""

    sharing: Sharing
    demand: Demand | None

    @property
    def narrows(self) -> bool:
        """Whether some value need not be computed whole."""
        return self.demand is not None and any(map(_some, self.demand.have.values()))


def analyse_channels(
    graph: fx.Graph | None, found: list[CandidateSite], plan: Plan, flow: Flow | None
) -> ChannelAnalysis:
    """What is shared and demanded under ``plan``; nothing is changed."""
    if graph is None:
        return ChannelAnalysis(Sharing([], {}, {}, nx.Graph(), []), None)
    if flow is None:
        return ChannelAnalysis(share(None, graph, found, plan), None)
    return ChannelAnalysis(*share_and_find_live(flow, graph, found, plan))


def _some(have: tuple[int, ...]) -> bool:
    return any(place != FULL for place in have)
