"""Holds the noise of sampling at a share of the noise that the batches make anyway."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fx_approx._compat import tree_leaves, tree_map_only
from fx_approx.analysis.scalar_logger import ScalarLogger
from fx_approx.core.plan_effects import tied
from fx_approx.runtime.approx_module import ApproxModule, find
from fx_approx.runtime.controls import set_each
from fx_approx.runtime.handle import GraphHandle, pieces_of
from fx_approx.runtime.snapshot import module_of
from fx_approx.runtime.step_gradient import Loss, sampled_gradient
from fx_approx.schedules.schedule import EIGHTHS, check_ratio, check_step

_RECENT = 12  # measurements that decide
_FADING = 0.85  # weight of each older one
_NEAR = 0.1  # of the ladder: how far measurements elsewhere count
_FURTHEST = 0.25  # of the ladder, moved at a time
_SLOPE = math.log(30.0)  # noise grows by so much from one end of the ladder to the other, until more is known


@dataclasses.dataclass(frozen=True)
class NoiseRecord:
    """One measurement.

    Attributes:
        step: When it was.
        sgd: Variance of the gradient over batches, summed over its entries.
        sampling: Mean squared error of the gradient by sampling.
        position: On the ladder before.
        moved_to: After.
    """

    step: int
    sgd: float
    sampling: float
    position: int
    moved_to: int

    @property
    def noise(self) -> float:
        """Sampling as a share of SGD."""
        return self.sampling / self.sgd if self.sgd else math.inf


class NoiseController:
    """Moves the sample ratios so that sampling adds ``target`` of the noise of SGD to the gradient.

    To be called as ``controller.step(batch)`` after every training step. Every ``every`` steps it measures on that
    batch: the variance of the gradient over batches of this size, from the gradients of its parts, and the squared
    error of the sampled gradient. Then it moves along a ladder on which each rung changes one selection by one ratio,
    along the line through the latest measurements. Source of the criterion: VCAS (Wang et al., ICLR 2024),
    which compares the same two.

    A measurement costs ``2 + draws`` training steps; ``every`` keeps that below ``overhead`` of the steps. They are
    counted, and no seconds, so that all ranks decide alike and a resumed run decides as before. With
    torch.distributed the gradients are averaged over all ranks, as data-parallel training does it, and both kinds of
    noise are those of that average; it is to be called by all ranks. Each rung that is new is one more compilation of a
    compiled model.

    Where the parts of a batch go through BatchNorm, their statistics are noisier than those of the whole: the noise of
    SGD is overestimated by that.

    Attributes:
        position: On the ladder: 0 has all selections at its first ratio, :attr:`last` all at its last.
        history: All measurements.
    """

    def __init__(
        self,
        model: nn.Module | GraphHandle,
        loss: Loss,
        *,
        target: float = 0.1,
        every: int | None = None,
        draws: int = 1,
        parts: int = 2,
        ladder: Sequence[float] = EIGHTHS,
        overhead: float = 0.02,
        log: ScalarLogger | None = None,
    ) -> None:
        """Begins at the rung nearest to the mean of the ratios that the model has.

        Args:
            model: A transformed model, what wraps it, or a backend, whose layers are known after its first step: the
                ladder begins then.
            loss: Called with the transformed model and a batch; returns the scalar that is trained on.
            target: Sampling noise as a share of the noise of SGD, above 0.
            every: Steps from one measurement to the next; None for the least that ``overhead`` allows.
            draws: Samples at each measurement, for random samplers.
            parts: Into which a batch is cut along its first axis, at least 2.
            ladder: Ratios in (0, 1]; 1 is exact.
            overhead: The largest share of steps that measurements may cost.
            log: Told every measurement.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: An argument out of range, ``every`` too small for ``overhead`` (the message says the least), or
                ``model`` is not transformed or samples nothing.
        """
        self._model = model if isinstance(model, GraphHandle) else find(model)
        if not callable(loss):
            raise TypeError(f"loss: expected a function of a model and a batch, got {loss!r}")
        for name, value in (("target", target), ("overhead", overhead)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: expected a number above 0, got {value!r}")
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a number above 0, got {value!r}")
        check_step("draws", draws, 1)
        check_step("parts", parts, 2)
        least = math.ceil((2 + draws) / overhead - 1e-9)
        if every is None:
            every = least
        check_step("every", every, 1)
        if every < least:
            raise ValueError(
                f"every: a measurement costs {2 + draws} steps, so expected at least {least} for "
                f"overhead={overhead:g}, got {every}"
            )
        if isinstance(ladder, (str, bytes)) or not isinstance(ladder, Sequence) or len(ladder) < 2:
            raise TypeError(f"ladder: expected at least two ratios, got {ladder!r}")
        for ratio in ladder:
            check_ratio("ladder", ratio)
        if len(set(ladder)) < 2:
            raise ValueError(f"ladder: expected at least two different ratios, got {ladder!r}")
        if log is not None and not isinstance(log, ScalarLogger):
            raise TypeError(f"log: expected a ScalarLogger or None, got {log!r}")
        self.target, self.every, self.draws, self.parts = float(target), every, draws, parts
        self.ladder = tuple(sorted({float(ratio) for ratio in ladder}, reverse=True))
        self.history: list[NoiseRecord] = []
        self._loss, self._log = loss, log
        self._steps = self.position = 0
        self._groups: list[tuple[str, ...]] = []
        self._waiting: Mapping[str, Any] | None = None
        if isinstance(self._model, GraphHandle):
            self._model.follow(self._joined)
        if pieces_of(self._model):
            self._begin()

    def _begin(self) -> None:
        """Builds the ladder of the layers that are there."""
        self._groups = [group for approx in pieces_of(self._model) for group in _groups(approx)]
        self._groups = list(dict.fromkeys(self._groups))  # those for other shapes of the same layers are the same
        if not self._groups:
            raise ValueError("model: nothing is sampled, so there are no ratios to move")
        self.position = self._nearest()
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self.load_state_dict(waiting)
        self._put()

    def _joined(self, approx: ApproxModule, new: bool) -> None:
        """A graph has appeared: layers that are on the ladder get the ratios of this rung."""
        if self._groups and not new:
            self._put()

    @property
    def last(self) -> int:
        """The highest rung of the ladder."""
        return len(self._groups) * (len(self.ladder) - 1)

    def ratios(self, position: int) -> dict[str, float]:
        """Of every layer at ``position``: the selections take turns, the last of the model first."""
        count = len(self._groups)
        return {
            name: self.ladder[(position + place) // count] for place, names in enumerate(self._groups) for name in names
        }

    def step(self, batch: Any) -> NoiseRecord | None:
        """Counts a training step; measures and moves every ``every`` steps.

        Args:
            batch: As ``loss`` takes it; all its tensors of one length along their first axis are cut into parts.

        Returns:
            The measurement, if there was one. One that is not finite says nothing: it is left out, and nothing moves.

        Raises:
            ValueError: The batch cannot be cut, or the loss is no scalar; nothing has moved then.
        """
        if not self._groups and pieces_of(self._model):
            self._begin()
        training = module_of(self._model, "NoiseController").training
        if (self._steps + 1) % self.every or not self._groups or not training:
            self._steps += 1
            return None
        pieces = cut(batch, self.parts)
        sgd, sampling = self._measure(batch, pieces)
        self._steps += 1
        if not (math.isfinite(sgd) and math.isfinite(sampling)):
            return None
        before = self.position
        self.history.append(NoiseRecord(self._steps, sgd, sampling, before, before))
        self.position = self._moved()
        record = self.history[-1] = dataclasses.replace(self.history[-1], moved_to=self.position)
        if self.position != before:
            self._put()
        if self._log is not None:
            ratios = self.ratios(self.position)
            values = {
                "noise/sgd": sgd,
                "noise/sampling": sampling,
                "noise/share": record.noise,
                "noise/target": self.target,
            }
            self._log.scalars(values, self._steps)
            self._log.ratios(ratios, self._steps)
        return record

    def _measure(self, batch: Any, pieces: Sequence[Any]) -> tuple[float, float]:
        model, loss = self._model, self._loss
        names = [name for group in self._groups for name in group]
        total, squares = torch.zeros(()), torch.zeros((), dtype=torch.float64)
        for piece in pieces:
            own = sampled_gradient(model, piece, loss, ())
            total, squares = total.to(own) + own, squares.to(own.device) + own.square().sum().double()
        ranks = _summed(total, squares)
        count = len(pieces) * ranks
        # The variance of a part's gradient is that of the whole step's times the number of parts.
        spread = max(0.0, float(squares) - float(total.square().sum()) / count) / (count - 1) / count
        exact = sampled_gradient(model, batch, loss, ())
        errors = []
        for number in range(self.draws):
            error = sampled_gradient(model, batch, loss, names, number) - exact
            _summed(error)
            errors.append(float(error.square().sum()) / ranks**2)
        return spread, sum(errors) / len(errors)

    def _moved(self) -> int:
        """Where to go: to where the line through what was measured lately and nearby, in logarithms, meets the target.

        The level of the line is a mean of the noise itself, carried over to this position, and not of its logarithm,
        which a few large errors would leave below the mean. From a position without noise it goes one rung on, since
        nothing can be learnt there.
        """
        recent = self.history[-_RECENT:]
        weights = [
            _FADING**age * math.exp(-abs(record.position - self.position) / (_NEAR * self.last))
            for age, record in enumerate(reversed(recent))
        ][::-1]
        if not recent[-1].sampling:
            return min(self.last, self.position + 1)
        noisy = [(record, weight) for record, weight in zip(recent, weights, strict=True) if record.sampling > 0]
        expected = _SLOPE / self.last
        slope = _slope([(r.position, math.log(r.sampling), weight) for r, weight in noisy], expected)
        here = [(r.sampling * math.exp(slope * (self.position - r.position)), weight) for r, weight in noisy]
        sampling = sum(value * weight for value, weight in here) / sum(weight for _, weight in here)
        sgd = sum(r.sgd * weight for r, weight in zip(recent, weights, strict=True)) / sum(weights)
        most = max(1, round(_FURTHEST * self.last))
        wanted = math.log(self.target * sgd / sampling) / slope if sgd else -most
        return max(0, min(self.last, self.position + round(max(-most, min(most, wanted)))))

    def _nearest(self) -> int:
        specs = {
            name: selector.spec.ratio
            for approx in pieces_of(self._model)
            for (name, _), selector in approx._fx_approx.selectors.items()
        }
        mean = sum(specs.values()) / len(specs)

        def distance(position: int) -> float:
            found = self.ratios(position)
            return abs(sum(found.values()) / len(found) - mean)

        return min(range(self.last + 1), key=distance)

    def _put(self) -> None:
        ratios = self.ratios(self.position)
        for approx in pieces_of(self._model):
            selectors = approx._fx_approx.selectors.items()
            set_each(approx, {one: (ratios[name], one.enabled) for (name, _), one in selectors if name in ratios})

    def state_dict(self) -> dict[str, Any]:
        """Plain values for JSON, for exact resume."""
        return {
            "steps": self._steps,
            "position": self.position,
            "ladder": list(self.ladder),
            "groups": [list(names) for names in self._groups],
            "history": [dataclasses.asdict(record) for record in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another one was, and sets the ratios of that moment.

        Raises:
            ValueError: That is no such state, or of another model or ladder; nothing is changed then.
        """
        keys = set(self.state_dict())
        if set(state) != keys:
            raise ValueError(f"state: expected the keys {sorted(keys)}, got {sorted(state)}")
        if not self._groups and isinstance(self._model, GraphHandle):
            self._waiting = dict(state)  # until the layers are known
            return
        own = {"ladder": list(self.ladder), "groups": [list(names) for names in self._groups]}
        for name, value in own.items():
            if state[name] != value:
                raise ValueError(f"{name}: expected {value}, as this controller has it, got {state[name]}")
        position = state["position"]
        if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position <= self.last:
            raise ValueError(f"position: expected an integer from 0 to {self.last}, got {position!r}")
        history = [NoiseRecord(**record) for record in state["history"]]
        self._steps, self.position, self.history = state["steps"], position, history
        self._put()


