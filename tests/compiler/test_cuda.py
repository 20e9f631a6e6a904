"""On a CUDA device: exactness, demand, compiled graphs, CUDA graphs, no waiting for the device, DDP with NCCL."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fx_approx
from fx_approx.policies import GradientSampling, Uniform
from tests.distributed.ranks import MODELS

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),  # exact products are compared
]
SCOPES = ["layer", "value", "group"]
POLICIES = {
    **{scores: Uniform(0.5, min_k=4, scores=scores) for scores in ("weight", "ema", "uniform")},
    "online": Uniform(0.5, min_k=4, scores="online"),
    "backward": GradientSampling.backward(0.5),
    "backward, uniform": GradientSampling.backward(0.5, scores="uniform"),
    "bernoulli": Uniform(0.5, "bernoulli", min_k=4),
}


@pytest.fixture(autouse=True)
def _plain_numbers() -> Iterator[None]:
    torch._dynamo.reset()
    convolutions, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = convolutions


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(8, 3, 8, 8, device="cuda", dtype=dtype)


def made(name: str, policy: Any, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return fx_approx.transform(MODELS[name]().to("cuda", dtype), policy, images(dtype), **options)


def step(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    model.zero_grad()
    call(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", MODELS)
def test_ratio_one_and_eval_are_bitwise_exact(name: str) -> None:
    torch.manual_seed(0)
    exact = MODELS[name]().cuda()
    policy = Uniform(0.5, min_k=1)
    approx = fx_approx.transform(copy.deepcopy(exact), policy, images())
    fx_approx.set_sampling(approx, 1.0)
    x = images()
    with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
        for one, other in zip(step(approx, approx, x), step(exact, exact, x), strict=True):
            assert torch.equal(one, other)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", fx_approx.errors.BatchNormWarning)
            assert torch.equal(approx.eval()(x), exact.eval()(x))


@pytest.mark.parametrize("scores", ["weight", "ema"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", MODELS)
def test_demand_gives_the_numbers_of_the_same_selections_without_it(name: str, scope: str, scores: str) -> None:
    approx = made(name, Uniform(0.5, min_k=4, scores=scores, scope=scope))
    for _ in range(2):  # the first step of learnt scores is exact
        step(approx, approx, images())
    found = fx_approx.analysis.verify(approx, images())
    assert found.passed, str(found)


@pytest.mark.parametrize(
    ("sampler", "scores"),
    [("topk", "ema"), ("topk", "online"), ("systematic", "weight"), ("bernoulli", "uniform"), ("crs", "weight")],
)
@pytest.mark.parametrize("scope", SCOPES)
def test_compiled_is_one_graph_that_takes_the_samples_of_the_eager_run(scope: str, sampler: str, scores: str) -> None:
    if scores == "online" and scope != "layer":
        pytest.skip("selections of activations are not shared")
    policy = Uniform(0.5, sampler, min_k=4, scores=scores, scope=scope)
    double = torch.float64  # other rounding of learnt scores would choose another channel near a threshold
    eager, approx = made("cnn", policy, double, seed=3), made("cnn", policy, double, seed=3)
    if scores == "ema":  # the first step is exact, but not that of compiled code
        x = images(double)
        for one in (eager, approx):
            step(one, one, x)
    compiled = torch.compile(approx, fullgraph=True)
    for turn in range(4):
        torch.manual_seed(turn)
        x = images(double)
        for one, other in zip(step(eager, eager, x), step(approx, compiled, x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_step_never_waits_for_the_device(name: str, policy: str) -> None:
    """A value read back from the device would raise."""
    approx = made(name, POLICIES[policy])
    compiled = torch.compile(approx, fullgraph=True)
    x = images()
    for _ in range(3):
        step(approx, compiled, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(approx, compiled, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sampler", ["topk", "systematic"])
def test_cuda_graphs_take_new_samples_in_every_step(sampler: str) -> None:
    policy = Uniform(0.5, sampler, min_k=4)
    eager, approx = made("cnn", policy, seed=3), made("cnn", policy, seed=3)
    compiled = torch.compile(approx, fullgraph=True, mode="reduce-overhead")
    seen = []
    for turn in range(6):
        torch.manual_seed(turn)
        x = images()
        torch.compiler.cudagraph_mark_step_begin()
        own, expected = step(approx, compiled, x), step(eager, eager, x)
        for one, other in zip(expected, own, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
        seen.append(own[3].flatten(2).ne(0).any(2).any(0).tolist())
    assert (len(set(map(tuple, seen))) > 1) == (sampler == "systematic")


@pytest.mark.parametrize("policy", [Uniform(0.5, min_k=4, scores="ema"), GradientSampling.backward(0.5)])
@pytest.mark.parametrize("name", MODELS)
def test_autocast_and_channels_last_train(name: str, policy: Any) -> None:
    approx = made(name, policy).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(approx.parameters(), 0.01)
    compiled = torch.compile(approx, fullgraph=True)
    x = images().contiguous(memory_format=torch.channels_last)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = (compiled(x).float() - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_dynamo_frontend_gives_the_numbers_of_the_transform() -> None:
    policy = Uniform(0.5, min_k=4)
    torch.manual_seed(0)
    exact = MODELS["cnn"]().cuda()
    approx = fx_approx.transform(copy.deepcopy(exact), policy, images())
    compiled = torch.compile(exact, backend=fx_approx.backend(policy))
    for _ in range(3):
        x = images()
        for one, other in zip(step(approx, approx, x), step(exact, compiled, x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not torch.distributed.is_nccl_available(), reason="needs NCCL")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scores", ["weight", "ema"])
def test_the_slice_hook_under_nccl_gives_the_numbers_of_dense_reduction(
    scores: str, compiled: bool, tmp_path: Path
) -> None:
    """One rank: packing and unpacking on the device, its streams, and the agreement's collectives."""
    place = f"file://{tmp_path}/meet"
    torch.distributed.init_process_group(
        "nccl", init_method=place, rank=0, world_size=1, device_id=torch.device("cuda:0")
    )
    try:
        policy = Uniform(0.5, min_k=4, scores=scores)
        losses = []
        for sliced in (False, True):
            model = made("cnn", policy)
            parallel = DistributedDataParallel(torch.compile(model) if compiled else model)
            traffic = fx_approx.distributed.enable_sparse_allreduce(parallel) if sliced else None
            optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
            losses.append([])
            for turn in range(8):
                torch.manual_seed(turn)
                optimizer.zero_grad()
                loss = (parallel(images()).float() - 1).square().mean()
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
            if traffic is not None:
                assert traffic.sent is not None and traffic.sent < 0.5 * traffic.dense
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()
