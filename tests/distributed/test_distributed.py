"""Ranks that reduce slices train as ranks that reduce whole gradients, and send less; so do ranks that hold shards."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx.schedules import NoiseController
from tests.distributed.ranks import batch, left, made, run

SAME = [
    *("mlp value", "cnn group", "vit value", "cnn stale", "mlp systematic", "cnn bernoulli", "mlp systematic, micro"),
    *("cnn fp16", "cnn unused", "cnn static", "cnn views"),
]
ODD = {
    "other seed": "rank 1: seed is '1', and '0' on the others",
    "other plan": "rank 1: layer 3, output is .*ratio=0.75.* and .*ratio=0.5.* on the others",
    "other weights": "rank 1: the selection of layer [13] is another one than on the others",
    "older step": "rank 1: step is 1, and 3 on the others; resume all ranks from the same checkpoint",
}
COMPILED = ["cnn compiled", "cnn compiled inside", "frontend", "sharded compiled"]
OTHERS = ["apart", "power", "scaled", "micro batches", "resumed", "controlled", "synchronized", "tokens", "frontend"]


SHARDED = [
    *("vit blocks online", "vit blocks weight micro"),
    *("mlp layers weight systematic", "grouped layers weight value", "mlp layers weight columns"),
]
MORE_SHARDED = [
    "cnn layers uniform bernoulli",
    "vit blocks weight value",
    "vit root weight value",
    "cnn layers stale group",
    "mlp layers weight copies",
    "vit nested stale group",
]
SHARDED_OTHERS = ["partly", "gradients", "mixed", "frontend", "python", "refused", "resumed"]
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


SCENARIOS = [*SAME, *ODD, *OTHERS, *(f"sharded {name}" for name in (*SHARDED, *SHARDED_OTHERS)), "killed"]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("name", SAME)
def test_two_ranks_train_bit_for_bit_as_with_dense_reduction_and_send_less(two: Path, name: str) -> None:
    """The sum of two numbers does not depend on their order."""
    results = left(two, name)
    for result, warned in results:
        plain, sliced = result["losses"]
        assert plain == sliced and len(set(plain)) == len(plain)
        assert equal(*result["parameters"]) and equal(result["parameters"][1], results[0][0]["parameters"][1])
        dense, predicted, sent = result["bytes"]
        assert predicted < 0.5 * dense
        if "micro" in name:
            assert predicted < sent < dense
        elif "bernoulli" in name:
            assert sent == pytest.approx(predicted, rel=0.3)
        else:
            assert sent == predicted
        assert not warned and f"({100 * (1 - sent / dense):.1f} % less)" in result["text"]


def test_bytes_of_one_model_by_hand(two: Path) -> None:
    """Two hidden layers of 48: the reader of both halves and its producer's outputs; the last reads half."""
    dense = 4 * (192 * 48 + 48 + 48 * 48 + 48 + 48 * 5 + 5)
    sent = 4 * (96 * 24 + 48 + 24 * 24 + 48 + 24 * 5 + 5)
    assert left(two, "mlp value")[0][0]["bytes"] == (dense, sent, sent)


@pytest.mark.slow
def test_four_ranks(tmp_path: Path) -> None:
    names = ["mlp value", "cnn group", "vit value"]
    run(tmp_path, 4, names)
    for name in names:
        results = [result for result, _ in left(tmp_path, name, 4)]
        for result in results:
            torch.testing.assert_close(*result["losses"], rtol=0, atol=1e-5)
            torch.testing.assert_close(*result["parameters"], rtol=0, atol=1e-5)
            assert equal(result["parameters"][1], results[0]["parameters"][1])


@pytest.mark.parametrize("name", ODD)
def test_what_differs_between_ranks_is_named_on_all_of_them(two: Path, name: str) -> None:
    (message, _), (other, _) = left(two, name)
    assert message == other and re.search(f"^DistributedMismatchError: {ODD[name]}", message), message


def test_micro_batches_of_stale_scores_need_a_held_selection(two: Path) -> None:
    (first, _), (second, _) = left(two, "micro batches")
    assert "no_sync: ema scores" in first["message"] and "fx_approx.reuse_selection(model)" in first["message"]
    assert equal(first["parameters"], second["parameters"])


def test_scaled_gradients_that_overflow_on_one_rank_are_skipped_on_both(two: Path) -> None:
    (first, _), (second, _) = left(two, "scaled")
    assert first["scales"] == second["scales"] == [1024.0, 512.0, 512.0, 512.0]
    assert equal(first["parameters"], second["parameters"])


def test_what_has_no_slice_can_go_by_another_hook(two: Path) -> None:
    for result, _ in left(two, "apart"):
        assert result["losses"][0] == result["losses"][1] and equal(*result["parameters"])
        dense, predicted, sent = result["bytes"]
        assert predicted < sent < dense  # the first layer's weight is alone in the last bucket, and goes whole


