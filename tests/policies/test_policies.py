"""Policies and plans: what is decided, why, and that a plan can be edited, stored and applied again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import fx_approx
from fx_approx import Plan, SamplerConfig
from fx_approx.core.candidates import Candidate, Role
from fx_approx.core.plan import Decision, Policy
from fx_approx.policies import (
    Auto,
    Exact,
    FlopBudget,
    FlopModel,
    MemoryBudget,
    Override,
    Paper,
    TimeBudget,
    Uniform,
    parse_policy,
)
from tests.helpers.models import Attention, CalledTwice, Cnn, NestedDropout, PlainCnn, mlp, same, train_step

HALF = Uniform(0.5, scores="online")


def plan_of(model: Any, policy: Policy, x: Any = None) -> Plan:
    return fx_approx.explain(model, policy, x).plan


def sampled(plan: Plan) -> list[str]:
    return [decision.name for decision in plan.sampled]


def test_every_candidate_gets_one_decision_with_a_reason() -> None:
    for policy in (Exact(), HALF, Paper(), Override({"fc": Exact()}, HALF)):
        plan = plan_of(Cnn(), policy)
        assert [decision.name for decision in plan] == ["conv1", "conv2", "grouped", "depthwise", "fc"]
        assert all(decision.reason and decision.source for decision in plan)


def test_exact_samples_nothing() -> None:
    assert sampled(plan_of(Cnn(), Exact())) == []


def test_uniform_samples_all_that_can_be_sampled() -> None:
    plan = plan_of(Cnn(), Uniform(0.25, "systematic", min_k=2, epsilon=0.2, scope="layer"))
    assert sampled(plan) == ["conv1", "conv2", "grouped", "fc"]
    assert plan["conv2"].spec == SamplerConfig("systematic", 0.25, 2, "weight", epsilon=0.2)
    assert plan["depthwise"].reason.startswith("depthwise") and plan["depthwise"].source == "blocked"


def test_a_minimal_k_that_keeps_everything_is_exact_and_says_so() -> None:
    plan = plan_of(Cnn(), Uniform(0.5, min_k=4, scores="online"))
    assert "min_k=4 keeps all 3 pairs" in plan["conv1"].reason
    assert sampled(plan) == ["conv2", "fc"]


def test_the_paper_rule_on_a_cnn() -> None:
    plan = plan_of(Cnn(), Paper(0.3))
    assert sampled(plan) == ["conv2", "grouped"]
    assert plan["conv2"].spec == SamplerConfig("topk", 0.3)
    assert plan["conv1"].reason == "first convolution"
    assert plan["fc"].reason.startswith("classifier")


def test_the_paper_rule_samples_the_first_linear_layer() -> None:
    assert sampled(plan_of(mlp(), Paper())) == ["0", "2"]


def test_the_paper_rule_leaves_other_products_exact() -> None:
    plan = plan_of(Attention(), Paper())
    assert sampled(plan) == ["q", "k", "v"]
    assert plan["matmul"].reason == "the paper samples linear and convolution layers"


def test_the_paper_rule_is_the_default() -> None:
    assert fx_approx.explain(Cnn()).plan.to_dict() == plan_of(Cnn(), Paper(0.5)).to_dict()


def test_override_by_glob() -> None:
    plan = plan_of(NestedDropout(), Override({"layer1.*": Uniform(0.25, scores="online"), "layer2": Exact()}, HALF))
    assert plan["layer1.fc1"].spec == plan["layer1.fc2"].spec == SamplerConfig("topk", 0.25)
    assert plan["layer2"].spec is None and plan["layer2"].source == "Exact"


def test_the_first_rule_that_matches_decides() -> None:
    rules = {"conv1": Uniform(0.25, scores="online"), "conv*": Exact()}
    assert sampled(plan_of(PlainCnn(), Override(rules, HALF))) == ["conv1", "fc"]
    with pytest.raises(ValueError, match="'conv1' decides nothing: rules before it match first"):
        plan_of(PlainCnn(), Override(dict(reversed(rules.items())), HALF))


def test_override_of_one_call_of_a_layer() -> None:
    model = CalledTwice()
    assert sampled(plan_of(model, Override({"fc#2": Exact()}, HALF))) == ["fc", "head"]
    assert sampled(plan_of(model, Override({"fc": Exact()}, HALF))) == ["head"]


def test_override_by_the_name_of_a_functional_call() -> None:
    plan = plan_of(Attention(), Override({"matmul*": HALF, "*": Exact()}, HALF))
    assert sampled(plan) == ["matmul", "matmul#2"]


def test_a_glob_without_match_lists_the_names() -> None:
    with pytest.raises(ValueError, match=r"rules: .*'convX\*'.*conv1, conv2, fc"):
        plan_of(PlainCnn(), Override({"conv1": Exact(), "convX*": Exact()}, HALF))


@pytest.mark.parametrize("rules, base", [({1: Exact()}, HALF), ({"a": 0.5}, HALF), ({"a": Exact()}, None)])
def test_override_checks_its_types(rules: Any, base: Any) -> None:
    with pytest.raises(TypeError, match=r"rules|base"):
        Override(rules, base)


@pytest.mark.parametrize(
    "text, policy",
    [
        ("exact", Exact()),
        ("paper", Paper(0.5)),
        ("paper:0.3", Paper(0.3)),
        ("topk:0.25", Uniform(0.25, scores="online")),
        ("systematic:0.5:weight", Uniform(0.5, "systematic", scope="layer")),
        ("topk:0.5:ema:group", Uniform(0.5, scores="ema", scope="group")),
        ("crs", Uniform(0.5, "crs", scores="online")),
        ("auto:0.25", Auto(0.25, check=False)),
        ("flops:0.4", FlopBudget(0.4)),
        ("memory:0.8", MemoryBudget(0.8)),
        ("time:0.7", TimeBudget(0.7)),
    ],
)
def test_policies_as_text(text: str, policy: Policy) -> None:
    assert parse_policy(text) == policy


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected exact, paper"),
        ("top", "topk"),
        ("exact:0.5", "exact"),
        ("paper:0.5:online", "paper"),
        ("topk:half", "'half'"),
        ("flops", "flops, memory, time with :budget"),
        ("flops:0", "budget"),
        ("topk:0", "ratio"),
        ("topk:nan", "ratio"),
        ("topk:0.5:norms", "online"),
        ("topk:0.5:online:x", "scope: expected one of layer, value, group, got 'x'"),
        ("topk:0.5:online:value", "scope: 'value' shares .* scores 'online' .*set scores to 'weight'"),
        ("topk:0.5:online:site:x", "topk"),
    ],
)
def test_wrong_policies_as_text(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_policy(text)


@pytest.mark.parametrize("scope", ["value", "group"])
@pytest.mark.parametrize(
    "make",
    [
        lambda scope: Uniform(0.5, scores="online", scope=scope),
        lambda scope: Uniform(0.5, scores="input", scope=scope),
        lambda scope: Paper(scope=scope),
        lambda scope: dataclasses.replace(HALF, scope=scope),
        lambda scope: Decision("0", {Role.OUTPUT: SamplerConfig("topk", 0.5)}, scope=scope),
        lambda scope: plan_of(mlp(), HALF).edit("0", SamplerConfig("topk", 0.5), scope=scope),
        lambda scope: Plan.from_json(plan_of(mlp(), HALF).to_json().replace('"scope": "layer"', f'"scope": "{scope}"')),
    ],
    ids=["Uniform", "input", "Paper", "replace", "Decision", "edit", "json"],
)
def test_scores_that_read_activations_cannot_be_shared(make: Callable[[str], Any], scope: str) -> None:
    pattern = f"scope: '{scope}' shares .*scores '(online|input)'.*set scores to 'weight', 'ema' or 'uniform', or scope"
    with pytest.raises(ValueError, match=pattern):
        make(scope)
    with pytest.raises(ValueError, match="per_batch"):
        Decision("0", {Role.OUTPUT: SamplerConfig("topk", 0.5, scores="weight", per_batch=True)}, scope=scope)


def test_explain_edit_transform() -> None:
    model, x = mlp(), torch.randn(6, 12)
    plan = plan_of(model, Exact())
    edited = plan.edit("2", SamplerConfig("topk", 0.25)).edit("0", SamplerConfig("systematic", 0.5))
    assert sampled(plan) == [] and sampled(edited) == ["0", "2"]
    assert edited["2"].source == "edit" and edited["2"].reason
    approx = fx_approx.transform(model, edited.edit("0", None))
    expected = fx_approx.transform(model, Override({"2": Uniform(0.25, scores="online")}, Exact()))
    assert same(train_step(approx, x), train_step(expected, x))
    with pytest.raises(KeyError, match="no candidate '9'"):
        plan.edit("9", None)


def test_a_plan_survives_json() -> None:
    plan = plan_of(Cnn(), Uniform(0.5, "bernoulli", epsilon=0.2, scores="online"), torch.randn(2, 3, 8, 8))
    text = plan.to_json()
    back = Plan.from_json(text)
    assert back == plan and back.to_json() == text
    assert json.loads(text)["format"].startswith("fx_approx.plan")
    assert sampled(plan_of(Cnn(), back)) == sampled(plan)


def test_a_plan_of_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="format"):
        Plan.from_dict({"format": "other/1", "decisions": []})


def test_a_plan_made_without_shapes_fits_with_shapes_and_the_other_way() -> None:
    model, x = Attention(), torch.randn(3, 5, 8)
    for plan, example in ((plan_of(model, HALF), x), (plan_of(model, HALF, x), None)):
        assert sampled(plan_of(model, plan, example)) == sampled(plan)


@pytest.mark.parametrize(
    "other, message",
    [
        (lambda: torch.nn.Sequential(torch.nn.Linear(12, 16)), "only in the plan: 2; only in the plan: 4"),
        (Cnn, "only in the model: conv1"),
        (lambda: mlp().append(torch.nn.Linear(4, 4)), "only in the model: 5"),
        (lambda: torch.nn.Sequential(*mlp()[:4], torch.nn.Linear(8, 4)), "4: pairs is 8, the plan has 16"),
        (lambda: torch.nn.Sequential(torch.nn.Conv1d(12, 16, 1), *mlp()[1:]), "0: kind is 'conv1d'"),
    ],
)
def test_a_plan_for_another_model_names_what_differs(other: Any, message: str) -> None:
    with pytest.raises(fx_approx.errors.PlanMismatchError, match=message):
        fx_approx.transform(other(), plan_of(mlp(), HALF))


def test_a_plan_cannot_sample_what_must_stay_exact() -> None:
    plan = plan_of(Cnn(), HALF).edit("depthwise", SamplerConfig())
    with pytest.raises(fx_approx.errors.PlanMismatchError, match="depthwise: the plan samples it"):
        fx_approx.transform(Cnn(), plan)


def test_decisions_carry_costs_where_shapes_are_known() -> None:
    model = PlainCnn()
    assert all(decision.cost is None for decision in plan_of(model, HALF))
    for decision in plan_of(model, HALF, torch.randn(2, 3, 8, 8)):
        assert decision.cost is not None and decision.cost.omits
        assert decision.cost.exact.flops is not None and decision.cost.sampled.flops is not None
        assert 0 < decision.cost.sampled.flops < decision.cost.exact.flops
        assert decision.cost.exact.seconds is None
    # conv2: 2 * (2 * 3 * 3) rows * 8 columns * (8 * 9) contraction, three roles
    conv2 = plan_of(model, Exact(), torch.randn(2, 3, 8, 8))["conv2"].cost
    assert conv2 is not None and conv2.exact.flops == conv2.sampled.flops == 3 * 2 * 18 * 8 * 72


@dataclasses.dataclass(frozen=True)
class LargestOnly:
    """A policy of a user: reads shapes."""

    needs_shapes = True

    def decide(self, candidates: Sequence[Candidate]) -> list[Decision]:
        flops = [FlopModel().estimate(candidate, {}).exact.flops for candidate in candidates]  # type: ignore[union-attr]
        return [
            Decision(
                c.name, {Role.OUTPUT: SamplerConfig()} if f == max(flops) else {}, f"{f} operations", "LargestOnly"
            )
            for c, f in zip(candidates, flops, strict=True)
        ]


@pytest.mark.parametrize("policy", [LargestOnly(), Override({"conv1": LargestOnly()}, Exact())])
def test_a_policy_that_needs_shapes_says_so(policy: Policy) -> None:
    with pytest.raises(fx_approx.errors.ShapesRequiredError, match=r"needs? .*shapes|by shapes.*example_inputs"):
        fx_approx.transform(PlainCnn(), policy)
    assert len(plan_of(PlainCnn(), policy, torch.randn(2, 3, 8, 8)).sampled) == 1


def test_a_policy_of_a_user_works_and_is_checked() -> None:
    assert sampled(plan_of(PlainCnn(), LargestOnly(), torch.randn(2, 3, 8, 8))) == ["conv1"]

    class Short(LargestOnly):
        needs_shapes = False

        def decide(self, candidates: Sequence[Candidate]) -> list[Decision]:
            return []

    with pytest.raises(ValueError, match="decisions: the policy made 0 for 3 candidates"):
        fx_approx.transform(PlainCnn(), Short())


def test_policies_are_values() -> None:
    assert Uniform(0.5, scores="online") == Uniform(0.5, scores="online") != Uniform(0.25, scores="online")
    with pytest.raises(dataclasses.FrozenInstanceError):
        HALF.ratio = 0.3  # type: ignore[misc]
