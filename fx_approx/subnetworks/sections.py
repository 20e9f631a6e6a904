"""Specialises a transformed model to fixed selections, section by section."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from fx_approx.capture.split_sections import split
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.graph_program import PROLOGUE
from fx_approx.runtime.upcoming import further_selectors
from fx_approx.sampling.base import Selection
from fx_approx.subnetworks.graph_form import Serves
from fx_approx.subnetworks.model_parts import Part
from fx_approx.subnetworks.narrowing import Narrowing
from fx_approx.subnetworks.specialize import Chosen, specialise


def _placed(approx: ApproxModule, chosen: tuple[Selection | None, ...]) -> Chosen:
    """Each selection at its place, as an object of its own: the graph has a value of that for each place."""
    chosen = tuple(None if one is None else _own_object(one) for one in chosen)
    outside, inside = further_selectors(approx)
    ahead = len(chosen) - len(outside) - len(inside)
    behind = ahead + len(outside)
    return Chosen(
        chosen[:ahead],
        dict(zip(outside, chosen[ahead:behind], strict=True)),
        dict(zip(inside, chosen[behind:], strict=True)),
    )


def _own_object(chosen: Selection) -> Selection:
    indices, scale = chosen
    return Selection(indices.view_as(indices), None if scale is None else scale.view_as(scale))


def parts_of(approx: ApproxModule, narrowing: Narrowing, selections: tuple[Selection | None, ...]) -> list[Part]:
    """The specialised graph of the model, or of each of its sections; none where nothing could be traced."""
    chosen = _placed(approx, selections)
    program = approx._fx_approx.program
    captured, graph = program.capture, program.graph
    if graph is None:
        specialise({}, approx, narrowing, (), chosen)
        return []
    if not captured.sections:
        made = specialise({"": graph}, approx, narrowing, (), chosen)
        return [Part("", made[""], Serves(captured.form, captured.guard, bool(captured.branching)))]
    head, own = split(graph, len(captured.sections), PROLOGUE)
    graphs = {section.path: part for section, part in zip(captured.sections, own, strict=True)}
    made = specialise(graphs, approx, narrowing, _handed(head, chosen.ahead), chosen)
    return [
        Part(section.path, made[section.path], Serves(section.form, section.guard, bool(each.branching)))
        for section, each in zip(captured.sections, captured.each, strict=True)
    ]


def exact_parts(approx: ApproxModule, narrowing: Narrowing) -> list[Part]:
    """The graphs of the model, or of its sections, without selections: nothing is narrowed."""
    shared = approx._fx_approx.resample
    count = 0 if shared is None else sum(1 for _ in shared.each())
    return parts_of(approx, narrowing, (None,) * (count + sum(map(len, further_selectors(approx)))))


def _handed(head: fx.Graph, chosen: Sequence[Any]) -> list[Any]:
    """What the head of the sections hands out, see :mod:`fx_approx.capture.split_sections`."""
    made: dict[fx.Node, Any] = {}
    for node in head.nodes:
        if node.op == "call_module":
            made[node] = chosen
        elif node.target is operator.getitem:
            made[node] = made[node.args[0]][node.args[1]]
        elif node.op == "output":
            return [made[one] for one in node.args[0]]
        else:
            made[node] = None
    return []
