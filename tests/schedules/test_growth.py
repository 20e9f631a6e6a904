"""Sampling ends without a jump: the exact network computes what the sampled one did."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Uniform
from fx_approx.schedules import ExactTail, PiecewiseConstant, PlanRatios
from tests.helpers.demand_nets import NETS
from tests.helpers.hoisting import Layers, loss_of
from tests.helpers.modules import made_of
from tests.helpers.quick import thinned


def trained(name: str, scope: str, scores: str, steps: int = 3) -> tuple[nn.Module, Tensor]:
    """A sampled network in double precision behind some steps."""
    torch.manual_seed(0)
    build, shape = NETS[name]
    x = torch.randn(shape, dtype=torch.float64)
    model = fx_approx.transform(build().double().train(), Layers(scores=scores, scope=scope), x)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()
    return model, x


@pytest.mark.parametrize(
    ("name", "scope", "scores"),
    thinned([(name, *(("value", "ema"), ("group", "weight"))[i // 2 % 2]) for i, name in enumerate(NETS)]),
)
def test_the_exact_network_computes_what_the_sampled_one_did(name: str, scope: str, scores: str) -> None:
    model, x = trained(name, scope, scores)
    jumping = copy.deepcopy(model)
    for one, preserve in ((jumping, False), (model, True)):
        with fx_approx.reuse_selection(one):
            sampled = one(x)
            if preserve:
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    assert sum(fx_approx.schedules.zero_unread_weights(one).values()) > 0
                if said:  # a layer is called twice, and the calls read different channels
                    assert name == "plain-residual" and "such as c:" in str(said[0].message)
                    return
                torch.testing.assert_close(one(x), sampled, rtol=1e-9, atol=1e-11)  # it read nothing of that
            fx_approx.set_sampling(one, enabled=False)
            exact = one(x)
        if preserve:
            torch.testing.assert_close(exact, sampled, rtol=1e-9, atol=1e-11)
        else:
            with pytest.raises(AssertionError):
                torch.testing.assert_close(exact, sampled, rtol=1e-3, atol=1e-3)


def test_what_comes_in_learns() -> None:
    model, x = trained("post-activation", "value", "weight")
    fx_approx.schedules.zero_unread_weights(model)
    weights = {name: one for name, one in model.named_parameters() if one.dim() == 4}
    empty = {name: (one == 0).flatten(2).all(2).all(0) for name, one in weights.items()}
    assert any(bool(one.any()) for one in empty.values())
    model.zero_grad()
    fx_approx.set_sampling(model, enabled=False)
    loss_of(model(x)).backward()
    for name, one in weights.items():
        assert one.grad is not None and bool(one.grad.transpose(0, 1).flatten(1).abs().sum(1)[empty[name]].gt(0).all())


def test_with_scores_of_weights_what_was_read_is_read_on() -> None:
    model, x = trained("post-activation", "value", "weight")
    with fx_approx.reuse_selection(model):
        before = model(x)
    fx_approx.schedules.zero_unread_weights(model)
    fx_approx.set_sampling(model, 0.75)  # another selection, of other sizes
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("every", "compiled"), [(3, False), pytest.param(3, True, marks=pytest.mark.slow), (4, False), (1000, False)]
)
def test_a_kept_selection_counts_also_where_its_period_has_just_ended(every: int, compiled: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    x = torch.randn(32, 8, dtype=torch.float64)
    model = fx_approx.transform(net, Layers(scores="ema", scope="value"), x, selection_interval=every)
    call: Any = torch.compile(model, backend="eager") if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        call(x).square().mean().backward()
        optimizer.step()
    read = [(one.weight.grad != 0).any(0) for one in (model[2], model[4])]  # as the last step did
    assert [int(one.sum()) for one in read] == [8, 8]
    model.eval()  # as between two epochs
    assert fx_approx.schedules.zero_unread_weights(model) == {"0": 4, "2": 8, "4": 8}
    assert not any(one.training for one in model.modules())
    for one, columns in zip((model[2], model[4]), read, strict=True):
        assert torch.equal((one.weight != 0).any(0), columns)


def test_some_layers_only() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)]
    x = torch.randn(4, 8)
    model = fx_approx.transform(nn.Sequential(*layers), Layers(), x)
    first, last = model[0].weight.detach().clone(), model[4].weight.detach().clone()
    assert fx_approx.schedules.zero_unread_weights(model, "2") == {"2": 4}
    assert int((model[2].weight == 0).all(0).sum()) == 4
    assert torch.equal(model[0].weight, first) and torch.equal(model[4].weight, last)
    assert fx_approx.schedules.zero_unread_weights(torch.compile(model), "4") == {"4": 4}
    fx_approx.set_sampling(model, enabled={"0": False})
    assert "0" not in fx_approx.schedules.zero_unread_weights(model)  # it reads all


class Functional(nn.Module):
    """Products of a parameter and of a buffer without a layer around them, and of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Parameter(torch.randn(16, 16))
        self.register_buffer("fixed", torch.randn(16, 16))
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(F.linear(torch.relu(x @ self.square), self.fixed)))


def test_other_products_are_named_and_left_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    model = fx_approx.transform(Functional(), Uniform(0.5, scope="layer"), x)
    square, fixed = model.square.detach().clone(), model.fixed.clone()
    with pytest.warns(
        fx_approx.errors.NoEffectWarning, match="of 2 sampled layers is not made ahead, or is of no weight"
    ):
        assert fx_approx.schedules.zero_unread_weights(model) == {"last": 8}
    assert torch.equal(model.square, square) and torch.equal(model.fixed, fixed)


