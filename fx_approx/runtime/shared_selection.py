"""Ahead selection: all selections that read no activation of this step, made in one node at the head of the graph.

Readers of one value share a selection; it is scored by the sum over the readers. Scores that follow the activations
(``ema``) use running norms of earlier steps, which are refreshed on the sampled channels, from values that the step
computes anyway.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fx_approx._compat import in_backward
from fx_approx.ops.base import norm
from fx_approx.ops.grad_norm_ema import new_running
from fx_approx.ops.input_norm_ema import aged, observe
from fx_approx.runtime.rng import Draw, draw, keep, recall_selection, remember_selection
from fx_approx.runtime.selection_tracker import SelectionTracker
from fx_approx.runtime.selector import Selector
from fx_approx.runtime.weight_scores import Scored, weight_scores
from fx_approx.sampling.base import Selection
from fx_approx.sampling.scores import RECENT, get_score

_numbers = itertools.count()

_EXAMPLES = 8  # of a batch, whose norms stand for those of all


@dataclasses.dataclass
class Member:
    """A stretch of one reader's pairs that a shared selection decides about.

    Attributes:
        selector: The reader's own; it says which sampler and ratio, and whether the reader is sampled now.
        offset: Where the stretch begins among the reader's pairs, all groups one behind the other.
        block: Pairs of the reader that make up one unit.
    """

    selector: Selector
    offset: int
    block: int


class SharedSelection(nn.Module):
    """One selection of the units of a value, shared by all that read it.

    Attributes:
        members: The readers, or stretches of them.
        units: Channels, or attention heads, to choose from, in all groups together.
        groups: Stretches of equal length of which each gives as many; more than 1 beside a grouped convolution.
        k: Units chosen in each group.
        count: Uniforms that a forward draws, at ``offset`` of ``Draw.numbers``.
        running: ``[members, units]`` running norms of what the readers read, for scores that learn them; -1: unknown.
        age: ``[units]`` steps since a unit was last chosen.
    """

    running: Tensor | None
    age: Tensor | None

    def __init__(self, members: Sequence[Member], units: int, groups: int, device: torch.device) -> None:
        super().__init__()
        self.members = tuple(members)
        self.selectors = tuple(dict.fromkeys(member.selector for member in members))
        self.units, self.groups = units, groups
        self.pairs = units // groups
        self.site, self.offset, self.count, self.k = members[0].selector.site, 0, 0, 0
        learns = self.selectors[0].score.learns
        running = new_running(len(members) * units, device).view(len(members), units) if learns else None
        self.register_buffer("running", running, persistent=False)
        self.register_buffer(
            "age", torch.zeros(units, dtype=torch.int64, device=device) if learns else None, persistent=False
        )
        self.fit()

    def fit(self) -> None:
        """Takes over the ratios of the readers; the largest decides."""
        self.k = max(self._count(member) for member in self.members)
        sampler = self.selectors[0].sampler
        self.count = self.groups * sampler.uniforms(self.pairs, self.k) if sampler.random and not self.exact else 0

    def _count(self, member: Member) -> int:
        selector = member.selector
        return selector.spec.count_units(self.pairs, member.block, self.groups, selector.groups)

    @property
    def exact(self) -> bool:
        """Whether the ratio keeps all units."""
        return self.k >= self.pairs

    @property
    def active(self) -> bool:
        """Whether the next call samples: all readers are enabled and in training mode."""
        # Switches first: where they are off, compiled code does not depend on the ratio.
        return all([selector.active for selector in self.selectors]) and not self.exact

    @property
    def learns(self) -> bool:
        """Whether the scores follow the activations of earlier steps."""
        return self.running is not None

    @property
    def coverage(self) -> float | None:
        """Share of the units chosen in the last :data:`RECENT` steps; None where that is not recorded."""
        return None if self.age is None else float((self.age < RECENT).float().mean())

    def scores(self, weights: Sequence[Tensor | Scored]) -> Tensor:
        """``[groups, pairs]``: summed over the readers, from their weights."""
        total: Tensor | None = None
        for place, (member, weight) in enumerate(zip(self.members, weights, strict=True)):
            selector = member.selector
            kind = get_score("weight") if self.learns else selector.score
            own = weight_scores(selector.kind, weight, kind, selector.op_kwargs)
            own = own[member.offset : member.offset + self.units * member.block]
            if member.block > 1:
                own = own.view(self.units, member.block)
                own = own.square().sum(1).sqrt() if kind.reads else own[:, 0]
            if self.running is not None:
                known = self.running[place]
                # What was never read counts as much as what was most: it is looked at soon.
                most = torch.where(known.max() < 0, 1.0, known.max())
                own = own * torch.where(known < 0, most, known).to(own.dtype)
            total = own if total is None else total + own
        assert total is not None
        if self.age is not None:
            total = aged(total, self.age)
        return total.view(self.groups, self.pairs)


class SharedSelections(nn.Module):
    """Makes all shared selections of a forward at once.

    Attributes:
        shared: In the order in which the selections are handed out.
        number: Unique in the process, of a copy another: recomputations ask for the selections by it.
        held: Selections are kept while the random key stays the same, though weights and running norms move.
        known: The running norms have been filled by an exact step, or are not needed.
        held_key: ``[2]``, the random key of the kept selections.
        held_indices: The kept selections, one behind the other.
        held_scale: Their scales, those without left out.
        published: Records what is selected, for data-parallel training; None if no one asks.
    """

    held_key: Tensor
    held_indices: Tensor
    held_scale: Tensor
    published: SelectionTracker | None

    def __init__(self, shared: Sequence[SharedSelection], device: torch.device) -> None:
        super().__init__()
        self.shared = nn.ModuleList(shared)
        self.number, self.held = next(_numbers), False
        self.known = not self.learns
        for name in ("held_key", "held_indices"):
            self.register_buffer(name, torch.full((2,), -1, device=device), persistent=False)
        self.register_buffer("held_scale", torch.zeros(0, device=device), persistent=False)
        self.add_module("published", None)
        self._first: tuple[SharedSelections, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedSelections:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(vars(self), memo))
        new.number = next(_numbers)
        return new

    def each(self) -> Iterator[SharedSelection]:
        """The shared selections."""
        for one in self.shared:
            assert isinstance(one, SharedSelection)
            yield one

    @property
    def learns(self) -> bool:
        """Whether the scores of any selection follow the activations of earlier steps."""
        return any([one.learns for one in self.each()])

    def tracker(self) -> SelectionTracker:
        """A new record of what is selected; nothing yet."""
        return SelectionTracker([(one.groups, one.pairs) for one in self.each()], self.held_key.device)

    def note_known(self) -> None:
        """Sees whether the running norms have been filled: compiled steps do not note it."""
        if any(one.running is not None and one.running.max() >= 0 for one in self.each()):
            self.known = True

    @property
    def remembers(self) -> bool:
        """Whether selections cannot be told from key and weights alone, so that they are kept for recomputation."""
        return self.held or self.learns

    @property
    def draws(self) -> bool:
        """Whether a forward needs a key."""
        active = [one for one in self.each() if one.active]
        return len(active) > 0 and (self.remembers or any([one.selectors[0].sampler.random for one in active]))

    def fit(self) -> None:
        """Takes over the ratios of the readers, and makes room for what is kept."""
        indices = scale = 0
        for one in self.each():
            one.fit()
            if not one.exact and one.selectors[0].sampler.fixed_size:
                indices += one.groups * one.k
                scale += one.groups * one.k * one.selectors[0].sampler.unbiased
        device = self.held_key.device
        if self.held_indices.shape[0] != indices or self.held_scale.shape[0] != scale:
            self.held_key = torch.full((2,), -1, device=device)
            self.held_indices = torch.zeros(indices, dtype=torch.int64, device=device)
            self.held_scale = torch.zeros(scale, device=device)
        for first in self._first:
            if (first.held_indices.shape, first.held_scale.shape) == (self.held_indices.shape, self.held_scale.shape):
                self.held_key, self.held_indices, self.held_scale = (
                    first.held_key,
                    first.held_indices,
                    first.held_scale,
                )

    def join(self, first: SharedSelections) -> None:
        """From now on has what ``first`` learns and keeps, which is of the same layers in another graph."""
        for one, other in zip(self.each(), first.each(), strict=True):
            one.running, one.age = other.running, other.age
        self._first, self.held, self.known = (first,), first.held, first.known
        self.fit()

    def forward(self, given: Draw | None, *weights: Tensor | Scored) -> tuple[Selection | None, ...]:
        """The selections, None where all readers stay exact.

        Args:
            given: The randomness of this forward.
            weights: One for each member of each shared selection, in order; or what stands in for it.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and self.remembers and given is not None and in_backward():
            return recall_selection(self.number, given.key)
        result: list[Selection | None] = [None] * len(self.shared)
        if compiling or self.known:
            with torch.no_grad(), torch.autocast(weights[0].device.type, enabled=False):
                self._choose(result, given, weights, compiling)
                if self.remembers and given is not None:
                    self._keep(result, given.key)
                for place, one in enumerate(self.each()):
                    if not one.active:
                        result[place] = None
        if not compiling and self.remembers and given is not None:
            remember_selection(self.number, given.key, tuple(result))
        if self.published is not None:
            self.published(result)
        return tuple(result)

    def _choose(
        self, result: list[Selection | None], given: Draw | None, weights: Sequence[Tensor | Scored], fixed_shape: bool
    ) -> None:
        buckets: dict[Any, list[tuple[int, SharedSelection, Tensor]]] = {}
        start = 0
        for place, one in enumerate(self.each()):
            own = weights[start : start + len(one.members)]
            start += len(one.members)
            # What is kept is kept of all, so that a layer that is switched on again reads the same sample.
            if not one.active and (not self.held or given is None or one.exact):
                continue
            selector, scores = one.selectors[0], one.scores(own)
            alone = None if selector.sampler.fixed_size else place  # a random count is each one's own
            key = one.pairs, one.k, selector.sampler.name, selector.epsilon, scores.dtype, alone
            buckets.setdefault(key, []).append((place, one, scores))
        for (_, k, _, epsilon, _, _), together in buckets.items():
            sampler = together[0][1].selectors[0].sampler
            scores = torch.cat([scores for _, _, scores in together])
            numbers = None
            if sampler.random:
                assert given is not None
                numbers = torch.cat([self._numbers(one, given) for _, one, _ in together])
            chosen = sampler.draw(scores, k, numbers, epsilon=epsilon, fixed_shape=fixed_shape)
            row = 0
            for place, one, _ in together:
                rows = slice(row, row + one.groups)
                scale = None if chosen.scale is None else chosen.scale[rows]
                result[place] = Selection(chosen.indices[rows], scale)
                row += one.groups
                if not fixed_shape and one.active:
                    for selector in one.selectors:
                        selector.last_count = chosen.indices.shape[1]

    @staticmethod
    def _numbers(one: SharedSelection, given: Draw) -> Tensor:
        numbers = given.numbers[one.offset : one.offset + one.count]
        if numbers.shape[0] != one.count:
            numbers = draw(given.key, [one.site], [one.count])
        return numbers.view(one.groups, -1)

    def _keep(self, result: list[Selection | None], key: Tensor) -> None:
        """Replaces selections by those kept under the same key; those of a random count are not kept."""
        places: list[int] = []
        fresh: list[Selection] = []
        for place, one in enumerate(self.each()):  # no comprehension with := in it, which Dynamo cannot trace
            chosen = result[place]
            if chosen is not None and one.selectors[0].sampler.fixed_size:
                places.append(place)
                fresh.append(chosen)
        if not fresh:
            return
        indices = torch.cat([chosen.indices.flatten() for chosen in fresh])
        scales = [chosen.scale.flatten() for chosen in fresh if chosen.scale is not None]
        scale = torch.cat(scales) if scales else self.held_scale.new_empty(0)
        if self.held_indices.shape == indices.shape:
            indices, scale = keep(
                key, indices, scale.float(), self.held_key, self.held_indices, self.held_scale, self.number
            )
        start = begin = 0
        for place, chosen in zip(places, fresh, strict=True):
            size = chosen.indices.numel()
            factors = chosen.scale
            if factors is not None:
                factors = scale[begin : begin + size].view(factors.shape).to(factors.dtype)
                begin += size
            result[place] = Selection(indices[start : start + size].view(chosen.indices.shape), factors)
            start += size

    def state(self) -> dict[str, Any]:
        """What :func:`fx_approx.sampler_state_dict` stores: running norms, ages and kept selections, as plain lists."""
        learnt = [one for one in self.each() if one.running is not None and one.age is not None]
        return {
            "known": self.known,
            "running": [one.running.tolist() for one in learnt if one.running is not None],
            "age": [one.age.tolist() for one in learnt if one.age is not None],
            "held": [self.held_key.tolist(), self.held_indices.tolist(), self.held_scale.tolist()],
        }

    def forget(self) -> None:
        """As after the transform: nothing is kept or learnt."""
        self.held_key.fill_(-1)
        for one in self.each():
            if one.running is not None and one.age is not None:
                one.running.fill_(-1)
                one.age.zero_()
        self.known = not self.learns

    def load_state(self, values: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`.

        Raises:
            ValueError: It is that of another model; nothing is changed then.
        """
        learnt = [one for one in self.each() if one.running is not None]
        running = [torch.tensor(numbers) for numbers in values["running"]]
        ages = [torch.tensor(numbers) for numbers in values["age"]]
        shapes = [tuple(one.running.shape) for one in learnt if one.running is not None]
        if [tuple(numbers.shape) for numbers in running] != shapes:
            got = [tuple(numbers.shape) for numbers in running]
            raise ValueError(f"resample: expected running norms of shapes {shapes}, got {got}")
        for one, norms, age in zip(learnt, running, ages, strict=True):
            assert one.running is not None and one.age is not None
            one.running.copy_(norms)
            one.age.copy_(age)
        device = self.held_key.device
        for name, numbers in zip(("held_key", "held_indices", "held_scale"), values["held"], strict=True):
            kept: Tensor = getattr(self, name)
            given = torch.tensor(numbers, dtype=kept.dtype, device=device)
            if kept.shape == given.shape:
                kept.copy_(given)  # in place: it may be that of several graphs
            else:
                setattr(self, name, given)
        self.known = bool(values["known"])


def coverages(shared: Sequence[SharedSelection]) -> dict[Selector, float]:
    """By selector, the share of its units chosen in the last steps, where that is recorded."""
    known = [(one, one.coverage) for one in shared]
    return {selector: share for one, share in known if share is not None for selector in one.selectors}


class Observer(nn.Module):
    """Refreshes the running norms of one reader from the channels that it reads in this step.

    Attributes:
        parts: Shared selection, place of the member in it, and block, of each stretch of the reader's input; None for
            a stretch that nothing is learnt of, with its width.
        dim: The input's axis that is sampled.
    """

    def __init__(self, parts: Sequence[tuple[SharedSelection | None, int, int]], dim: int, owner: nn.Module) -> None:
        super().__init__()
        self.parts, self.dim, self.owner = tuple(parts), dim, (owner,)

    def forward(self, input: Tensor, *chosen: Selection | None) -> None:
        """``input`` holds the selected entries of each part; ``chosen`` are the parts' selections."""
        if not self.owner[0].training or input.shape[0] == 0:
            return
        with torch.no_grad():
            dim = self.dim % input.dim()
            some = input.detach()[:_EXAMPLES] if dim else input.detach()
            norms = norm(some, tuple(axis for axis in range(some.dim()) if axis != dim))
            norms = norms * math.sqrt(input.shape[0] / some.shape[0])
            start = 0
            for (shared, place, block), selection in zip(self.parts, chosen, strict=True):
                if shared is None:
                    start += block
                    continue
                units = shared.units if selection is None else selection.indices.numel()
                own = norms[start : start + units * block]
                start += units * block
                if block > 1:
                    own = own.view(units, block).square().sum(1).sqrt()
                assert shared.running is not None and shared.age is not None
                index = None
                if selection is not None:
                    starts = torch.arange(shared.groups, device=own.device).unsqueeze(1) * shared.pairs
                    index = (selection.indices + starts).flatten()
                observe(shared.running, shared.age, own.float(), index, place)
