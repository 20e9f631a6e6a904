"""What the report says of shared selections and of demand: counts at the present ratios and switches, and memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fx_approx.core.candidates import Candidate, Role
from fx_approx.core.flops import Kept, kept_bytes, kept_pairs, sliced_bytes
from fx_approx.core.plan_effects import Axis, Operation, PlanEffects, TokenAxis, entries
from fx_approx.core.values import nbytes
from fx_approx.sampling.base import get_sampler
from fx_approx.sampling.scores import get_score
from fx_approx.sampling.spec import SamplerConfig
from fx_approx.savings.rows import Demanded

_INDEX_BYTES = 8
_SCALE_BYTES = 4


class Counts:
    """How many units each selection that is made ahead keeps at the moment.

    Attributes:
        kept: Units by class, of all groups together.
        tokens: Of each stretch of blocks how many of the tokens that may be left out it computes.
    """

    def __init__(
        self,
        effects: PlanEffects,
        candidates: Sequence[Candidate],
        specs: Mapping[str, SamplerConfig],
        off: Mapping[str, str],
        tokens: Sequence[float] | None = None,
    ) -> None:
        """Counts.

        Args:
            effects: What is shared and demanded.
            candidates: All of the model.
            specs: Sampler of the output of each candidate that has one, switched on or not.
            off: Candidates whose output is not sampled now though the plan says so, with the reason.
            tokens: Of each stretch the share of the tokens that it keeps now; None for those of the plan.
        """
        ratios = [one.sampling.ratio for one in effects.tokens] if tokens is None else tokens
        self.tokens = [one.sampled(ratio) for one, ratio in zip(effects.tokens, ratios, strict=True)]
        self.effects = effects
        self._groups = {candidate.name: candidate.groups for candidate in candidates}
        self._operations = {one.candidate: one for one in effects.operations if one.candidate is not None}
        self.kept: list[int] = []
        self._whole: dict[int, str] = {}
        for place, one in enumerate(effects.classes):
            names = list(dict.fromkeys(reading.name for reading in one.readings))
            stopping = [f"{name}, which is {off[name]}" for name in names if name in off]
            units = one.kept(specs, self._groups)
            if not stopping and units == one.units:
                largest = max(names, key=lambda name: specs[name].ratio)
                stopping = [f"{largest}, whose ratio is {specs[largest].ratio:g}"]
            if stopping:
                self._whole[place] = stopping[0]
            self.kept.append(one.units if stopping else units)

    def units(self, candidate: Candidate) -> tuple[int, int, int] | None:
        """Units kept and there, per group of a reader, and pairs that make up one; None if it draws for itself."""
        axis = self.effects.reads.get(candidate.name)
        if axis is None:
            return None
        blocks = {part.block for part in axis}
        if len(blocks) > 1:
            return entries(axis, self.kept) // candidate.groups, entries(axis) // candidate.groups, 1
        unit = blocks.pop()
        groups = candidate.groups * unit
        return entries(axis, self.kept) // groups, entries(axis) // groups, unit

    def why_whole(self, name: str) -> str | None:
        """Why a reader that shares its selection reads all, if that is because of another one."""
        reasons = [self._whole[part.place] for part in self.effects.reads.get(name, ()) if part.place in self._whole]
        others = [reason for reason in reasons if not reason.startswith(f"{name},")]
        return f"shares its selection with {others[0]}" if others else None

    def of(self, candidate: Candidate, roles: Mapping[Role, SamplerConfig], straight_through: bool) -> Kept:
        """How much of each product of ``candidate`` is computed, if samplers of ``roles`` are at work."""
        operation = self._operations.get(candidate.name)
        kept = dataclasses.replace(
            kept_pairs(candidate, roles, straight_through),
            tokens=self.tokens_of(candidate),
            mixes=candidate.kind == "scaled_dot_product_attention" or (operation is not None and operation.mixes),
        )
        axis = self.effects.reads.get(candidate.name)
        if axis is not None and Role.OUTPUT in roles:
            pairs = entries(axis, self.kept) // candidate.groups
            output = None if pairs * candidate.groups == entries(axis) else pairs
            through = straight_through and output is not None
            kept = dataclasses.replace(kept, output=output, straight_through=through)
        if operation is None:
            return kept
        now, whole = entries(operation.axis, self.kept), entries(operation.axis)
        if now == whole:
            return kept
        if operation.action == "produce":
            return dataclasses.replace(kept, columns=now // candidate.groups)
        return dataclasses.replace(kept, share=(now, whole))

    def tokens_of(self, candidate: Candidate) -> tuple[int, int]:
        """Tokens that a product computes, and all; both 1 where it computes every one."""
        operation = self._operations.get(candidate.name)
        return (1, 1) if operation is None else self.entries_of(operation.tokens)

    def entries_of(self, axis: TokenAxis | None) -> tuple[int, int]:
        """Entries of an axis of tokens that are there, and all; both 1 where no tokens are left out."""
        if axis is None or not axis.sampled:
            return 1, 1
        some, of = self.tokens[axis.stretch], self.effects.tokens[axis.stretch].tokens
        return axis.others + axis.sampled * some // of, axis.others + axis.sampled

    def demand(self, candidate: Candidate) -> tuple[Demanded, ...]:
        """Who reads which part of the outputs of ``candidate``."""
        operation = self._operations.get(candidate.name)
        found = []
        for part in () if operation is None else operation.axis:
            if part.place < 0 or self.kept[part.place] == part.count:
                continue
            readers = tuple(dict.fromkeys(reading.name for reading in self.effects.classes[part.place].readings))
            found.append(Demanded(readers, self.kept[part.place], part.count, part.block))
        return tuple(dict.fromkeys(found))


@dataclasses.dataclass(frozen=True)
class Product:
    """A candidate as it is computed now."""

    candidate: Candidate
    kept: Kept
    roles: Mapping[Role, SamplerConfig]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a training step, see :class:`fx_approx.savings.rows.Totals`."""

    memory_exact: int
    memory: int
    moved_exact: int
    moved: int
    gathered: int
    copies: int = 0
    """Of selected channels, whose bytes ``gathered`` has."""


