"""A ratio for each layer: the same as the override that it stands for."""

from __future__ import annotations

from typing import Any

import pytest

import fx_approx
from fx_approx.policies import Exact, FlopBudget, Override, Paper, PerLayer, Uniform

from ..models import Cnn
from .test_budget import IMAGES, SMALL, network

WEIGHT = Uniform(0.9, "systematic", min_k=2, scope="layer")


def test_each_layer_has_its_ratio() -> None:
    plan = fx_approx.explain(Cnn(), PerLayer({"conv2": 0.25, "conv*": 0.5}, uniform=WEIGHT)).plan
    rules = {
        "conv2": Uniform(0.25, "systematic", min_k=2, scope="layer"),
        "conv*": Uniform(0.5, "systematic", min_k=2, scope="layer"),
    }
    assert plan == fx_approx.explain(Cnn(), Override(rules, Exact())).plan
    assert [decision.name for decision in plan.sampled] == ["conv1", "conv2"]


def test_the_others_have_a_policy_of_their_own() -> None:
    plan = fx_approx.explain(Cnn(), PerLayer({"grouped": 0.25}, Paper(0.5))).plan
    assert plan["conv2"].source == "Paper" and plan["grouped"].spec == fx_approx.SamplerConfig("topk", 0.25)


def test_a_budget_for_the_others() -> None:
    plan = fx_approx.explain(network(), PerLayer({"5.*": 0.25}, FlopBudget(0.7, **SMALL)), IMAGES).plan
    totals = fx_approx.explain(network(), plan, IMAGES).report.totals
    assert plan["5.conv1"].spec is not None and plan["5.conv1"].spec.ratio == 0.25
    assert (totals.executed.total + totals.selection) / totals.exact.total <= 0.7


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (({},), ValueError, "ratios: expected at least one glob"),
        ((0.5,), TypeError, "ratios: expected globs with ratios"),
        (({"fc": 2.0},), ValueError, "ratio: expected a number"),
        (({1: 0.5},), TypeError, "rules: expected a glob"),
        (({"fc": 0.5}, None), TypeError, "base: expected a policy"),
        (({"fc": 0.5}, Exact(), 0.5), TypeError, "uniform: expected a Uniform"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PerLayer(*arguments)


def test_a_glob_that_matches_nothing() -> None:
    with pytest.raises(ValueError, match="no candidate matches 'fd'"):
        fx_approx.explain(Cnn(), PerLayer({"fd": 0.5}))
