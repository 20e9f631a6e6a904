"""The controller holds the noise that it is asked for, decides the same again, and leaves no trace."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx.analysis import ScalarLogger
from fx_approx.policies import Uniform
from fx_approx.schedules import NoiseController
from fx_approx.schedules.noise_controller import cut
from tests.policies.test_budget import network
from tests.schedules.test_scheduler import Twice, Writer

VALUE = Uniform(0.5, min_k=4)
SHAPE = (16, 3, 8, 8)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """Classes that can be told by colour, most labels wrong, so that the noise of SGD stays."""
    generator = torch.Generator().manual_seed(step)
    classes = torch.randint(5, (SHAPE[0],), generator=generator)
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]])[classes]
    wrong = torch.rand(SHAPE[0], generator=generator) < 0.6
    labels = torch.where(wrong, torch.randint(5, (SHAPE[0],), generator=generator), classes)
    return colours[:, :, None, None] + torch.randn(SHAPE, generator=generator), labels


def started(policy: Uniform = VALUE, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, NoiseController]:
    torch.manual_seed(0)
    model = fx_approx.transform(network(16), policy, torch.randn(SHAPE))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    return model, optimizer, NoiseController(model, loss, **{"every": 6, "overhead": 1.0, **options})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, controller: NoiseController, steps: range) -> None:
    for step in steps:
        batch = batch_of(step)
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        controller.step(batch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "target", "draws"),
    [
        ("topk", 0.3, 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("topk", 0.1, 1), ("systematic", 0.3, 4), ("systematic", 1.0, 4))
        ),
    ],
)
def test_it_holds_the_noise(sampler: str, target: float, draws: int) -> None:
    """After warm-up, within 20 per cent: the mean over the second half of the measurements."""
    policy = Uniform(0.5, sampler, min_k=4)
    model, optimizer, controller = started(policy, target=target, draws=draws)
    train(model, optimizer, controller, range(240))
    late = controller.history[len(controller.history) // 2 :]
    found = sum(record.sampling for record in late) / sum(record.sgd for record in late)
    assert found == pytest.approx(target, rel=0.2)
    assert len({record.position for record in controller.history}) > 3


def test_a_measurement_is_what_it_says() -> None:
    """Of two halves: the variance of a half's gradient, halved; and the squared error on the whole."""
    model, _, controller = started(every=3)
    before = {key: copy.deepcopy(selector.spec) for key, selector in model._fx_approx.selectors.items()}
    batch = batch_of(0)
    first, second = cut(batch, 2)

    def gradient(of: nn.Module, part: tuple[Tensor, Tensor]) -> Tensor:
        copied = copy.deepcopy(of)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss(copied, part), list(copied.parameters()))])

    exact = fx_approx.restore(copy.deepcopy(model))
    one, two, whole = gradient(exact, first), gradient(exact, second), gradient(exact, batch)
    sampled = gradient(model, batch)
    assert controller.step(batch) is None is controller.step(batch)
    record = controller.step(batch)
    assert record is not None and record.step == 3
    assert record.sgd == pytest.approx(float((one - two).square().sum() / 4), rel=1e-3)
    assert record.sampling == pytest.approx(float((sampled - whole).square().sum()), rel=1e-3)
    assert (record.moved_to != record.position) == (
        {key: selector.spec for key, selector in model._fx_approx.selectors.items()} != before
    )


def test_the_same_run_again_decides_the_same() -> None:
    runs = [started(target=0.5) for _ in range(2)]
    for run in runs:
        train(*run, range(30))
    assert runs[0][2].history == runs[1][2].history and len(runs[0][2].history) == 5


