"""Takes one graph that holds several, one behind the other, apart: each runs by itself.

See :mod:`fx_approx.capture.sections`.

The selections that are made ahead are the head. It runs once in a forward of the model, before its Python, and each
section is handed what it returns. All else that no section computes from its inputs, such as slices of weights, stands
in each section that reads it: weights are read when the section runs, in its grad mode.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from fx_approx.capture.records import SECTION


def split(graph: fx.Graph, sections: int, prologue: str) -> tuple[fx.Graph, list[fx.Graph]]:
    """The head, of the randomness of a forward, and the graph of each section, of what the head returns and its inputs.

    Args:
        graph: The rewritten graph of all.
        sections: How many.
        prologue: The target of the node that hands out the randomness; of what makes selections it is the beginning.
    """
    place: dict[fx.Node, int | None] = {}
    for node in graph.nodes:
        place[node] = None if _is_call(node, prologue) else _section(node, place)
    resample = [node for node in graph.nodes if _is_call(node, f"{prologue}.resample")]
    head = [node for node in graph.nodes if _is_call(node, prologue)]
    for node in resample:
        head += [source for source in node.all_input_nodes if source not in head]
    head += resample
    head += [node for node in graph.nodes if node.target is operator.getitem and node.args[0] in resample]
    handed = [node for node in head if _is_call(node, prologue) or node.target is operator.getitem]
    results: Any = next(node for node in graph.nodes if node.op == "output").args[0]
    return _head(head, handed, prologue), [
        _own(graph, place, handed, results[number], number) for number in range(sections)
    ]


def _is_call(node: fx.Node, target: str) -> bool:
    return node.op == "call_module" and node.target == target


def _section(node: fx.Node, place: dict[fx.Node, int | None]) -> int | None:
    if SECTION in node.meta:
        return int(node.meta[SECTION])
    if node.op == "output":
        return None
    found = {place[source] for source in node.all_input_nodes} - {None}
    assert len(found) < 2, f"{node.name} reads values of two sections"
    return next(iter(found), None)


def _head(nodes: list[fx.Node], handed: list[fx.Node], prologue: str) -> fx.Graph:
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    given = made.placeholder("drawn")
    for node in nodes:
        copies[node] = given if _is_call(node, prologue) else made.node_copy(node, copies.__getitem__)
    made.output(tuple(copies[node] for node in handed))
    return made


def _own(
    graph: fx.Graph, place: dict[fx.Node, int | None], handed: list[fx.Node], result: Any, number: int
) -> fx.Graph:
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    head = made.placeholder("head")
    needed = {node for node in graph.nodes if place[node] == number}
    fx.map_arg(result, needed.add)
    for node in reversed(graph.nodes):
        if node in needed and node not in handed:
            needed.update(node.all_input_nodes)
    for node in graph.nodes:
        if node in needed and node.op == "placeholder":
            copies[node] = made.node_copy(node)
    for index, node in enumerate(handed):
        if node in needed:
            copies[node] = made.call_function(operator.getitem, (head, index))
    for node in graph.nodes:
        if node in needed and node not in copies:
            copies[node] = made.node_copy(node, copies.__getitem__)
    made.output(fx.map_arg(result, copies.__getitem__))
    return made
