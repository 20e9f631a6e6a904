"""Schedules: their values by hand, and their JSON."""

from __future__ import annotations

from typing import Any

import pytest

from fx_approx.schedules import (
    Constant,
    Cosine,
    ExactTail,
    ExactWarmup,
    Linear,
    PeriodicExact,
    PiecewiseConstant,
    PlanRatios,
    Schedule,
)

ALL = [
    PlanRatios(),
    Constant(0.5),
    Linear(1.0, 0.25, 10),
    Cosine(0.9, 0.3, 7, levels=(0.5, 0.7)),
    Linear(0.3, 0.9, 12, levels=4),
    PiecewiseConstant({0: 1.0, 5: 0.5, 8: None}),
    ExactWarmup(Constant(0.5), 3),
    ExactTail(Linear(0.5, 0.25, 4), 12, 2),
    PeriodicExact(ExactWarmup(PlanRatios(), 2), 4),
]


def values(schedule: Schedule, count: int) -> list[float | None]:
    return [schedule.ratio(step) for step in range(count)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (PlanRatios(), [None, None]),
        (Constant(0.3), [0.3, 0.3]),
        (Linear(1.0, 0.5, 4), [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]),
        (Linear(0.5, 1.0, 4, levels=(0.5, 1.0)), [0.5, 0.5, 1.0, 1.0, 1.0]),
        (Linear(1.0, 0.5, 4, levels=3), [1.0, 1.0, 0.75, 0.75, 0.5]),
        (Linear(0.25, 0.75, 2, levels=2), [0.25, 0.75, 0.75]),
        (Cosine(1.0, 0.5, 4), [1.0, 0.875, 0.75, 0.625, 0.5]),  # 1, 0.927, 0.75, 0.573, 0.5
        (Cosine(1.0, 0.5, 8), [1.0, 1.0, 0.875, 0.875, 0.75, 0.625, 0.625, 0.5, 0.5]),
        (PiecewiseConstant({0: 1.0, 2: 0.5, 4: None}), [1.0, 1.0, 0.5, 0.5, None, None]),
        (ExactWarmup(Linear(0.75, 0.5, 2), 2), [1.0, 1.0, 0.75, 0.625, 0.5]),
        (ExactTail(Constant(0.5), 4, 2), [0.5, 0.5, 1.0, 1.0, 1.0]),
        (PeriodicExact(Constant(0.5), 3), [0.5, 0.5, 1.0, 0.5, 0.5, 1.0]),
        (ExactWarmup(PeriodicExact(PlanRatios(), 2), 1), [1.0, None, 1.0, None]),
    ],
)
def test_values(schedule: Schedule, expected: list[float | None]) -> None:
    assert values(schedule, len(expected)) == expected


@pytest.mark.parametrize("schedule", ALL)
def test_ratios_are_all_that_it_takes(schedule: Schedule) -> None:
    assert set(values(schedule, 40)) <= schedule.ratios
    assert len(set(values(schedule, 40))) >= len(schedule.ratios) - 2  # a short ramp may jump over a rung


@pytest.mark.parametrize("schedule", ALL)
def test_json(schedule: Schedule) -> None:
    assert Schedule.from_json(schedule.to_json()) == schedule


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Constant(0), ValueError, r"value: expected a number in \(0, 1\], got 0"),
        (lambda: Constant("0.5"), TypeError, "value: expected a number"),
        (lambda: Linear(1.0, 0.5, 0), ValueError, "steps: expected an integer of at least 1, got 0"),
        (lambda: Linear(1.0, 1.5, 3), ValueError, "end: expected"),
        (lambda: Cosine(1.0, 0.5, 3, levels=[0.5]), TypeError, "levels: expected a tuple"),
        (lambda: Cosine(1.0, 0.5, 3, levels=(2.0,)), ValueError, "levels: expected"),
        (lambda: Cosine(1.0, 0.5, 3, levels=1), ValueError, "levels: expected an integer of at least 2, got 1"),
        (lambda: PiecewiseConstant({0: 0.5}).ratio(-1), ValueError, "step: expected an integer of at least 0, got -1"),
        (lambda: Schedule.from_dict({"kind": "_Moving"}), ValueError, r"kind: expected one of Constant, Cosine, "),
        (
            lambda: Schedule.from_dict({"kind": "Constant"}),
            ValueError,
            r"Constant: expected the fields value, got \[\]",
        ),
        (
            lambda: Schedule.from_dict({"kind": "PlanRatios", "value": 1}),
            ValueError,
            "PlanRatios: expected the fields none",
        ),
        (lambda: PiecewiseConstant({}), TypeError, "ratios_by_step: expected steps with ratios"),
        (lambda: PiecewiseConstant({1: 0.5}), ValueError, r"expected steps in order, the first 0, got \[1\]"),
        (lambda: PiecewiseConstant({0: 0.5, 3: 2.0}), ValueError, r"ratios_by_step\[3\]: expected"),
        (lambda: PiecewiseConstant({0: 0.5, 1.5: 0.5}), TypeError, "ratios_by_step: expected an integer"),
        (lambda: ExactWarmup(0.5, 3), TypeError, "schedule: expected a schedule such as"),
        (lambda: ExactWarmup(Constant(0.5), -1), ValueError, "steps: expected"),
        (lambda: ExactTail(Constant(0.5), 3, 4), ValueError, "steps: expected at most total=3, got 4"),
        (lambda: PeriodicExact(Constant(0.5), 1), ValueError, "every: expected an integer of at least 2"),
        (lambda: Schedule.from_dict({"kind": "Random"}), ValueError, "kind: expected one of .*Constant.* got 'Random'"),
    ],
)
def test_bad_input(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
