"""torch.compile: one graph, the samples of the eager run, counted compilations, checkpoints."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fx_approx
from fx_approx.policies import Paper, Uniform
from tests.helpers.modes import BACKENDS


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 8))


def gradients(model: nn.Module, call: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of one backward pass through all forwards."""
    model.zero_grad()
    losses = [call(x).square().mean() for x in inputs]
    torch.stack(losses).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def chosen(model: nn.Module) -> dict[str, list[bool]]:
    """The input channels that each weight's gradient has reached: the indices of its selection."""
    return {
        name: p.grad.transpose(0, 1).flatten(1).ne(0).any(1).tolist()
        for name, p in model.named_parameters()
        if p.dim() > 1 and p.grad is not None
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sampler", ["topk", "systematic"])
def test_resnet18_is_one_graph_with_the_indices_of_the_eager_run(
    sampler: str, backend: str, torchvision: ModuleType
) -> None:
    # Online scores follow the activations. A compiled graph sums norms in another order and so rounds otherwise, which
    # in float32 flips a pair near a threshold now and then, and then all that follows; float64 leaves no such pair.
    dtype = torch.float64
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).to(dtype)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 32, 32, dtype=dtype)
    policy = Paper(0.5, sampler=sampler)
    eager, approx = (fx_approx.transform(m, policy, x, seed=3) for m in (twin, model))
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(approx, backend=counter, fullgraph=True)
    seen = []
    for _ in range(5):
        for run, owner in ((eager, eager), (compiled, approx)):
            owner.zero_grad()
            run(x).square().mean().backward()
        assert chosen(approx) == chosen(eager)
        seen.append(chosen(eager)["layer2.1.conv2.weight"])
    assert sum(seen[0]) == 64
    assert (seen[0] != seen[1]) == (sampler == "systematic")
    assert counter.frame_count == 1

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", fx_approx.errors.BatchNormWarning)
        compiled.eval()
        compiled(x)
    assert counter.frame_count == 2
    compiled.train()
    compiled(x).sum().backward()
    compiled.eval()
    with torch.no_grad():
        compiled(x)
    assert counter.frame_count == 2


@pytest.mark.parametrize("sampler", ["crs", "bernoulli", "systematic", "topk", "wta", "wta_unique"])
@pytest.mark.parametrize("scores", ["online", "weight", "uniform"])
def test_every_sampler_compiles_without_graph_breaks(sampler: str, scores: str) -> None:
    policy = Uniform(0.5, sampler, scores=scores, scope="layer")
    eager, approx = fx_approx.transform(mlp(), policy), fx_approx.transform(mlp(), policy)
    compiled = torch.compile(approx, backend="aot_eager", fullgraph=True)
    x = torch.randn(16, 32)
    for _ in range(3):
        ours, theirs = gradients(approx, compiled, [x]), gradients(eager, eager, [x])
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)


def test_a_schedule_compiles_once_for_each_ratio() -> None:
    approx = fx_approx.transform(mlp(), Uniform(0.5, "systematic", scores="online"))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(approx, backend=counter, fullgraph=True)
    x = torch.randn(16, 32)
    for ratio in (0.25, 0.5, 0.75, 0.5, 0.25):
        fx_approx.set_sampling(compiled, ratio)
        for _ in range(2):
            compiled(x).sum().backward()
    assert counter.frame_count == 3


def test_switching_off_and_on_compiles_once_more_and_is_exact() -> None:
    model = mlp()
    approx = fx_approx.transform(model, Uniform(0.5, "systematic", scores="online"))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(approx, backend=counter, fullgraph=True)
    x = torch.randn(16, 32)
    compiled(x)
    fx_approx.set_sampling(compiled, enabled=False)
    assert torch.equal(compiled(x), model(x))
    fx_approx.set_sampling(compiled, enabled=True)
    assert not torch.equal(compiled(x), model(x))
    assert counter.frame_count == 2


def test_two_models_do_not_share_the_recompile_limit() -> None:
    x = torch.randn(4, 32)
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        approx = fx_approx.transform(mlp(), Uniform(0.5, scores="online"))
        torch.compile(approx, backend="eager", fullgraph=True)(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_around_the_compiled_model_recomputes_the_same_sample(backend: str) -> None:
    policy = Uniform(0.5, "systematic", scores="online")
    plain, approx = fx_approx.transform(mlp(), policy), fx_approx.transform(mlp(), policy)
    compiled = torch.compile(approx, backend=backend, fullgraph=True)
    inputs = [torch.randn(16, 32) for _ in range(2)]

    def call(x: Tensor) -> Any:
        return checkpoint(compiled, x, use_reentrant=False)

    for _ in range(2):
        for one, other in zip(gradients(approx, call, inputs), gradients(plain, plain, inputs), strict=True):
            torch.testing.assert_close(one, other)


def test_compiling_around_a_checkpoint_of_the_model_is_a_clear_error() -> None:
    approx = fx_approx.transform(mlp(), Uniform(0.5, "systematic", scores="online"))
    call = torch.compile(lambda x: checkpoint(approx, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"checkpoint\(torch\.compile\(model\), x\)"):
        call(torch.randn(16, 32))


class Checkpointed(nn.Module):
    def __init__(self, on: bool, reentrant: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
        self.on, self.reentrant = on, reentrant

    def forward(self, x: Tensor) -> Tensor:
        if not self.on:
            return self.body(x)
        out: Tensor = checkpoint(self.body, x, use_reentrant=self.reentrant)
        return out


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_inside_the_model_recompute_the_same_sample(reentrant: bool, backend: str | None) -> None:
    def made(on: bool) -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Linear(16, 32), Checkpointed(on, reentrant), Checkpointed(on, reentrant), nn.Linear(32, 4)
        return nn.Sequential(*layers)

    policy = Uniform(0.5, "systematic", scores="online")
    plain = fx_approx.transform(made(False), policy)
    with pytest.warns(fx_approx.errors.CaptureWarning, match=r"torch\.utils\.checkpoint"):
        approx = fx_approx.transform(made(True), policy)
    call = approx if backend is None else torch.compile(approx, backend=backend, fullgraph=True)
    inputs = [torch.randn(8, 16) for _ in range(2)]
    for _ in range(2):
        for one, other in zip(gradients(approx, call, inputs), gradients(plain, plain, inputs), strict=True):
            torch.testing.assert_close(one, other)
