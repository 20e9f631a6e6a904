"""Policies that plan for a subnetwork: its cost is that of the narrow network, and small layers pay at last."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fx_approx
from fx_approx.compiler.extractors import extractors
from fx_approx.compiler.graph_view import GraphView
from fx_approx.compiler.transform import view_of
from fx_approx.core.step_cost import ProductWork, StepWorkload, Update
from fx_approx.errors import UnsupportedError
from fx_approx.policies import (
    Auto,
    Exact,
    FlopBudget,
    FlopModel,
    GradientSampling,
    MeasuredModel,
    MemoryBudget,
    Override,
    RooflineModel,
    TimeBudget,
    Uniform,
    cost_update,
)
from fx_approx.policies import cost_measured as measured
from fx_approx.policies.cost_roofline import Device
from fx_approx.policies.cost_update import update_seconds
from fx_approx.subnetworks import extract
from fx_approx.subnetworks.parts import take_part
from fx_approx.utils.timing import Timing
from tests.helpers.demand_nets import NETS, BasicBlock
from tests.helpers.hoisting import Layers
from tests.helpers.quick import in_turn

CORE = Device("one core of an EPYC", "torch.float32", 8.5e10, 3.5e9, 1.8e9, 4.5e-6, 1.06, 1.18, 0.88, 0.12)
ROOFLINE = RooflineModel(compiled=False, device=CORE)
SGD = torch.optim.SGD
DIGITS, IMAGES = torch.randn(64, 784), torch.randn(4, 3, 16, 16)
HIDDEN = Override({"0": Exact()}, Uniform(0.5))


def mlp(width: int = 512) -> nn.Module:
    hidden = nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def convolutions(width: int = 32) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(width, width, 3, padding=1, groups=4), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 5)),
    )


def narrow_convolutions() -> nn.Module:
    made = convolutions(16)
    made[7] = nn.Conv2d(16, 16, 3, padding=1, groups=16)
    return made


BY_HAND = {
    "mlp": (mlp(), mlp(256), HIDDEN, DIGITS),
    "convolutions": (convolutions(), narrow_convolutions(), HIDDEN, IMAGES),
}


def step(model: nn.Module, policy: Any, x: Any, **kind: Any) -> tuple[GraphView, StepWorkload]:
    view, plan = view_of(model, policy, x)
    view = view.realized(**kind)
    return view, view.work({decision.name: decision for decision in plan.sampled})


def counted(work: StepWorkload, gathered: int = 0) -> dict[str, Any]:
    assert work.update is not None
    parts = {name: getattr(work, name) for name in ("flops", "memory", "operations", "selection_flops", "slicing")}
    return {**parts, "moved": work.moved + gathered, "bytes": work.update.bytes, "tensors": work.update.tensors}


def plain(sub: Any) -> nn.Module:
    """The graph of a subnetwork in torch's own operations, without the hook that looks at its calls."""
    graph = copy.deepcopy(sub.graph)
    for node in graph.find_nodes(op="call_function", target=take_part):
        node.target = torch.index_select
    return torch.fx.GraphModule(sub, graph)


# ---- the work of a step


CUT_OUT = ["post-activation", "pre-activation", "dense", "squeeze-excite", "grouped", "fused-heads", "gated"]


@pytest.mark.parametrize(("name", "scope"), in_turn(CUT_OUT, ["value", "group"], step=2))
def test_the_work_is_that_of_the_subnetwork_that_is_cut_out(name: str, scope: str) -> None:
    """The oracle: the graph of what ``extract`` makes, whose gathers are operations like any other."""
    torch.manual_seed(0)
    build, shape = NETS[name]
    x = torch.randn(*shape)
    model, policy = build(), Layers("topk", 0.5, "weight", scope)
    _, work = step(model, policy, x, subnetwork=True, optimizer=SGD)
    sub = extract(fx_approx.transform(model, policy, x))
    _, wanted = step(plain(sub), Exact(), x, optimizer=SGD)
    assert counted(work, work.gathered) == counted(wanted)
    assert work.update is not None and work.update.bytes < 0.6 * work.update.bytes_exact
    assert work.update.bytes == sum(4 * p.numel() for p in sub.parameters())


