"""Policies and plans: what is decided, why, and that a plan can be edited, stored and applied again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import fx_approx
from fx_approx import Plan, SamplerConfig, policies
from fx_approx.core.candidates import Candidate, Role
from fx_approx.core.plan import Decision, Policy
from fx_approx.core.policy_names import POLICIES as NAMED
from fx_approx.core.policy_names import SAMPLERS as NAMED_SAMPLERS
from fx_approx.policies import (
    Auto,
    ErrorBudget,
    Exact,
    FlopBudget,
    FlopModel,
    GradientSampling,
    HiddenUnits,
    MemoryBudget,
    Override,
    Paper,
    RooflineModel,
    Sensitivity,
    TimeBudget,
    Tokens,
    Uniform,
    calibrate,
    parse_policy,
)
from fx_approx.policies.cost_roofline import Device
from fx_approx.policies.uniform import DEFAULT_POLICY
from fx_approx.sampling.base import SAMPLERS
from tests.helpers.models import Attention, CalledTwice, Cnn, NestedDropout, PlainCnn, mlp, same, train_step

HALF = Uniform(0.5, scores="online")


def plan_of(model: Any, policy: Policy, x: Any = None) -> Plan:
    return fx_approx.explain(model, policy, x).plan


def sampled(plan: Plan) -> list[str]:
    return [decision.name for decision in plan.sampled]


X = torch.randn(2, 3, 8, 8)
DEVICE = Device("made up", "torch.float32", 1e11, 1e10, 1e10, 1e-6, 0.8, 0.7, 0.5, 0.1)
KNOWN = Sensitivity(0.5, {"conv2": 0.1, "grouped": 0.1, "fc": 0.1}, 1.0)
ALL = ["conv1", "conv2", "grouped", "fc"]
# A policy; what it samples of ``Cnn`` (None: what its cost model says); why it leaves one layer exact.
POLICIES: list[tuple[Policy, list[str] | None, dict[str, str]]] = [
    (Exact(), [], {"conv1": "asked for"}),
    (HALF, ALL, {"depthwise": "depthwise"}),
    (
        Uniform(0.25, "systematic", min_k=2, epsilon=0.2),
        ["conv1", "conv2", "grouped", "fc"],
        {"depthwise": "depthwise"},
    ),
    (Uniform(0.5, min_k=4, scores="online"), ["conv2", "fc"], {"conv1": "min_k=4 keeps all 3 pairs"}),
    (Paper(0.3), ["conv2", "grouped"], {"conv1": "first convolution", "fc": "classifier"}),
    (Override({"fc": Exact()}, HALF), ["conv1", "conv2", "grouped"], {"fc": "asked for"}),
    (GradientSampling.weight_gradient(0.5), ALL, {"depthwise": "depthwise"}),
    (FlopBudget(0.8, min_k=1, round_to=1), None, {"conv1": "first convolution"}),
    (MemoryBudget(0.97, min_k=1, round_to=1), None, {"conv1": "first convolution"}),
    (TimeBudget(0.97, RooflineModel(device=DEVICE), min_k=1, round_to=1), None, {"conv1": "first convolution"}),
    (
        ErrorBudget(0.5, RooflineModel(device=DEVICE), sensitivity=KNOWN, min_k=1, round_to=1),
        None,
        {"conv1": "first convolution"},
    ),
    (Auto(cost=RooflineModel(device=DEVICE), check=False, min_k=1, round_to=1), None, {"conv1": "first convolution"}),
    (Tokens(0.5), [], {}),
    (HiddenUnits(HALF), None, {"conv1": "no layer before it"}),
]


def test_every_policy_has_a_row() -> None:
    public = [getattr(policies, name) for name in policies.__all__ if name != "Policy"]
    classes = {one for one in public if isinstance(one, type) and hasattr(one, "decide")}
    assert classes == {type(policy) for policy, _, _ in POLICIES}


@pytest.mark.parametrize("policy, chosen, reasons", POLICIES, ids=lambda value: type(value).__name__)
def test_every_candidate_gets_one_decision_with_a_reason(
    policy: Policy, chosen: list[str] | None, reasons: dict[str, str]
) -> None:
    """And the plan goes through JSON, and is a policy that decides the same."""
    plan = plan_of(Cnn(), policy, X)
    assert [decision.name for decision in plan] == ["conv1", "conv2", "grouped", "depthwise", "fc"]
    assert all(decision.reason and decision.source for decision in plan)
    assert plan["depthwise"].source == "blocked"
    assert chosen is None or sampled(plan) == chosen
    for name, reason in reasons.items():
        assert reason in plan[name].reason
    text = plan.to_json()
    assert json.loads(text)["format"].startswith("fx_approx.plan")
    back = Plan.from_json(text)
    assert back == plan and back.to_json() == text
    assert sampled(plan_of(Cnn(), back, X)) == sampled(plan)


def test_samplers_are_those_that_were_asked_for() -> None:
    plan = plan_of(Cnn(), Uniform(0.25, "systematic", min_k=2, epsilon=0.2), X)
    assert plan["conv2"].spec == SamplerConfig("systematic", 0.25, 2, "weight", epsilon=0.2)
    assert plan_of(Cnn(), Paper(0.3))["conv2"].spec == SamplerConfig("topk", 0.3)


def test_the_paper_rule_leaves_other_products_and_the_classifier_exact() -> None:
    assert sampled(plan_of(mlp(), Paper())) == ["0", "2"]
    plan = plan_of(Attention(), Paper())
    assert sampled(plan) == ["q", "k", "v"]
    assert plan["matmul"].reason == "the paper samples linear and convolution layers"


def test_the_default_is_what_the_advice_begins_with() -> None:
    assert Uniform(0.65, min_k=16) == DEFAULT_POLICY
    model, x = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(3))), torch.randn(2, 32)
    plan = fx_approx.explain(model, example_inputs=x).plan
    assert plan.to_dict() == plan_of(model, DEFAULT_POLICY, x).to_dict() and plan.sampled


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


def test_override_by_a_function_of_name_and_module() -> None:
    model, seen = CalledTwice(), {}

    def square(name: str, module: nn.Module) -> bool:
        seen[name] = module
        return isinstance(module, nn.Linear) and module.in_features == module.out_features

    squares = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.in_features == m.out_features]
    plan = plan_of(model, Override({square: Exact()}, HALF))
    assert sampled(plan) == ["head"] and squares == ["fc"]  # both calls of fc have its name
    assert seen == {"fc": model.fc, "head": model.head}  # the user's own modules
    assert Plan.from_json(plan.to_json()) == plan

    attention = Attention()
    plan = plan_of(attention, Override({lambda name, module: module is attention: HALF}, Exact()))
    assert sampled(plan) == ["matmul", "matmul#2", "einsum", "bmm"]  # functional calls stand in a module's forward
    nested = Override({lambda name, module: name == "fc": Override({"fc#2": Exact()}, HALF)}, Exact())
    assert sampled(plan_of(model, nested)) == ["fc"]


def never(name: str, module: nn.Module) -> bool:
    return False


def test_policies_as_text() -> None:
    for text, policy in {
        "exact": Exact(),
        "paper": Paper(0.5),
        "paper:0.3": Paper(0.3),
        "topk:0.25": Uniform(0.25),
        "systematic:0.5:weight": Uniform(0.5, "systematic"),
        "topk:0.5:ema:group": Uniform(0.5, scores="ema", scope="group"),
        "crs": Uniform(0.5, "crs"),
        "backward:0.3": GradientSampling.backward(0.3),
        "auto:0.25": Auto(0.25, check=False),
        "hidden-units": HiddenUnits(),
        "hidden-units:0.25": HiddenUnits(Uniform(0.25, min_k=16, round_to=8)),
        "tokens": Tokens(0.5),
        "tokens:0.25": Tokens(0.25),
        "flops:0.4": FlopBudget(0.4),
        "memory:0.8": MemoryBudget(0.8),
        "time:0.7": TimeBudget(0.7),
    }.items():
        assert parse_policy(text) == policy, text
    assert set(NAMED_SAMPLERS) == set(SAMPLERS), "the help lists every sampler"
    for name, (number, _) in NAMED.items():
        parse_policy(f"{name}:0.5" if number else name)


BACKWARD: dict[str, Any] = {"mode": "backward", "sampler": "systematic", "scores": "uniform"}
SENSITIVE = Sensitivity(0.5, {})
#: Calls with wrong values, and what the message says.
WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: Override({1: Exact()}, HALF), TypeError, "rules"),  # type: ignore[dict-item]
    (lambda: Override({"a": 0.5}, HALF), TypeError, "rules"),  # type: ignore[dict-item]
    (lambda: Override({nn.ReLU(): Exact()}, HALF), TypeError, "a function of \\(name, module\\), got ReLU"),
    (lambda: Override({never: Exact()}, HALF).decide([]), TypeError, "rules: never reads modules"),
    (lambda: plan_of(mlp(), Override({never: Exact()}, HALF)), ValueError, "no candidate matches never; there are: "),
    (
        lambda: plan_of(mlp(), Override({lambda name, module: None: Exact()}, HALF)),  # type: ignore[dict-item]
        TypeError,
        r"lambda>\('0', module\): expected True or False, got None",
    ),
    (lambda: Override({"a": Exact()}, None), TypeError, "base"),  # type: ignore[arg-type]
    (lambda: parse_policy(""), ValueError, "expected exact, paper"),
    (lambda: parse_policy("top"), ValueError, "topk"),
    (lambda: parse_policy("exact:0.5"), ValueError, "exact"),
    (lambda: parse_policy("paper:0.5:online"), ValueError, "paper"),
    (lambda: parse_policy("topk:half"), ValueError, "'half'"),
    (lambda: parse_policy("flops"), ValueError, "flops, memory, time with :budget"),
    (lambda: parse_policy("flops:0"), ValueError, "budget"),
    (lambda: parse_policy("topk:0"), ValueError, "ratio"),
    (lambda: parse_policy("topk:nan"), ValueError, "ratio"),
    (lambda: parse_policy("topk:0.5:norms"), ValueError, "online"),
    (lambda: parse_policy("topk:0.5:weight:x"), ValueError, "scope: expected one of layer, value, group, got 'x'"),
    (
        lambda: parse_policy("topk:0.5:online:value"),
        ValueError,
        "scope: 'value' shares .* scores 'online' .*set scores to 'weight'",
    ),
    (lambda: parse_policy("topk:0.5:online:site:x"), ValueError, "topk"),
    (lambda: Plan.from_dict({"format": "other/1", "decisions": []}), ValueError, "format"),
    (lambda: plan_of(mlp(), Exact()).edit("9", None), KeyError, "no candidate '9'"),
    (
        lambda: plan_of(PlainCnn(), Override({"conv1": Exact(), "convX*": Exact()}, HALF)),
        ValueError,
        r"rules: .*'convX\*'.*conv1, conv2, fc",
    ),
    (lambda: FlopBudget(0.0), ValueError, r"budget: expected a number in \(0, 1\], got 0.0"),
    (lambda: FlopBudget(1.5), ValueError, r"budget: expected a number in \(0, 1\], got 1.5"),
    (lambda: TimeBudget(float("nan")), ValueError, "budget: expected a number"),
    (lambda: MemoryBudget("half"), TypeError, "budget: expected a number"),  # type: ignore[arg-type]
    (lambda: FlopBudget(True), TypeError, "budget: expected a number"),
    (lambda: FlopBudget(0.5, ratios=()), ValueError, "ratios: expected at least one"),
    (lambda: FlopBudget(0.5, ratios=(0.5, 2)), ValueError, "ratios: expected a number"),
    (lambda: FlopBudget(0.5, scores="online"), ValueError, "scores: expected weight, ema or uniform"),
    (lambda: FlopBudget(0.5, scope="all"), ValueError, "scope: expected one of"),
    (lambda: FlopBudget(0.5, sampler="best"), ValueError, "best"),
    (lambda: FlopBudget(0.5, keep_first=1), TypeError, "keep_first: expected True or False"),  # type: ignore[arg-type]
    (lambda: FlopBudget(0.5, sensitivity={"a": 1}), TypeError, "sensitivity: expected a Sens"),  # type: ignore[arg-type]
    (lambda: FlopBudget(0.5, mode="sideways"), ValueError, "mode: expected forward or backward"),
    (lambda: FlopBudget(0.5, mode="backward"), ValueError, "grad_weight: scores 'weight' say nothing of it"),
    (lambda: FlopBudget(0.5, sensitivity=SENSITIVE, **BACKWARD), ValueError, "sensitivity: measured for outputs only"),
    (lambda: FlopBudget(0.5).decide([]), TypeError, "FlopBudget decides about a graph as a whole"),
    (lambda: ErrorBudget(0.1), ValueError, "sensitivity: expected one with sgd_noise"),
    (lambda: ErrorBudget(0.1, sensitivity=SENSITIVE), ValueError, "sensitivity: expected one with sgd"),
    (lambda: ErrorBudget(0, sensitivity=Sensitivity(0.5, {}, 1.0)), ValueError, "noise: expected a number above 0"),
    (lambda: Sensitivity(1.0, {}), ValueError, r"ratio: expected a number in \(0, 1\)"),
    (lambda: Sensitivity(0.5, {"a": -1.0}), ValueError, "errors: expected numbers of at least 0"),
    (lambda: Sensitivity.from_json('{"format": "x"}'), ValueError, "format: expected"),
    (lambda: Auto(ratio=1.0), ValueError, r"ratio: expected a number in \(0, 1\), got 1.0"),
    (lambda: Auto(ratio=0), ValueError, "ratio"),
    (lambda: Auto(check=1), TypeError, "check: expected True or False"),  # type: ignore[arg-type]
    (lambda: Auto(margin=0.5), ValueError, "margin: expected a number of at least 1"),
    (lambda: Auto(repeats=2), ValueError, "repeats: expected an integer of at least 3"),
    (lambda: Auto(tries=0), ValueError, "tries: expected an integer of at least 1, got 0"),
    (lambda: Auto(scope="all"), ValueError, "scope: expected fastest or one of layer, value, group, got 'all'"),
    (lambda: Auto(keep_last="no"), TypeError, "keep_last: expected True or False, got 'no'"),  # type: ignore[arg-type]
    (lambda: Auto(scores="online"), ValueError, "scores: expected weight"),
    (lambda: Auto(**BACKWARD), ValueError, "mode: expected forward"),
    (lambda: plan_of(Cnn(), Auto(cost=FlopModel()), X), TypeError, "cost: FlopModel estimates no time"),
    (lambda: plan_of(Cnn(), TimeBudget(0.5, FlopModel()), X), TypeError, "cost: FlopModel estimates no time"),
    (lambda: calibrate(dtype=torch.int64), TypeError, "dtype: expected a floating-point"),
]


@pytest.mark.parametrize("call, error, message", WRONG)
def test_messages_name_the_field_and_the_value(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


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
    for decision in plan_of(model, HALF, X):
        assert decision.cost is not None and decision.cost.omits
        assert decision.cost.exact.flops is not None and decision.cost.sampled.flops is not None
        assert 0 < decision.cost.sampled.flops < decision.cost.exact.flops
        assert decision.cost.exact.seconds is None
    # conv2: 2 * (2 * 3 * 3) rows * 8 columns * (8 * 9) contraction, three roles
    conv2 = plan_of(model, Exact(), X)["conv2"].cost
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
    assert len(plan_of(PlainCnn(), policy, X).sampled) == 1


def test_a_policy_of_a_user_works_and_is_checked() -> None:
    assert sampled(plan_of(PlainCnn(), LargestOnly(), X)) == ["conv1"]

    class Short(LargestOnly):
        needs_shapes = False

        def decide(self, candidates: Sequence[Candidate]) -> list[Decision]:
            return []

    with pytest.raises(ValueError, match="decisions: the policy made 0 for 3 candidates"):
        fx_approx.transform(PlainCnn(), Short())


def test_policies_are_values() -> None:
    assert Uniform(0.5, scores="online") == HALF != Uniform(0.25, scores="online")
    kinds = [
        one
        for one in vars(policies).values()
        if dataclasses.is_dataclass(one) and isinstance(one, type) and hasattr(one, "decide")
    ]
    assert len(kinds) > 8
    assert [kind.__name__ for kind in kinds if not kind.__dataclass_params__.frozen] == []  # type: ignore[attr-defined]
    with pytest.raises(dataclasses.FrozenInstanceError):
        HALF.ratio = 0.3  # type: ignore[misc]
    one = Sensitivity(0.5, {"a": 0.25, "b": 1e-9}, 0.125)
    assert Sensitivity.from_json(one.to_json()) == one
    assert json.loads(one.to_json())["format"] == "fx_approx.sensitivity/1"
