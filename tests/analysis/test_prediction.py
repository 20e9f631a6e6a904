"""Predictions: what the cost model says of the plan, and what the clock says beside it."""

from __future__ import annotations

import pytest

import fx_approx
from fx_approx.compiler.transform import view_of
from fx_approx.policies import Exact, FlopModel, RooflineModel, Uniform
from fx_approx.policies.cost_roofline import Device
from tests.policies.test_budget import IMAGES, network

COST = RooflineModel(device=Device("made up", "torch.float32", 1e11, 1e10, 1e10, 1e-6, 0.8, 0.7, 0.5, 0.1))
VALUE = Uniform(0.5)


def test_a_prediction_is_the_cost_of_both_steps() -> None:
    found = fx_approx.analysis.estimate_step_time(network(), VALUE, IMAGES, cost=COST)
    view, plan = view_of(network(), VALUE, IMAGES)
    work = view.work({decision.name: decision for decision in plan.sampled})
    assert (found.exact, found.now) == (COST.step(work.exact, view), COST.step(work, view))
    assert found.speedup is not None and found.speedup > 1.2 and found.measured is None
    assert f"{found.speedup:.2f} times as fast, predicted" in str(found) and COST.omits in str(found)


def test_a_plan_and_the_exact_policy() -> None:
    plan = fx_approx.explain(network(), VALUE, IMAGES).plan
    assert fx_approx.analysis.estimate_step_time(
        network(), plan, IMAGES, cost=COST
    ) == fx_approx.analysis.estimate_step_time(network(), VALUE, IMAGES, cost=COST)
    assert fx_approx.analysis.estimate_step_time(network(), Exact(), IMAGES, cost=COST).speedup == 1


def test_the_clock_beside_it() -> None:
    found = fx_approx.analysis.estimate_step_time(network(), VALUE, IMAGES, cost=COST, check=True, repeats=3)
    assert found.measured is not None and f"measured {found.measured.speedup[1]:.2f}" in str(found)


def test_operations_have_no_speedup() -> None:
    found = fx_approx.analysis.estimate_step_time(network(), VALUE, IMAGES, cost=FlopModel())
    assert found.speedup is None and "operations exact" in str(found)


def test_demand_can_be_left_out() -> None:
    with_demand, without = (
        fx_approx.analysis.estimate_step_time(network(), VALUE, IMAGES, cost=FlopModel(), prune_unread=demand).now.flops
        for demand in (True, False)
    )
    assert with_demand is not None and without is not None and with_demand < without


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="repeats: expected an integer of at least 1, got 0"):
        fx_approx.analysis.estimate_step_time(network(), VALUE, IMAGES, repeats=0)
    with pytest.raises(ValueError, match="example_inputs: expected a training batch"):
        fx_approx.analysis.estimate_step_time(network(), VALUE, None)
