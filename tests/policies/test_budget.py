"""Budgets are met by the plan as the report counts it, and say what is feasible where they cannot be."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fx_approx
from fx_approx import Plan
from fx_approx.compiler.transform import view_of
from fx_approx.policies import (
    ErrorBudget,
    Exact,
    FlopBudget,
    FlopModel,
    MemoryBudget,
    Override,
    RooflineModel,
    Sensitivity,
    TimeBudget,
    Uniform,
)
from fx_approx.policies.cost_roofline import Device
from tests.helpers.demand_nets import BasicBlock
from tests.helpers.quick import thinned

IMAGES = torch.randn(4, 3, 16, 16)
DEVICE = Device("made up", "torch.float32", 1e11, 1e10, 1e10, 1e-6, 0.8, 0.7, 0.5, 0.1)
SMALL: dict[str, Any] = {"min_k": 4, "round_to": 4}


def network(width: int = 32) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
        *(BasicBlock(width, width), BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 5)),
    )


def totals(policy: Any, model: nn.Module | None = None) -> Any:
    return fx_approx.explain(network() if model is None else model, policy, IMAGES).report.totals


ROOFLINE = RooflineModel(device=DEVICE)
#: A budget, the share of it that is spent at least, and what is spent, of one of the exact step.
SPENT: list[tuple[Any, float, Callable[[Any], float]]] = [
    *(
        (FlopBudget(budget, scope=scope, **SMALL), 0.98, lambda t: (t.executed.total + t.selection) / t.exact.total)
        for budget, scope in ((0.35, "group"), (0.5, "layer"), (0.5, "value"), (0.7, "group"), (0.9, "value"))
    ),
    *((MemoryBudget(budget, **SMALL), 0.95, lambda t: t.memory / t.memory_exact) for budget in (0.75, 0.9)),
]


@pytest.mark.parametrize(
    "policy, least, spent",
    thinned(SPENT),
    ids=[f"{type(row[0]).__name__}-{row[0].budget}-{row[0].scope}" for row in SPENT],
)
def test_the_plan_is_within_the_budget(policy: Any, least: float, spent: Callable[[Any], float]) -> None:
    assert least * policy.budget <= spent(totals(policy)) <= policy.budget


@pytest.mark.parametrize("budget", [0.6, 0.8])
def test_predicted_time_is_within_the_budget(budget: float) -> None:
    policy = TimeBudget(budget, ROOFLINE, **SMALL)
    made = fx_approx.analysis.estimate_step_time(network(), policy, IMAGES, cost=ROOFLINE)
    assert made.speedup is not None and 0.95 * budget <= 1 / made.speedup <= budget


@pytest.mark.parametrize("policy", [FlopBudget(0.05), MemoryBudget(0.1), TimeBudget(0.05, ROOFLINE)])
def test_what_cannot_be_met_says_what_can(policy: Any) -> None:
    with pytest.raises(
        ValueError, match=r"budget: 0.\d+ of the exact step cannot be met; the least is (0\.\d+)"
    ) as caught:
        fx_approx.explain(network(), policy, IMAGES)
    least = float(str(caught.value).partition("the least is ")[2].split()[0])
    again = type(policy)(least + 0.001, *([policy.cost] if isinstance(policy, TimeBudget) else []))
    fx_approx.explain(network(), again, IMAGES)


def test_reasons_and_kept_layers() -> None:
    exact = fx_approx.explain(network(), FlopBudget(1.0, **SMALL), IMAGES).plan
    assert not exact.sampled
    assert exact["3.conv1"].reason == "within the budget without it"
    plan = fx_approx.explain(network(), FlopBudget(0.5, **SMALL), IMAGES).plan
    assert plan["0"].reason == "first convolution" and plan["8"].reason == "no layer after it"
    assert all(d.source == "FlopBudget" and "predicted error" in d.reason for d in plan.sampled)
    assert all("asked 0.5" in decision.reason for decision in plan.sampled)
    everything = fx_approx.explain(
        network(), FlopBudget(0.3, keep_first=False, keep_last=False, min_k=1, round_to=1), IMAGES
    ).plan
    assert not {"first convolution", "no layer after it"} & {decision.reason for decision in everything}
    # Readers of one value get one ratio.
    plan = fx_approx.explain(network(), FlopBudget(0.4, **SMALL), IMAGES).plan
    assert plan["4.conv1"].spec == plan["4.shortcut.0"].spec


def test_a_sensitive_layer_is_kept_and_an_insensitive_one_is_not() -> None:
    view, _ = view_of(network(), Exact(), IMAGES)
    names = [name for group in FlopBudget(0.5, **SMALL).groups(view, 0.125)[0] for name in group]
    for spared in ("3.conv1", "5.conv2"):
        measured = Sensitivity(0.5, {name: 10.0 if name == spared else 0.01 for name in names})
        plan = fx_approx.explain(network(), FlopBudget(0.6, sensitivity=measured, **SMALL), IMAGES).plan
        assert spared not in [decision.name for decision in plan.sampled]
    with pytest.raises(ValueError, match=r"sensitivity: measured for another model .* nothing is known of 3\.conv1"):
        fx_approx.explain(network(), FlopBudget(0.6, sensitivity=Sensitivity(0.5, {"x": 1.0}), **SMALL), IMAGES)


@pytest.mark.parametrize("noise", [0.001, 0.1, 1.0])
def test_the_error_budget_holds(noise: float) -> None:
    view, _ = view_of(network(), Exact(), IMAGES)
    base = FlopBudget(0.5, **SMALL)
    groups, _ = base.groups(view, 0.125)
    measured = Sensitivity(0.5, {name: 0.1 for names in groups for name in names}, sgd_noise=2.0)
    policy = ErrorBudget(noise, ROOFLINE, sensitivity=measured, **SMALL)
    plan = fx_approx.explain(network(), policy, IMAGES).plan
    ratios = [plan[names[0]].spec.ratio if plan[names[0]].spec is not None else 1.0 for names in groups]
    errors = policy.errors(view, groups, [*sorted(set(ratios))], measured)
    spent = sum(own[sorted(set(ratios)).index(ratio)] for own, ratio in zip(errors, ratios, strict=True))
    assert spent <= noise * 2.0
    assert bool(plan.sampled) == (noise > 0.001)


def test_more_noise_allowed_is_less_time() -> None:
    view, _ = view_of(network(), Exact(), IMAGES)
    groups, _ = FlopBudget(0.5, **SMALL).groups(view, 0.125)
    measured = Sensitivity(0.5, {name: 0.1 for names in groups for name in names}, sgd_noise=1.0)
    flops = [
        totals(ErrorBudget(noise, FlopModel(), sensitivity=measured, **SMALL)).executed.total
        for noise in (0.05, 0.3, 1.0)
    ]
    assert flops[0] > flops[1] > flops[2]


def test_inside_an_override_the_whole_step_counts() -> None:
    """The budget is of the whole graph, with what the other rules do."""
    policy = Override({"5.*": Uniform(0.25)}, FlopBudget(0.6, **SMALL))
    plan = fx_approx.explain(network(), policy, IMAGES).plan
    assert plan["5.conv1"].source == "Uniform" and plan["3.conv1"].source == "FlopBudget"
    found = fx_approx.explain(network(), plan, IMAGES).report.totals
    assert (found.executed.total + found.selection) / found.exact.total <= 0.6


def test_plans_go_through_json_and_train() -> None:
    plan = fx_approx.explain(network(), FlopBudget(0.5, **SMALL), IMAGES).plan
    again = Plan.from_json(plan.to_json())
    assert again == plan
    approx = fx_approx.transform(network(), again, IMAGES)
    approx(IMAGES).sum().backward()
    assert fx_approx.report(approx).totals.executed == fx_approx.explain(network(), plan, IMAGES).report.totals.executed


def test_through_the_dynamo_frontend() -> None:
    torch._dynamo.reset()
    model, backend = network(), fx_approx.backend(FlopBudget(0.6, **SMALL), inner="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
        torch.compile(model, backend=backend)(IMAGES).sum().backward()
    found = backend.report().totals
    assert 0.58 <= (found.executed.total + found.selection) / found.exact.total <= 0.6


def test_without_example_inputs() -> None:
    with pytest.raises(fx_approx.errors.ShapesRequiredError, match="FlopBudget decides by shapes"):
        fx_approx.transform(network(), FlopBudget(0.5))
    with pytest.raises(ValueError, match="no layer can be"):
        fx_approx.explain(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), FlopBudget(0.5), IMAGES)


BACKWARD: dict[str, Any] = {
    "mode": "backward",
    "sampler": "systematic",
    "scores": "uniform",
    "min_k": 1,
    "round_to": 1,
}


@pytest.mark.parametrize("budget", [0.6, pytest.param(0.9, marks=pytest.mark.slow)])
def test_gradients_each_at_its_own_ratio(budget: float) -> None:
    """Outputs stay exact, so a third of the operations stays; the two gradients of a layer may differ."""
    made = fx_approx.explain(network(), FlopBudget(budget, **BACKWARD), IMAGES)
    spent = (made.report.totals.executed.total + made.report.totals.selection) / made.report.totals.exact.total
    assert 0.98 * budget <= spent <= budget
    assert all(
        set(d.roles) <= {fx_approx.core.candidates.Role.GRAD_INPUT, fx_approx.core.candidates.Role.GRAD_WEIGHT}
        for d in made.plan.sampled
    )
    ratios = {(d.name, role): spec.ratio for d in made.plan.sampled for role, spec in d.roles.items()}
    assert len(set(ratios.values())) > 1
    approx = fx_approx.transform(network(), made.plan, IMAGES)
    exact = network()
    exact.load_state_dict(approx.state_dict())
    assert torch.equal(approx(IMAGES), exact(IMAGES))
    with pytest.raises(ValueError, match=r"the least is 0\.[34]"):
        fx_approx.explain(network(), FlopBudget(0.3, **BACKWARD), IMAGES)