def test_a_resumed_run_goes_on_as_the_one_that_was_not_stopped() -> None:
    stop = 15  # within a period
    model, optimizer, controller = started(target=0.5)
    train(model, optimizer, controller, range(24))
    early = started(target=0.5)
    train(*early, range(stop))
    stored = json.loads(json.dumps(early[2].state_dict()))
    late = started(target=0.5)
    late[0].load_state_dict(early[0].state_dict())
    fx_approx.load_sampler_state_dict(late[0], fx_approx.sampler_state_dict(early[0]))
    late[1].load_state_dict(early[1].state_dict())
    late[2].load_state_dict(stored)
    train(*late, range(stop, 24))
    assert late[2].history == controller.history
    for one, other in zip(late[0].parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_measuring_leaves_no_trace_but_the_ratios() -> None:
    model, _, controller = started(every=3, target=1e-9)
    batch = batch_of(0)
    loss(model, batch).backward()
    fx_approx.set_sampling(model, enabled={"5.conv1": False})
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    buffers = {name: value.clone() for name, value in model.state_dict().items()}
    state, random = fx_approx.sampler_state_dict(model), torch.get_rng_state()
    for _ in range(3):
        controller.step(batch)
    assert len(controller.history) == 1 and controller.position < controller.history[0].position
    assert torch.equal(torch.get_rng_state(), random) and fx_approx.sampler_state_dict(model) == state
    assert all(torch.equal(value, buffers[name]) for name, value in model.state_dict().items())
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None and grad is None) or torch.equal(p.grad, grad)
    assert not model._fx_approx.selectors["5.conv1", fx_approx.core.candidates.Role.OUTPUT].enabled


def test_rungs_move_one_selection_each() -> None:
    _, _, controller = started()
    assert set(controller.ratios(0).values()) == {1.0}
    assert set(controller.ratios(controller.last).values()) == {0.125}
    for place in range(controller.last):
        one, other = controller.ratios(place), controller.ratios(place + 1)
        changed = {name for name in one if one[name] != other[name]}
        assert changed in [set(group) for group in controller._groups]
        assert all(other[name] < one[name] for name in changed)


def test_it_begins_near_the_ratios_of_the_model() -> None:
    model, _, controller = started()
    found = [selector.spec.ratio for selector in model._fx_approx.selectors.values()]
    assert sum(found) / len(found) == pytest.approx(0.5, abs=0.05)
    assert set(controller.ratios(controller.position).values()) <= {0.375, 0.5, 0.625}


def test_calls_of_one_layer_move_apart() -> None:
    model = fx_approx.transform(Twice(), Uniform(0.5, min_k=1, scores="online"), torch.randn(4, 32))
    controller = NoiseController(model, lambda model, batch: model(batch).square().mean(), every=3, overhead=1.0)
    state = controller.state_dict()
    for position in range(controller.last + 1):
        controller.load_state_dict({**state, "position": position})
        found = {name: selector.spec.ratio for (name, _), selector in model._fx_approx.selectors.items()}
        assert found == controller.ratios(position)


@pytest.mark.slow
def test_learnt_scores_of_a_compiled_model_are_measured() -> None:
    """Compiled steps learn running norms too; an eager model measures exactly what they choose."""
    torch._dynamo.reset()
    policy = Uniform(0.5, min_k=4, scores="ema")
    (one, first, eager), (other, second, compiled) = started(policy, every=3), started(policy, every=3)
    call = torch.compile(other, backend="aot_eager")
    eager_steps = ((one, one, first, eager), (call, other, second, compiled))
    for place, (run, model, optimizer, controller) in enumerate(eager_steps):
        if not place:  # a compiled model samples from the first step on
            model._fx_approx.resample.known = True
        for step in range(3):
            batch = batch_of(step)
            optimizer.zero_grad()
            loss(run, batch).backward()
            optimizer.step()
            controller.step(batch)
    assert compiled.history[0].sampling == pytest.approx(eager.history[0].sampling, rel=1e-2)
    assert compiled.history[0].sampling > 0 and not other._fx_approx.resample.known


def test_a_measurement_that_is_not_finite_says_nothing() -> None:
    model, _, controller = started(every=3)
    broken = NoiseController(model, lambda m, b: loss(m, b) * math.nan, every=3, overhead=1.0)
    before = broken.ratios(broken.position)
    assert [broken.step(batch_of(step)) for step in range(6)] == [None] * 6
    assert broken.history == [] and broken.ratios(broken.position) == before
    state = broken.state_dict()
    assert state["steps"] == 6
    controller.load_state_dict(state)
    assert [controller.step(batch_of(step)) is None for step in range(3)] == [True, True, False]