@pytest.mark.parametrize("name", BY_HAND)
def test_a_roofline_of_the_network_written_narrow_by_hand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, narrow, policy, x = BY_HAND[name]
    monkeypatch.setattr(cost_update, "_constants", lambda *_: (1e-6, 1e-9))
    view, work = step(model, policy, x, subnetwork=True, optimizer=SGD)
    other, wanted = step(narrow, Exact(), x, optimizer=SGD)
    assert work.gathered == 0 and counted(work) == counted(wanted)
    now, expected = ROOFLINE.step(work, view), ROOFLINE.step(wanted, other)
    assert (now.flops, now.bytes, now.launches) == (expected.flops, expected.bytes, expected.launches)
    assert now.seconds == pytest.approx(expected.seconds, rel=1e-12)
    assert FlopModel().step(work, view) == FlopModel().step(wanted, other)
    in_graph, exact = (
        ROOFLINE.step(one, view).seconds for one in (step(model, policy, x, optimizer=SGD)[1], work.exact)
    )
    assert in_graph is not None and exact is not None and now.seconds is not None
    assert now.seconds < in_graph and now.seconds < exact


@pytest.mark.parametrize("name", BY_HAND)
def test_measured_products_are_those_of_the_network_written_narrow_by_hand(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """A clock that tells nothing but the sizes that are multiplied; no launches, so that the rest is bytes."""

    def run(self: MeasuredModel, products: Sequence[ProductWork]) -> list[float]:
        calls = [measured._operands(one) for one in products]
        return [1e-6 * (math.prod(one.lhs) + 3 * math.prod(one.rhs)) for one in calls if one is not None]

    monkeypatch.setenv("FX_APPROX_CACHE", str(tmp_path))
    monkeypatch.setattr(MeasuredModel, "_run", run)
    monkeypatch.setattr(cost_update, "_constants", lambda *_: (1e-6, 1e-9))
    model, narrow, policy, x = BY_HAND[name]
    cost = MeasuredModel(compiled=False, progress=False)
    cost._rest = RooflineModel(compiled=False, device=dataclasses.replace(CORE, launch=0.0))
    seconds = []
    for built, chosen, kind in ((model, policy, {"subnetwork": True}), (narrow, Exact(), {})):
        view, work = step(built, chosen, x, optimizer=SGD, **kind)
        monkeypatch.setattr(view, "_inputs", None)  # nothing to run: the rest of the step is predicted
        seconds.append(cost.step(work, view).seconds)
    assert seconds[0] == pytest.approx(seconds[1], rel=1e-9)


def test_a_part_of_a_wide_value_costs_its_copy() -> None:
    """At scope value the residual stream stays whole, and each reader takes its part."""
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), BasicBlock(32, 32), BasicBlock(32, 32))
    policy = Override({"0": Exact()}, Uniform(0.5))
    view, work = step(model, policy, IMAGES, subnetwork=True)
    stream = 4 * 32 * 16 * 16 * 4
    assert work.gathered == 2 * stream // 2
    free = dataclasses.replace(work, gathered=0)
    now, other = (ROOFLINE.step(one, view).seconds for one in (work, free))
    assert now is not None and other is not None and now - other == pytest.approx(4 * stream / CORE.bandwidth)
    exact = step(model, Exact(), IMAGES)[1]
    assert work.operations == exact.operations + 2


