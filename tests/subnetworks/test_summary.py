"""The summary of a subnetwork counts what a step does, by formula, and nothing is changed by it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Exact, Override, Uniform
from fx_approx.subnetworks import extract, narrow_optimizer, record_of, summary
from tests.helpers.demand_nets import NETS
from tests.helpers.hoisting import Layers

BATCH = 64
X = torch.randn(BATCH, 40, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def hidden() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    approx = fx_approx.transform(mlp(), Override({"0": Exact()}, Uniform(0.5)), X)
    return extract(approx, example_inputs=X), approx


def sizes(width: int) -> list[tuple[int, int]]:
    return [(40, width), (width, width), (width, 10)]


def test_operations_and_bytes_are_those_of_the_formulas() -> None:
    sub, approx = hidden()
    found = summary(sub, approx, X, optimizer="adamw")
    for costs, width in ((found.full, 64), (found.sub, 32)):
        parameters = sum(a * b + b for a, b in sizes(width))
        forward = [2 * BATCH * a * b for a, b in sizes(width)]
        assert costs.parameters == parameters
        assert costs.forward == sum(forward)
        assert costs.training == 3 * sum(forward) - forward[0], "no gradient flows into the batch"
        assert costs.weights == costs.gradients == 4 * parameters
        assert costs.optimizer == 2 * 4 * parameters + 4 * 6, "two moments, and the step of each tensor"
        assert costs.activations == 4 * BATCH * (40 + width + width), "the batch and what each ReLU gives"
        assert costs.step == 16 * parameters + 4 * 6 + costs.activations
    assert found.full.resting == 0 and found.sub.resting == found.full.weights
    assert found.sub.step_and_resting == found.sub.step + found.full.weights
    assert (found.model, found.form, found.optimizer) == ("Sequential", "own class", "AdamW")


@pytest.mark.parametrize(
    ("layer", "forward"),
    [
        (nn.Conv2d(8, 16, 3, padding=1, groups=4, bias=False), 2 * 4 * 36 * 16 * 2 * 9),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), 2 * 4 * 36 * 8 * 9),
        (nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2), 2 * 4 * 36 * 8 * 2 * 4),
    ],
    ids=["grouped", "depthwise", "transposed"],
)
def test_each_gradient_of_a_convolution_costs_what_its_forward_does(layer: nn.Module, forward: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), layer, nn.Flatten(), nn.Linear(layer.out_channels * 36, 8), nn.Linear(8, 2)
    )
    if isinstance(layer, nn.ConvTranspose2d):
        model[3] = nn.Linear(4 * 144, 8)
    x = torch.randn(4, 3, 6, 6)
    approx = fx_approx.transform(model, Override({"4": Uniform(0.5)}, Exact()), x)
    found = summary(extract(approx, example_inputs=x), approx, x).full
    first, head, last = 2 * 4 * 36 * 24, 2 * 4 * model[3].weight.numel(), 2 * 4 * 16
    assert found.forward == first + forward + head + last
    assert found.training == 2 * first + 3 * (forward + head + last)


def test_what_is_not_asked_for_is_left_out() -> None:
    sub, approx = hidden()
    found = summary(sub, fx_approx.restore(approx))
    assert found.sub.forward is found.sub.activations is found.sub.optimizer is found.sub.step is None
    assert "operations" not in str(found) and "optimiser" not in str(found) and "?" not in str(found)
    assert "sum, without an optimiser" in str(summary(sub, approx, X))


def test_frozen_parameters_have_no_gradients() -> None:
    sub, approx = hidden()
    for model in (sub, approx):
        model.get_submodule("0").requires_grad_(False)
    found = summary(sub, approx, X, optimizer="sgd").sub
    trained = found.parameters - 32 * 41
    assert (found.gradients, found.optimizer) == (4 * trained, 0)
    forward = [2 * BATCH * a * b for a, b in sizes(32)]
    assert found.training == 3 * sum(forward) - 2 * forward[0] - forward[1]


def halves(model: nn.Module) -> list[dict[str, Any]]:
    names = dict(model.named_parameters())
    return [
        {"params": [p for name, p in names.items() if "weight" in name], "momentum": 0.9},
        {"params": [p for name, p in names.items() if "bias" in name]},
    ]


@pytest.mark.parametrize("of", ["full", "sub"])
def test_an_optimiser_lends_its_groups_and_stays_as_it_is(of: str) -> None:
    sub, approx = hidden()
    optimizer = torch.optim.SGD(halves(approx if of == "full" else sub), 0.1)
    found = summary(sub, approx, optimizer=optimizer)
    assert found.full.optimizer == 4 * sum(a * b for a, b in sizes(64))
    assert found.sub.optimizer == 4 * sum(a * b for a, b in sizes(32))
    assert not optimizer.state and all(p.grad is None for p in (*approx.parameters(), *sub.parameters()))
    nn.functional.cross_entropy((approx if of == "full" else sub)(X), torch.arange(BATCH) % 10).backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    assert summary(sub, approx, optimizer=optimizer) == found
    if of == "full":
        narrow_optimizer(optimizer, sub, approx)
        assert summary(sub, approx, optimizer=optimizer) == found
    else:
        assert torch.equal(optimizer.state_dict()["state"][0]["momentum_buffer"], before["state"][0]["momentum_buffer"])


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.NAdam])
def test_the_state_of_any_optimiser_is_what_a_step_leaves(kind: Callable[..., torch.optim.Optimizer]) -> None:
    sub, approx = hidden()
    found = summary(sub, approx, optimizer=kind).sub.optimizer  # type: ignore[arg-type]
    optimizer = kind(sub.parameters())
    nn.functional.cross_entropy(sub(X), torch.arange(BATCH) % 10).backward()
    optimizer.step()
    states = optimizer.state.values()
    assert found == sum(v.nbytes for state in states for v in state.values() if isinstance(v, Tensor))


def test_one_that_asks_for_a_device_is_counted_too() -> None:
    sub, approx = hidden()
    fused = torch.optim.AdamW(sub.parameters(), fused=True)
    assert summary(sub, approx, optimizer=fused).sub == summary(sub, approx, optimizer="AdamW").sub


@pytest.mark.parametrize("name", ["post-activation", "fused-heads"])
def test_a_graph_is_measured_as_it_runs_and_nothing_changes(name: str) -> None:
    build, shape = NETS[name]
    x = torch.randn(*shape)
    approx = fx_approx.transform(build(), Layers("topk", 0.5, "weight", "value"), x)
    sub = extract(approx)
    before = [copy.deepcopy(model.state_dict()) for model in (sub, approx)]
    flags = [[module.training for module in model.eval().modules()] for model in (sub, approx)]
    random = torch.get_rng_state()
    found = summary(sub, approx, x, latency=True)
    assert torch.equal(torch.get_rng_state(), random)
    for model, state, flag in zip((sub, approx), before, flags, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert [module.training for module in model.modules()] == flag
        assert all(parameter.grad is None for parameter in model.parameters())
    assert found.form == f"graph: {record_of(sub).reason}"
    assert found.sub.parameters == sum(p.numel() for p in sub.parameters())
    assert found.sub.training < 0.6 * found.full.training and found.sub.activations < found.full.activations  # type: ignore[operator]
    indices = sum(buffer.nbytes for buffer in sub.buffers() if buffer.dtype is torch.int64 and buffer.dim())
    assert indices > 0 and found.sub.weights >= 4 * found.sub.parameters + indices
    for costs in (found.full, found.sub):
        assert costs.latency is not None and 0 < costs.latency.low <= costs.latency.median <= costs.latency.high


def test_it_prints_as_a_narrow_table_and_goes_to_json() -> None:
    sub, approx = hidden()
    record_of(sub).own_forward, record_of(sub).reason = False, f"a part of a wide value is read; {'why ' * 30}"
    found = summary(sub, approx, X, optimizer="adafactor", latency=True)
    told = json.loads(json.dumps(found.to_dict()))
    assert told["sub"]["latency"]["median"] > 0 and told["full"]["step"] == found.full.step
    text = str(found)
    assert max(map(len, text.splitlines())) <= 100
    head, *reasons = text.splitlines()[:4]
    assert head == "Sequential and its subnetwork (graph)"
    assert reasons[0] == "  a part of a wide value is read" and reasons[1].startswith("  why") and reasons[2].strip()
    rows = {line[:36].strip(): line[36:].split() for line in text.splitlines()[6:]}
    assert rows["parameters"] == ["7.43k", "2.7k", "0.36"]
    assert rows["bytes: full weights at rest"] == ["0", "29.7k"]


def test_bad_input_is_named() -> None:
    sub, approx = hidden()
    with pytest.raises(ValueError, match="example_inputs: expected a batch"):
        summary(sub, approx, latency=True)
    with pytest.raises(ValueError, match=r"optimizer: expected a name from .*adamw.*, got 'adamm'"):
        summary(sub, approx, optimizer="adamm")
    with pytest.raises(TypeError, match="optimizer: expected an optimiser, a class"):
        summary(sub, approx, optimizer=nn.Linear)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a parameter of shape \(3,\) is neither one of model nor of sub"):
        summary(sub, approx, optimizer=torch.optim.SGD([nn.Parameter(torch.ones(3))], 0.1))
    with pytest.raises(ValueError, match=r"optimizer: Muon makes no step on these parameters: .*2D"):
        summary(sub, approx, optimizer="muon")
    with pytest.raises(ValueError, match="cut out of another model"):
        summary(sub, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected what fx_approx"):
        summary(approx, approx)
