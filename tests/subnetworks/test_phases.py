"""Phases: one loop trains the full model and its subnetworks, and goes on from a checkpoint as if never stopped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim import Optimizer

import fx_approx
from fx_approx.errors import BatchNormWarning, UnsupportedError
from fx_approx.policies import Exact, Override, Uniform
from fx_approx.schedules import (
    Constant,
    ExactTail,
    ExactWarmup,
    Linear,
    PeriodicExact,
    PiecewiseConstant,
    PlanRatios,
    Schedule,
)
from fx_approx.subnetworks import Phases, extract, merge, narrow_optimizer, record_of, reselect, widen_optimizer
from fx_approx.subnetworks.optimizers import full_moments
from tests.helpers.quick import in_turn
from tests.subnetworks.nets import X, Y, hidden, largest

SCHEDULE = ExactTail(ExactWarmup(PlanRatios(), 2), total=12, steps=3)
RANDOM = Override({"0": Exact()}, Uniform(0.5, "systematic", scores="uniform"))
AHEAD = Override({"0": Exact()}, Uniform(0.5, scores="ema"))


def adamw(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, 1e-2)


def one_step(phases: Phases, optimizer: Optimizer) -> float:
    """As in the documentation; gradients stay until the next step."""
    loss = F.cross_entropy(phases.model(X), Y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    phases.step()
    return loss.item()


def run(
    stop: int = 12,
    resume: dict[str, Any] | None = None,
    make: Callable[[Any], Optimizer] = adamw,
    schedule: Any = SCHEDULE,
    policy: Any = None,
    **options: Any,
) -> tuple[list[tuple[str, float]], Any, nn.Module]:
    approx = hidden(**({} if policy is None else {"policy": policy}))
    optimizer = make(approx.parameters())
    phases = Phases(approx, optimizer, schedule, **{"interval": 3, "example_inputs": X, **options})
    if resume is not None:
        approx.load_state_dict(resume["model"])
        fx_approx.load_sampler_state_dict(approx, resume["sampler"])
        phases.load_state_dict(resume["phases"])
        optimizer.load_state_dict(resume["optimizer"])
    losses = []
    while phases.last_step < stop:
        name = type(phases.model).__name__
        losses.append((name, one_step(phases, optimizer)))
    state = {
        "model": approx.state_dict(),
        "sampler": fx_approx.sampler_state_dict(approx),
        "phases": phases.state_dict(),
    }
    return losses, copy.deepcopy({**state, "optimizer": optimizer.state_dict()}), approx


MAKERS = {
    "momentum": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    "AdamW": adamw,
}


@pytest.mark.parametrize(("rest", "kind"), in_turn(["cpu", "keep", "drop"], ["AdamW", "momentum"]))
def test_one_loop_trains_all_and_resumes_bitwise(rest: str, kind: str) -> None:
    make = MAKERS[kind]
    losses, _, whole = run(make=make, rest=rest)
    assert [name for name, _ in losses] == ["ApproxSequential"] * 2 + ["Sequential"] * 7 + ["ApproxSequential"] * 3
    assert losses[-1][1] < losses[2][1] < losses[0][1]
    for stop in (1, 4, 7, 10):  # in the warm-up, in the first and the second selection, and in the tail
        first, state, _ = run(stop=stop, make=make, rest=rest)
        second, _, again = run(resume=state, make=make, rest=rest)
        assert first + second == losses and largest(whole, again) == 0


@pytest.mark.parametrize("scores", ["uniform", "ema"])
def test_what_samplers_have_drawn_and_learnt_resumes_too(scores: str) -> None:
    options: dict[str, Any] = {"policy": AHEAD, "schedule": ExactWarmup(PlanRatios(), 2)}
    if scores == "uniform":
        options |= {"policy": RANDOM, "preserve": False}
    losses, _, whole = run(**options)
    first, state, _ = run(stop=7, **options)
    second, _, again = run(resume=state, **options)
    assert first + second == losses and largest(whole, again) == 0


def test_the_same_as_by_hand() -> None:
    with pytest.warns(BatchNormWarning, match="steps=3 is too short"):
        losses, _, _ = run(preserve=False)
    approx = hidden()
    optimizer = adamw(approx.parameters())

    def steps(model: nn.Module, count: int) -> list[float]:
        found = []
        for _ in range(count):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(X), Y)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        optimizer.zero_grad()
        return found

    fx_approx.set_sampling(approx, enabled=False)
    expected = steps(approx, 2)
    fx_approx.set_sampling(approx, enabled=True)
    sub = extract(approx, example_inputs=X)
    for count in (3, 3, 1):
        narrow_optimizer(optimizer, sub, approx)
        expected += steps(sub, count)
        merge(sub, approx)
        widen_optimizer(optimizer, sub)
        if count == 3:
            reselect(sub, approx)
    fx_approx.set_sampling(approx, enabled=False)
    expected += steps(approx, 3)
    assert [loss for _, loss in losses] == expected


def test_no_jump_where_the_full_model_takes_over() -> None:
    approx = hidden()
    optimizer = adamw(approx.parameters())
    phases = Phases(approx, optimizer, PlanRatios(), example_inputs=X)
    for _ in range(5):
        one_step(phases, optimizer)
    before = phases.model(X)
    sub = phases.model
    full = phases.finish()
    assert phases.model is full
    evaluated = full.eval()(X)  # no warning: the statistics fit
    assert torch.allclose(evaluated, sub.eval()(X), atol=1e-12)
    assert torch.allclose(full.train()(X), before, atol=1e-12)


def test_without_preserve_statistics_of_a_phase_are_known_to_be_of_a_sampled_network() -> None:
    approx = hidden()
    optimizer = adamw(approx.parameters())
    phases = Phases(approx, optimizer, PlanRatios(), preserve=False, example_inputs=X)
    for _ in range(3):
        one_step(phases, optimizer)
    full = phases.finish()
    assert int(full[1].num_batches_tracked) == 3
    with pytest.warns(BatchNormWarning, match="gathered while sampling"):
        full.eval()


def test_a_ramp_has_a_subnetwork_of_each_size() -> None:
    widths = []
    approx = hidden()
    optimizer = adamw(approx.parameters())
    schedule = Linear(1.0, 0.25, 6, levels=4)
    phases = Phases(approx, optimizer, schedule, example_inputs=X)
    losses = []
    for _ in range(8):
        layer = phases.model.get_submodule("3")
        widths.append(layer.in_features if type(layer) is nn.Linear else 64)
        losses.append(one_step(phases, optimizer))
    assert widths == [64 * (schedule.ratio(step) or 0) for step in range(8)] and losses[-1] < losses[0]
    assert len(set(widths)) == 4
    assert {id(p) for p in phases.finish().parameters()} == {id(p) for p in approx.parameters()}
    assert optimizer.state[approx[3].weight]["exp_avg"].shape == (64, 64)


def test_layers_have_schedules_of_their_own() -> None:
    approx = hidden()
    optimizer = adamw(approx.parameters())
    schedules: dict[str, Schedule] = {"3": PiecewiseConstant({0: 1.0, 2: 0.5, 4: 1.0}), "*": Constant(1.0)}
    phases = Phases(approx, optimizer, schedules, example_inputs=X)
    shapes = []
    for _ in range(6):
        shapes.append(tuple(phases.model.get_submodule("3").weight.shape))
        one_step(phases, optimizer)
    assert shapes == [(64, 64)] * 2 + [(64, 32)] * 2 + [(64, 64)] * 2


def test_the_model_says_how_long_a_selection_is_kept() -> None:
    """Without an interval, ``selection_interval`` of the transform; at 10**9 the first selection for good."""
    for every, expected in ((3, 3), (10**9, 1), (1, 1)):
        approx = hidden(RANDOM, selection_interval=every)
        optimizer = adamw(approx.parameters())
        phases = Phases(approx, optimizer, PeriodicExact(PlanRatios(), 9), preserve=False, example_inputs=X)
        seen = set()
        for _ in range(8):
            seen.add(tuple(record_of(phases.model).selections[0].indices.flatten().tolist()))
            one_step(phases, optimizer)
        one_step(phases, optimizer)  # exact
        last = tuple(record_of(phases.model).selections[0].indices.flatten().tolist())
        assert len(seen) == expected and (last in seen) is (every > 1)  # the third of 3 was kept for 2 steps


def test_an_interval_that_is_given_decides() -> None:
    approx = hidden(RANDOM, selection_interval=10**9)
    optimizer = adamw(approx.parameters())
    phases = Phases(approx, optimizer, PlanRatios(), interval=2, preserve=False)
    seen = []
    for _ in range(6):
        seen.append(tuple(record_of(phases.model).selections[0].indices.flatten().tolist()))
        one_step(phases, optimizer)
    assert seen[0::2] == seen[1::2] and len(set(seen)) == 3


@pytest.mark.filterwarnings("ignore:step. the optimiser that was given has not stepped")  # nothing is to move
def test_scores_that_learn_look_for_what_was_not_chosen_in_phases_too() -> None:
    approx = hidden(AHEAD)
    optimizer = torch.optim.SGD(approx.parameters(), 0.0)
    phases = Phases(approx, optimizer, ExactWarmup(PlanRatios(), 1), interval=200)
    one_step(phases, optimizer)
    seen = set()
    for _ in range(1200):
        if phases._since == 0:
            seen.update(record_of(phases.model).selections[0].indices.flatten().tolist())
        phases.step()
    assert len(seen) > 48  # 32 without age, since nothing moves


@pytest.mark.parametrize("by_backend", [False, True])
def test_counts_that_are_random_make_another_subnetwork(by_backend: bool) -> None:
    policy = Override({"0": Exact()}, Uniform(0.5, "bernoulli"))
    given: Any = hidden(policy)
    parameters = list(given.parameters())
    if by_backend:
        model, given = fx_approx.restore(given).train(), fx_approx.backend(policy, inner="eager")
        torch.compile(model, backend=given)(X)
    optimizer = adamw(parameters)
    phases = Phases(given, optimizer, PlanRatios(), interval=1, preserve=False, example_inputs=X)
    widths = set()
    for _ in range(4):
        widths.add(phases.model.get_submodule("3").in_features)
        one_step(phases, optimizer)
    assert len(widths) > 1


# ---- gradients


def test_gradients_that_wait_go_along_and_spent_ones_do_not() -> None:
    approx = hidden()
    optimizer = torch.optim.SGD(approx.parameters(), 1e-2)
    phases = Phases(approx, optimizer, PiecewiseConstant({0: 1.0, 1: 0.5}), example_inputs=X)
    F.cross_entropy(phases.model(X), Y).backward()
    gradient = approx[3].weight.grad.clone()
    phases.step()  # without the optimiser's: the next micro-batch adds to it
    cut = record_of(phases.model).cut_of("3.weight")
    assert torch.equal(phases.model[3].weight.grad, cut.taken(gradient)) and approx[3].weight.grad is None
    optimizer.step()
    phases.finish()
    assert approx[3].weight.grad is None  # no second step by it


# ---- what is called


def test_compiled_subnetworks_are_compiled_once() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    approx = hidden(RANDOM)
    optimizer = adamw(approx.parameters())
    wrapped: list[nn.Module] = []

    def wrap(module: nn.Module) -> nn.Module:
        wrapped.append(module)
        return torch.compile(module, backend=counter)

    schedule = PeriodicExact(PlanRatios(), 5)
    phases = Phases(approx, optimizer, schedule, interval=2, preserve=False, example_inputs=X, wrap=wrap)
    plain = run(schedule=schedule, interval=2, preserve=False, policy=RANDOM, stop=14)[0]
    counts, losses = [], []
    for _ in range(14):
        losses.append(one_step(phases, optimizer))
        counts.append(counter.frame_count)
    assert len(wrapped) == 2, "one subnetwork, which waits through the exact steps, and the full model"
    assert counts[4] == counts[-1], "nothing is compiled after one step of each"
    assert losses == pytest.approx([loss for _, loss in plain], abs=1e-12)
    torch._dynamo.reset()


def test_training_flags_stay() -> None:
    approx = hidden()
    approx[1].eval()  # frozen statistics
    optimizer = adamw(approx.parameters())
    phases = Phases(approx, optimizer, PiecewiseConstant({0: 0.5, 2: 1.0}), example_inputs=X)
    assert phases.model.training and not phases.model.get_submodule("1").training
    one_step(phases, optimizer)
    phases.model.eval()
    phases.model.train()
    phases.model.get_submodule("1").eval()
    one_step(phases, optimizer)
    assert approx.training and not approx[1].training and int(approx[1].num_batches_tracked) == 0


# ---- what is refused


@pytest.mark.parametrize(
    ("error", "message", "policy", "options"),
    [
        (TypeError, "schedule.*: expected a schedule such as", None, {"schedule": 0.5}),
        (ValueError, "'4' decides about no sampled layer", None, {"schedule": {"4": PlanRatios(), "*": PlanRatios()}}),
        (ValueError, "interval: expected an integer of at least 1, got 0", None, {"interval": 0}),
        (ValueError, "rest: expected 'cpu', 'keep' or 'drop', got 'disk'", None, {"rest": "disk"}),
        (TypeError, "preserve: expected True or False, got 1", None, {"preserve": 1}),
        (TypeError, "wrap: expected what makes a module", None, {"wrap": 3}),
        (TypeError, "wrap: expected that it returns a module, got None", None, {"wrap": lambda module: None}),
        (ValueError, "preserve: 3 is sampled by systematic, which scales", "systematic", {}),
        (ValueError, r"scores ema have learnt nothing yet.*such as ExactWarmup\(schedule, 50\)", "ema", {}),
        (UnsupportedError, "its selection follows the activations", "online", {}),
        (ValueError, "none of its 8 parameters is one of model", None, {"optimizer": "other"}),
        (UnsupportedError, "LBFGS keeps directions", None, {"optimizer": "LBFGS"}),
    ],
)
def test_what_does_not_fit_is_refused_at_once_and_changes_nothing(
    error: type[Exception], message: str, policy: str | None, options: dict[str, Any]
) -> None:
    policies = {
        "systematic": Override({"0": Exact()}, Uniform(0.5, "systematic")),
        "ema": AHEAD,
        "online": Override({"3": Uniform(0.5)}, Uniform(0.5, scores="online")),
    }
    approx = hidden(policies[policy]) if policy else hidden()
    made = {"other": lambda: adamw(hidden().parameters()), "LBFGS": lambda: torch.optim.LBFGS(approx.parameters())}
    options = dict(options)
    which = options.pop("optimizer", None)
    optimizer = adamw(approx.parameters()) if which is None else made[which]()
    given = list(optimizer.param_groups[0]["params"])
    fx_approx.set_sampling(approx, 0.75)
    before = approx._fx_approx.setting
    with pytest.raises(error, match=message):
        Phases(approx, optimizer, **{"schedule": Constant(0.5), **options})
    assert approx._fx_approx.setting == before
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], given, strict=True))


def test_a_state_of_another_kind_is_refused_and_changes_nothing() -> None:
    approx = hidden()
    optimizer = adamw(approx.parameters())
    phases = Phases(approx, optimizer, PlanRatios())
    one_step(phases, optimizer)
    state, sub = copy.deepcopy(phases.state_dict()), phases.model
    for wrong, message in (
        ({}, r"state: expected what Phases.state_dict gives, got the keys \[\]"),
        ({**state, "selections": state["selections"][:1]}, "selections: expected 2, one for each"),
        ({**state, "scheduler": {**state["scheduler"], "planned": {}}}, "state: of another model"),
        ({**state, "since": -1}, "since: expected an integer of at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            phases.load_state_dict(wrong)
        assert (
            phases.model is sub and phases.last_step == 1 and full_moments(optimizer).keys() == state["moments"].keys()
        )
    one_step(phases, optimizer)


def test_a_model_that_was_changed_during_a_phase_is_not_overwritten() -> None:
    approx = hidden()
    optimizer = adamw(approx.parameters())
    phases = Phases(approx, optimizer, PiecewiseConstant({0: 0.5, 2: 1.0}))
    one_step(phases, optimizer)
    sub = phases.model
    with torch.no_grad():
        approx[3].bias.add_(1.0)
    with pytest.raises(ValueError, match=r"3\.bias was changed since sub was cut out"):
        one_step(phases, optimizer)
    assert phases.model is sub and phases.last_step == 1
    assert set(optimizer.param_groups[0]["params"]) == set(sub.parameters())