def test_powersgd_compresses_what_has_no_slice(two: Path) -> None:
    (first, _), (second, _) = left(two, "power")
    assert first["steps"] > 2 and first["errors"] > 0  # it began, and left something out
    dense, predicted, sent = first["bytes"]
    assert sent == predicted < dense
    plain, compressed = first["losses"]
    assert plain[:2] == compressed[:2] and plain != compressed
    assert max(abs(one - other) for one, other in zip(plain, compressed, strict=True)) < 0.2
    assert equal(first["parameters"], second["parameters"])


def test_resuming_gives_the_same_losses(two: Path) -> None:
    for (whole, resumed), _ in left(two, "resumed"):
        assert whole == resumed and len(whole) == 3


def test_a_rank_that_dies_is_an_error_on_the_other(two: Path) -> None:
    message, _ = torch.load(two / "killed.0.pt")
    assert "Error" in message and "no error" not in message


# ---- what sets ratios, learns scores, and compiles


def loss_of(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(given[0]), given[1])


def gradient(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(model, given), list(model.parameters()))])


def test_ranks_decide_alike_by_the_noise_of_the_averaged_gradient(two: Path) -> None:
    """Both kinds of noise, from the gradients of both ranks' data in one process."""
    (one, _), (other, _) = left(two, "controlled")
    assert one["state"] == other["state"]
    history = one["state"]["history"]
    assert len(history) == 4 and any(record["position"] != record["moved_to"] for record in history)
    model = made("mlp", scope="layer")
    model.load_state_dict(one["measured"])
    NoiseController(model, loss_of)  # the ratios to begin with
    exact = fx_approx.restore(made("mlp", scope="layer"))
    exact.load_state_dict(model.state_dict())
    batches = [batch(rank, 2) for rank in range(2)]
    parts = [(x[half], y[half]) for x, y in batches for half in (slice(0, 4), slice(4, 8))]
    spread = torch.stack([gradient(exact, part) for part in parts]).var(0).sum() / 4
    errors = [gradient(model, given) - gradient(exact, given) for given in batches]
    assert history[0]["sgd"] == pytest.approx(float(spread), rel=1e-4)
    assert history[0]["sampling"] == pytest.approx(float((sum(errors) / 2).square().sum()), rel=1e-4)
    assert not torch.allclose(errors[0], errors[1])


def test_a_scheduler_drives_a_data_parallel_model(two: Path) -> None:
    exact, planned = left(two, "controlled")[0][0]["ratios"]
    assert set(exact.values()) == {1.0} and set(planned.values()) == {0.5} and len(planned) == 3


def test_running_norms_of_scores_are_averaged(two: Path) -> None:
    (one, _), (other, _) = left(two, "synchronized")
    assert not equal(one["before"], other["before"]) and equal(one["after"], other["after"])
    assert equal(one["age"], other["age"])
    for mine, theirs, after in zip(one["before"], other["before"], one["after"], strict=True):
        torch.testing.assert_close(after, (mine + theirs) / 2)


def test_ranks_that_average_what_they_learn_choose_the_same_tokens(two: Path) -> None:
    (one, _), (other, _) = left(two, "tokens")
    assert one["state"] == other["state"]
    assert all(map(torch.equal, one["chosen"], other["chosen"]))
    assert not torch.equal(one["alone"][-1], other["alone"][-1]) and one["chosen"][0].shape == (8, 2)


def test_without_a_process_group_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        fx_approx.distributed.synchronize_scores(made("mlp", scores="ema", scope="layer"))


def test_below_it_the_dynamo_frontend_trains_two_ranks_as_one_with_all_the_data(two: Path) -> None:
    for (buckets, whole, alone), _ in left(two, "frontend"):
        for (parameters, pieces, sampled), expected in ((buckets, 3), (whole, 1)):
            assert (pieces, sampled) == (expected, alone[2]) == (expected, 3)
            torch.testing.assert_close(parameters, alone[0], rtol=0, atol=1e-12)


# ---- shards of a model: trained as the whole


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


@pytest.mark.parametrize("name", SHARDED)
def test_two_ranks_train_sharded_as_they_train_whole(two: Path, name: str) -> None:
    trained_alike([result for result, _ in left(two, f"sharded {name}")])
    for _, warned in left(two, f"sharded {name}"):
        assert [text for text in warned if not re.match(KNOWN, text)] == []


@pytest.mark.slow
def test_more_models_trained_sharded_are_as_trained_whole(tmp_path: Path) -> None:
    run(tmp_path, 2, [f"sharded {name}" for name in MORE_SHARDED])
    for name in MORE_SHARDED:
        test_two_ranks_train_sharded_as_they_train_whole(tmp_path, name)


@pytest.mark.slow
def test_four_ranks_train_sharded_as_they_train_whole(tmp_path: Path) -> None:
    run(tmp_path, 4, [f"sharded {name}" for name in FOUR])
    for name in FOUR:
        trained_alike([result for result, _ in left(tmp_path, f"sharded {name}", 4)])


def test_a_layer_may_stay_exact_and_registration_may_be_repeated(two: Path) -> None:
    for result, _ in left(two, "sharded partly"):
        dense, sharded = result["losses"]
        assert dense == pytest.approx(sharded, abs=TOLERANCE)
        close(*result["state"])