def test_the_overhead_is_bounded() -> None:
    model = fx_approx.transform(network(16), VALUE, torch.randn(SHAPE))
    assert NoiseController(model, loss).every == 150
    assert NoiseController(model, loss, draws=4, overhead=0.1).every == 60
    with pytest.raises(
        ValueError, match=r"every: a measurement costs 3 steps, so expected at least 150 for overhead=0\.02"
    ):
        NoiseController(model, loss, every=149)


def test_what_is_logged() -> None:
    writer = Writer()
    model, optimizer, controller = started(log=ScalarLogger(writer), every=3)
    train(model, optimizer, controller, range(3))
    found = {tag: value for tag, value, step in writer.written if step == 3}
    (record,) = controller.history
    assert found["fx_approx/noise/sampling"] == record.sampling and found["fx_approx/noise/sgd"] == record.sgd
    assert found["fx_approx/ratio/3.conv1"] == controller.ratios(controller.position)["3.conv1"]


def test_cutting_a_batch() -> None:
    batch = {"x": torch.arange(7), "y": [torch.arange(14).view(7, 2), torch.tensor(3.0)], "name": "a"}
    one, two, three = cut(batch, 3)
    assert torch.equal(torch.cat([one["x"], two["x"], three["x"]]), batch["x"])
    assert [len(part["y"][0]) for part in (one, two, three)] == [2, 2, 3]
    assert two["y"][1] is batch["y"][1] and two["name"] == "a"
    with pytest.raises(ValueError, match="batch: expected tensors of at least 8 examples"):
        cut(batch, 8)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"target": 0}, ValueError, "target: expected a number above 0"),
    ({"target": math.inf}, ValueError, "target: expected a number above 0"),
    ({"target": "0.1"}, TypeError, "target: expected a number above 0"),
    ({"draws": 0}, ValueError, "draws: expected an integer of at least 1"),
    ({"parts": 1}, ValueError, "parts: expected an integer of at least 2"),
    ({"every": 0}, ValueError, "every: expected an integer of at least 1"),
    ({"ladder": (0.5,)}, TypeError, "ladder: expected at least two ratios"),
    ({"ladder": (0.5, 0.5)}, ValueError, "ladder: expected at least two different ratios"),
    ({"ladder": (0.5, 2.0)}, ValueError, "ladder: expected a number"),
    ({"log": print}, TypeError, "log: expected a ScalarLogger"),
]


def test_bad_input() -> None:
    model, _, _ = started()
    for options, error, message in BAD:
        with pytest.raises(error, match=message):
            NoiseController(model, loss, **options)


def test_bad_models_losses_and_states() -> None:
    model, _, controller = started()
    with pytest.raises(TypeError, match="loss: expected a function"):
        NoiseController(model, None)  # type: ignore[arg-type]
    with pytest.warns(fx_approx.errors.NoEffectWarning):
        exact = fx_approx.transform(network(16), fx_approx.policies.Exact())
    with pytest.raises(ValueError, match="model: nothing is sampled"):
        NoiseController(exact, loss)
    state = controller.state_dict()
    for wrong, message in (
        ({}, "state: expected the keys"),
        ({**state, "ladder": [1.0, 0.5]}, "ladder: expected"),
        ({**state, "groups": []}, "groups: expected"),
        ({**state, "position": 10_000}, "position: expected an integer from 0 to"),
    ):
        with pytest.raises(ValueError, match=message):
            controller.load_state_dict(wrong)
        assert controller.state_dict() == state
    bad = NoiseController(model, lambda model, batch: model(batch[0]), every=3, overhead=1.0)
    ratios = bad.ratios(bad.position)
    for _ in range(2):
        bad.step(batch_of(0))
    with pytest.raises(ValueError, match="loss: expected it to return a scalar tensor"):
        bad.step(batch_of(0))
    assert bad.history == [] and bad.ratios(bad.position) == ratios
