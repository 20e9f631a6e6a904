"""Calls that take turns are timed in the order that was asked for."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from fx_approx.utils.timing import in_turn

CPU = torch.device("cpu")


@pytest.fixture
def called() -> list[str]:
    return []


@pytest.fixture
def calls(called: list[str]) -> list[Callable[[], None]]:
    return [lambda name=name: called.append(name) for name in "abc"]


def test_calls_take_turns_and_those_of_the_warm_up_do_not_count(
    calls: list[Callable[[], None]], called: list[str]
) -> None:
    times = in_turn(calls, CPU, 3, warmup=2)
    assert "".join(called) == "abc" * 5 and [len(own) for own in times] == [3, 3, 3]
    assert all(seconds > 0 for own in times for seconds in own)
    assert in_turn(calls, CPU, 0, warmup=1) == [[], [], []] and in_turn([], CPU, 2) == []


def test_every_second_round_goes_backwards(calls: list[Callable[[], None]], called: list[str]) -> None:
    in_turn(calls, CPU, 2, warmup=1, back_and_forth=True)
    assert "".join(called) == "abc" + "cba" + "abc"


def test_a_measurement_is_the_mean_of_its_calls_by_the_clock_that_is_given(
    calls: list[Callable[[], None]], called: list[str]
) -> None:
    ticks = itertools.count(0.0, 6.0)
    assert in_turn(calls, CPU, 2, counts=[1, 2, 3], clock=lambda: next(ticks)) == [[6.0] * 2, [3.0] * 2, [2.0] * 2]
    assert "".join(called) == "abbccc" * 2


def test_calls_before_the_measurement_are_outside_it(called: list[str]) -> None:
    moments: list[int] = []

    def clock() -> float:
        moments.append(len(called))
        return 0.0

    in_turn([lambda: called.append("a")], CPU, 2, before=3, clock=clock)
    assert moments == [3, 4, 7, 8] and len(called) == 8
