"""Auto samples what pays, and nothing where it does not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import fx_approx
from fx_approx.compiler.graph_view import GraphView
from fx_approx.compiler.transform import view_of
from fx_approx.core.plan import Cost
from fx_approx.core.step_cost import Model, StepTime, StepWorkload
from fx_approx.policies import Auto, Exact, RooflineModel
from fx_approx.policies.auto_search import drafts
from fx_approx.policies.cost_roofline import Device
from tests.helpers.quick import in_turn

from .test_budget import IMAGES, network

SMALL: dict[str, Any] = {"min_k": 4, "round_to": 4}
FAST = Device("many operations pay", "torch.float32", 1e9, 1e12, 1e12, 1e-9, 1.0, 1.0, 1.0, 1.0)
ROOFLINE = RooflineModel(device=FAST)
SLOW_MEMORY = Device("only bytes count", "torch.float32", 1e18, 1e6, 1e6, 1e-3, 1.0, 1.0, 1.0, 1.0)


def clock(monkeypatch: pytest.MonkeyPatch, low: float, middle: float) -> list[bool]:
    asked: list[bool] = []

    def time(self: GraphView, plans: Any, *, compiled: bool = False, **options: Any) -> list[StepTime]:
        asked.append(compiled)
        assert all(decision.spec.ratio == 0.5 for plan in plans for decision in plan.values())
        return [StepTime(1.0, (1.0, 1.0, 1.0)), *[StepTime(1 / middle, (low, middle, middle))] * len(plans)]

    monkeypatch.setattr(GraphView, "time", time)
    return asked


def test_where_operations_count_all_that_may_be_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = clock(monkeypatch, 1.5, 1.6)
    plan = fx_approx.explain(network(), Auto(cost=ROOFLINE, **SMALL), IMAGES).plan
    assert [d.name for d in plan if not d.roles] == ["0", "8"]
    assert asked == [False]
    fx_approx.explain(network(), Auto(cost=ROOFLINE, compiled=True, **SMALL), IMAGES)
    assert asked == [False, True], "the compiled step is what is timed where asked"
    assert all("measured 1.60 [1.50, 1.60]" in d.reason and "saves" in d.reason for d in plan.sampled)


def test_a_plan_that_the_clock_does_not_confirm_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, 1.01, 1.3)
    plan = fx_approx.explain(network(), Auto(cost=ROOFLINE, **SMALL), IMAGES).plan
    assert not plan.sampled
    assert "but measured 1.30 [1.01, 1.30], below 1.02" in plan["3.conv1"].reason
    with pytest.warns(fx_approx.errors.NoEffectWarning):
        fx_approx.transform(network(), Auto(cost=ROOFLINE, **SMALL), IMAGES)


def test_without_a_check_the_prediction_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = clock(monkeypatch, 0.5, 0.5)
    cost = ROOFLINE
    assert fx_approx.explain(network(), Auto(cost=cost, check=False, **SMALL), IMAGES).plan.sampled
    plan = fx_approx.explain(network(), Auto(cost=cost, check=False, margin=100, **SMALL), IMAGES).plan
    assert not plan.sampled and "below 100" in plan["3.conv1"].reason and not asked


def clock_by_plan(monkeypatch: pytest.MonkeyPatch, speedups: dict[tuple[str, bool], float]) -> list[tuple[str, bool]]:
    """Times told by scope and by whether the last layer is sampled; returns what was timed."""
    asked: list[tuple[str, bool]] = []

    def time(self: GraphView, plans: Any, **options: Any) -> list[StepTime]:
        asked.extend((next(iter(plan.values())).scope, "8" in plan) for plan in plans)
        return [StepTime(1 / s, (s, s, s)) for s in (1.0, *(speedups[kind] for kind in asked))]

    monkeypatch.setattr(GraphView, "time", time)
    return asked


ALL = [("value", False), ("value", True), ("group", False), ("group", True)]


@pytest.mark.parametrize(
    ("times", "scope", "last"),
    [
        ((1.5, 1.6, 1.7, 1.8), "group", True),
        ((1.5, 1.6, 1.8, 1.8), "group", False),
        ((1.5, 1.8, 1.7, 1.8), "value", True),
        ((1.76, 1.8, 1.7, 1.8), "value", False),
        ((1.74, 1.7, 1.76, 1.8), "group", False),
    ],
)
def test_the_fastest_draft_is_taken_and_of_equals_the_one_of_least_error(
    monkeypatch: pytest.MonkeyPatch, times: tuple[float, ...], scope: str, last: bool
) -> None:
    asked = clock_by_plan(monkeypatch, dict(zip(ALL, times, strict=True)))
    plan = fx_approx.explain(network(), Auto(cost=ROOFLINE, **SMALL), IMAGES).plan
    assert asked == ALL
    assert {decision.scope for decision in plan.sampled} == {scope}
    assert bool(plan["8"].roles) == last


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"scope": "value"}, ALL[:2]),
        ({"keep_last": True}, [ALL[0], ALL[2]]),
        ({"keep_last": False, "scope": "group"}, ALL[3:]),
        ({"tries": 1}, ALL[3:]),
        ({"tries": 2}, [ALL[1], ALL[3]]),
    ],
)
def test_what_is_tried(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], expected: list[tuple[str, bool]]
) -> None:
    """Operations are all that counts here: the fewest are left where the last layer is sampled, at group scope."""
    asked = clock_by_plan(monkeypatch, dict.fromkeys(ALL, 1.5))
    fx_approx.explain(network(), Auto(cost=ROOFLINE, **SMALL, **options), IMAGES)
    assert asked == expected


def test_both_drafts_of_a_scope_are_timed_where_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = clock_by_plan(monkeypatch, {("value", False): 1.5})
    auto = Auto(cost=Penalty("3.conv2"), scope="value", keep_last=True, **SMALL)
    plan = fx_approx.explain(network(), auto, IMAGES).plan
    assert asked == [("value", False)], "all at once is predicted to be much slower than exact"
    assert not plan["3.conv2"].roles
    asked.clear()
    auto = dataclasses.replace(auto, cost=Penalty("3.conv2", 0.2))
    assert not fx_approx.explain(network(), auto, IMAGES).plan["3.conv2"].roles
    assert asked == [("value", False)] * 2


@pytest.mark.parametrize(("scope", "slicing"), in_turn(["value", "group"], [2e8, 5e8]))
def test_no_selection_is_left_that_does_not_pay_and_none_is_missing_that_would(scope: str, slicing: float) -> None:
    """The pruned draft is a local optimum, by the cost model itself."""
    device = Device("in between", "torch.float32", 1e11, 1e10, slicing, 1e-6, 0.8, 0.7, 0.5, 0.1)
    cost, policy = RooflineModel(device=device), Auto(scope=scope, keep_last=True, **SMALL)
    view = view_of(network(), Exact(), IMAGES)[0]
    pruned, everything = drafts(policy, 0.5, view, cost)
    assert 0 < len(pruned.decisions) < len(everything.decisions)
    assert pruned.speedup > everything.speedup
    whole, now = cost.step(view.work({}), view).seconds, cost.step(pruned.work, view).seconds
    assert whole is not None and now is not None and pruned.speedup == pytest.approx(whole / now)
    for place, ratio in enumerate(pruned.ratios):
        if ratio < 1:
            ratios = [*pruned.ratios[:place], 1.0, *pruned.ratios[place + 1 :]]
            other = cost.step(view.work(policy.decisions(pruned.groups, ratios)), view).seconds
            assert other is not None and other - now >= 1e-3 * whole
            assert pruned.gains[pruned.groups[place]] == pytest.approx((other - now) / whole)


class Penalty:
    """Operations, but sampling ``name`` costs as much as a share of the whole step."""

    omits = "all but operations"

    def __init__(self, name: str, share: float = 1) -> None:
        self.name, self.share = name, share

    def step(self, work: StepWorkload, model: Model) -> Cost:
        own = any(product.candidate.name == self.name and product.roles for product in work.products)
        return Cost(seconds=work.flops + own * self.share * work.flops_exact)


@pytest.mark.parametrize("name", ["3.conv2", "5.conv1"])
def test_what_does_not_pay_is_left_out(name: str) -> None:
    plan = fx_approx.explain(network(), Auto(cost=Penalty(name), check=False, **SMALL), IMAGES).plan
    assert not plan[name].roles and "saves -" in plan[name].reason
    assert len(plan.sampled) >= 4


def test_where_nothing_pays_nothing_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slicing weights costs more bytes than narrow activations save at two pixels."""
    asked = clock(monkeypatch, 9.0, 9.0)
    policy = Auto(cost=RooflineModel(device=SLOW_MEMORY), **SMALL)
    plan = fx_approx.explain(torch.nn.Sequential(*list(network())[3:6]), policy, torch.randn(2, 32, 1, 1)).plan
    assert not plan.sampled and not asked


def test_counts_are_aligned() -> None:
    policy = Auto(0.4, cost=ROOFLINE, check=False, min_k=4, round_to=8)
    rows = fx_approx.explain(network(), policy, IMAGES).report.rows
    assert {sample.k % 8 for row in rows for sample in row.samples if sample.k is not None} == {0}


def test_a_network_that_cannot_be_sampled() -> None:
    plan = fx_approx.explain(torch.nn.Sequential(torch.nn.Linear(4, 4)), Auto(cost=ROOFLINE), torch.randn(2, 4)).plan
    assert not plan.sampled and plan["0"].reason == "no layer after it"
