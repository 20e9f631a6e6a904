"""The measured cost of choosing: what is counted, that nothing is changed, where it is shown."""

from __future__ import annotations

import json
import time
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fx_approx
from fx_approx.policies import GradientSampling, Uniform


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)
    )


X = torch.randn(4, 3, 8, 8)
POLICIES = {
    "ahead": Uniform(0.5, scores="ema"),
    "online": Uniform(0.5, "systematic", scores="online"),
    "gradients": GradientSampling.backward(0.5, scores="uniform"),
}


WAIT = 0.1
"""Seconds, far more than a selection of these layers takes on a busy machine."""


def wait(*_: Any) -> None:
    time.sleep(WAIT)


@pytest.mark.parametrize("name", POLICIES)
def test_what_makes_selections_is_timed_and_the_rest_is_not(name: str) -> None:
    approx = fx_approx.transform(net(), POLICIES[name], X)
    runtime = approx._fx_approx
    makers = [runtime.resample] if name == "ahead" else list(runtime.selectors.values())
    plain = fx_approx.analysis.selection_time(approx, X, repeats=3)
    assert plain.seconds > 0 and plain.step > 0
    handles = [maker.register_forward_hook(wait) for maker in makers]
    slow = fx_approx.analysis.selection_time(approx, X, repeats=3)
    for handle in handles:
        handle.remove()
    assert WAIT * len(makers) < slow.seconds and WAIT * len(makers) < slow.step
    approx[2].register_forward_hook(wait)  # a ReLU chooses nothing
    other = fx_approx.analysis.selection_time(approx, X, repeats=3)
    assert other.step > WAIT > other.seconds
    assert 0 < other.quartiles[0] <= other.quartiles[1]


@pytest.mark.parametrize("name", POLICIES)
def test_the_model_is_as_before(name: str) -> None:
    approx = fx_approx.transform(net(), POLICIES[name], X)
    approx(X).sum().backward()
    before = {key: value.clone() for key, value in approx.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in approx.parameters()]
    sampler, numbers = fx_approx.sampler_state_dict(approx), torch.get_rng_state()
    fx_approx.analysis.selection_time(approx, X, repeats=1)
    assert all(torch.equal(value, before[key]) for key, value in approx.state_dict().items())
    assert fx_approx.sampler_state_dict(approx) == sampler
    assert torch.equal(torch.get_rng_state(), numbers)
    for p, grad in zip(approx.parameters(), grads, strict=True):
        assert (p.grad is None) == (grad is None) and (grad is None or torch.equal(p.grad, grad))


def test_the_report_shows_it() -> None:
    approx = fx_approx.transform(net(), POLICIES["ahead"], X)
    assert "Selections take" not in str(fx_approx.report(approx))
    assert json.loads(fx_approx.report(approx).to_json())["selection_time"] is None
    found = fx_approx.analysis.selection_time(approx, X, repeats=2)
    report = fx_approx.report(approx)
    assert report.selection_time == found
    assert f"Selections take {100 * found.share:.1f} % of a training step" in str(report)
    assert json.loads(report.to_json())["selection_time"]["repeats"] == 2


def test_bad_calls() -> None:
    approx = fx_approx.transform(net(), POLICIES["ahead"], X)
    with pytest.raises(ValueError, match="repeats: expected an integer of at least 1, got 0"):
        fx_approx.analysis.selection_time(approx, X, repeats=0)
    with pytest.raises(ValueError, match="batch: expected"):
        fx_approx.analysis.selection_time(approx, None)
    with pytest.raises(ValueError, match="not a transformed model"):
        fx_approx.analysis.selection_time(net(), X)
    fx_approx.set_sampling(approx, enabled=False)
    with pytest.raises(ValueError, match="nothing is selected"):
        fx_approx.analysis.selection_time(approx, X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.BatchNormWarning)
        approx.eval()
    with pytest.raises(ValueError, match="expected training mode"):
        fx_approx.analysis.selection_time(approx, X)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_compiled_models_time_compiled_selections(name: str) -> None:
    approx = fx_approx.transform(net(), POLICIES[name], X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fx_approx.analysis.selection_time(torch.compile(approx), X, repeats=2)
    assert found.compiled and found.seconds > 0 and found.step > 0
