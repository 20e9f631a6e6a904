"""Sensitivities against gradients computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Exact, FlopBudget, Override, Uniform
from tests.policies.test_budget import network

OPTIONS: dict[str, Any] = {"min_k": 4, "round_to": 4}
SPEC: dict[str, Any] = {"min_k": 4, "round_to": 4, "scores": "weight", "scope": "value"}


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(4, 3, 16, 16), torch.randint(5, (4,))) for _ in range(count)]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def gradient(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    parameters = list(model.parameters())
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss(model, batch), parameters)])


def test_errors_are_those_of_one_selection_alone() -> None:
    model, data = network(), batches(2)
    found = fx_approx.analysis.sensitivity(model, data, loss, data[0][0], ratio=0.5, **OPTIONS)
    for name, rule in (("3.conv1", "3.conv1"), ("4.shortcut.0", "4.[cs][oh]*1*")):
        names = ["4.conv1", "4.shortcut.0"] if name.startswith("4") else [name]
        policy = Override(dict.fromkeys(names, Uniform(0.5, **SPEC)), Exact())
        shares = []
        for batch in data:
            exact, alone = gradient(model, batch), gradient(fx_approx.transform(model, policy, batch[0]), batch)
            shares.append(float((alone - exact).square().sum() / exact.square().sum()))
        assert found.errors[name] == pytest.approx(sum(shares) / 2, rel=1e-3), rule
    assert found.errors["4.conv1"] == found.errors["4.shortcut.0"]
    assert set(found.errors) == {"3.conv1", "3.conv2", "4.conv1", "4.shortcut.0", "4.conv2", "5.conv1", "5.conv2"}


def test_noise_of_the_batches() -> None:
    model, data = network(), batches(3)
    found = fx_approx.analysis.sensitivity(model, data, loss, data[0][0], **OPTIONS)
    grads = torch.stack([gradient(model, batch) for batch in data])
    expected = grads.var(0).sum() / grads.square().sum(1).mean()
    assert found.sgd_noise == pytest.approx(float(expected), rel=1e-3)
    assert fx_approx.analysis.sensitivity(model, data[:1], loss, data[0][0], **OPTIONS).sgd_noise is None


def test_nothing_of_the_model_changes() -> None:
    model, data = network().eval(), batches(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    fx_approx.analysis.sensitivity(model, data, loss, data[0][0], sampler="systematic", draws=2, **OPTIONS)
    assert torch.equal(state, torch.get_rng_state()) and not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_draws_differ() -> None:
    model, data = network(), batches(1)
    one, two = (
        fx_approx.analysis.sensitivity(model, data, loss, data[0][0], sampler="systematic", draws=draws, **OPTIONS)
        for draws in (1, 2)
    )
    assert one.errors != two.errors
    again = fx_approx.analysis.sensitivity(model, data, loss, data[0][0], sampler="systematic", draws=2, **OPTIONS)
    assert two == again


def test_it_serves_a_budget() -> None:
    model, data = network(), batches(2)
    found = fx_approx.analysis.sensitivity(model, data, loss, data[0][0], **OPTIONS)
    plan = fx_approx.explain(model, FlopBudget(0.5, sensitivity=found, **OPTIONS), data[0][0]).plan
    assert plan.sampled


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batches": []}, ValueError, "batches: expected a sequence of at least one batch"),
        ({"loss": None}, TypeError, "loss: expected a function of a model and a batch"),
        ({"loss": lambda model, batch: model(batch[0])}, ValueError, "loss: expected it to return a scalar tensor"),
        ({"ratio": 1.0}, ValueError, r"ratio: expected a number in \(0, 1\)"),
        ({"draws": 0}, ValueError, "draws: expected at least 1"),
        ({"draws": 1.5}, TypeError, "draws: expected an integer"),
        ({"colour": "red"}, TypeError, "colour"),
        ({"scores": "online"}, ValueError, "scores: expected weight"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    data = batches(1)
    given = {"batches": data, "loss": loss, **OPTIONS, **change}
    with pytest.raises(error, match=message):
        fx_approx.analysis.sensitivity(network(), given.pop("batches"), given.pop("loss"), data[0][0], **given)
