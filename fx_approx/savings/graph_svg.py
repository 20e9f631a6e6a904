"""The graph of a report as SVG: a line for each product and each meeting of values, in the order in which they run."""

from __future__ import annotations

import html
from collections.abc import Sequence

from fx_approx.core.plan_effects import FULL
from fx_approx.savings.drawing import DrawnNode, Stretch

_HEIGHT, _BAR, _LANE, _CHARACTER = 20, 130, 9, 6.7
_LANES = 12
"""Most lines beside each other that skip some nodes; where there are more, they share the last."""

STYLE = """
svg text { font: 11px ui-monospace, monospace; fill: var(--ink); }
svg .meets { fill: var(--faint); }
svg .edge { fill: none; stroke: var(--line); }
svg .none { fill: var(--none); }
svg .whole { fill: var(--whole); }
svg .stop { fill: var(--stop); }
"""


def graph_svg(nodes: Sequence[DrawnNode]) -> str:
    """The drawing; colours are those of the page (:data:`STYLE`), each shared selection has one of its own.

    Beside each name stand two bars: the channels that it reads, and those of its value. Of either the part that is
    there is coloured and the rest is grey.
    """
    lanes = _lanes(nodes)
    left = _LANE * (max(lanes.values(), default=-1) + 2)
    names = left + 12
    bars = names + _CHARACTER * max([20, *(len(node.name) for node in nodes)]) + 10
    stops = bars + 2 * _BAR + 130
    reasons = max((len(reason) for node in nodes for reason in node.stops), default=0)
    width, height = stops + 20 + _CHARACTER * reasons, _HEIGHT * (len(nodes) + 1) + 6
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}" role="img" aria-label="the graph, layer by layer">',
        _text(bars, 14, "reads", "meets"),
        _text(bars + _BAR + 65, 14, "computes", "meets"),
    ]
    for number, node in enumerate(nodes):
        parts += [_edge(parent, number, lanes.get((parent, number)), left) for parent in node.parents]
    for number, node in enumerate(nodes):
        y = _middle(number)
        dot = "whole" if node.is_row else "none"
        parts.append(f'<circle class="{dot}" cx="{left}" cy="{y}" r="{4 if node.is_row else 3}"/>')
        parts.append(_text(names, y + 4, node.name, "" if node.is_row else "meets"))
        parts += _bar(bars, y, node.reads)
        parts += _bar(bars + _BAR + 65, y, node.makes)
        for reason in node.stops[:1]:
            more = "".join(f"\n{one}" for one in node.stops)
            title = f"<title>{html.escape(more.strip())}</title>"
            parts.append(f'<rect class="stop" x="{stops:.0f}" y="{y - 5}" width="8" height="10">{title}</rect>')
            parts.append(_text(stops + 14, y + 4, reason, "meets"))
    return "\n".join([*parts, "</svg>"])


def _lanes(nodes: Sequence[DrawnNode]) -> dict[tuple[int, int], int]:
    """Edges that skip nodes, each with the number of a lane in which no other edge runs beside it, short ones first."""
    edges = [(parent, number) for number, node in enumerate(nodes) for parent in node.parents if number - parent > 1]
    taken: list[list[tuple[int, int]]] = [[] for _ in range(_LANES)]
    found = {}
    for edge in sorted(edges, key=lambda one: (one[1] - one[0], one)):
        free = (lane for lane, others in enumerate(taken) if not any(_beside(edge, other) for other in others))
        found[edge] = next(free, _LANES - 1)
        taken[found[edge]].append(edge)
    return found


def _beside(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two edges would lie upon each other; from one node they may."""
    return one[1] > other[0] and one[0] < other[1] and one[0] != other[0]


def _edge(parent: int, number: int, lane: int | None, left: int) -> str:
    top, bottom = _middle(parent), _middle(number)
    if lane is None:
        return f'<path class="edge" d="M{left} {top}V{bottom}"/>'
    x = left - _LANE * (lane + 1)
    out = f"M{left} {top}C{x} {top} {x} {top} {x} {top + 9}"
    return f'<path class="edge" d="{out}V{bottom - 9}C{x} {bottom} {x} {bottom} {left} {bottom}"/>'


def _middle(number: int) -> int:
    return _HEIGHT * (number + 1) + 12


def _bar(x: float, y: int, stretches: Sequence[Stretch]) -> list[str]:
    """A bar of one length for all, parted by the channels of each stretch, with the counts beside it."""
    units = sum(one.units for one in stretches)
    if not units:
        return []
    kept = sum(one.kept for one in stretches)
    parts, start = [], x
    for one in stretches:
        length = _BAR * one.units / units
        done = length * one.kept / one.units if one.units else 0.0
        look = 'class="whole"' if one.kept == one.units else f'fill="{colour(one.group)}"'
        parts.append(f'<rect {look} x="{start:.1f}" y="{y - 5}" width="{done:.1f}" height="10"/>')
        if done < length:
            rest = f'x="{start + done:.1f}" y="{y - 5}" width="{length - done:.1f}" height="10"'
            parts.append(f'<rect class="none" {rest}/>')
        start += length
    return [*parts, _text(x + _BAR + 5, y + 4, f"{kept}" if kept == units else f"{kept}/{units}", "meets")]


def colour(group: int) -> str:
    """Of a selection; neighbours in number are far apart in hue. One that a layer does not share is violet."""
    return "hsl(280 45% 55%)" if group == FULL else f"hsl({(group * 137.5 + 20) % 360:.0f} 65% 50%)"


def _text(x: float, y: int, text: str, look: str) -> str:
    mark = f' class="{look}"' if look else ""
    return f'<text{mark} x="{x:.0f}" y="{y}">{html.escape(text)}</text>'
