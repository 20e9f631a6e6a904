"""Several graphs that lie one behind the other in one, see :mod:`fx_approx.sections`: parted, each to run by itself.

What no section computes from its inputs is the head: the selections that are made ahead. It runs once in a forward of
the model, before its Python, and each section is handed what it returns.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from fx_approx.capture import SECTION


def split(graph: fx.Graph, sections: int, prologue: str) -> tuple[fx.Graph, list[fx.Graph]]:
    """The head, of the randomness of a forward, and the graph of each section, of what the head returns and its inputs.

    Args:
        graph: The rewritten graph of all.
        sections: How many.
        prologue: The target of the node that hands out the randomness.
    """
    place: dict[fx.Node, int | None] = {}
    for node in graph.nodes:
        place[node] = None if _is_prologue(node, prologue) else _section(node, place)
    shared = [node for node in graph.nodes if place[node] is None and node.op != "output"]
    handed = [node for node in shared if any(place[user] is not None or user.op == "output" for user in node.users)]
    results: Any = next(node for node in graph.nodes if node.op == "output").args[0]
    return _head(shared, handed, prologue), [
        _own(graph, place, handed, results[number], number) for number in range(sections)
    ]


def _is_prologue(node: fx.Node, prologue: str) -> bool:
    return node.op == "call_module" and node.target == prologue


def _section(node: fx.Node, place: dict[fx.Node, int | None]) -> int | None:
    if SECTION in node.meta:
        return int(node.meta[SECTION])
    if node.op == "output":
        return None
    found = {place[source] for source in node.all_input_nodes} - {None}
    assert len(found) < 2, f"{node.name} reads values of two sections"
    return next(iter(found), None)


def _head(shared: list[fx.Node], handed: list[fx.Node], prologue: str) -> fx.Graph:
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    given = made.placeholder("drawn")
    for node in shared:
        copies[node] = given if _is_prologue(node, prologue) else made.node_copy(node, copies.__getitem__)
    made.output(tuple(copies[node] for node in handed))
    return made


def _own(
    graph: fx.Graph, place: dict[fx.Node, int | None], handed: list[fx.Node], result: Any, number: int
) -> fx.Graph:
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    head = made.placeholder("head")
    own = [node for node in graph.nodes if place[node] == number]
    for node in own:
        if node.op == "placeholder":
            copies[node] = made.node_copy(node)
    read = {source for node in own for source in node.all_input_nodes}
    fx.map_arg(result, read.add)
    for index, node in enumerate(handed):
        if node in read:
            copies[node] = made.call_function(operator.getitem, (head, index))
    for node in own:
        if node.op != "placeholder":
            copies[node] = made.node_copy(node, copies.__getitem__)
    made.output(fx.map_arg(result, copies.__getitem__))
    return made
