"""torch.compile: one graph, the samples of the eager run, counted compilations, checkpoints, batches of any size."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

import fx_approx
from fx_approx.policies import Uniform
from tests.helpers.modes import BACKENDS


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 8))


def gradients(model: nn.Module, call: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of one backward pass through all forwards."""
    model.zero_grad()
    losses = [call(x).square().mean() for x in inputs]
    torch.stack(losses).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_switching_off_and_on_compiles_once_more_and_is_exact() -> None:
    model = mlp()
    approx = fx_approx.transform(model, Uniform(0.5, "systematic", scores="online"))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(approx, backend=counter, fullgraph=True)
    x = torch.randn(16, 32)
    compiled(x)
    fx_approx.set_sampling(compiled, enabled=False)
    assert torch.equal(compiled(x), model(x))
    fx_approx.set_sampling(compiled, enabled=True)
    assert not torch.equal(compiled(x), model(x))
    assert counter.frame_count == 2


@torch._dynamo.config.patch(recompile_limit=4)
def test_two_models_do_not_share_the_recompile_limit() -> None:
    x = torch.randn(4, 32)
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        approx = fx_approx.transform(nn.Sequential(nn.Linear(32, 8)), Uniform(0.5, scores="online"))
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
    def __init__(self, on: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
        self.on = on

    def forward(self, x: Tensor) -> Tensor:
        if not self.on:
            return self.body(x)
        out: Tensor = checkpoint(self.body, x, use_reentrant=True)
        return out


@pytest.mark.parametrize("backend", [None, pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_checkpoints_inside_the_model_recompute_the_same_sample(backend: str | None) -> None:
    def made(on: bool) -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Linear(16, 32), Checkpointed(on), Checkpointed(on), nn.Linear(32, 4)
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


# ---- scopes and samplers, batches of any size, the limit of recompilations


class Residual(nn.Module):
    """Blocks on a residual stream; with two, every scope shares and hoists something else."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)
        self.first = nn.ModuleList([nn.Conv2d(16, 24, 3, padding=1) for _ in range(blocks)])
        self.second = nn.ModuleList([nn.Conv2d(24, 16, 3, padding=1) for _ in range(blocks)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(24) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for first, norm, second in zip(self.first, self.norms, self.second, strict=True):
            x = x + second(torch.tanh(norm(first(torch.tanh(x)))))
        result: Tensor = self.out(torch.tanh(x).mean((2, 3)))
        return result


def compilations(approx: nn.Module) -> int:
    """How often the forward of a transformed model was compiled."""
    return len(torch._dynamo.eval_frame._debug_get_cache_entry_list(type(approx).forward.__code__))


def step(model: nn.Module, call: Any, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    call(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("scope", "sampler", "scores"),
    [
        ("value", "systematic", "weight"),
        pytest.param("group", "topk", "ema", marks=pytest.mark.slow),
        pytest.param("layer", "bernoulli", "uniform", marks=pytest.mark.slow),
        pytest.param("value", "crs", "ema", marks=pytest.mark.slow),
        pytest.param("group", "wta_unique", "weight", marks=pytest.mark.slow),
        pytest.param("layer", "wta", "online", marks=pytest.mark.slow),
    ],
)
def test_every_scope_is_one_graph_that_takes_the_samples_of_the_eager_run(
    scope: str, sampler: str, scores: str
) -> None:
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    policy = Uniform(0.5, sampler, scores=scores, scope=scope)
    eager, approx = (fx_approx.transform(copy.deepcopy(model), policy, x, seed=2) for _ in range(2))
    if scores == "ema":  # the first step is exact, but not that of compiled code
        for one in (eager, approx):
            step(one, one, x)
    compiled = torch.compile(approx, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        ours, theirs = step(approx, compiled, x), step(eager, eager, x)
        torch.testing.assert_close(ours, theirs)
        # Biases in front of a normalisation have gradients of rounding errors only.
        assert [(g == 0).tolist() for g in ours if g.dim() > 1] == [(g == 0).tolist() for g in theirs if g.dim() > 1]
    assert compilations(approx) == 1
    if scope != "value":
        return
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.BatchNormWarning)
        torch.testing.assert_close(compiled.eval()(x), approx(x))
    step(approx.train(), compiled, x)
    assert compilations(approx) == 2, "each mode once"


@pytest.mark.slow
@pytest.mark.parametrize(("dynamic", "most"), [(None, 2), (True, 1)])
def test_batches_of_any_size_need_no_graph_each(dynamic: bool | None, most: int) -> None:
    model = Residual(1 if dynamic else 2)
    policy = Uniform(0.5, "systematic")
    eager, approx = (fx_approx.transform(copy.deepcopy(model), policy, torch.randn(2, 3, 8, 8)) for _ in range(2))
    compiled = torch.compile(approx, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for size in (2, 4, 3, 6):
        x = torch.randn(size, 3, 8, 8)
        torch.testing.assert_close(step(approx, compiled, x), step(eager, eager, x))
    assert compilations(approx) == most


@torch._dynamo.config.patch(recompile_limit=4)
def test_before_the_recompile_limit_a_warning_says_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    x = torch.randn(4, 64)
    approx = fx_approx.transform(model, Uniform(0.9, "systematic", scope="layer"), x)
    compiled = torch.compile(approx, backend="eager", fullgraph=True)
    limit = torch._dynamo.config.recompile_limit
    compiled(x)
    for made in range(1, limit - 1):
        fx_approx.set_sampling(compiled, made / limit)
        compiled(x)
    assert compilations(approx) == limit - 1
    fx_approx.set_sampling(compiled, 1 / limit)  # compiled before: nothing to warn of
    with pytest.warns(fx_approx.errors.RecompilationWarning, match=rf"compiled {limit - 1} times .* ends at {limit}"):
        fx_approx.set_sampling(compiled, 0.99)
    compiled(x)
    with pytest.warns(fx_approx.errors.RecompilationWarning, match=f"compiled {limit} times"):
        fx_approx.set_sampling(compiled, enabled={"0": False})
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        compiled(x)


def test_an_uncompiled_model_may_have_any_number_of_ratios() -> None:
    approx = fx_approx.transform(nn.Sequential(nn.Linear(64, 64)), Uniform(0.9, "systematic", scope="layer"))
    for made in range(1, 30):  # three times torch's own limit of recompilations, which other packages raise
        fx_approx.set_sampling(approx, 1 / made)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("scope", ["layer", "value", "group"])
def test_modes_of_inductor(mode: str, scope: str) -> None:
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    policy = Uniform(0.5, "systematic", scope=scope)
    eager, approx = (fx_approx.transform(copy.deepcopy(model), policy, x) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(approx, mode=mode, fullgraph=True)
        for _ in range(3):
            torch.testing.assert_close(step(approx, compiled, x), step(eager, eager, x), rtol=1e-4, atol=1e-6)


# ---- what Inductor makes of a hoisted graph


@pytest.mark.slow
def test_gathers_and_norms_are_fused_into_their_neighbours() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    conv, norm = nn.Conv2d, nn.BatchNorm2d
    layers = conv(32, 64, 3), norm(64), nn.ReLU(), conv(64, 64, 3), norm(64), nn.ReLU(), conv(64, 32, 3)
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    x = torch.randn(4, 32, 16, 16).to(memory_format=torch.channels_last)
    policy = Uniform(0.5)
    compiled = torch.compile(fx_approx.transform(model, policy, x), fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, (forward, backward) = run_and_get_code(lambda: compiled(x).sum().backward())
    kernels = re.findall(r"^(cpp_fused_\w+) = async_compile", forward, re.MULTILINE)
    assert len(kernels) <= 6
    assert any("linalg_vector_norm" in name for name in kernels)
    assert all(
        not {"index_select", "batch_norm"} - set(re.findall("index_select|batch_norm", name)) for name in kernels[-2:]
    )
    assert len(re.findall(r"extern_kernels\.convolution\(", forward)) == 3
    assert len(re.findall(r"aten\.convolution_backward\.default\(", backward)) == 3
    for code in (forward, backward):
        assert not re.search(r"torch\.ops\.aten\.(index|index_select|gather|index_put)\b.*\(buf", code)