def cut(batch: Any, parts: int) -> list[Any]:
    """``batch`` in ``parts`` along the first axis of its tensors; those of one entry or of another length stay whole.

    Raises:
        ValueError: There are fewer examples than parts.
    """
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    count = tensors[0].shape[0] if tensors else 0
    if count < parts:
        raise ValueError(f"batch: expected tensors of at least {parts} examples, to cut into parts, got {count}")
    edges = [place * count // parts for place in range(parts + 1)]

    def piece(start: int, end: int) -> Any:
        return tree_map_only(Tensor, lambda t: t[start:end] if t.dim() and t.shape[0] == count else t, batch)

    return [piece(start, end) for start, end in itertools.pairwise(edges)]


def _groups(approx: ApproxModule) -> list[tuple[str, ...]]:
    """Sampled layers, those with one selection together, in the order of the model."""
    runtime = approx._fx_approx
    return tied(runtime.record.effects, list(dict.fromkeys(name for name, _ in runtime.selectors)))


def _slope(known: Sequence[tuple[float, float, float]], expected: float) -> float:
    """Of the logarithm of the noise over the position, by weighted least squares, held near what is expected.

    Args:
        known: Positions, logarithms and weights.
        expected: The slope to begin with, which counts like one more measurement at each end of a stretch.
    """
    total = sum(weight for *_, weight in known)
    middle = sum(place * weight for place, _, weight in known) / total
    level = sum(noise * weight for _, noise, weight in known) / total
    spread = sum(weight * (place - middle) ** 2 for place, _, weight in known)
    found = sum(weight * (place - middle) * (noise - level) for place, noise, weight in known)
    return min(12 * expected, max(expected / 4, (found + expected) / (spread + 1)))


def _summed(*tensors: Tensor) -> int:
    """Adds up each of ``tensors`` over all ranks, in place; returns how many ranks there are."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    for tensor in tensors:
        torch.distributed.all_reduce(tensor)
    return torch.distributed.get_world_size()
