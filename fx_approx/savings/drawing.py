"""The graph of a model as a report draws it: products, and where values meet, with what is computed of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from fx_approx.core.plan_effects import FULL, Axis, PlanEffects
from fx_approx.savings.memory_model import Counts
from fx_approx.savings.rows import Row


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Channels, or units of several, that one selection decides about.

    Attributes:
        kept: How many are computed.
        units: How many there are.
        group: Number of the selection; :data:`fx_approx.core.plan_effects.FULL` where none decides.
    """

    kept: int
    units: int
    group: int = FULL


@dataclasses.dataclass(frozen=True)
class DrawnNode:
    """A product, or an operation in which values meet.

    Attributes:
        name: That of its row, or what the operation is, in the words of modules.
        is_row: It is a product.
        parents: Those before it whose values it reads, by their numbers.
        reads: The channels that it contracts over; empty for an addition, and where they are not known.
        makes: The channels of its value; empty where they cannot be followed.
        stops: Why values that it makes, or that follow from it alone, are whole although some reader wants a part.
    """

    name: str
    is_row: bool
    parents: tuple[int, ...] = ()
    reads: tuple[Stretch, ...] = ()
    makes: tuple[Stretch, ...] = ()
    stops: tuple[str, ...] = ()


def draw_nodes(effects: PlanEffects, counts: Counts, rows: Mapping[str, Row]) -> tuple[DrawnNode, ...]:
    """The nodes of a plan in the order in which the model runs; empty if shapes are not known.

    Args:
        effects: What the plan does.
        counts: Units kept now.
        rows: Of the report, by name.
    """
    at: dict[str, tuple[int, ...]] = {}
    found: list[DrawnNode] = []
    for one in effects.operations:
        parents = tuple(dict.fromkeys(number for name in one.inputs for number in at.get(name, ())))
        row = rows.get(one.candidate or "")
        if row is None and (not one.joins or len(parents) < 2):
            at[one.name] = parents
            continue
        at[one.name] = (len(found),)
        reads = () if row is None else _reads(row, effects.reads.get(row.name, ()), counts.kept)
        name = one.joins if row is None else row.name
        found.append(DrawnNode(name, row is not None, parents, reads, _stretches(one.axis, counts.kept)))
    for stop in effects.stops:
        if places := at.get(stop.operation):
            made = found[places[-1]]
            found[places[-1]] = dataclasses.replace(made, stops=(*made.stops, str(stop)))
    return tuple(found)


def _reads(row: Row, axis: Axis, kept: Sequence[int]) -> tuple[Stretch, ...]:
    if axis:
        return _stretches(axis, kept)
    sample = row.sample()
    if sample is not None and sample.k is not None and sample.pairs is not None:
        return (Stretch(sample.k, sample.pairs),)
    return () if row.pairs is None else (Stretch(row.pairs, row.pairs),)


def _stretches(axis: Axis, kept: Sequence[int]) -> tuple[Stretch, ...]:
    """Those of one selection whose units are all kept count as whole."""
    found = []
    for part in axis:
        some = part.count if part.place == FULL else kept[part.place]
        found.append(Stretch(some, part.count, FULL if some == part.count else part.place))
    return tuple(found)


def joined(drawings: Sequence[Sequence[DrawnNode]]) -> tuple[DrawnNode, ...]:
    """Several graphs as one, each with selections of its own."""
    found: list[DrawnNode] = []
    groups = 0
    for drawing in drawings:
        first = len(found)
        for node in drawing:
            reads, makes = (tuple(_moved(part, groups) for part in side) for side in (node.reads, node.makes))
            parents = tuple(first + number for number in node.parents)
            found.append(dataclasses.replace(node, parents=parents, reads=reads, makes=makes))
        parts = (part for node in drawing for part in (*node.reads, *node.makes))
        groups += 1 + max((part.group for part in parts), default=FULL)
    return tuple(found)


def _moved(part: Stretch, groups: int) -> Stretch:
    return part if part.group == FULL else dataclasses.replace(part, group=part.group + groups)
