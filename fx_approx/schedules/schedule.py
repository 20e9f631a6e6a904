"""Sample ratios that change over a training: what they are at each step or epoch, as data."""

from __future__ import annotations

import abc
import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

EIGHTHS = tuple(place / 8 for place in range(1, 9))

_KINDS: dict[str, type[Schedule]] = {}


def check_step(name: str, value: Any, least: int = 0) -> None:
    """TypeError or ValueError unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value}")


def check_ratio(name: str, value: Any) -> None:
    """TypeError or ValueError unless ``value`` is a number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number in (0, 1], got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"{name}: expected a number in (0, 1], got {value!r}")


class Schedule(abc.ABC):
    """A sample ratio for every step, or epoch; 1 is exact, None the ratios of the plan, each layer its own."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Registers the class by its name, for JSON."""
        super().__init_subclass__(**options)
        if not cls.__name__.startswith("_"):
            _KINDS[cls.__name__] = cls

    @abc.abstractmethod
    def ratio(self, step: int) -> float | None: ...

    @property
    @abc.abstractmethod
    def ratios(self) -> frozenset[float | None]:
        """All that it can take: so many graphs a compiled model will have at most."""

    def to_dict(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        plain: dict[str, Any] = {"kind": type(self).__name__}
        for name, value in fields.items():
            if isinstance(value, Schedule):
                plain[name] = value.to_dict()
            elif isinstance(value, Mapping):
                plain[name] = [[step, ratio] for step, ratio in value.items()]
            else:
                plain[name] = list(value) if isinstance(value, tuple) else value
        return plain

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Schedule:
        """The inverse of :meth:`to_dict`; ValueError for an unknown kind, or other fields than it has."""
        values = dict(data)
        kind = values.pop("kind", None)
        if kind not in _KINDS:
            raise ValueError(f"kind: expected one of {', '.join(sorted(_KINDS))}, got {kind!r}")
        fields: list[str] = [field.name for field in dataclasses.fields(_KINDS[kind])]  # type: ignore[arg-type]
        if set(values) != set(fields):
            raise ValueError(f"{kind}: expected the fields {', '.join(fields) or 'none'}, got {sorted(values)}")
        for name, value in values.items():
            if isinstance(value, Mapping):
                values[name] = Schedule.from_dict(value)
            elif name == "ratios_by_step":
                values[name] = {step: ratio for step, ratio in value}
            elif isinstance(value, list):
                values[name] = tuple(value)
        return _KINDS[kind](**values)

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @staticmethod
    def from_json(text: str) -> Schedule:
        return Schedule.from_dict(json.loads(text))


@dataclasses.dataclass(frozen=True)
class PlanRatios(Schedule):
    """The ratios of the plan, each layer its own."""

    def ratio(self, step: int) -> float | None:
        return None

    @property
    def ratios(self) -> frozenset[float | None]:
        return frozenset({None})


@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
    """One ratio.

    Attributes:
        value: In (0, 1].
    """

    value: float

    def __post_init__(self) -> None:
        check_ratio("value", self.value)

    def ratio(self, step: int) -> float | None:
        return self.value

    @property
    def ratios(self) -> frozenset[float | None]:
        return frozenset({float(self.value)})


@dataclasses.dataclass(frozen=True)
class _Moving(Schedule):
    """From ``start`` to ``end`` within ``steps`` steps, then ``end``, on the rungs of a ladder.

    Attributes:
        start: Ratio at step 0.
        end: Ratio from step ``steps`` on.
        steps: How long it moves.
        levels: The ratios that it may take, beside ``start`` and ``end``: the nearest one, the larger half way. Or how
            many it takes in all, at even distances. Each is one more compilation of a compiled model.
    """

    start: float
    end: float
    steps: int
    levels: tuple[float, ...] | int = EIGHTHS

    def __post_init__(self) -> None:
        check_ratio("start", self.start)
        check_ratio("end", self.end)
        check_step("steps", self.steps, 1)
        if isinstance(self.levels, int):
            check_step("levels", self.levels, 2)
            return
        if not isinstance(self.levels, tuple) or not self.levels:
            raise TypeError(f"levels: expected a tuple of ratios, or how many, got {self.levels!r}")
        for level in self.levels:
            check_ratio("levels", level)

    _share: ClassVar[Any]

    def ratio(self, step: int) -> float | None:
        if step >= self.steps:
            return self.end
        share = type(self)._share(step / self.steps)
        exact = self.start + (self.end - self.start) * share
        return min(self._rungs, key=lambda level: (abs(level - exact), -level))

    @property
    def _rungs(self) -> list[float]:
        low, high = sorted((float(self.start), float(self.end)))
        if isinstance(self.levels, int):
            pace = (high - low) / (self.levels - 1)
            return sorted({low, high, *(low + pace * place for place in range(1, self.levels - 1))})
        return sorted({low, high, *(float(level) for level in self.levels if low <= level <= high)})

    @property
    def ratios(self) -> frozenset[float | None]:
        """The rungs between start and end."""
        return frozenset(self._rungs)


@dataclasses.dataclass(frozen=True)
class Linear(_Moving):
    """Moves at an even pace; see :class:`Cosine` for the fields."""

    _share: ClassVar[Any] = staticmethod(lambda share: share)


@dataclasses.dataclass(frozen=True)
class Cosine(_Moving):
    """Moves along half a cosine: slowly at both ends.

    Attributes:
        start: Ratio at step 0, in (0, 1].
        end: Ratio from step ``steps`` on, in (0, 1].
        steps: How long it moves, at least 1.
        levels: The ratios that it may take, beside ``start`` and ``end``: the nearest one, the larger half way. Or how
            many it takes in all, at even distances. Each is one more compilation of a compiled model.
    """

    _share: ClassVar[Any] = staticmethod(lambda share: (1 - math.cos(math.pi * share)) / 2)


@dataclasses.dataclass(frozen=True)
class PiecewiseConstant(Schedule):
    """A ratio from each of some steps on.

    Attributes:
        ratios_by_step: First step -> ratio, in order, the first step 0; None for the plan's.
    """

    ratios_by_step: Mapping[int, float | None]

    def __post_init__(self) -> None:
        if not isinstance(self.ratios_by_step, Mapping) or not self.ratios_by_step:
            raise TypeError(f"ratios_by_step: expected steps with ratios, got {self.ratios_by_step!r}")
        steps = list(self.ratios_by_step)
        for step, ratio in self.ratios_by_step.items():
            check_step("ratios_by_step", step)
            if ratio is not None:
                check_ratio(f"ratios_by_step[{step}]", ratio)
        if steps[0] != 0 or steps != sorted(steps):
            raise ValueError(f"ratios_by_step: expected steps in order, the first 0, got {steps}")

    def ratio(self, step: int) -> float | None:
        """Of the last of the steps that is not after ``step``."""
        check_step("step", step)
        return next(self.ratios_by_step[first] for first in reversed(list(self.ratios_by_step)) if first <= step)

    @property
    def ratios(self) -> frozenset[float | None]:
        return frozenset(self.ratios_by_step.values())


@dataclasses.dataclass(frozen=True)
class _Around(Schedule):
    schedule: Schedule

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"schedule: expected a schedule such as Constant(0.5), got {self.schedule!r}")

    @property
    def ratios(self) -> frozenset[float | None]:
        return self.schedule.ratios | {1.0}


