"""Which cases of a test run each time, and which with ``-m slow``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


def quick(cases: Iterable[tuple[Any, ...]], runs: Callable[..., bool]) -> list[Any]:
    """The cases; those that ``runs`` says no to are slow."""
    return [pytest.param(*case, marks=() if runs(*case) else pytest.mark.slow) for case in cases]


def thinned(cases: Iterable[Any], step: int = 2) -> list[Any]:
    """The cases, of which every ``step``-th runs and the others are slow."""
    given = [one if isinstance(one, tuple) else (one,) for one in cases]
    return [pytest.param(*one, marks=pytest.mark.slow if place % step else ()) for place, one in enumerate(given)]


def in_turn(first: Collection[Any], second: Collection[Any], both: Collection[Any] = (), step: int = 1) -> list[Any]:
    """All pairs: of every ``step``-th ``first`` one runs, with the next ``second``; of those in ``both`` all."""
    turns = set(zip([*first][::step], itertools.cycle(second), strict=False))
    return quick(itertools.product(first, second), lambda one, other: one in both or (one, other) in turns)
