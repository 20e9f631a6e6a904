"""What a plan does to every product and every value: shared selections and demand, as plain data that holds no graph.

How many units a selection keeps follows from the ratios and switches of the moment, and is counted later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import networkx as nx

from fx_approx.core.candidates import Shape
from fx_approx.core.token_axis import TokenBlock
from fx_approx.core.token_sampling import TokenSampling
from fx_approx.core.values import Values
from fx_approx.sampling.spec import SamplerConfig

FULL = -1
"""All channels."""


@dataclasses.dataclass(frozen=True)
class GroupMember:
    """A stretch of one reader's pairs: units of ``block`` pairs each, from pair ``offset`` on."""

    name: str
    offset: int
    block: int


@dataclasses.dataclass
class SelectionGroup:
    """What one selection decides about.

    Attributes:
        units: Channels or heads to choose from.
        groups: Stretches of which each gives as many.
        spec: Sampler, ratio and scores.
        scope: ``layer``, ``value`` or ``group``.
        readings: The readers, or stretches of them.
        known: The units are those of a space, so that producers can follow; else of one reader's pairs.
    """

    units: int
    groups: int
    spec: SamplerConfig
    scope: str
    readings: list[GroupMember] = dataclasses.field(default_factory=list)
    known: bool = True

    def kept(self, specs: Mapping[str, SamplerConfig], reader_groups: Mapping[str, int]) -> int:
        """Units chosen in all groups together, at the ratios ``specs`` of the readers by name."""
        pairs = self.units // self.groups
        counts = [
            specs[r.name].count_units(pairs, r.block, self.groups, reader_groups.get(r.name, 1)) for r in self.readings
        ]
        return self.groups * min(pairs, max(counts))


@dataclasses.dataclass(frozen=True)
class ChannelSlice:
    """``count`` units of ``block`` entries each of an axis, of which class ``place`` decides; FULL: all are there."""

    place: int
    count: int
    block: int


Axis = tuple[ChannelSlice, ...]
"""The axis of the channels, one stretch behind the other; empty for a value whose channels are not known."""


@dataclasses.dataclass(frozen=True)
class TokenAxis:
    """The axis of the tokens of a value, in entries of one example.

    Attributes:
        stretch: Number of the stretch of blocks that computes some of them.
        others: Entries that are always there.
        sampled: Entries of the tokens that may be left out, if all are there.
    """

    stretch: int
    others: int
    sampled: int


@dataclasses.dataclass(frozen=True)
class Operation:
    """A node of the captured graph.

    Attributes:
        name: Of the node.
        inputs: Names of the nodes that it reads.
        axis: What is computed of its value.
        narrowed: By operand, what is read of it where that is less than what is there.
        action: How it is made to work on some channels only, see :class:`fx_approx.passes.channel_flow.Step`.
        candidate: Name of the product that it is.
        weight: Path of that product's weight.
        joins: Where values meet in it, what it is, in the words of modules; empty for anything else.
        moves: It writes new values and multiplies nothing: element-wise, normalisation, pooling, a copy.
        own: Bytes of parameters and statistics that it has for each channel.
        rectified: It is a ReLU that keeps only the signs, if parts of its value are taken.
        trained: Shape, and bytes of an entry, of each trained parameter that it reads, by path.
        tokens: The axis of the tokens of its value, in a stretch of blocks; None where all tokens are computed.
        taken: By operand, the axes along which the chosen tokens of it are copied out.
        mixes: It is a product of each of these tokens with each.
        squares: Its value has an entry for each pair of them.
    """

    name: str
    inputs: tuple[str, ...]
    axis: Axis
    narrowed: Mapping[str, Axis]
    action: str
    candidate: str | None
    weight: str | None
    moves: bool
    own: int
    rectified: bool
    trained: Mapping[str, tuple[Shape, int]]
    joins: str = ""
    tokens: TokenAxis | None = None
    taken: Mapping[str, tuple[TokenAxis, ...]] = dataclasses.field(default_factory=dict)
    mixes: bool = False
    squares: bool = False


@dataclasses.dataclass(frozen=True)
class Stop:
    """A value that is whole although some reader wants a part of it only.

    Attributes:
        operation: Name of the operation that makes it.
        value: The same in the words of modules.
        reason: Why it is whole.
    """

    operation: str
    value: str
    reason: str

    def __str__(self) -> str:
        """One line of a report."""
        return f"{self.value}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class TokenShare:
    """The tokens of one stretch of blocks.

    Attributes:
        sampling: How they are chosen.
        others: Those that are always kept.
        tokens: Those that may be left out.
        end: Name of the value behind which they come back; empty if they do not.
    """

    sampling: TokenSampling
    others: int
    tokens: int
    end: str = ""

    def sampled(self, ratio: float) -> int:
        """How many of those that may be left out are computed at a ratio."""
        return self.tokens if ratio == 1 else self.sampling.count(self.tokens, ratio)

    def kept(self, ratio: float) -> tuple[int, int]:
        """Tokens that are computed at a ratio, and all."""
        return self.others + self.sampled(ratio), self.others + self.tokens


@dataclasses.dataclass(frozen=True)
class PlanEffects:
    """What sharing and demand do.

    Attributes:
        classes: The selections that are made ahead.
        reads: Candidate -> the axis that it contracts over, as its selections choose from it.
        operations: The nodes of the captured graph in order; empty if shapes are not known.
        values: Their shapes and memory.
        stops: Values that are whole although some reader wants a part of them only.
        notes: What was not shared, and why.
        hoisted: What is not demanded is not computed.
        packs: The signs of a tapped ReLU take one bit each, and not a byte.
        tokens: The stretches of blocks that compute some tokens only.
        blocks: The blocks of a model whose plan samples tokens, with how many they compute, and why.
    """

    classes: tuple[SelectionGroup, ...] = ()
    reads: Mapping[str, Axis] = dataclasses.field(default_factory=dict)
    operations: tuple[Operation, ...] = ()
    values: Values | None = None
    stops: tuple[Stop, ...] = ()
    notes: tuple[str, ...] = ()
    hoisted: bool = False
    packs: bool = False
    tokens: tuple[TokenShare, ...] = ()
    blocks: tuple[TokenBlock, ...] = ()


def tied(effects: PlanEffects, names: Sequence[str]) -> list[tuple[str, ...]]:
    """``names`` of readers, those together whose selections are one; in order."""
    graph = nx.Graph()
    graph.add_nodes_from(names)
    for one in effects.classes:
        nx.add_path(graph, [reading.name for reading in one.readings if reading.name in graph])
    return [tuple(name for name in names if name in group) for group in nx.connected_components(graph)]


def entries(axis: Axis, kept: Sequence[int] | None = None) -> int:
    """Length of an axis.

    Args:
        axis: See :data:`Axis`.
        kept: Units that each class keeps; None for all.
    """
    total = 0
    for part in axis:
        units = part.count if kept is None or part.place == FULL else kept[part.place]
        total += units * part.block
    return total
