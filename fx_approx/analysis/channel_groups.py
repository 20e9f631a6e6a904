"""The coupling graph of a transformed model, as text and as a picture."""

from __future__ import annotations

from pathlib import Path

import networkx as nx
from torch import nn

from fx_approx.runtime.approx_module import find
from fx_approx.utils.optional_imports import load_matplotlib


def coupling_graph(model: nn.Module) -> nx.Graph:
    """Which channels are coupled with which: what scope ``group`` shares selections over.

    A node stands for channels that are the same in all values that hold them, named by where they begin. Its
    attributes: ``units`` (how many), ``begins`` (all graph nodes where they begin), ``readers`` (layers that contract
    over them). An edge is an addition, ``by`` its name. Connected components are groups.

    Raises:
        ValueError: ``model`` is not transformed, or was transformed without example inputs.
    """
    analysis = find(model)._fx_approx.record.analysis
    if analysis is None or analysis.demand is None:
        raise ValueError(
            "model: expected one that was transformed with example_inputs, since shapes tell who reads what"
        )
    graph: nx.Graph = analysis.sharing.coupling
    return graph


def coupling_text(model: nn.Module) -> str:
    """The coupling graph in lines: each group of coupled channels, where they begin and who reads them.

    Raises:
        ValueError: As :func:`coupling_graph`.
    """
    graph = coupling_graph(model)
    lines = []
    for number, group in enumerate(_groups(graph), start=1):
        additions = sorted({by for _, _, by in graph.edges(group, data="by")})
        said = f", coupled by {', '.join(additions)}" if additions else ""
        lines.append(f"group {number}{said}")
        for name in group:
            node = graph.nodes[name]
            readers = ", ".join(dict.fromkeys(node["readers"])) or "no layer"
            lines.append(f"  {name} ({node['units']} channels) read by {readers}")
    return "\n".join(lines)


def _groups(graph: nx.Graph) -> list[list[str]]:
    order = {name: place for place, name in enumerate(graph.nodes)}
    return sorted(
        (sorted(group, key=order.__getitem__) for group in nx.connected_components(graph)), key=lambda g: order[g[0]]
    )


def draw_coupling(model: nn.Module, path: str | Path) -> None:
    """Draws the coupling graph to a file whose suffix says the format (``.png``, ``.svg``, ``.pdf``).

    Spaces that nothing reads and nothing couples are left out. Needs matplotlib (the extra ``figures``).

    Raises:
        ValueError: As :func:`coupling_graph`.
        ImportError: Without matplotlib.
    """
    graph = coupling_graph(model)
    figures = load_matplotlib("figure", "draw_coupling")
    groups = [group for group in _groups(graph) if len(group) > 1 or graph.nodes[group[0]]["readers"]]
    longest = max((len(group) for group in groups), default=1)
    figure = figures.Figure(figsize=(2.6 * max(longest, 2), 1.1 * max(len(groups), 1) + 0.6), layout="constrained")
    axes = figure.subplots()
    places = {name: (column, -row) for row, group in enumerate(groups) for column, name in enumerate(group)}
    shown = graph.subgraph(places)
    for one, other, by in shown.edges(data="by"):
        (x1, y1), (x2, y2) = sorted((places[one], places[other]))
        bend = 0.0 if x2 - x1 == 1 else 0.12 * (x2 - x1)
        style = f"arc3,rad={-min(bend, 0.35)}"
        axes.annotate("", (x2, y2), (x1, y1), arrowprops={"arrowstyle": "-", "connectionstyle": style, "color": "0.6"})
        if not bend:
            axes.text((x1 + x2) / 2, y1 + 0.05, by, ha="center", va="bottom", fontsize=7, color="0.4")
    for name, (x, y) in places.items():
        node = graph.nodes[name]
        readers = list(dict.fromkeys(node["readers"]))
        few = ", ".join(readers[:2]) + (f" +{len(readers) - 2}" if len(readers) > 2 else "")
        box = {"boxstyle": "round", "facecolor": "#dbeafe" if readers else "#f3f4f6", "edgecolor": "0.5"}
        text = f"{name}\n{node['units']} ch" + (f"\n→ {few}" if few else "")
        axes.text(x, y, text, ha="center", va="center", fontsize=7, bbox=box)
    axes.set(xlim=(-0.6, longest - 0.4), ylim=(-len(groups) + 0.4, 0.6))
    axes.set_axis_off()
    figure.savefig(path, dpi=150)
