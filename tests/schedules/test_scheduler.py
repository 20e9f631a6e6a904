"""Schedules by hand; the scheduler sets what they say, compiles no more than their ratios, and resumes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fx_approx
from fx_approx.analysis import ScalarLogger
from fx_approx.policies import FlopBudget, GradientSampling, Uniform
from fx_approx.schedules import (
    Constant,
    Cosine,
    ExactTail,
    ExactWarmup,
    Linear,
    PeriodicExact,
    PiecewiseConstant,
    PlanRatios,
    RatioScheduler,
    Schedule,
)
from tests.helpers.modules import made_of
from tests.policies.test_budget import IMAGES, SMALL, network

ALL = [
    PlanRatios(),
    Constant(0.5),
    Linear(1.0, 0.25, 10),
    Cosine(0.9, 0.3, 7, levels=(0.5, 0.7)),
    Linear(0.3, 0.9, 12, levels=4),
    PiecewiseConstant({0: 1.0, 5: 0.5, 8: None}),
    ExactWarmup(Constant(0.5), 3),
    ExactTail(Linear(0.5, 0.25, 4), 12, 2),
    PeriodicExact(ExactWarmup(PlanRatios(), 2), 4),
]


def values(schedule: Schedule, count: int) -> list[float | None]:
    return [schedule.ratio(step) for step in range(count)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (PlanRatios(), [None, None]),
        (Constant(0.3), [0.3, 0.3]),
        (Linear(1.0, 0.5, 4), [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]),
        (Linear(0.5, 1.0, 4, levels=(0.5, 1.0)), [0.5, 0.5, 1.0, 1.0, 1.0]),
        (Linear(1.0, 0.5, 4, levels=3), [1.0, 1.0, 0.75, 0.75, 0.5]),
        (Linear(0.25, 0.75, 2, levels=2), [0.25, 0.75, 0.75]),
        (Cosine(1.0, 0.5, 4), [1.0, 0.875, 0.75, 0.625, 0.5]),  # 1, 0.927, 0.75, 0.573, 0.5
        (Cosine(1.0, 0.5, 8), [1.0, 1.0, 0.875, 0.875, 0.75, 0.625, 0.625, 0.5, 0.5]),
        (PiecewiseConstant({0: 1.0, 2: 0.5, 4: None}), [1.0, 1.0, 0.5, 0.5, None, None]),
        (ExactWarmup(Linear(0.75, 0.5, 2), 2), [1.0, 1.0, 0.75, 0.625, 0.5]),
        (ExactTail(Constant(0.5), 4, 2), [0.5, 0.5, 1.0, 1.0, 1.0]),
        (PeriodicExact(Constant(0.5), 3), [0.5, 0.5, 1.0, 0.5, 0.5, 1.0]),
        (ExactWarmup(PeriodicExact(PlanRatios(), 2), 1), [1.0, None, 1.0, None]),
    ],
)
def test_values(schedule: Schedule, expected: list[float | None]) -> None:
    assert values(schedule, len(expected)) == expected


@pytest.mark.parametrize("schedule", ALL)
def test_ratios_are_all_that_it_takes(schedule: Schedule) -> None:
    assert set(values(schedule, 40)) <= schedule.ratios
    assert len(set(values(schedule, 40))) >= len(schedule.ratios) - 2  # a short ramp may jump over a rung


@pytest.mark.parametrize("schedule", ALL)
def test_json(schedule: Schedule) -> None:
    assert Schedule.from_json(schedule.to_json()) == schedule


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Constant(0), ValueError, r"value: expected a number in \(0, 1\], got 0"),
        (lambda: Constant("0.5"), TypeError, "value: expected a number"),
        (lambda: Linear(1.0, 0.5, 0), ValueError, "steps: expected an integer of at least 1, got 0"),
        (lambda: Linear(1.0, 1.5, 3), ValueError, "end: expected"),
        (lambda: Cosine(1.0, 0.5, 3, levels=[0.5]), TypeError, "levels: expected a tuple"),
        (lambda: Cosine(1.0, 0.5, 3, levels=(2.0,)), ValueError, "levels: expected"),
        (lambda: Cosine(1.0, 0.5, 3, levels=1), ValueError, "levels: expected an integer of at least 2, got 1"),
        (lambda: PiecewiseConstant({0: 0.5}).ratio(-1), ValueError, "step: expected an integer of at least 0, got -1"),
        (lambda: Schedule.from_dict({"kind": "_Moving"}), ValueError, r"kind: expected one of Constant, Cosine, "),
        (
            lambda: Schedule.from_dict({"kind": "Constant"}),
            ValueError,
            r"Constant: expected the fields value, got \[\]",
        ),
        (
            lambda: Schedule.from_dict({"kind": "PlanRatios", "value": 1}),
            ValueError,
            "PlanRatios: expected the fields none",
        ),
        (lambda: PiecewiseConstant({}), TypeError, "ratios_by_step: expected steps with ratios"),
        (lambda: PiecewiseConstant({1: 0.5}), ValueError, r"expected steps in order, the first 0, got \[1\]"),
        (lambda: PiecewiseConstant({0: 0.5, 3: 2.0}), ValueError, r"ratios_by_step\[3\]: expected"),
        (lambda: PiecewiseConstant({0: 0.5, 1.5: 0.5}), TypeError, "ratios_by_step: expected an integer"),
        (lambda: ExactWarmup(0.5, 3), TypeError, "schedule: expected a schedule such as"),
        (lambda: ExactWarmup(Constant(0.5), -1), ValueError, "steps: expected"),
        (lambda: ExactTail(Constant(0.5), 3, 4), ValueError, "steps: expected at most total=3, got 4"),
        (lambda: PeriodicExact(Constant(0.5), 1), ValueError, "every: expected an integer of at least 2"),
        (lambda: Schedule.from_dict({"kind": "Random"}), ValueError, "kind: expected one of .*Constant.* got 'Random'"),
    ],
)
def test_bad_input(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# ---- the scheduler


VALUE = Uniform(0.5, round_to=4)


class Writer:
    def __init__(self) -> None:
        self.written: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.written.append((tag, value, step))


def transformed(policy: Any = VALUE) -> nn.Module:
    return fx_approx.transform(network(), policy, IMAGES)


def in_force(model: nn.Module) -> set[float]:
    selectors = fx_approx.runtime.approx_module.find(model)._fx_approx.selectors.values()
    return {one.spec.ratio if one.enabled else 1.0 for one in selectors}


@pytest.mark.parametrize(
    "schedule",
    [
        Constant(0.25),
        Linear(1.0, 0.5, 4),
        ExactWarmup(ExactTail(Constant(0.5), 5, 2), 2),
        PeriodicExact(Linear(0.75, 0.25, 6), 3),
        PiecewiseConstant({0: 0.75, 2: 1.0, 4: 0.25}),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
@pytest.mark.filterwarnings("ignore:ExactTail:fx_approx.errors.BatchNormWarning")
def test_every_step_has_its_ratio(schedule: Schedule) -> None:
    model = transformed()
    scheduler = RatioScheduler(model, schedule)
    for step in range(8):
        assert in_force(model) == {schedule.ratio(step)}
        assert set(scheduler.get_last_ratio().values()) == {schedule.ratio(step)} and scheduler.last_step == step
        scheduler.step()


def test_the_plan_s_own_ratios_come_back() -> None:
    model = transformed(FlopBudget(0.5, **SMALL))
    before = {key: selector.spec for key, selector in model._fx_approx.selectors.items()}
    scheduler = RatioScheduler(model, PiecewiseConstant({0: 0.25, 1: 1.0, 2: None}))
    assert in_force(model) == {0.25}
    scheduler.step()
    assert in_force(model) == {1.0}
    scheduler.step()
    assert {key: selector.spec for key, selector in model._fx_approx.selectors.items()} == before


def test_by_layer_and_first_match() -> None:
    model = transformed(Uniform(0.5, scores="online"))
    scheduler = RatioScheduler(model, {"5.conv1": Constant(0.25), "5.*": Constant(0.75), "*": PlanRatios()})
    found = scheduler.get_last_ratio()
    assert (found["5.conv1"], found["5.conv2"], found["3.conv1"]) == (0.25, 0.75, 0.5)


@made_of(lambda: {"fc": nn.Linear(32, 32), "out": nn.Linear(32, 4)})
def Twice(self: Any, x: Tensor) -> Tensor:
    """Calls one layer twice: two products of one path."""
    return self.out(F.relu(self.fc(F.relu(self.fc(x)))))


def twice(policy: Uniform) -> nn.Module:
    return fx_approx.transform(Twice(), policy, torch.randn(4, 32))


def test_calls_of_one_layer_are_told_apart() -> None:
    model = twice(Uniform(0.5, min_k=1, scores="online"))
    scheduler = RatioScheduler(model, {"fc#2": PiecewiseConstant({0: 0.25, 1: 1.0}), "*": Constant(0.75)})
    assert scheduler.get_last_ratio() == {"fc": 0.75, "fc#2": 0.25, "out": 0.75}
    scheduler.step()
    assert scheduler.get_last_ratio() == {"fc": 0.75, "fc#2": 1.0, "out": 0.75}
    RatioScheduler(model, {"fc": Constant(0.5), "out": PlanRatios()})
    assert scheduler.get_last_ratio() == {"fc": 0.5, "fc#2": 0.5, "out": 0.75}


def test_all_roles_of_a_layer_follow() -> None:
    model = transformed(GradientSampling.backward(0.5))
    RatioScheduler(model, Constant(0.25))
    assert {(selector.spec.ratio) for selector in model._fx_approx.selectors.values()} == {0.25}


def test_an_exact_step_is_the_exact_model_s() -> None:
    model, plain = transformed(), network()
    plain.load_state_dict(model.state_dict())
    RatioScheduler(model, Constant(1.0))
    assert torch.equal(model(IMAGES), plain(IMAGES))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:ExactTail:fx_approx.errors.BatchNormWarning")
def test_compilations_are_the_distinct_ratios() -> None:
    """Exact, 0.75 and 0.5, in any order and back: three graphs."""
    torch._dynamo.reset()
    model, count = transformed(), 0

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal count
        count += 1
        return gm.forward

    schedule = ExactTail(ExactWarmup(PeriodicExact(Linear(0.75, 0.5, 4, levels=(0.75, 0.5)), 3), 2), 11, 2)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    scheduler = RatioScheduler(compiled, schedule)
    for _ in range(13):
        compiled(IMAGES)
        scheduler.step()
    assert schedule.ratios == {1.0, 0.75, 0.5} and count == 3


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=8)  # torch's own; other packages raise it for the whole process
def test_exact_steps_are_one_graph_whatever_the_ratio_between_them() -> None:
    """And up to the limit of torch.compile without a warning, which the tests would raise."""
    torch._dynamo.reset()
    model = twice(Uniform(0.5, "systematic", min_k=1))
    counter, x = CompileCounterWithBackend("eager"), torch.randn(4, 32)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    ratios = [0.25, 0.375, 0.5, 0.625, 0.75]
    schedule = PiecewiseConstant(dict(enumerate(ratio for one in [*ratios, *ratios] for ratio in (1.0, one))))
    scheduler = RatioScheduler(compiled, schedule)
    for _ in range(20):
        compiled(x).sum().backward()
        scheduler.step()
    assert counter.frame_count == len(schedule.ratios) == 6 == torch._dynamo.config.recompile_limit - 2


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=8)
def test_the_last_compilation_is_announced_once() -> None:
    torch._dynamo.reset()
    model = twice(Uniform(0.5, min_k=1))
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    limit = torch._dynamo.config.recompile_limit
    new = [(place + 1) / 20 for place in range(1, limit)]
    order = [1.0, *new[:-1], 1.0, new[0], 1.0, new[3], new[-1]]
    scheduler = RatioScheduler(compiled, PiecewiseConstant(dict(enumerate(order))))
    for _ in order[:-2]:
        compiled(torch.randn(4, 32))
        scheduler.step()
    with pytest.warns(fx_approx.errors.RecompilationWarning):
        scheduler.step()


def test_it_resumes_from_json() -> None:
    schedule = PeriodicExact(Linear(1.0, 0.25, 6), 4)
    one, model = RatioScheduler(transformed(FlopBudget(0.5, **SMALL)), schedule), transformed(FlopBudget(0.5, **SMALL))
    for _ in range(4):
        one.step()
    other = RatioScheduler(model, Constant(0.5))
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for _ in range(5):
        assert one.get_last_ratio() == other.get_last_ratio()
        one.step()
        other.step()


def test_planned_ratios_survive_a_resume() -> None:
    """The model that resumes may have been transformed, or set, otherwise in between."""
    one = RatioScheduler(transformed(Uniform(0.75, scores="online")), PlanRatios())
    model = transformed(Uniform(0.25, scores="online"))
    RatioScheduler(model, PlanRatios()).load_state_dict(one.state_dict())
    assert in_force(model) == {0.75}


def test_what_is_logged() -> None:
    writer, model = Writer(), transformed()
    scheduler = RatioScheduler(model, PiecewiseConstant({0: 1.0, 2: 0.25}), log=ScalarLogger(writer))
    for _ in range(4):
        scheduler.step()
    means = [(value, step) for tag, value, step in writer.written if tag == "fx_approx/mean_ratio"]
    assert means == [(1.0, 0), (0.25, 2)]
    assert ("fx_approx/ratio/3.conv1", 0.25, 2) in writer.written


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        (0.5, TypeError, r"schedule\['\*'\]: expected a schedule such as Constant"),
        ({"fc": Constant(0.5)}, ValueError, "schedule: 'fc' decides about no sampled layer; there are: .*3.conv1"),
        ({"*": Constant(0.5), "5.*": Constant(0.5)}, ValueError, r"'5\.\*' decides about no sampled layer"),
    ],
)
def test_scheduler_bad_input(schedule: Any, error: type[Exception], message: str) -> None:
    model = transformed()
    with pytest.raises(error, match=message):
        RatioScheduler(model, schedule)
    assert in_force(model) == {0.5}


def test_bad_states_change_nothing() -> None:
    scheduler, other = (
        RatioScheduler(transformed(), Constant(0.25)),
        RatioScheduler(transformed(FlopBudget(0.9, **SMALL)), PlanRatios()),
    )
    state = scheduler.state_dict()
    for wrong, message in (
        ({"last_step": 1}, "expected last_step, schedules and planned"),
        ({**state, "last_step": -1}, "last_step: expected"),
        (
            {**state, "last_step": 3, "planned": dict.fromkeys(state["planned"], 7.0)},
            r"planned\['3.conv1/output'\]: exp",
        ),
        ({**state, "schedules": {"x": Constant(0.5).to_dict()}}, "'x' decides about no sampled layer"),
        (other.state_dict(), "state: of another model"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler.load_state_dict(wrong)
        assert scheduler.state_dict() == state
    with pytest.raises(TypeError, match="log: expected a ScalarLogger"):
        RatioScheduler(transformed(), Constant(0.5), log=Writer())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not a transformed model"):
        RatioScheduler(network(), Constant(0.5))
