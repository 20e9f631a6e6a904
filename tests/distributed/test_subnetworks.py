"""Two ranks train a subnetwork as one process on their joint batch, and hold the same selections or stop."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import left

SCENARIOS = [f"subnetwork {name}" for name in ("mlp", "vit", "phases", "sharded", "differing", "alone")]
KNOWN = "FSDP2-wrapped module"


def results(two: Path, name: str) -> list[Any]:
    found = left(two, f"subnetwork {name}")
    assert not [warning for _, warned in found for warning in warned if not re.search(KNOWN, warning)]
    return [result for result, _ in found]


@pytest.mark.parametrize("name", ["mlp", "vit", "phases", "sharded"])
def test_two_ranks_train_as_one_process_on_the_joint_batch(two: Path, name: str) -> None:
    first, second = results(two, name)
    for result in (first, second):
        for mine, its in zip(*result["parameters"], strict=True):
            torch.testing.assert_close(mine, its, rtol=0, atol=1e-12)
    assert all(map(torch.equal, first["parameters"][0], second["parameters"][0]))


@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_the_small_gradients_are_sent_and_buckets_stay_with_their_tensors(two: Path, name: str) -> None:
    for result in results(two, name):
        assert result["sent"] == result["narrow"] < 0.55 * result["full"] and result["same"]


def test_each_module_is_wrapped_once(two: Path) -> None:
    for result in results(two, "phases"):
        assert result["wrapped"] == ["ApproxSequential", "SequentialSubnetwork"]


def test_no_optimiser_of_whole_parameters_trains_shards(two: Path) -> None:
    for result in results(two, "sharded"):
        assert re.match(r"ValueError: sub: .* is sharded.*build one on sub.parameters\(\)", result["refused"])


def test_ranks_with_other_selections_stop_and_nothing_is_changed(two: Path) -> None:
    for result in results(two, "differing"):
        assert result["same"]
        for error in result["errors"].values():
            message = "DistributedMismatchError: rank 1: the selection of layer [135] is another one than on the others"
            assert re.match(message, error), error


def test_one_rank_alone_waits_for_none(two: Path) -> None:
    assert results(two, "alone") == [True, True]
