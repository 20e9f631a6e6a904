"""Scopes under a profiler: named after the layers, around the same numbers, and only while one records."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import GradientSampling, Uniform
from fx_approx.runtime import profiled
from tests.helpers.models import Attention, mlp


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return self.last(y @ y.transpose(0, 1) @ y)


def recorded(call: Any) -> tuple[Any, list[str]]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        result = call()
    return result, [event.name for event in profiler.events()]


@pytest.mark.parametrize(
    "policy", [Uniform(0.5), Uniform(0.5, scores="online"), GradientSampling.backward(0.5)], ids=repr
)
def test_scopes_have_the_names_of_the_rows(policy: Any) -> None:
    x = torch.randn(16, 8)
    approx = fx_approx.transform(Functional(), policy, x)
    with fx_approx.reuse_selection(approx):
        expected = approx(x)
        result, names = recorded(lambda: approx(x))
    assert torch.equal(result, expected)
    assert {row.name for row in fx_approx.report(approx).rows} <= set(names)
    own = {"fx_approx: selections"} if policy == Uniform(0.5) else {"first: selection", "last: selection"}
    assert own <= set(names)


def test_slices_of_weights_have_scopes_too() -> None:
    x = torch.randn(6, 12)
    approx = fx_approx.transform(mlp(), Uniform(0.5), x)
    _, names = recorded(lambda: approx(x))
    assert {"0: slice", "2: slice", "0", "2"} <= set(names)


def test_gradients_are_the_same() -> None:
    x = torch.randn(3, 5, 8)
    approx = fx_approx.transform(Attention(), Uniform(0.5), x)
    found = []
    with fx_approx.reuse_selection(approx):
        for run in (lambda step: step(), recorded):
            approx.zero_grad()
            run(lambda: approx(x).square().sum().backward())
            found.append([p.grad.clone() for p in approx.parameters() if p.grad is not None])
    assert found[0] and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_nothing_is_done_where_no_profiler_records(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(16, 8)
    approx = fx_approx.transform(Functional(), Uniform(0.5), x)
    monkeypatch.setattr(profiled, "record_function", lambda name: pytest.fail("no profiler records"))
    approx(x)
    compiled = torch.compile(approx, backend="eager", fullgraph=True)
    expected = compiled(x)
    result, _ = recorded(lambda: compiled(x))
    assert torch.equal(result, expected), "compiled code has no scopes, and is not compiled anew"