def test_in_the_graph_the_optimiser_updates_all_parameters() -> None:
    _, work = step(mlp(), HIDDEN, DIGITS, optimizer=SGD)
    whole = 4 * sum(p.numel() for p in mlp().parameters())
    assert work.update == Update(SGD, 6, whole, whole, "torch.float32", "cpu") and work.exact.update == work.update
    _, work = step(mlp(), HIDDEN, DIGITS, subnetwork=True, optimizer=SGD)
    small = 4 * sum(p.numel() for p in mlp(256).parameters())
    assert work.update == Update(SGD, 6, whole, small, "torch.float32", "cpu")
    assert work.exact.update == Update(SGD, 6, whole, whole, "torch.float32", "cpu")
    frozen = mlp().requires_grad_(False)
    assert step(frozen, Exact(), DIGITS, optimizer=SGD)[1].update is None


def test_an_update_costs_a_time_for_each_tensor_and_for_each_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fake(calls: Sequence[Any], device: torch.device) -> list[Timing]:
        asked.extend(call() for call in calls)
        return [Timing(64e-6, 0.0), Timing(2e-6 + 4096 * 1e-9, 0.0)]

    monkeypatch.setattr(cost_update, "time_calls", fake)
    update = Update(torch.optim.AdamW, 6, 9999, 4000, "torch.float32", "cpu")
    cost_update._constants.cache_clear()
    assert update_seconds(update) == pytest.approx(6 * 2e-6 + 4000 * 1e-9)
    assert update_seconds(dataclasses.replace(update, bytes=5000)) == pytest.approx(6 * 2e-6 + 5000 * 1e-9)
    assert len(asked) == 2 and update_seconds(None) == 0
    update_seconds(dataclasses.replace(update, bytes=9999))
    assert len(asked) == 4, "what is much larger is timed by itself"
    cost_update._constants.cache_clear()


# ---- the choice


def test_auto_samples_the_hidden_units_of_a_small_mlp_for_a_subnetwork_only() -> None:
    """In the graph, slicing weights costs more than the products save; the images stay whole."""
    assert not fx_approx.explain(mlp(), Auto(cost=ROOFLINE, check=False), DIGITS).plan.sampled
    plan = fx_approx.explain(mlp(), Auto(cost=ROOFLINE, check=False, subnetwork=True), DIGITS).plan
    assert [decision.name for decision in plan.sampled] == ["2", "4"]
    assert plan["0"].reason == "first layer of a subnetwork"
    predicted = fx_approx.analysis.estimate_step_time(mlp(), plan, DIGITS, cost=ROOFLINE, subnetwork=True)
    assert predicted.speedup is not None and predicted.speedup > 2
    assert all(f"the step as a subnetwork {predicted.speedup:.2f} times" in one.reason for one in plan.sampled)
    everything = Auto(cost=ROOFLINE, check=False, subnetwork=True, keep_first=False)
    assert len(fx_approx.explain(mlp(), everything, DIGITS).plan.sampled) == 3


def test_in_an_override_too() -> None:
    policy = Override({"2": Uniform(0.25)}, Auto(cost=ROOFLINE, check=False, subnetwork=True))
    plan = fx_approx.explain(mlp(), policy, DIGITS).plan
    assert [(one.name, one.spec and one.spec.ratio) for one in plan] == [("0", None), ("2", 0.25), ("4", 0.5)]