def test_gradients_are_those_of_the_sample(two: Path) -> None:
    for result, _ in left(two, "sharded gradients"):
        assert result["columns True"] == (32, 64)
        assert result["columns False"] == (64, 64)


def test_one_block_is_gathered_at_a_time_and_one_all_reduce_scores_all_shards(two: Path) -> None:
    """The layers of two blocks read 2 · (32 + 32 + 64 + 32) channels; without sampling nothing is scored."""
    for result, _ in left(two, "sharded gradients"):
        assert result["gathered"] == [[True, False], [False, True]] * 2
        assert result["reduced"] == [320]


def test_mixed_precision_is_near_float32(two: Path) -> None:
    (first, _), (second, _) = left(two, "sharded mixed")
    for sampler, (losses, expected, gathered) in first.items():
        assert losses == pytest.approx(expected, abs=0.03), sampler
        assert losses != expected
        for name, tensor in gathered.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, second[sampler][2][name])


def test_sharded_training_is_resumed_exactly(two: Path) -> None:
    for (at_once, resumed), _ in left(two, "sharded resumed"):
        assert at_once == resumed


@pytest.mark.slow
def test_compiled_training_is_that_of_whole_models(tmp_path: Path) -> None:
    run(tmp_path, 2, COMPILED, inner="aot_eager")
    for name in COMPILED[:2]:
        test_two_ranks_train_bit_for_bit_as_with_dense_reduction_and_send_less(tmp_path, name)
    test_below_it_the_dynamo_frontend_trains_two_ranks_as_one_with_all_the_data(tmp_path)
    for result, _ in left(tmp_path, "sharded compiled"):
        expected, losses = result["losses"]
        assert losses == pytest.approx(expected, abs=TOLERANCE)
        close(*result["state"])


def test_blocks_of_the_dynamo_frontend_train_as_whole_ones(two: Path) -> None:
    for result, _ in left(two, "sharded frontend"):
        dense, sharded = result["losses"]
        assert dense == pytest.approx(sharded, abs=TOLERANCE)
        close(*result["state"])
        assert result["columns"] == 24


def test_the_own_python_of_the_model_runs_by_the_hooks_of_its_blocks(two: Path) -> None:
    (first, warned), (second, _) = left(two, "sharded python")
    assert any("a FSDPBlock got hooks" in text for text in warned)
    close(first["state"], second["state"])


def test_wrong_uses_are_clear_errors(two: Path) -> None:
    for result, _ in left(two, "sharded refused"):
        wrong = {name: result[name] for name in REFUSED if not re.match(REFUSED[name], result[name], re.DOTALL)}
        assert wrong == {}


# ---- the example under torchrun


EXAMPLE = Path(__file__).parents[2] / "examples" / "ddp_train.py"


def torchrun(place: Path, ranks: int, *arguments: Any) -> list[str]:
    """What the ranks print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=place, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_example_resumes_under_torchrun_with_another_number_of_ranks(tmp_path: Path) -> None:
    def train(ranks: int, epochs: int) -> list[str]:
        options = ("--limit", 256, "--checkpoint", tmp_path / "checkpoint.pt", "--epochs", epochs)
        return torchrun(tmp_path, ranks, EXAMPLE, *options)

    first = train(2, 1)
    assert first[0].startswith("epoch 1: loss") and "74.6 % less" in first[-1]
    second = train(1, 2)
    assert [line for line in second if line.startswith("epoch")] == [second[0]]
    assert second[0].startswith("epoch 2: loss") and "74.6 % less" in second[-1]


CRASH = """
import os, pathlib, runpy, sys, torch

flag, script = pathlib.Path(sys.argv[1]), sys.argv[2]
sys.argv = sys.argv[2:]
plain, taken = torch.optim.SGD.step, 0


def step(self, *args, **kwargs):
    global taken
    taken += 1
    if taken == 7 and os.environ["RANK"] == "1" and not flag.exists():
        flag.touch()
        os._exit(1)
    return plain(self, *args, **kwargs)


torch.optim.SGD.step = step
sys.path.insert(0, str(pathlib.Path(script).parent))
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
def test_torchrun_restarts_after_a_death_to_the_same_losses(tmp_path: Path) -> None:
    """Rank 1 dies in the middle of the second epoch; all go on from the checkpoint after the first."""
    (tmp_path / "crash.py").write_text(CRASH, encoding="utf-8")
    losses = []
    for name, restarts in (("whole", 0), ("broken", 1)):
        flag = tmp_path / f"{name}.flag"
        if not restarts:
            flag.touch()
        options = ("--limit", 256, "--epochs", 3, "--checkpoint", tmp_path / f"{name}.pt")
        said = torchrun(tmp_path, 2, "--max-restarts", restarts, tmp_path / "crash.py", flag, EXAMPLE, *options)
        losses.append([line for line in said if line.startswith("epoch")])
    assert (tmp_path / "broken.flag").exists() and [line.split(":")[0] for line in losses[0]] == [
        f"epoch {number}" for number in (1, 2, 3)
    ]
    assert losses[1] == losses[0]