def trained_bytes(effects: PlanEffects, counts: Counts, products: Mapping[str, Product]) -> dict[str, int]:
    """By path, the bytes of each trained parameter that the graph reads, as a subnetwork has it."""
    found: dict[str, int] = {}
    for one in effects.operations:
        product = products.get(one.candidate or "")
        now, whole = entries(one.axis, counts.kept), entries(one.axis)
        for name, (shape, itemsize) in one.trained.items():
            size = math.prod(shape) * itemsize
            if product is not None and name == one.weight and product.candidate.facts is not None:
                size = sliced_bytes(product.candidate.facts, product.kept) or size
            elif shape and shape[0] == whole:
                size = size * now // whole
            found.setdefault(name, size)
    return found


def memory(
    effects: PlanEffects, counts: Counts, products: Mapping[str, Product], subnetwork: bool = False
) -> Memory | None:
    """Bytes that a training step keeps for backward, exact and now, and what it moves; None if shapes are not known.

    Where the run on fake tensors stopped, of the operations before that.

    The exact step is known from a run on fake tensors: which pieces of memory autograd keeps for which operation, each
    counted once. Those that hold channels shrink with what is demanded of them; a slice of a weight, a gathered input
    and the indices of a selection are new ones. Not known: autocast; what a part that is not traced would keep if the
    layers in it are sampled (counted as exact); copies that only the smaller step makes, or no longer makes; memory
    that no operation asked autograd to keep, such as gradients, workspaces and what Python holds on to.

    Args:
        effects: What is shared and demanded.
        counts: Units kept.
        products: All of them, by name.
        subnetwork: Slices of weights and indices are parameters and buffers, and a ReLU is torch's.
    """
    if effects.values is None or not effects.operations:
        return None
    walk = _Walk(effects, counts, products, subnetwork)
    for operation in effects.operations:
        walk.step(operation)
    values = effects.values
    saved = {place for places in values.saved.values() for place in places}
    return Memory(
        sum(values.bytes[place] for place in saved),
        sum(walk.held.values()),
        sum(nbytes(values, one.name) for one in effects.operations if one.moves),
        walk.moved,
        sum(walk.gathered.values()),
        len(walk.gathered),
    )


Piece = tuple[Any, int]
"""A piece of memory: what tells it from others, and its bytes."""


