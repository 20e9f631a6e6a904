"""Layouts: along which axis of each value the channels lie, and which values hold the same channels.

A *space* is a set of units (channels, or attention heads) that one selection can choose from. Values that channelwise
operations make of each other hold the same space. What a convolution or linear layer puts out begins a new one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from torch import fx

from fx_approx.core.candidates import Shape


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of an axis: ``count`` units of ``space``, each ``block`` neighbouring entries."""

    space: int
    count: int
    block: int

    @property
    def entries(self) -> int:
        """How many entries of the axis the segment has."""
        return self.count * self.block


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axis ``dim`` of a value is one segment behind the other."""

    dim: int
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """Length of the axis."""
        return sum(segment.entries for segment in self.segments)


class Restart(Exception):
    """A space turned out to be cut, or to have larger units: the analysis begins again, knowing that."""


@dataclasses.dataclass(frozen=True)
class _Origin:
    """Where a space begins: at entry ``start`` of the node's axis, ``unit`` entries for each unit."""

    node: fx.Node
    start: int
    unit: int


class Spaces:
    """The spaces of a graph, and what is known of where they begin.

    Attributes:
        cuts: Node -> entries at which its axis is cut into spaces.
        unit: Node -> entries that make up one unit of its axis.
        dead: Nodes whose axis cannot be described.
        strata: Space -> stretches of equal length of which a selection takes as many; read through :meth:`strata_of`.
        joins: Spaces that an addition couples, with its node.
    """

    def __init__(self) -> None:
        self.cuts: dict[fx.Node, set[int]] = {}
        self.unit: dict[fx.Node, int] = {}
        self.dead: set[fx.Node] = set()
        self.begin()

    def begin(self) -> None:
        """Forgets all but what :class:`Restart` taught."""
        self.origins: list[list[_Origin]] = []
        self.counts: list[int] = []
        self._parent: list[int] = []
        self._strata: list[int] = []
        self.joins: list[tuple[int, int, fx.Node]] = []

    def new(self, node: fx.Node, dim: int, size: int) -> Layout | None:
        """The layout of a value that begins spaces of its own."""
        unit = self.unit.get(node, 1)
        edges = [0, *sorted(self.cuts.get(node, ())), size]
        if node in self.dead or size == 0 or any(edge % unit for edge in edges):
            return None
        segments = []
        for start, end in itertools.pairwise(edges):
            space = len(self._parent)
            self._parent.append(space)
            self._strata.append(1)
            self.counts.append((end - start) // unit)
            self.origins.append([_Origin(node, start, unit)])
            segments.append(Segment(space, (end - start) // unit, unit))
        return Layout(dim, tuple(segments))

    def find(self, space: int) -> int:
        """The space that stands for all that were found to be one with ``space``."""
        while self._parent[space] != space:
            self._parent[space] = self._parent[self._parent[space]]
            space = self._parent[space]
        return space

    def cut(self, segment: Segment, units: int) -> None:
        """Cuts the space of ``segment`` behind so many units; always raises :class:`Restart`."""
        for origin in self.origins[self.find(segment.space)]:
            self.cuts.setdefault(origin.node, set()).add(origin.start + units * origin.unit)
        raise Restart

    def coarsen(self, segment: Segment, factor: int) -> bool:
        """Makes ``factor`` units of the space one; False if that does not divide, else raises :class:`Restart`."""
        if factor == 1:
            return True
        if segment.count % factor:
            return False
        for origin in self.origins[self.find(segment.space)]:
            self.unit[origin.node] = math.lcm(self.unit.get(origin.node, 1), origin.unit * factor)
        raise Restart

    def stratify(self, segment: Segment, groups: int) -> bool:
        """Makes selections of the space take as many of each of ``groups`` stretches; False if that does not divide."""
        root = self.find(segment.space)
        wanted = math.lcm(self._strata[root], groups)
        if segment.count % wanted:
            return False
        self._strata[root] = wanted
        return True

    def align(self, one: Sequence[Segment], other: Sequence[Segment]) -> bool:
        """Whether both stretches have the same structure; cuts and coarsens what differs, if it can."""
        if sum(s.entries for s in one) != sum(s.entries for s in other):
            return False
        here, there = _edges(one), _edges(other)
        for segments, missing in ((one, there - here), (other, here - there)):
            for edge in sorted(missing):
                segment, start = _at(segments, edge)
                if (edge - start) % segment.block:
                    return False
                self.cut(segment, (edge - start) // segment.block)
        for a, b in zip(one, other, strict=True):
            unit = math.lcm(a.block, b.block)
            if not self.coarsen(a, unit // a.block) or not self.coarsen(b, unit // b.block):
                return False
        return True

    def merge(self, one: Sequence[Segment], other: Sequence[Segment]) -> None:
        """Makes the spaces of two aligned stretches one."""
        for a, b in zip(one, other, strict=True):
            root, gone = self.find(a.space), self.find(b.space)
            if root != gone:
                self._parent[gone] = root
                self.origins[root] += self.origins[gone]
                self._strata[root] = math.lcm(self._strata[root], self._strata[gone])

    def couple(self, node: fx.Node, result: Sequence[Segment], operand: Sequence[Segment]) -> None:
        """Notes that an addition makes ``result`` of ``operand``, aligned stretches."""
        for a, b in zip(result, operand, strict=True):
            if self.find(a.space) != self.find(b.space):
                self.joins.append((a.space, b.space, node))

    def groups(self) -> dict[int, int]:
        """Space -> the space that stands for all that additions couple with it."""
        parent = {root: root for root in {self.find(space) for space in range(len(self._parent))}}

        def find(space: int) -> int:
            while parent[space] != space:
                space = parent[space]
            return space

        for a, b, _ in self.joins:
            parent[find(self.find(b))] = find(self.find(a))
        return {space: find(space) for space in parent}

    def strata_of(self, groups: dict[int, int]) -> dict[int, int]:
        """Space -> its strata, the same for all that additions couple; 0 where they do not fit together."""
        found: dict[int, int] = {}
        for space, group in groups.items():
            found[group] = math.lcm(found.get(group, 1), self._strata[space])
        return {s: found[g] if self.counts[s] % found[g] == 0 else 0 for s, g in groups.items()}


def _edges(segments: Sequence[Segment]) -> set[int]:
    edges, end = set(), 0
    for segment in segments:
        end += segment.entries
        edges.add(end)
    return edges


def _at(segments: Sequence[Segment], entry: int) -> tuple[Segment, int]:
    """The segment that holds ``entry`` in its inside, and where it starts."""
    start = 0
    for segment in segments:
        if start < entry < start + segment.entries:
            return segment, start
        start += segment.entries
    raise AssertionError(f"entry {entry} is no inner one")


def stretch(spaces: Spaces, segments: Sequence[Segment], start: int, end: int) -> tuple[int, int] | None:
    """First and last (exclusive) of the segments that make up the entries from ``start`` to ``end``; cuts if needed."""
    edges = {0, *_edges(segments)}
    for edge in (start, end):
        if edge not in edges:
            segment, begin = _at(segments, edge)
            if (edge - begin) % segment.block:
                return None
            spaces.cut(segment, (edge - begin) // segment.block)
    order = sorted(edges)
    return order.index(start), order.index(end)


def regroup(before: Shape, after: Shape) -> Iterator[tuple[range, range]]:
    """Which axes of a reshaped value come from which axes: the smallest runs with equal products."""
    i = j = 0
    while i < len(before) or j < len(after):
        start, begin = i, j
        left = before[i] if i < len(before) else 1
        right = after[j] if j < len(after) else 1
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        while left != right:
            if left < right:
                left *= before[i]
                i += 1
            else:
                right *= after[j]
                j += 1
        # Axes of length 1 belong to what stands before them.
        if start < len(before):
            while i < len(before) and before[i] == 1 and (j >= len(after) or after[j] != 1):
                i += 1
            while j < len(after) and after[j] == 1 and (i >= len(before) or before[i] != 1):
                j += 1
        yield range(start, i), range(begin, j)
