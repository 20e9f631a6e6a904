"""The head of a rewritten graph: the prologue, all ahead selections in one node, and what is made of them once."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from fx_approx.core.candidates import Role
from fx_approx.core.plan_effects import FULL
from fx_approx.ops.channel_slices import positions, remaining
from fx_approx.passes.channel_spaces import Segment
from fx_approx.passes.find_candidates import CandidateSite
from fx_approx.passes.share_selections import Sharing
from fx_approx.runtime.graph_program import PROLOGUE
from fx_approx.runtime.graph_runtime import Runtime
from fx_approx.runtime.rng import SELECTION_INTERVAL
from fx_approx.runtime.shared_selection import Member, Observer, SharedSelection, SharedSelections


def make_resample(runtime: Runtime, sharing: Sharing) -> None:
    """Gives the runtime the selectors that ``sharing`` says, and observers where scores learn."""
    shared = []
    for one in sharing.classes:
        members = [Member(runtime.selectors[r.name, Role.OUTPUT], r.offset, r.block) for r in one.readings]
        shared.append(SharedSelection(members, one.units, one.groups, runtime.state.device))
    resample = SharedSelections(shared, runtime.state.device) if shared else None
    if resample is not None:
        resample.held = int(runtime.state[SELECTION_INTERVAL]) > 1
    runtime.add_module("resample", resample)
    for selector in {id(s): s for one in shared for s in one.selectors}.values():
        selector.shared = True


class GraphHead:
    """Inserts nodes at the head of a graph, each once however often it is asked for.

    Attributes:
        key: The prologue's node.
    """

    def __init__(self, graph: fx.Graph, runtime: Runtime, sharing: Sharing, weights: dict[str, str]) -> None:
        self.graph, self.runtime, self.sharing = graph, runtime, sharing
        self._anchor = next(node for node in graph.nodes if node.op != "placeholder")
        inputs = tuple(node for node in graph.nodes if node.op == "placeholder")
        self._made: dict[Any, fx.Node] = {}
        with graph.inserting_before(self._anchor):
            self.key = graph.call_module(PROLOGUE, inputs)
            if sharing.classes:
                read = [graph.create_node("get_attr", weights[r.name]) for one in sharing.classes for r in one.readings]
                self._resample = graph.call_module(f"{PROLOGUE}.resample", (self.key, *read))

    def once(self, what: Any, make: Any) -> fx.Node:
        """``make()`` at the head of the graph, the first time that ``what`` is asked for."""
        if what not in self._made:
            with self.graph.inserting_before(self._anchor):
                self._made[what] = make()
        return self._made[what]

    def read(self, target: str) -> fx.Node:
        """A node that reads the parameter ``target``, made once."""
        return self.once(("get_attr", target), lambda: self.graph.create_node("get_attr", target))

    def units(self, place: int) -> fx.Node:
        """The selection of class ``place``, of units."""
        make = lambda: self.graph.call_function(operator.getitem, (self._resample, place))  # noqa: E731
        return self.once(("units", place), make)

    def parts(self, segments: Sequence[Segment], classes: Sequence[int]) -> tuple[tuple[fx.Node | None, int, int], ...]:
        """An axis as :mod:`fx_approx.ops.channel_slices` describes it."""
        return tuple(
            (None if place == FULL else self.units(place), segment.count, segment.block)
            for segment, place in zip(segments, classes, strict=True)
        )

    def positions(self, segments: Sequence[Segment], classes: Sequence[int], groups: int = 1) -> fx.Node | None:
        """The selected entries of an axis; None if all are there."""
        if all(place == FULL for place in classes):
            return None
        parts = self.parts(segments, classes)
        simple = len(parts) == 1 and segments[0].block == 1 and self.sharing.classes[classes[0]].groups == groups
        if simple:
            return parts[0][0]
        call = lambda: self.graph.call_function(positions, (parts, groups))  # noqa: E731
        return self.once(("positions", parts, groups), call)

    def rest(self, segments: Sequence[Segment], have: Sequence[int], wants: Sequence[int]) -> fx.Node | None:
        """What is wanted of an axis that holds ``have``, as positions in what it holds."""
        if all(place == FULL for place in have):
            return self.positions(segments, wants)
        there, wanted = self.parts(segments, have), self.parts(segments, wants)
        call = lambda: self.graph.call_function(remaining, (there, wanted))  # noqa: E731
        return self.once(("rest", there, wanted), call)

    def observer(self, one: CandidateSite, segments: Sequence[Segment], classes: Sequence[int], dim: int) -> str | None:
        """The target of the module that refreshes what a reader's scores learn, None if they do not."""
        shared = list(self.runtime.resample.each()) if self.runtime.resample is not None else []
        parts: list[tuple[SharedSelection | None, int, int]] = []
        name, offset = one.candidate.name, 0
        for segment, place in zip(segments, classes, strict=True):
            readings = self.sharing.classes[place].readings
            at = next(i for i, r in enumerate(readings) if r.name == name and r.offset == offset)
            parts.append((shared[place], at, segment.block))
            offset += segment.entries
        if not any(part is not None and part.learns for part, _, _ in parts):
            return None
        target = f"o{self.runtime.selectors[name, Role.OUTPUT].site}"
        owner = self.runtime.selectors[name, Role.OUTPUT].owner[0]
        self.runtime.add_module(target, Observer(parts, dim, owner))
        return f"{PROLOGUE}.{target}"
