"""Tokens as an axis of the policies that see the whole graph, and in what cost models say."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fx_approx
from fx_approx import Plan
from fx_approx.compiler.graph_view import GraphView
from fx_approx.compiler.transform import view_of
from fx_approx.core.candidates import Role
from fx_approx.core.step_cost import StepTime
from fx_approx.errors import UnsupportedError
from fx_approx.policies import (
    Auto,
    Exact,
    FlopBudget,
    FlopModel,
    MeasuredModel,
    MemoryBudget,
    Override,
    RooflineModel,
    Sensitivity,
    TimeBudget,
    Tokens,
    Uniform,
)
from fx_approx.policies.cost_roofline import Device
from tests.passes.test_tokens import TOKENS, WIDTH, Block, Stack, stack

SMALL: dict[str, Any] = {"min_k": 2, "round_to": 2, "ratios": (0.25, 0.5, 0.75)}
FAST = Device("many operations pay", "torch.float64", 1e9, 1e12, 1e12, 1e-9, 1.0, 1.0, 1.0, 1.0)
ROOFLINE = RooflineModel(device=FAST)
HALF = Tokens(0.5)


@pytest.fixture(scope="module")
def made() -> tuple[Stack, torch.Tensor]:
    return stack("plain", "mean")


def flops(totals: Any) -> float:
    return (totals.executed.total + totals.selection) / totals.exact.total


@pytest.mark.parametrize(
    ("policy", "spent", "layers"),
    [
        pytest.param(FlopBudget(0.8, tokens=HALF, **SMALL), flops, False, marks=pytest.mark.slow),
        (FlopBudget(0.5, tokens=HALF, **SMALL), flops, True),
        (MemoryBudget(0.75, tokens=HALF, **SMALL), lambda t: t.memory / t.memory_exact, False),
        pytest.param(FlopBudget(0.5, tokens=Tokens(0.5, mode="skip"), **SMALL), flops, True, marks=pytest.mark.slow),
    ],
)
def test_the_plan_is_within_the_budget_as_the_report_counts_it(
    made: tuple[Stack, torch.Tensor], policy: Any, spent: Callable[[Any], float], layers: bool
) -> None:
    model, x = made
    found = fx_approx.explain(model, policy, x)
    assert 0.8 * policy.budget <= spent(found.report.totals) <= policy.budget
    assert found.plan.tokens is not None and policy.tokens.ratio <= found.plan.tokens.ratio < 1
    assert found.plan.tokens.mode == policy.tokens.mode
    assert bool(found.plan.sampled) == layers, "tokens cost the least error, so that they are left out first"
    assert "of them are computed: predicted error" in found.plan.why_tokens
    assert f"asked {policy.budget:g}" in found.plan.why_tokens and found.plan.why_tokens in " ".join(str(found).split())
    again = Plan.from_json(found.plan.to_json())
    assert again == found.plan
    approx = fx_approx.transform(model, again, x)
    assert fx_approx.report(approx).totals == found.report.totals
    assert f"Tokens: {again.why_tokens}" in " ".join(str(fx_approx.report(approx)).split())


def test_predicted_time_is_within_the_budget(made: tuple[Stack, torch.Tensor]) -> None:
    model, x = made
    policy = TimeBudget(0.8, ROOFLINE, tokens=HALF, **SMALL)
    found = fx_approx.analysis.estimate_step_time(model, policy, x, cost=ROOFLINE)
    assert found.speedup is not None and 0.8 * 0.8 <= 1 / found.speedup <= 0.8


def test_all_tokens_where_the_budget_allows_it_or_none_can_be_left_out(made: tuple[Stack, torch.Tensor]) -> None:
    model, x = made
    plan = fx_approx.explain(model, FlopBudget(1.0, tokens=HALF, **SMALL), x).plan
    assert plan.tokens is None and plan.why_tokens == "all are computed: within the budget without fewer"
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    plan = fx_approx.explain(plain, FlopBudget(0.8, tokens=HALF, **SMALL), torch.randn(2, 8)).plan
    assert plan.tokens is None and "all are computed: no attention" in plan.why_tokens and plan.sampled


def test_what_cannot_be_met_says_what_can(made: tuple[Stack, torch.Tensor]) -> None:
    model, x = made
    with pytest.raises(ValueError, match=r"the least is 0\.\d+ .* and tokens at 0\.5 or more\)"):
        fx_approx.explain(model, FlopBudget(0.01, tokens=HALF, **SMALL), x)


def test_a_budget_for_the_layers_counts_what_tokens_save(made: tuple[Stack, torch.Tensor]) -> None:
    model, x = made
    for policy in (
        Tokens(0.5, layers=FlopBudget(0.5, **SMALL)),
        Override({"classes": Exact()}, FlopBudget(0.5, tokens=HALF, **SMALL)),
    ):
        found = fx_approx.explain(model, policy, x)
        assert 0.45 <= flops(found.report.totals) <= 0.5 and found.plan.sampled
        assert found.plan.tokens is not None and found.plan.tokens.ratio == 0.5
    plan = fx_approx.explain(
        model, Override({"classes": Exact()}, Tokens(0.5, layers=FlopBudget(0.8, **SMALL))), x
    ).plan
    assert plan.tokens == HALF.tokens and not plan.sampled, "the tokens alone meet it"


def test_through_the_dynamo_frontend() -> None:
    torch._dynamo.reset()
    model, x = stack("plain", "all")
    backend = fx_approx.backend(FlopBudget(0.7, tokens=Tokens(0.25), **SMALL), inner="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
        torch.compile(model, backend=backend)(x).sum().backward()
    assert flops(backend.report().totals) <= 0.7 and "Tokens: " in str(backend.report())


# ---- Auto


def clock(monkeypatch: pytest.MonkeyPatch, speedup: Callable[[bool, bool], float]) -> list[tuple[bool, bool]]:
    """Times told by whether tokens, and layers, are sampled; returns what was timed."""
    asked: list[tuple[bool, bool]] = []

    def time(self: GraphView, plans: Any, *, tokens: Any, **options: Any) -> list[StepTime]:
        asked.extend((own is not None, bool(plan)) for own, plan in zip(tokens, plans, strict=True))
        return [StepTime(1 / s, (s, s, s)) for s in (1.0, *(speedup(*kind) for kind in asked))]

    monkeypatch.setattr(GraphView, "time", time)
    return asked


@pytest.mark.parametrize(
    ("times", "tokens", "layers"),
    [((1.5, 1.2, 2.0), True, True), ((1.5, 1.2, 1.5), True, False), ((1.0, 0.5, 1.01), False, False)],
    ids=["both", "tokens", "none"],
)
def test_auto_takes_what_is_fastest(
    made: tuple[Stack, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    times: tuple[float, float, float],
    tokens: bool,
    layers: bool,
) -> None:
    model, x = made
    known = {(True, False): times[0], (False, True): times[1], (True, True): times[2]}
    asked = clock(monkeypatch, lambda *kind: known[kind])
    auto = Auto(cost=ROOFLINE, tokens=HALF, min_k=2, round_to=2, scope="value", keep_last=True)
    plan = fx_approx.explain(model, auto, x).plan
    assert set(asked) >= {(True, False), (True, True)}
    assert (plan.tokens is not None, bool(plan.sampled)) == (tokens, layers)
    assert ("0.5 of them are computed" if tokens else "below 1.02") in plan.why_tokens
    assert "measured" in plan.why_tokens


def test_auto_times_tokens_for_itself(made: tuple[Stack, torch.Tensor]) -> None:
    model, x = made
    auto = Auto(cost=ROOFLINE, tokens=HALF, min_k=16, scope="value", keep_last=True, repeats=3, margin=1)
    plan = fx_approx.explain(model, auto, x).plan
    assert "predicted, measured" in plan.why_tokens or "but measured" in plan.why_tokens
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    plan = fx_approx.explain(plain, dataclasses.replace(auto, check=False), torch.randn(2, 8)).plan
    assert plan.tokens is None and "all are computed: no attention" in plan.why_tokens


# ---- cost models


def shorter(policy: Tokens) -> tuple[Any, Any]:
    """A step that leaves tokens out behind the embedding, and the exact step on as many tokens."""
    torch.manual_seed(0)
    blocks = nn.Sequential(nn.Linear(5, WIDTH), *(Block("plain") for _ in range(2))).double()

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks(x).mean(1)

    views = [view_of(Mean(), Exact(), torch.randn(3, count, 5).double())[0] for count in (TOKENS, TOKENS // 2)]
    return views[0].with_tokens(policy.tokens), views[1]


def test_products_cost_what_they_do_on_as_many_tokens() -> None:
    some, short = shorter(Tokens(0.5, first=0))
    works = [view.work({}) for view in (some, short)]
    for own, other in zip(works[0].products, works[1].products, strict=True):
        if own.candidate.name == "blocks.0":
            continue  # the embedding is that of all tokens
        assert own.flops == other.flops
        if own.candidate.facts.shape is not None:
            assert ROOFLINE.product(own, FAST) == pytest.approx(ROOFLINE.product(other, FAST), rel=1e-9)
    assert FlopModel().step(works[0], some).flops < works[0].flops_exact


@pytest.mark.parametrize("layers", [False, True])
def test_measured_products_have_as_many_rows(monkeypatch: pytest.MonkeyPatch, layers: bool) -> None:
    from fx_approx.policies import cost_measured

    some, _ = shorter(Tokens(0.5, first=0))
    decisions = {}
    if layers:
        spec = Uniform(0.5, min_k=2, scope="layer")
        decisions = {one.name: one for one in spec.decide(some.candidates) if one.roles}
    work = some.work(decisions)
    seen = []
    for product in work.products:
        operands = None if product.candidate.facts.shape is None else cost_measured._operands(product)
        if operands is not None and product.kept.tokens != (1, 1):
            assert operands.lhs[0] == 3 * TOKENS // 2
            cost_measured._training(product, False)()
            seen.append(product.roles.get(Role.OUTPUT) is not None)
    assert len(seen) == 8 and any(seen) == layers


@pytest.mark.slow
def test_the_measured_model_times_the_exact_step_with_all_tokens(
    made: tuple[Stack, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FX_APPROX_CACHE", "")
    model, x = made
    cost = MeasuredModel(compiled=False, progress=False)
    found = fx_approx.analysis.estimate_step_time(model, HALF, x, cost=cost, check=True, repeats=3)
    assert found.measured is not None and found.exact.flops is not None and found.now.flops is not None
    assert found.now.flops < found.exact.flops
    assert found.exact.seconds == pytest.approx(cost.exact_step(view_of(model, Exact(), x)[0]), rel=1e-6)


# ---- what is refused


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FlopBudget(0.5, tokens=0.5), TypeError, r"tokens: expected Tokens\(\.\.\.\) or None, got 0\.5"),
        (lambda: Auto(tokens=(0.5, 1.0)), TypeError, "tokens: expected Tokens"),
        (
            lambda: FlopBudget(0.5, tokens=Tokens(layers=Uniform(0.5))),
            ValueError,
            "tokens: the layers are decided about already; expected no layers, got Uniform",
        ),
        (lambda: FlopBudget(0.5, tokens=HALF, subnetwork=True), ValueError, "tokens: a subnetwork computes all of"),
        (lambda: Auto(tokens=HALF, subnetwork=True), ValueError, "tokens: a subnetwork computes all of them"),
        (
            lambda: FlopBudget(0.5, tokens=HALF, sensitivity=Sensitivity(0.5, {})),
            ValueError,
            "sensitivity: says nothing of tokens",
        ),
        (lambda: Tokens(layers=FlopBudget(0.5, tokens=HALF)), ValueError, "layers: expected a policy that decides"),
        (lambda: Override({"a": HALF}, Exact()), ValueError, r"rules\['a'\]: tokens are those of all layers; expected"),
    ],
)
def test_errors_name_the_field(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_subnetwork_in_tokens_is_refused(made: tuple[Stack, torch.Tensor]) -> None:
    model, x = made
    with pytest.raises(UnsupportedError, match="subnetwork: a model that samples tokens has none"):
        fx_approx.explain(model, Tokens(0.5, layers=FlopBudget(0.5, subnetwork=True, **SMALL)), x)
