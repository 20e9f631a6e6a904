"""Ranks that hold shards of a transformed model train as ranks that hold all of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run

SCRIPT = Path(__file__).with_name("fsdp_ranks.py")
SAME = [
    "vit blocks weight value",
    "vit blocks weight group",
    "vit nested stale value",
    "vit root weight value",
    "vit blocks online",
    "vit blocks weight micro",
    "cnn layers weight value",
    "cnn layers stale group",
    "cnn layers uniform bernoulli",
    "mlp layers uniform systematic",
    "mlp layers weight systematic",
    "mlp layers weight columns",
    "mlp layers weight copies",
    "grouped layers weight value",
]
FOUR = ["four copies", "four shards"]
TOLERANCE = 1e-10
KNOWN = "FSDP2-wrapped module|BatchNorm statistics were gathered while sampling"
UNTOLD = r"is sharded by fully_shard.*call fx_approx.distributed.enable_fsdp\(model\) after the last fully_shard"
REFUSED = {
    "not sharded": "ValueError: model: fully_shard was called on no part of ApproxVit; call it first",
    "no module": "TypeError: model: expected a transformed model under fully_shard, got str",
    "not transformed": "ValueError: model: FSDPVit is not a transformed model",
    "unregistered blocks weight": f"RuntimeError: a FSDPBlock {UNTOLD}",
    "unregistered layers weight": rf"RuntimeError: a weight of shape \[48, 192\] {UNTOLD}",
    "unregistered layers online": rf"RuntimeError: a weight of shape \[48, 192\] {UNTOLD}",
    "turns": "ValueError: model: one and two take turns in the graph.*call fully_shard on the module around them",
    "hooked": "ValueError: model: blocks.1 has hooks of its own",
    "other seed": "DistributedMismatchError: rank 1: seed is '1', and '0' on the others",
    "placed": r"ValueError: model: 3.weight is placed as \(Replicate.*expected one Shard",
    "late": "CaptureError: model: FSDPVit is sharded; transform first, then fully_shard",
    "verify": "ValueError: model: .*verify before fully_shard",
    "restore": "CaptureError: model: FSDPApproxVit cannot be copied: .*FSDP does not support deepcopy",
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left."""
    folder = tmp_path_factory.mktemp("two")
    names = [*SAME, "vit partly", "gradients", "mixed", "compiled", "frontend", "python", "refused", "resumed"]
    run(SCRIPT, folder, 2, names)
    return folder


def left(folder: Path, name: str, size: int = 2) -> list[tuple[Any, list[str]]]:
    """Results and warnings of each rank."""
    return [torch.load(folder / f"{name}.{rank}.pt") for rank in range(size)]


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """All parameters are the same to rounding."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=TOLERANCE, msg=lambda text, n=name: f"{n}: {text}")


def trained_alike(results: list[dict[str, Any]]) -> None:
    """Whole and sharded; steps, an exact tail, an evaluation. BatchNorm's statistics are each rank's own."""
    for rank, result in enumerate(results):
        dense, sharded = result["losses"]
        assert dense == pytest.approx(sharded, abs=TOLERANCE)
        assert len(set(dense)) == len(dense)
        whole, gathered = result["state"]
        learnt = [name for name in whole if "running_" not in name and "num_batches" not in name]
        close({name: whole[name] for name in learnt}, {name: gathered[name] for name in learnt})
        assert all(torch.equal(gathered[name], results[0]["state"][1][name]) for name in learnt)
        statistics = [name for name in whole if "running_mean" in name]
        for name in statistics:  # DistributedDataParallel spreads those of the first rank
            same = torch.allclose(whole[name], gathered[name], rtol=0, atol=TOLERANCE)
            assert same == (rank == 0), name
        if not statistics:
            torch.testing.assert_close(*result["output"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", SAME)
def test_two_ranks_train_sharded_as_they_train_whole(two: Path, name: str) -> None:
    trained_alike([result for result, _ in left(two, name)])
    for _, warned in left(two, name):
        assert [text for text in warned if not re.match(KNOWN, text)] == []


@pytest.mark.slow
def test_four_ranks_train_sharded_as_they_train_whole(tmp_path: Path) -> None:
    run(SCRIPT, tmp_path, 4, FOUR)
    for name in FOUR:
        trained_alike([result for result, _ in left(tmp_path, name, 4)])


def test_a_layer_may_stay_exact_and_registration_may_be_repeated(two: Path) -> None:
    for result, _ in left(two, "vit partly"):
        dense, sharded = result["losses"]
        assert dense == pytest.approx(sharded, abs=TOLERANCE)
        close(*result["state"])


def test_gradients_are_those_of_the_sample(two: Path) -> None:
    for result, _ in left(two, "gradients"):
        assert result["columns True"] == (32, 64)
        assert result["columns False"] == (64, 64)


def test_one_block_is_gathered_at_a_time_and_one_all_reduce_scores_all_shards(two: Path) -> None:
    """The layers of two blocks read 2 · (32 + 32 + 64 + 32) channels; without sampling nothing is scored."""
    for result, _ in left(two, "gradients"):
        assert result["gathered"] == [[True, False], [False, True]] * 2
        assert result["reduced"] == [320]


def test_mixed_precision_is_near_float32(two: Path) -> None:
    (first, _), (second, _) = left(two, "mixed")
    for sampler, (losses, expected, gathered) in first.items():
        assert losses == pytest.approx(expected, abs=0.03), sampler
        assert losses != expected
        for name, tensor in gathered.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, second[sampler][2][name])


def test_training_is_resumed_exactly(two: Path) -> None:
    for result, _ in left(two, "resumed"):
        at_once, resumed = result["losses"]
        assert at_once == resumed


def test_compiled_training_is_that_of_whole_models(two: Path) -> None:
    for result, _ in left(two, "compiled"):
        expected, losses = result["losses"]
        assert losses == pytest.approx(expected, abs=TOLERANCE)
        close(*result["state"])


def test_blocks_of_the_dynamo_frontend_train_as_whole_ones(two: Path) -> None:
    for result, _ in left(two, "frontend"):
        dense, sharded = result["losses"]
        assert dense == pytest.approx(sharded, abs=TOLERANCE)
        close(*result["state"])
        assert result["columns"] == 24


def test_the_own_python_of_the_model_runs_by_the_hooks_of_its_blocks(two: Path) -> None:
    (first, warned), (second, _) = left(two, "python")
    assert any("a FSDPBlock got hooks" in text for text in warned)
    close(first["state"], second["state"])


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_uses_are_clear_errors(two: Path, name: str) -> None:
    for result, _ in left(two, "refused"):
        assert re.match(REFUSED[name], result[name], re.DOTALL), result[name]
