"""Effects: what sharing and demand do to every product and every value, as plain data that holds no graph.

Facts only; how many units a selection keeps follows from the ratios and switches of the moment, and is counted later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn

from fx_approx.core.layer_types import CHANNEL_LAYERS
from fx_approx.core.plan import Plan
from fx_approx.core.plan_effects import FULL, Axis, ChannelSlice, Operation, PlanEffects, Stop, TokenAxis
from fx_approx.ops.narrow_calls import NARROW_CALLS
from fx_approx.passes.aliasing import can_tap_relu, changes_in_place
from fx_approx.passes.channel_flow import Flow
from fx_approx.passes.channel_liveness import ChannelAnalysis, Demand
from fx_approx.passes.channel_spaces import Layout
from fx_approx.passes.find_candidates import CandidateSite, attribute
from fx_approx.passes.node_words import place
from fx_approx.passes.reshape_rules import RESHAPES
from fx_approx.passes.sample_tokens import TokenStretch
from fx_approx.passes.share_selections import Sharing, follows
from fx_approx.passes.token_scores import are_scores, mixes


def find_effects(
    found: Sequence[CandidateSite],
    plan: Plan,
    facts: ChannelAnalysis,
    flow: Flow | None,
    hoisting: bool = True,
    stretches: Sequence[TokenStretch] = (),
) -> PlanEffects:
    """The effects of ``facts``.

    Args:
        found: The candidates of the captured graph.
        plan: What is sampled.
        facts: What is shared and demanded under ``plan``.
        flow: What operations do to channels; None if shapes are not known.
        hoisting: What is not demanded is not computed.
        stretches: Blocks that compute some tokens only.
    """
    sharing = facts.sharing
    by_node = {one.candidate.node: one for one in found if one.candidate.node}
    names = {node: one.candidate.name for node, one in by_node.items()}
    reads: dict[str, Axis] = {names[node.name]: (_whole(sharing, place),) for node, place in sharing.loose.items()}
    if flow is None:
        return PlanEffects(tuple(sharing.classes), reads, notes=tuple(sharing.notes))
    reads.update({names[node.name]: _axis(flow.readers[node][1], own) for node, own in sharing.reads.items()})
    demand = facts.demand if hoisting and facts.narrows else None
    trained = {id(p): name for name, p in flow.root.named_parameters() if p.requires_grad}
    inside = {node: number for number, stretch in enumerate(stretches) for node in stretch.inside}
    operations = [
        dataclasses.replace(
            _operation(node, by_node.get(node.name), flow, sharing, demand, trained),
            **({} if node not in inside else _token_axes(stretches[inside[node]], inside[node], node)),
            mixes=node in inside and mixes(stretches[inside[node]].flow, node),
            squares=node in inside and are_scores(stretches[inside[node]].flow, node),
        )
        for node in flow.graph.nodes
    ]
    stops = () if demand is None else tuple(_stops(flow, sharing, demand, names, plan))
    hoisted, notes = demand is not None, tuple(sharing.notes)
    packs = all(parameter.device.type == "cpu" for parameter in flow.root.parameters())
    tokens = () if plan.tokens is None else tuple(stretch.share(plan.tokens) for stretch in stretches)
    return PlanEffects(
        tuple(sharing.classes), reads, tuple(operations), flow.values, stops, notes, hoisted, packs, tokens
    )


def _token_axes(stretch: TokenStretch, number: int, node: fx.Node) -> dict[str, Any]:
    """Along which axes a node of a stretch has some tokens, and of what it reads them."""

    def axis(layout: Layout | None) -> TokenAxis:
        segments = () if layout is None else layout.segments
        sampled = sum(s.entries for s in segments if stretch.is_sampled(s.space))
        return TokenAxis(number, sum(s.entries for s in segments) - sampled, sampled)

    flow, step = stretch.flow, stretch.flow.steps[node]
    outside = dict.fromkeys(link.source for link in step.links if link.source not in stretch.inside)
    taken = {source.name: (axis(flow.layout(source)),) for source in outside}
    for rider, _ in step.follow:
        taken[rider.name] = (*taken.get(rider.name, ()), axis(step.layout))
    return {"tokens": axis(step.layout), "taken": taken}


def _whole(sharing: Sharing, place: int) -> ChannelSlice:
    return ChannelSlice(place, sharing.classes[place].units, 1)


def _axis(layout: Layout, classes: Sequence[int]) -> Axis:
    return tuple(
        ChannelSlice(place, segment.count, segment.block)
        for segment, place in zip(layout.segments, classes, strict=True)
    )


def _operation(
    node: fx.Node,
    one: CandidateSite | None,
    flow: Flow,
    sharing: Sharing,
    demand: Demand | None,
    trained: Mapping[int, str],
) -> Operation:
    module, step = flow.module(node), flow.steps[node]
    axis: Axis = ()
    if step.layout is not None:
        have = (FULL,) * len(step.layout.segments) if demand is None else demand.have[node]
        axis = _axis(step.layout, have)
    narrowed = {} if demand is None else dict(_narrowed(flow, sharing, demand, node))
    own = 0
    if module is not None and isinstance(module, CHANNEL_LAYERS):
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        own = sum(tensor.itemsize for tensor in tensors if tensor.dim() == 1)
    return Operation(
        name=node.name,
        inputs=tuple(source.name for source in node.all_input_nodes),
        axis=axis,
        narrowed=narrowed,
        action=step.action,
        candidate=None if one is None else one.candidate.name,
        weight=None if one is None else one.weight,
        moves=one is None and _moves(flow, node),
        joins=place(node) if one is None and step.layout is not None and _joins(flow, node) else "",
        own=own,
        rectified=can_tap_relu(flow, node),
        trained={
            trained[id(p)]: (tuple(p.shape), p.itemsize)
            for p in _parameters_read(flow, node, one is not None)
            if id(p) in trained
        },
    )


def _joins(flow: Flow, node: fx.Node) -> bool:
    """Whether several values that the step computes meet in ``node``."""
    return sum(source not in flow.constants for source in node.all_input_nodes) > 1


def _parameters_read(flow: Flow, node: fx.Node, multiplies: bool) -> Iterator[nn.Parameter]:
    """What a layer has, or the function of a layer is given; in arithmetic a parameter is a value like any other."""
    module = flow.module(node)
    if module is not None:
        yield from module.parameters()
    for source in node.all_input_nodes if multiplies or node.target in NARROW_CALLS else ():
        found = attribute(flow.root, source)
        if isinstance(found, nn.Parameter):
            yield found


def _moves(flow: Flow, node: fx.Node) -> bool:
    values = flow.values
    if node.op not in ("call_function", "call_method", "call_module") or values.of(node) is None:
        return False
    sources = {place for source in node.all_input_nodes for place in values.storages.get(source.name, ())}
    if not sources & set(values.storages.get(node.name, ())):
        return True
    return changes_in_place(flow, node) and node.target not in RESHAPES


def _narrowed(flow: Flow, sharing: Sharing, demand: Demand, node: fx.Node) -> Iterator[tuple[str, Axis]]:
    """What is taken of operands that hold more than the node reads."""
    step = flow.steps[node]
    if step.action == "produce":
        if node in sharing.reads:
            source, layout = flow.readers[node]
            if sharing.reads[node] != demand.have[source]:
                yield source.name, _axis(layout, sharing.reads[node])
        return
    if step.layout is None:
        return
    for source, wants in demand.wanted(step.links, node).items():
        own = flow.layout(source)
        if own is not None and tuple(wants) != tuple(demand.have[source]):
            yield source.name, _axis(own, wants)


def _stops(flow: Flow, sharing: Sharing, demand: Demand, names: Mapping[str, str], plan: Plan) -> Iterator[Stop]:
    """Values of which some reader wants a part only, and why they are whole."""
    for node in flow.graph.nodes:
        stops = demand.stops.get(node)
        if stops is None or node.op == "placeholder" or FULL not in demand.have[node]:
            continue
        if not any(_wants_less(flow, sharing, demand, node, user, names, plan) for user in node.users):
            continue
        decision = plan[names[node.name]] if node.name in names else None
        if decision is not None and decision.roles and not follows(decision):
            reason = "its gradients are sampled apart, so it computes all of its outputs"
        elif decision is not None and decision.roles and flow.steps[node].action != "produce":
            reason = "a sampled product of activations computes all of its output"
        else:
            refused = [flow.stopped[user] for user in node.users if user in flow.stopped]
            reads = [what if user is None else f"{place(user)} {what}" for user, what in stops]
            reason = "; ".join(dict.fromkeys([*refused, *reads]))
        yield Stop(node.name, place(node), reason)


def _wants_less(
    flow: Flow, sharing: Sharing, demand: Demand, node: fx.Node, user: fx.Node, names: Mapping[str, str], plan: Plan
) -> bool:
    if user in sharing.reads and flow.readers[user][0] is node:
        return follows(plan[names[user.name]])
    return any(
        place != FULL
        for link in flow.steps[user].links
        if link.source is node
        for place in demand.have[user][link.place : link.place + link.count]
    )
