"""Selections made ahead through a model's life: saved and resumed, copied, switched, frozen, compiled."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fx_approx
from fx_approx.runtime.approx_module import find
from tests.helpers.ahead import batch, indices, readers, same, selections, shared, shuffle
from tests.helpers.demand_nets import NETS
from tests.helpers.hoisting import Layers, assert_same_numbers, narrow_producers, pair, perturbed, training_step
from tests.helpers.quick import thinned


def stale(**options: Any) -> nn.Module:
    return readers(Layers("systematic", scores="ema", scope="group"), **options)


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- saved and resumed


@pytest.mark.parametrize(("scores", "steps"), thinned([("ema", 0), ("ema", 1), ("ema", 2), ("ema", 3), ("weight", 3)]))
def test_resumed_runs_continue_exactly(scores: str, steps: int) -> None:
    """With every=2, in the middle of a period and between two; the state goes through JSON."""
    model = readers(Layers("systematic", scores=scores, scope="value"), selection_interval=2)
    for step in range(steps):
        model(batch(step))
        shuffle_same(model, step)
    state = json.loads(json.dumps(fx_approx.sampler_state_dict(model)))
    other = readers(Layers("systematic", scores=scores, scope="value"), seed=5)
    other.load_state_dict(model.state_dict())
    fx_approx.load_sampler_state_dict(other, state)
    for step in range(steps, steps + 5):
        one, two = selections(model, batch(step)), selections(other, batch(step))
        assert same(one, two), step
        shuffle_same(model, step)
        other.load_state_dict(model.state_dict())
    for mine, theirs in zip(shared(model), shared(other), strict=True):
        assert mine.running is theirs.running or torch.equal(mine.running, theirs.running)


def shuffle_same(model: nn.Module, step: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(step)
        shuffle(model)


def test_state_of_another_model_is_refused() -> None:
    model = stale()
    model(batch())
    before = fx_approx.sampler_state_dict(model)
    values = fx_approx.sampler_state_dict(readers(Layers(scores="ema", scope="layer")))
    with pytest.raises(ValueError, match="running norms of shapes"):
        fx_approx.load_sampler_state_dict(model, values)
    assert fx_approx.sampler_state_dict(model) == before


def test_state_without_what_was_learnt_starts_anew() -> None:
    model = stale()
    for _ in range(3):
        model(batch())
    values = {k: v for k, v in fx_approx.sampler_state_dict(model).items() if k != "resample"}
    fx_approx.load_sampler_state_dict(model, values)
    assert selections(model, batch()) == [None, None]  # exact again
    assert all(one is not None for one in selections(model, batch()))


# ---- copied and moved


def test_copies_and_pickles_continue_alike() -> None:
    model = stale()
    for step in range(3):
        model(batch(step))
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    expected = [selections(model, batch(step)) for step in range(3, 6)]
    for twin in twins:
        assert all(same(selections(twin, batch(s)), expected[s - 3]) for s in range(3, 6))


def test_copies_learn_for_themselves() -> None:
    model = stale()
    model(batch())
    twin, before = copy.deepcopy(model), [one.running.clone() for one in shared(model)]
    twin(batch(1) * 5)
    assert all(torch.equal(one.running, b) for one, b in zip(shared(model), before, strict=True))
    assert not torch.equal(shared(twin)[0].running, before[0])
    assert {id(s) for one in shared(twin) for s in one.selectors}.isdisjoint(
        id(s) for one in shared(model) for s in one.selectors
    )
    fx_approx.set_sampling(twin, 0.25)
    assert [one.k for one in shared(model)] == [3, 8]
    assert [one.k for one in shared(twin)] == [2, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_dtype_keeps_what_was_learnt(dtype: torch.dtype) -> None:
    model = stale()
    model(batch())
    before = [one.running.clone() for one in shared(model)]
    model.to(dtype)
    for one, running in zip(shared(model), before, strict=True):
        assert one.running.dtype == torch.float32
        assert torch.equal(one.running, running)
        assert one.age.dtype == torch.int64
    output = model(batch().to(dtype))
    output.sum().backward()
    assert output.dtype == dtype
    assert all(p.grad.dtype == dtype for p in model.parameters() if p.grad is not None)


def test_the_state_dict_is_the_exact_models() -> None:
    build, shape = NETS["post-activation"]
    model = build()
    approx = fx_approx.transform(model, Layers(scores="ema", scope="group"), torch.randn(shape))
    approx(torch.randn(shape))
    assert list(approx.state_dict()) == list(model.state_dict())
    assert [n for n, _ in approx.named_buffers()] == [n for n, _ in model.named_buffers()]


# ---- switched


def test_a_reader_in_evaluation_makes_all_that_share_with_it_exact() -> None:
    for scope in ("value", "group"):
        torch.manual_seed(0)
        x = torch.randn(NETS["post-activation"][1]).double()
        policy = Layers("systematic", 0.5, "weight", scope)
        hoisted, whole = pair(perturbed(NETS["post-activation"][0]()).double(), policy, x)
        for model in (hoisted, whole):
            model.get_submodule("6.conv1").eval()
        classes = find(hoisted)._fx_approx.record.analysis.sharing.classes
        readings = [{r.name for r in one.readings} for one in classes]
        for own, chosen in zip(readings, selections(hoisted, x), strict=True):
            assert (chosen is None) == ("6.conv1" in own)
        selections(whole, x)
        assert_same_numbers(training_step(hoisted, x), training_step(whole, x), 1e-10)


def test_switching_off_one_layer() -> None:
    model = readers(Layers(scope="value"))
    fx_approx.set_sampling(model, enabled={"right": False})
    assert indices(model, batch())[1] is None
    assert indices(model, batch())[0] is not None
    fx_approx.set_sampling(model, enabled={"right": True})
    assert len(indices(model, batch())[1]) == 8
    fx_approx.set_sampling(model, enabled=False)
    torch.manual_seed(0)
    exact = fx_approx.restore(model)
    expected = exact(batch())
    assert torch.equal(model(batch()), expected)


def test_all_ahead_layers_off_while_another_draws() -> None:
    """The step is random because of another layer; nothing is there to be kept."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8)).double()
    plan = fx_approx.explain(model, Layers("systematic", scores="ema"), batch()).plan
    plan = plan.edit("2", fx_approx.SamplerConfig("systematic", 0.5))
    approx = fx_approx.transform(model, plan, batch())
    approx(batch())
    approx[0].eval()
    approx(batch())
    assert shared(approx)[0].age.max() == 0


