"""Ranks that train by a recipe in DistributedDataParallel hold the same parameters, though each learns other norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import left

SCENARIOS = ["recipe graph", "recipe backend", "recipe agreed", "recipe synchronized"]


def results(two: Path, name: str) -> list[Any]:
    found = left(two, f"recipe {name}")
    assert not [warning for _, warned in found for warning in warned]
    return [result for result, _ in found]


@pytest.mark.parametrize("name", ["graph", "backend"])
def test_both_ranks_choose_and_set_to_zero_the_same(two: Path, name: str) -> None:
    first, second = results(two, name)
    assert ("by a backend" in first["text"]) == (name == "backend")
    before, after, _ = zip(first["learnt"], second["learnt"], strict=True)
    assert before[0] != before[1] and after[0] == after[1]  # averaged when they begin to sample
    assert any(int(zero.sum()) for zero in first["zeros"][1]) and not any(int(zero.sum()) for zero in first["zeros"][0])
    assert all(map(torch.equal, first["zeros"][1], second["zeros"][1]))
    assert all(map(torch.equal, first["parameters"], second["parameters"]))


def test_the_slowest_rank_decides_whether_it_pays(two: Path) -> None:
    first, second = results(two, "agreed")
    assert first == second and "1.04 times as fast here" in first


def test_running_norms_of_a_backend_are_averaged(two: Path) -> None:
    first, second = results(two, "synchronized")
    assert first == second and len(first) > 0