@dataclasses.dataclass(frozen=True)
class ExactWarmup(_Around):
    """Exact for the first ``steps``; the schedule inside begins at its step 0 after that.

    Attributes:
        schedule: What follows.
        steps: Exact ones.
    """

    steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_step("steps", self.steps)

    def ratio(self, step: int) -> float | None:
        return 1.0 if step < self.steps else self.schedule.ratio(step - self.steps)


@dataclasses.dataclass(frozen=True)
class ExactTail(_Around):
    """Exact from step ``total - steps`` on: BatchNorm statistics and the last decimals come from exact steps.

    Attributes:
        schedule: What comes before.
        total: Steps of the whole training.
        steps: Exact ones at its end.
    """

    total: int
    steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_step("total", self.total, 1)
        check_step("steps", self.steps)
        if self.steps > self.total:
            raise ValueError(f"steps: expected at most total={self.total}, got {self.steps}")

    def ratio(self, step: int) -> float | None:
        return self.schedule.ratio(step) if step < self.total - self.steps else 1.0


def exact_tail(schedule: Schedule) -> int | None:
    """Exact steps that ``schedule`` ends with, the longest of its tails; None without an :class:`ExactTail`."""
    found: list[int] = []
    while isinstance(schedule, _Around):
        found += [schedule.steps] if isinstance(schedule, ExactTail) else []
        schedule = schedule.schedule
    return max(found, default=None)


@dataclasses.dataclass(frozen=True)
class PeriodicExact(_Around):
    """Every ``every``-th step exact, the last of each stretch; the others by the schedule.

    Attributes:
        schedule: For the other steps; it counts all steps.
        every: At least 2.
    """

    every: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_step("every", self.every, 2)

    def ratio(self, step: int) -> float | None:
        """Exact at steps every - 1, 2 every - 1 and so on."""
        return 1.0 if step % self.every == self.every - 1 else self.schedule.ratio(step)