def test_the_largest_ratio_of_those_that_share_decides() -> None:
    model = readers(Layers(scope="value"))
    fx_approx.set_sampling(model, {"right": 0.25})
    assert len(indices(model, batch())[1]) == 8
    fx_approx.set_sampling(model, {"left": 0.125})
    assert len(indices(model, batch())[1]) == 4
    fx_approx.set_sampling(model, {"left": 1.0})
    assert indices(model, batch())[1] is None
    assert indices(model, batch())[0] is not None


@pytest.mark.parametrize("name", ["grouped", "fused-heads"])
def test_a_new_ratio_is_hoisted_too(name: str) -> None:
    torch.manual_seed(0)
    build, shape = NETS[name]
    x = torch.randn(shape).double()
    hoisted, whole = pair(perturbed(build()).double(), Layers("systematic", 0.5, "ema", "group"), x)
    for ratio in (0.25, 0.75, 1.0, 0.5):
        for model in (hoisted, whole):
            fx_approx.set_sampling(model, ratio)
        assert_same_numbers(training_step(hoisted, x), training_step(whole, x), 1e-10)


# ---- normalisation


def frozen(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def with_momentum(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(("pre-activation", with_momentum), ("squeeze-excite", frozen)),
        pytest.param("post-activation", frozen, marks=pytest.mark.slow),
        pytest.param("dense", with_momentum, marks=pytest.mark.slow),
    ],
)
def test_batch_norm_frozen_or_averaging(name: str, change: Any) -> None:
    torch.manual_seed(0)
    build, shape = NETS[name]
    x = torch.randn(shape).double()
    model = perturbed(build()).double()
    model(x * 2 + 1)  # statistics that are not 0 and 1
    hoisted, whole = pair(model, Layers("systematic", 0.5, "weight", "group"), x)
    for _ in range(2):
        for one in (hoisted, whole):
            one.train()
            change(one)
        assert_same_numbers(training_step(hoisted, x), training_step(whole, x), 1e-10)


def test_statistics_of_channels_that_are_not_computed_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).double()
    x = torch.randn(2, 3, 4, 4).double()
    approx = fx_approx.transform(model, Layers(scope="value"), x)
    chosen = indices(approx, x)[1]
    fresh = [channel for channel in range(8) if approx[1].running_mean[channel] == 0]
    assert sorted(set(range(8)) - set(fresh)) == chosen
    assert int(approx[1].num_batches_tracked) == 1


def test_sync_batch_norm_without_a_process_group() -> None:
    torch.manual_seed(0)
    build, shape = NETS["post-activation"]
    x = torch.randn(shape).double()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(perturbed(build()).double())
    for scope in ("value", "group"):
        hoisted, whole = pair(model, Layers("systematic", 0.5, "weight", scope), x)
        assert narrow_producers(hoisted)
        for _ in range(2):
            assert_same_numbers(training_step(hoisted, x), training_step(whole, x), 1e-10)
        hoisted.load_state_dict(whole.state_dict())  # where channels were left out, statistics differ
        for one in (hoisted, whole):
            frozen(one)
        assert_same_numbers(training_step(hoisted, x), training_step(whole, x), 1e-10)


# ---- compiled


SCORES = ("weight", "ema")
COMPILED = [*itertools.product(("vgg", "post-activation", "grouped", "fused-heads"), ("value", "group"), SCORES)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scope", "scores"), COMPILED)
def test_compiled_steps_take_the_same_selections(name: str, scope: str, scores: str) -> None:
    torch.manual_seed(0)
    build, shape = NETS[name]
    x = torch.randn(shape).double()
    model = perturbed(build()).double()
    eager, approx = (
        fx_approx.transform(copy.deepcopy(model), Layers("systematic", 0.5, scores, scope), x) for _ in range(2)
    )
    compiled = torch.compile(approx, backend="aot_eager", fullgraph=True)
    if scores == "ema":
        eager(x)
        approx(x)
    for _ in range(3):
        expected = training_step(eager, x)
        found = training_step(compiled, x)
        torch.testing.assert_close(found.outputs[0], expected.outputs[0], rtol=1e-9, atol=1e-9)
        for mine, other in zip(found.grads.values(), expected.grads.values(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
    for one, other in zip(shared(approx), shared(eager), strict=True):
        assert one.running is other.running or torch.allclose(one.running, other.running)
        assert one.age is other.age or torch.equal(one.age, other.age)


@pytest.mark.slow
def test_compiled_hold_keeps_a_sample() -> None:
    model = readers(Layers("systematic", scope="value"))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with fx_approx.reuse_selection(model):
        one = compiled(batch())
        with torch.no_grad():
            model.first.weight.mul_(torch.linspace(0.1, 3, 6))
            model.first.weight.div_(torch.linspace(0.1, 3, 6))
        assert torch.allclose(compiled(batch()), one, rtol=1e-12)
    assert not torch.allclose(compiled(batch()), one)
