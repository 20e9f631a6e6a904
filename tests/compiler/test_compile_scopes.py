"""torch.compile over scopes and samplers, batches of any size, modes of Inductor, and the limit of recompilations."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Uniform


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Residual(nn.Module):
    """Two blocks on a residual stream, so that every scope shares and hoists something else."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)
        self.first = nn.ModuleList([nn.Conv2d(16, 24, 3, padding=1) for _ in range(2)])
        self.second = nn.ModuleList([nn.Conv2d(24, 16, 3, padding=1) for _ in range(2)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(24) for _ in range(2)])

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


@pytest.mark.parametrize("scope", ["layer", "value", "group"])
@pytest.mark.parametrize(
    ("sampler", "scores"),
    [("topk", "ema"), ("systematic", "weight"), ("bernoulli", "uniform"), ("crs", "ema"), ("wta_unique", "weight")],
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


@pytest.mark.parametrize(("dynamic", "most"), [(None, 2), (True, 1)])
def test_batches_of_any_size_need_no_graph_each(dynamic: bool | None, most: int) -> None:
    model = Residual()
    policy = Uniform(0.5, "systematic")
    eager, approx = (fx_approx.transform(copy.deepcopy(model), policy, torch.randn(2, 3, 8, 8)) for _ in range(2))
    compiled = torch.compile(approx, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for size in (2, 4, 3, 6):
        x = torch.randn(size, 3, 8, 8)
        torch.testing.assert_close(step(approx, compiled, x), step(eager, eager, x))
    assert compilations(approx) == most


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
    for made in range(1, 3 * torch._dynamo.config.recompile_limit):
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
