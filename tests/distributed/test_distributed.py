"""Ranks that reduce slices train exactly as ranks that reduce whole gradients, and send less."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fx_approx
from fx_approx import distributed
from fx_approx.distributed.hook import Part
from fx_approx.distributed.slices import find_slices
from fx_approx.policies import GradientSampling, Uniform
from tests.distributed.reduction_ranks import MODELS, SCENARIOS, made
from tests.helpers.models import CalledTwice, Tied
from tests.helpers.ranks import run

SCRIPT = Path(__file__).with_name("reduction_ranks.py")
SAME = [name for name in SCENARIOS if name.split()[0] in MODELS]
ODD = {
    "other seed": "rank 1: seed is '1', and '0' on the others",
    "other plan": "rank 1: layer 3, output is .*ratio=0.75.* and .*ratio=0.5.* on the others",
    "other weights": "rank 1: the selection of layer [13] is another one than on the others",
    "older step": "rank 1: step is 1, and 3 on the others; resume all ranks from the same checkpoint",
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left; the last scenario ends with the death of one."""
    folder = tmp_path_factory.mktemp("two")
    run(SCRIPT, folder, 2, [*(name for name in SCENARIOS if name != "killed"), "resumed", "killed"])
    return folder


def left(folder: Path, name: str, size: int = 2) -> Iterator[tuple[Any, list[str]]]:
    """Results and warnings of each rank."""
    for rank in range(size):
        yield torch.load(folder / f"{name}.{rank}.pt")