@pytest.mark.parametrize("compiled", thinned([False, True]))
def test_a_scheduler_does_it_where_ratios_rise(compiled: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)]
    x = torch.randn(32, 8)
    plain = fx_approx.transform(nn.Sequential(*copy.deepcopy(layers)), Uniform(0.25, scope="layer"), x)
    model = fx_approx.transform(nn.Sequential(*layers), Uniform(0.25, min_k=1, scope="layer"), x)
    call: Any = torch.compile(model, backend="eager") if compiled else model
    schedule = ExactTail(PiecewiseConstant({0: 0.25, 2: 0.5}), total=6, steps=2)
    scheduler = fx_approx.schedules.RatioScheduler(model, schedule, preserve=True)
    read = []
    for _ in range(6):
        before = call(x)
        read.append([int((one.weight != 0).any(0).sum()) for one in (model[0], model[2], model[4])])
        scheduler.step()
        torch.testing.assert_close(call(x), before)  # no step of an optimiser is between
    assert read == [[8, 16, 16]] * 2 + [[2, 4, 4]] * 4
    scheduler = fx_approx.schedules.RatioScheduler(plain, ExactTail(PlanRatios(), total=2, steps=1))
    before = plain(x)
    scheduler.step()
    assert not torch.allclose(plain(x), before)


@made_of(lambda: {"h": nn.Linear(8, 16), "a": nn.Linear(16, 4), "b": nn.Linear(16, 4)})
def Sum(self: Any, x: Tensor) -> Tensor:
    """Two layers that read one value."""
    h = torch.relu(self.h(x))
    return self.a(h) + self.b(h)


def test_a_shared_selection_ends_for_all_its_readers() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    model = fx_approx.transform(Sum(), Uniform(0.5), x)
    schedules = {"a": ExactTail(PlanRatios(), total=2, steps=1), "*": PlanRatios()}
    scheduler = fx_approx.schedules.RatioScheduler(model, schedules, preserve=True)
    first = model.h.weight.detach().clone()
    before = model(x)
    scheduler.step()
    assert scheduler.get_last_ratio() == {"h": 0.5, "a": 1.0, "b": 0.5}
    torch.testing.assert_close(model(x), before)
    assert torch.equal(model.h.weight, first)  # whose own selection goes on


def test_layers_that_share_a_selection_go_together() -> None:
    torch.manual_seed(0)
    model = fx_approx.transform(Sum(), Uniform(0.5), torch.randn(16, 8))
    assert fx_approx.schedules.zero_unread_weights(model, "a") == {"a": 8, "b": 8}
    zero = [(one.weight == 0).all(0) for one in (model.a, model.b)]
    assert int(zero[0].sum()) == 8 and torch.equal(*zero)


def test_a_resumed_scheduler_changes_no_weight() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    model = fx_approx.transform(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), Layers(), x)
    schedule = ExactTail(PlanRatios(), total=4, steps=2)
    scheduler = fx_approx.schedules.RatioScheduler(model, schedule, preserve=True)
    weights = copy.deepcopy(model.state_dict())
    scheduler.load_state_dict({**scheduler.state_dict(), "last_step": 3})
    assert set(scheduler.get_last_ratio().values()) == {1.0}
    assert all(torch.equal(one, weights[name]) for name, one in model.state_dict().items())


def test_wrong_uses_are_named_and_change_nothing() -> None:
    x = torch.randn(4, 8)
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="not a transformed model"):
        fx_approx.schedules.zero_unread_weights(plain)
    with pytest.raises(TypeError, match=r"model: expected what .* returned, got 3"):
        fx_approx.schedules.zero_unread_weights(3)  # type: ignore[arg-type]
    schedule = ExactTail(PlanRatios(), total=4, steps=2)
    model = fx_approx.transform(plain, Layers(), x)
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"layers: .*got 'fc\*'; there are: 0, 2"):
        fx_approx.schedules.zero_unread_weights(model, "fc*")
    with pytest.raises(TypeError, match="preserve: expected True or False, got 1"):
        fx_approx.schedules.RatioScheduler(model, schedule, preserve=1)  # type: ignore[arg-type]
    scaled = fx_approx.transform(copy.deepcopy(plain), Layers(sampler="bernoulli"), x)
    with pytest.raises(ValueError, match="model: 0 is sampled by bernoulli, which scales"):
        fx_approx.schedules.zero_unread_weights(scaled)
    with pytest.raises(ValueError, match="preserve: 0 is sampled by bernoulli"):  # now, and not where sampling ends
        fx_approx.schedules.RatioScheduler(scaled, schedule, preserve=True)
    with pytest.raises(
        fx_approx.errors.ShapesRequiredError, match="preserve: expected a model transformed with example_inputs"
    ):
        fx_approx.schedules.RatioScheduler(
            fx_approx.transform(copy.deepcopy(plain), Uniform(0.5, scope="layer")), schedule, preserve=True
        )
    assert all(torch.equal(one, weights[name]) for name, one in model.state_dict().items())
    online = fx_approx.transform(copy.deepcopy(plain), Layers(scores="online"), x)
    with pytest.warns(fx_approx.errors.NoEffectWarning, match="of 2 sampled layers is not made ahead"):
        assert fx_approx.schedules.zero_unread_weights(online) == {}
    with pytest.warns(fx_approx.errors.NoEffectWarning, match="preserve: no selection of channels is made ahead"):
        fx_approx.schedules.RatioScheduler(online, schedule, preserve=True)
