"""What a gradient's slice is, what has none and why, and what a hook refuses."""

from __future__ import annotations

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
from tests.distributed.ranks import MODELS, made
from tests.helpers.models import CalledTwice, Tied


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