@pytest.mark.parametrize("name", SAME)
def test_two_ranks_train_bit_for_bit_as_with_dense_reduction(two: Path, name: str) -> None:
    """The sum of two numbers does not depend on their order."""
    results = [result for result, _ in left(two, name)]
    for result in results:
        dense, sliced = result["losses"]
        assert dense == sliced and len(set(dense)) == len(dense)
        for one, other in zip(*result["parameters"], strict=True):
            assert torch.equal(one, other)
    for one, other in zip(results[0]["parameters"][1], results[1]["parameters"][1], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", SAME)
def test_less_is_sent(two: Path, name: str) -> None:
    for result, warned in left(two, name):
        dense, predicted, sent = result["bytes"]
        assert predicted < 0.5 * dense
        if "micro" in name:
            assert predicted < sent < dense
        elif "bernoulli" in name:
            assert sent == pytest.approx(predicted, rel=0.3)
        else:
            assert sent == predicted
        assert not warned
        less = 100 * (1 - sent / dense)
        assert f"({less:.1f} % less)" in result["text"]


def test_bytes_of_one_model_by_hand(two: Path) -> None:
    """Two hidden layers of 48: the reader of both halves and its producer's outputs; the last reads half."""
    result, _ = next(left(two, "mlp value"))
    dense = 4 * (192 * 48 + 48 + 48 * 48 + 48 + 48 * 5 + 5)
    sent = 4 * (96 * 24 + 48 + 24 * 24 + 48 + 24 * 5 + 5)
    assert result["bytes"] == (dense, sent, sent)


def test_four_ranks(tmp_path: Path) -> None:
    names = ["mlp value", "cnn group", "vit value"]
    run(SCRIPT, tmp_path, 4, names)
    for name in names:
        results = [result for result, _ in left(tmp_path, name, 4)]
        for result in results:
            torch.testing.assert_close(*result["losses"], rtol=0, atol=1e-5)
            for one, other in zip(*result["parameters"], strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
            for one, other in zip(result["parameters"][1], results[0]["parameters"][1], strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("name", ODD)
def test_what_differs_between_ranks_is_named_on_all_of_them(two: Path, name: str) -> None:
    messages = [result for result, _ in left(two, name)]
    assert messages[0] == messages[1]
    assert re.search(f"^DistributedMismatchError: {ODD[name]}", messages[0]), messages[0]


def test_micro_batches_of_stale_scores_need_a_held_selection(two: Path) -> None:
    (first, _), (second, _) = left(two, "micro batches")
    assert "no_sync: ema scores" in first["message"] and "fx_approx.reuse_selection(model)" in first["message"]
    for one, other in zip(first["parameters"], second["parameters"], strict=True):
        assert torch.equal(one, other)


def test_scaled_gradients_that_overflow_on_one_rank_are_skipped_on_both(two: Path) -> None:
    (first, _), (second, _) = left(two, "scaled")
    assert first["scales"] == second["scales"] == [1024.0, 512.0, 512.0, 512.0]
    for one, other in zip(first["parameters"], second["parameters"], strict=True):
        assert torch.equal(one, other)


def test_what_has_no_slice_can_go_by_another_hook(two: Path) -> None:
    for result, _ in left(two, "apart"):
        assert result["losses"][0] == result["losses"][1]
        for one, other in zip(*result["parameters"], strict=True):
            assert torch.equal(one, other)
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
    for one, other in zip(first["parameters"], second["parameters"], strict=True):
        assert torch.equal(one, other)


def test_resuming_gives_the_same_losses(two: Path) -> None:
    for result, _ in left(two, "resumed"):
        whole, resumed = result["losses"]
        assert whole == resumed and len(whole) == 3


def test_a_rank_that_dies_is_an_error_on_the_other(two: Path) -> None:
    message, _ = torch.load(two / "killed.0.pt")
    assert "Error" in message and "no error" not in message


@pytest.mark.slow
def test_the_example_resumes_under_torchrun_with_another_number_of_ranks(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "examples" / "ddp_train.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def train(ranks: int, epochs: int) -> list[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        options = ["--limit", "256", "--checkpoint", str(tmp_path / "checkpoint.pt"), "--epochs", str(epochs)]
        done = subprocess.run(
            [*command, str(script), *options],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout.splitlines()

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
    script = Path(__file__).parents[2] / "examples" / "ddp_train.py"
    losses = []
    for name, restarts in (("whole", 0), ("broken", 1)):
        flag = tmp_path / f"{name}.flag"
        if not restarts:
            flag.touch()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--max-restarts", str(restarts), str(tmp_path / "crash.py"), str(flag), str(script)]
        command += ["--limit", "256", "--epochs", "3", "--checkpoint", str(tmp_path / f"{name}.pt")]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        losses.append([line for line in done.stdout.splitlines() if line.startswith("epoch")])
    assert (tmp_path / "broken.flag").exists() and [line.split(":")[0] for line in losses[0]] == [
        f"epoch {number}" for number in (1, 2, 3)
    ]
    assert losses[1] == losses[0]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def plan_of(model: nn.Module, x: Any, policy: Any) -> tuple[dict[str, Any], dict[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        approx = fx_approx.transform(model, policy, x)
    sliced, whole = find_slices(approx)
    return {own.name: own for own in sliced.values()}, whole


WEIGHT = Uniform(0.5, min_k=1)


def test_a_weight_that_is_used_twice_is_reduced_whole() -> None:
    for model, x in ((CalledTwice(), torch.randn(4, 16)), (Tied(), torch.randint(10, (4, 6)))):
        sliced, whole = plan_of(model, x, WEIGHT)
        assert any("is used 2 times" in reason for reason in whole.values()), (type(model), sliced, whole)


def test_what_is_not_known_on_all_ranks_is_reduced_whole() -> None:
    x = torch.randn(8, 3, 8, 8)
    for policy in (Uniform(0.5, min_k=1, scores="online"), GradientSampling.backward(0.5)):
        sliced, whole = plan_of(MODELS["cnn"](), x, policy)
        assert not sliced and len(whole) >= 3
        assert all("not made ahead" in reason for reason in whole.values())


@pytest.mark.usefixtures("alone")
def test_what_has_no_slice_is_said_once() -> None:
    model = fx_approx.transform(MODELS["mlp"](), Uniform(0.5, min_k=1, scores="online"), torch.randn(8, 3, 8, 8))
    wrapped = DistributedDataParallel(model)
    with pytest.warns(
        fx_approx.errors.NoEffectWarning, match="no gradient has a slice: all are reduced whole, such as 1: its sel"
    ):
        traffic = distributed.enable_sparse_allreduce(wrapped)
    wrapped(torch.randn(8, 3, 8, 8)).sum().backward()
    assert traffic.sent == traffic.dense == traffic.predicted


@pytest.mark.usefixtures("alone")
def test_a_gradient_beside_the_selection_is_noticed() -> None:
    model = made("mlp")
    wrapped = DistributedDataParallel(model)
    distributed.enable_sparse_allreduce(wrapped)
    loss = wrapped(torch.randn(8, 3, 8, 8)).sum() + model[3].weight.square().sum()  # type: ignore[index, union-attr, operator]
    with pytest.raises(
        fx_approx.errors.DistributedMismatchError, match=r"the gradient of 3\.weight is not zero outside"
    ):
        loss.backward()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            "plain",
            {},
            TypeError,
            "ddp_model: expected a DistributedDataParallel around a transformed model, got ApproxSequential",
        ),
        ("exact", {}, ValueError, "is not a transformed model"),
        ("ddp", {"inner": "fp16"}, TypeError, "inner: expected a communication hook, got 'fp16'"),
        (
            "ddp",
            {"dense": print},
            TypeError,
            "dense: expected a pair of a state and a communication hook, got <built-in",
        ),
        ("ddp", {"check_every": 0}, ValueError, "check_every: expected an integer of at least 1, got 0"),
        ("ddp", {"check_every": True}, ValueError, "check_every: expected an integer of at least 1, got True"),
    ],
)
def test_bad_input(arguments: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = MODELS["mlp"]() if arguments == "exact" else made("mlp")
    given = model if arguments == "plain" else DistributedDataParallel(model)
    with pytest.raises(error, match=message):
        distributed.enable_sparse_allreduce(given, **options)
    if arguments == "ddp":
        distributed.enable_sparse_allreduce(given)  # nothing had been changed


@pytest.mark.parametrize("axes", ["rows", "columns", "both"])
@pytest.mark.parametrize(
    ("shape", "last"), [((6, 8), False), ((6, 8, 3, 3), False), ((6, 8, 3, 3), True), ((6, 8, 1, 1), False)]
)
def test_a_slice_comes_back_where_it_was(shape: tuple[int, ...], last: bool, axes: str) -> None:
    rows = torch.tensor([4, 0, 5]) if axes != "columns" else None
    columns = torch.tensor([7, 1, 2, 4]) if axes != "rows" else None
    gradient = torch.randn(shape).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    expected = torch.zeros_like(gradient)
    for row in range(6) if rows is None else rows.tolist():
        for column in range(8) if columns is None else columns.tolist():
            expected[row, column] = gradient[row, column]
    part = Part(gradient, rows, columns)
    flat = torch.empty(part.size)
    part.take(flat)
    assert sorted(flat.tolist()) == sorted(expected[expected != 0].tolist())
    target = torch.zeros_like(gradient)
    Part(target, rows, columns).put(flat)
    assert torch.equal(target, expected)


def test_what_would_be_sent_is_told_without_a_process_group() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    model = fx_approx.transform(net, Uniform(0.5), torch.randn(2, 8))
    dense = 4 * (8 * 16 + 16 + 16 * 16 + 16 + 16 * 4 + 4)
    # Half of the columns of each, and the rows that the next one reads.
    saved = 4 * (8 * 16 - 4 * 8 + 16 * 16 - 8 * 8 + 16 * 4 - 8 * 4)
    traffic = fx_approx.distributed.estimate_traffic(model)
    assert (traffic.dense, traffic.predicted, traffic.sent) == (dense, dense - saved, None)
    assert "sent" in str(traffic) and "0.weight" in str(traffic)
    fx_approx.set_sampling(model, 1.0)
    assert traffic.predicted == dense
    model[2].weight.requires_grad_(False)
    fx_approx.set_sampling(model, 0.5)
    frozen = fx_approx.distributed.estimate_traffic(model)
    assert frozen.dense == dense - 4 * 16 * 16
    assert frozen.predicted == frozen.dense - saved + 4 * (16 * 16 - 8 * 8)
    with pytest.raises(TypeError, match=r"model: expected what .* returned, got 3"):
        fx_approx.distributed.estimate_traffic(3)