class _Walk:
    """One forward of the graph as it is now.

    Attributes:
        held: Pieces of memory kept for backward, with their bytes.
        gathered: Copies of selected channels or tokens, with their bytes.
        moved: Bytes put out by operations that multiply nothing.
    """

    def __init__(self, effects: PlanEffects, counts: Counts, products: Mapping[str, Product], subnetwork: bool) -> None:
        assert effects.values is not None
        kept = counts.kept
        self.subnetwork = subnetwork
        self.effects, self.values, self.kept, self.products = effects, effects.values, kept, products
        self.counts = counts
        self.held: dict[Any, int] = {}
        self.gathered: dict[Any, int] = {}
        self.moved = 0
        self._axes = {one.name: one.axis for one in effects.operations}
        self._pieces: dict[str, dict[int, Piece]] = {}
        self._shares: dict[str, tuple[int, int]] = {}
        self._ends = {one.end for one in effects.tokens}
        self._tapped = {
            name
            for one in effects.operations
            for name, wants in one.narrowed.items()
            if entries(wants, kept) < entries(self._axes[name], kept)
        }

    def step(self, one: Operation) -> None:
        """Counts the next operation of the graph."""
        now, whole = entries(one.axis, self.kept), entries(one.axis)
        now, whole = (now, whole) if whole else (1, 1)
        narrow = now < whole
        some, of = (size ** (1 + one.squares) for size in self.counts.entries_of(one.tokens))
        self._shares[one.name] = some, of
        now, whole = now * some, whole * of
        seen: dict[int, Piece] = {}
        for source in one.inputs:
            seen.update(self._read(one, source))
        for place in self.values.storages.get(one.name, ()):
            seen.setdefault(place, (place, self.values.bytes[place] * now // whole))
        self._pieces[one.name] = {place: seen[place] for place in self.values.storages.get(one.name, ())}
        if one.moves:
            self.moved += nbytes(self.values, one.name) * now // whole
        saved = self.values.saved.get(one.name, ())
        if one.own and saved and narrow and not self.subnetwork:
            self._hold((("own", one.name), one.own * entries(one.axis, self.kept)))
        product = self.products.get(one.candidate or "")
        sliced = one.action in ("produce", "depthwise") and narrow
        if product is not None and product.candidate.facts is not None and (product.roles or sliced):
            self._product(one, product, saved, seen)
        else:
            for place in saved:
                self._keep(one, place, seen, self.values.bytes[place] * now // whole)
        if one.name in self._ends and some < of:
            self._put_back(one, nbytes(self.values, one.name) * now * of // (whole * some))

    def _keep(self, one: Operation, place: int, seen: Mapping[int, Piece], size: int) -> None:
        """One piece of memory that autograd keeps for an operation."""
        if one.rectified and one.name in self._tapped and not self.subnetwork:
            numbers = size // self.values.sizes[one.name]
            self._hold((("sign", one.name), -(-numbers // 8) if self.effects.packs else numbers))
        else:
            self._hold(seen.get(place, ((one.name, place), size)))

    def _put_back(self, one: Operation, size: int) -> None:
        """Behind a stretch all tokens are there again, in new memory; the backward pass knows what was put back."""
        for own in self._pieces[one.name].values():
            self._hold(own)
        piece = ("back", one.name), size
        self.gathered[piece[0]] = size
        self._pieces[one.name] = dict.fromkeys(self._pieces[one.name], piece)
        self._shares[one.name] = 1, 1

    def _read(self, one: Operation, source: str) -> dict[int, Piece]:
        """The memory of an operand, or of a copy of the part of it that is read."""
        wants, axes = one.narrowed.get(source), one.taken.get(source, ())
        there, (some, of) = self._pieces.get(source, {}), self._shares.get(source, (1, 1))
        size, name = nbytes(self.values, source) * some // of, ("part", source, one.tokens and one.tokens.stretch)
        places = self.values.storages.get(source, ())
        if wants is not None and entries(wants, self.kept) < entries(self._axes[source], self.kept):
            size = size * entries(wants, self.kept) // entries(wants)
            there = dict.fromkeys(places, ((*name, wants), size))
            self.gathered[(*name, wants)] = size
            self._index(wants, 0)
        elif wants is None and self._axes.get(source):
            size = size * entries(self._axes[source], self.kept) // entries(self._axes[source])
        for axis in axes:
            some, of = self.counts.entries_of(axis)
            if some < of:
                size = size * some // of
                there = dict.fromkeys(places, ((*name, wants, axis), size))
                self.gathered[(*name, wants, axis)] = size
                self._hold((("tokens", axis), some * _INDEX_BYTES))
        return there

    def _hold(self, piece: Piece) -> None:
        self.held[piece[0]] = piece[1]

    def _index(self, axis: Axis, scale: int) -> None:
        if not self.subnetwork:
            self._hold((("index", axis), entries(axis, self.kept) * (_INDEX_BYTES + scale)))

    def _product(self, one: Operation, product: Product, saved: Sequence[int], seen: Mapping[int, Piece]) -> None:
        """What a sampled or narrowed product keeps: its input, or the chosen part of it, and a slice of its weight.

        A linear layer whose slice is a value of the graph takes it again in the backward pass (``ops.sliced_linear``).
        """
        candidate, kept, facts = product.candidate, product.kept, product.candidate.facts
        assert facts is not None
        spec, rows = product.roles.get(Role.OUTPUT), product.roles.get(Role.GRAD_WEIGHT)
        forward = kept.output is not None and not kept.straight_through
        early = rows is not None and kept.grad_weight is not None and get_score(rows.scores).early
        if facts.shape is None:
            some, of = kept.share
            for place in saved:
                self._hold(seen.get(place, ((one.name, place), self.values.bytes[place] * some // of)))
            return
        if set(product.roles) - {Role.OUTPUT} or kept.straight_through:
            self._apart(one, product, saved, seen, forward, early)
            return
        pairs = facts.shape.pairs
        some, of = kept.share
        reads = self.effects.reads.get(candidate.name)
        follows = one.action == "produce" and reads is not None and self.effects.hoisted
        chosen = pairs if kept.output is None else kept.output
        again = candidate.kind == "linear" and self.effects.hoisted and (follows or not forward)
        tokens, of_tokens = kept.tokens
        some, of = some * tokens, of * of_tokens
        size = facts.lhs_bytes * chosen * some // (pairs * of)
        if forward and not follows:
            self.gathered["part", candidate.name] = size
        if facts.lhs_kept and forward and not follows:
            self._hold((("part", candidate.name), size))
        elif facts.lhs_kept:
            self._whole_input(one, saved, seen, chosen, pairs)
        if facts.rhs_kept and not facts.rhs_is_parameter:
            self._hold((("right", candidate.name), facts.rhs_bytes * chosen * some // (pairs * of)))
        elif facts.rhs_kept and not again and not self.subnetwork and (size := sliced_bytes(facts, kept)):
            self._hold((("slice", one.weight, reads if forward else None, one.axis), size))
        if forward and spec is not None:
            scale = _SCALE_BYTES * (get_sampler(spec.name).unbiased and facts.flops.grad_weight > 0)
            if reads is not None:
                self._index(reads, scale)
            elif not self.subnetwork:
                size = candidate.groups * chosen * (_INDEX_BYTES + scale)
                self._hold((("index", candidate.name), size))

    def _apart(
        self,
        one: Operation,
        product: Product,
        saved: Sequence[int],
        seen: Mapping[int, Piece],
        forward: bool,
        early: bool,
    ) -> None:
        """What a product with sampled gradients keeps: copies of chosen parts, and the operands that it keeps whole."""
        facts = product.candidate.facts
        assert facts is not None
        total, (some, of) = kept_bytes(facts, product.kept, product.roles), product.kept.tokens
        if not forward:
            left, right = one.inputs[0], () if facts.rhs_is_parameter else one.inputs[1:2]
            others = {place for name in right for place in self.values.storages.get(name, ())}
            if right:
                total -= facts.rhs_kept * facts.rhs_bytes * some // of
            if facts.flops.grad_weight and not early:
                total -= facts.lhs_kept * facts.lhs_bytes * some // of
                others |= set(saved) if facts.rhs_is_parameter else set(self.values.storages.get(left, ()))
            for place in saved:
                if place in others:
                    self._hold(seen.get(place, ((one.name, place), self.values.bytes[place] * some // of)))
        self._hold((("own", product.candidate.name), total))

    def _whole_input(self, one: Operation, saved: Sequence[int], seen: Mapping[int, Piece], some: int, of: int) -> None:
        """What was kept of the input, of which a copy made inside holds the selected part."""
        for place in saved:
            self._hold(seen.get(place, ((one.name, place), self.values.bytes[place] * some // of)))