def test_what_is_timed_is_the_subnetwork_with_its_optimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(cost_update, "_constants", lambda *_: (0.0, 0.0))

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made.append(sum(p.numel() for p in parameters))
        return torch.optim.AdamW(parameters, 1.0)

    model = mlp(64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    auto = Auto(cost=ROOFLINE, subnetwork=True, optimizer=optimizer, repeats=3, margin=1.0, tries=1, min_k=8)
    plan = fx_approx.explain(model, auto, DIGITS).plan
    assert made == [sum(p.numel() for p in mlp(width).parameters()) for width in (64, 32)]
    assert "measured" in plan["2"].reason
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("budget", [0.5, 0.7])
def test_a_budget_of_time_is_met_as_a_subnetwork(budget: float) -> None:
    """In the graph no ratio gets there."""
    ratios = tuple(place / 16 for place in range(1, 16))
    policy = TimeBudget(budget, ROOFLINE, subnetwork=True, keep_last=False, ratios=ratios)
    plan = fx_approx.explain(mlp(), policy, DIGITS).plan
    found = fx_approx.analysis.estimate_step_time(mlp(), plan, DIGITS, cost=ROOFLINE, subnetwork=True)
    assert found.speedup is not None and 0.9 * budget < 1 / found.speedup <= budget
    assert any(one.spec is not None and one.spec.ratio > 0.4 for one in plan.sampled)
    with pytest.raises(ValueError, match=r"budget: .* cannot be met"):
        fx_approx.explain(mlp(), dataclasses.replace(policy, subnetwork=False), DIGITS)


def test_budgets_of_memory_and_operations_count_the_subnetwork() -> None:
    for policy, share in (
        (MemoryBudget(0.7, subnetwork=True, keep_last=False), lambda work: work.memory / work.memory_exact),
        (FlopBudget(0.5, subnetwork=True, keep_last=False), lambda work: work.flops / work.flops_exact),
    ):
        plan = fx_approx.explain(mlp(), policy, DIGITS).plan
        spent = share(step(mlp(), plan, DIGITS, subnetwork=True)[1])
        assert 0.95 * policy.budget < spent <= policy.budget


class Standardised(nn.Linear):
    """Its weight is computed in each step."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight / self.weight.std(1, keepdim=True), self.bias)


def test_a_weight_that_is_computed_stays_exact() -> None:
    """Else the plan would be for a subnetwork that cannot be cut out."""
    policy = Auto(cost=ROOFLINE, check=False, subnetwork=True)
    layers = nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), Standardised(512, 512), nn.ReLU()
    approx = fx_approx.transform(nn.Sequential(*layers, nn.Linear(512, 10)), policy, DIGITS)
    sub = extract(approx, example_inputs=DIGITS)
    assert sub.get_submodule("0").out_features < 512 and sub.get_submodule("4").weight.shape == (512, 512)


# ---- errors


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (Uniform(0.5, scores="online", scope="layer"), r"the selection of 0 follows the activations .*got 'online'"),
        (GradientSampling.backward(0.5), "the gradients of 0 are sampled apart"),
    ],
)
def test_what_has_no_subnetwork_is_refused_by_name(policy: Any, text: str) -> None:
    with pytest.raises(UnsupportedError, match=f"subnetwork: {text}"):
        fx_approx.analysis.estimate_step_time(mlp(), policy, DIGITS, cost=ROOFLINE, subnetwork=True)


class Untraced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if float(x.sum()) > 0 else self.layer(-x)


def test_a_forward_that_is_not_traced_is_refused() -> None:
    with warnings.catch_warnings(), pytest.raises(UnsupportedError, match=r"subnetwork: .* could not be traced"):
        warnings.simplefilter("ignore")
        fx_approx.explain(Untraced(), Auto(cost=ROOFLINE, subnetwork=True), DIGITS)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"subnetwork": 1}, TypeError, "subnetwork: expected True or False, got 1"),
        ({"subnetwork": True, "mode": "backward", "scores": "uniform"}, ValueError, "mode: expected forward"),
        ({"optimizer": "adamw"}, TypeError, "optimizer: expected what makes one, such as torch.optim.AdamW"),
        ({"optimizer": SGD(nn.Linear(2, 2).parameters(), 0.1)}, TypeError, "optimizer: expected what makes one"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        TimeBudget(0.5, **options)
    with pytest.raises(error, match=text):
        Auto(**options)


def test_what_is_timed_is_narrow_also_where_scores_have_learnt_nothing() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    x, sizes = torch.randn(2, 32), []
    for scores in ("weight", "ema"):
        approx = fx_approx.transform(model, Uniform(0.5, scores=scores), x)
        sizes.append(sum(p.numel() for p in extractors[0](approx, x).parameters()))
    assert sizes[0] == sizes[1] < 0.6 * sum(p.numel() for p in model.parameters())
