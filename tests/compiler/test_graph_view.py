"""What policies for a whole graph are shown, and what people look at: the graph after each pass, and who is coupled."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx import Plan, SamplerConfig
from fx_approx.compiler.graph_view import GraphView
from fx_approx.compiler.transform import view_of
from fx_approx.core.plan import Decision
from fx_approx.policies import Exact, GradientSampling, Override, Paper, Uniform
from tests.helpers.ahead import Readers
from tests.helpers.demand_nets import post_activation
from tests.helpers.hoisting import Layers
from tests.helpers.models import Cnn
from tests.helpers.quick import quick

IMAGES = torch.randn(2, 3, 8, 8)
POLICIES = [
    Uniform(0.5),
    Uniform(0.25, scores="ema", scope="group"),
    Uniform(0.5, "systematic", scores="online"),
    GradientSampling.backward(0.5),
    GradientSampling.straight(0.5),
    Override({"4.conv1": Exact(), "5.*": Uniform(0.25, scope="layer")}, Uniform(0.75, scope="layer")),
]


def viewed(model: nn.Module, policy: Any = None, x: Tensor = IMAGES) -> tuple[GraphView, dict[str, Decision], Plan]:
    view, plan = view_of(model, Exact() if policy is None else policy, x)
    return view, {decision.name: decision for decision in plan.sampled}, plan


@pytest.mark.parametrize(
    ("policy", "ratio"),
    quick(
        [*((one, None) for one in POLICIES), *((one, 0.3) for one in POLICIES[:2])],
        lambda policy, ratio: (POLICIES.index(policy), ratio) in ((0, 0.3), (2, None), (3, None), (5, None)),
    ),
)
def test_work_is_that_of_the_report(policy: Any, ratio: float | None) -> None:
    """Also at other ratios, for which sharing and demand are not found anew."""
    view, decisions, plan = viewed(post_activation(), policy)
    if ratio is not None:
        view.work(decisions)
        for name, decision in decisions.items():
            roles = {role: spec.replace(ratio=ratio) for role, spec in decision.roles.items()}
            plan = plan.edit(name, roles, straight_through=decision.straight_through, scope=decision.scope)
        decisions = {decision.name: decision for decision in plan.sampled}
    work, totals = view.work(decisions), fx_approx.explain(post_activation(), plan, IMAGES).report.totals
    assert (work.flops_exact, work.flops) == (totals.exact.total, totals.executed.total)
    assert work.selection_flops == totals.selection
    assert (work.moved_exact, work.moved, work.gathered) == (totals.moved_exact, totals.moved, totals.gathered)
    assert (work.memory_exact, work.memory, work.slicing) == (totals.memory_exact, totals.memory, totals.slicing)
    assert work.flops < work.flops_exact


def test_readers_of_one_value_at_different_ratios() -> None:
    """They do not share then, which no work found for equal ratios says."""
    view, decisions, plan = viewed(post_activation(), Uniform(0.5))
    view.work(decisions)
    plan = plan.edit("4.conv1", SamplerConfig("topk", 0.25, scores="weight"), scope="value")
    other = view.work({decision.name: decision for decision in plan.sampled})
    assert other.flops == fx_approx.explain(post_activation(), plan, IMAGES).report.totals.executed.total


def test_nothing_sampled_is_the_exact_step() -> None:
    view, decisions, _ = viewed(Cnn(), Uniform(0.5))
    work = view.work({})
    assert work == view.work(decisions).exact
    assert work.flops == work.flops_exact and work.moved == work.moved_exact > 0 and work.slicing == 0


def test_the_products_alone() -> None:
    view, decisions, _ = viewed(post_activation(), Uniform(0.5))
    work, short = view.work(decisions), view.work(decisions, memory=False)
    assert short.products == work.products and short.slicing == work.slicing and short.memory == short.moved == 0


def test_what_shares_a_selection_is_tied() -> None:
    view, decisions, _ = viewed(post_activation(), Uniform(0.5))
    tied = [set(names) for names in view.tied(decisions)]
    assert {"5.conv1", "5.shortcut.0"} in tied
    assert sorted(name for names in tied for name in names) == sorted(decisions)
    view, decisions, _ = viewed(post_activation(), Uniform(0.5, scores="online"))
    assert all(len(names) == 1 for names in view.tied(decisions))


def test_weight_norms() -> None:
    model = Cnn()
    view, _, _ = viewed(model)
    torch.testing.assert_close(view.weight_norms("fc"), model.fc.weight.detach().norm(dim=0)[None])
    grouped = model.grouped.weight.detach().view(2, 4, 4, 9).square().sum((1, 3)).sqrt()
    torch.testing.assert_close(view.weight_norms("grouped"), grouped)


def test_fingerprint() -> None:
    one, other, wider = (viewed(Cnn(), x=x)[0] for x in (IMAGES, IMAGES + 1, torch.randn(2, 3, 9, 9)))
    assert one.fingerprint == other.fingerprint != wider.fingerprint
    assert viewed(post_activation())[0].fingerprint != one.fingerprint


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_timing_leaves_the_model_as_it_was(compiled: bool) -> None:
    model = Cnn().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    view, decisions, _ = viewed(model, Paper(0.5))
    state = torch.get_rng_state()
    exact, sampled = view.time([decisions], compiled=compiled, repeats=3)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters()) and not model.training
    assert exact.speedup == (1.0, 1.0, 1.0) and exact.seconds > 0
    low, middle, high = sampled.speedup
    assert 0 < low <= middle <= high


class SlowAfterOthers(nn.Module):
    """Its step takes long if another one ran before, as if caches had been emptied."""

    last = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(32, 32), [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        if SlowAfterOthers.last != id(self):
            time.sleep(0.2)
        SlowAfterOthers.last = id(self)
        return self.linear(x)


@pytest.mark.slow
def test_the_first_step_after_another_models_is_not_counted() -> None:
    """Training repeats one model's step; what taking turns costs is none of its time."""
    times = viewed(SlowAfterOthers(), x=torch.randn(4, 32))[0].time([{}, {}], repeats=3)
    assert len(times) == 3 and max(one.seconds for one in times) < 0.1


def test_without_inputs_there_is_nothing_to_time() -> None:
    view, _ = view_of(Cnn(), Exact(), None)
    assert not view.runs
    with pytest.raises(ValueError, match="example_inputs: none were given"):
        view.time([])


def transformed(scope: str = "group") -> nn.Module:
    torch.manual_seed(0)
    return fx_approx.transform(Readers(), Layers("topk", scope=scope), torch.randn(4, 6))


def test_each_pass_says_what_it_took_out_and_put_in(capsys: pytest.CaptureFixture[str]) -> None:
    model = transformed()
    model.print_passes()
    text = capsys.readouterr().out
    captured, shared, demand = (text.partition(f"== {name} (")[2] for name in ("capture", "share", "demand"))
    assert "left = self.left(relu)" in captured.partition("== scope")[0]
    changes = [line for line in shared.partition("== demand")[0].splitlines() if line[:1] in "+-"]
    assert any(line.startswith("-") and line.endswith("left = self.left(relu)") for line in changes)
    assert any(line.startswith("+") and "self._fx_approx.resample(" in line for line in changes)
    assert any(line.startswith("+") and "slice_weights(" in line for line in demand.splitlines())
    assert "fx_approx_ops" not in text and " = None" not in text
    model.print_passes(whole=True)
    assert len(capsys.readouterr().out) > len(text)


def test_the_coupling_names_groups_readers_and_additions() -> None:
    text = fx_approx.analysis.coupling_text(transformed())
    (group,) = (part for part in text.split("\ngroup ") if "add" in part.splitlines()[0])
    assert group.splitlines()[0].endswith("coupled by add")
    assert "first (16 channels) read by left, right" in group and "add (16 channels) read by last" in group
    graph = fx_approx.analysis.coupling_graph(transformed("value"))
    assert {graph.edges[edge]["by"] for edge in graph.edges} == {"add"}
    assert graph.nodes["first"]["units"] == 16 and graph.nodes["first"]["readers"] == ["left", "right"]


def test_the_coupling_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    fx_approx.analysis.draw_coupling(transformed(), tmp_path / "coupling.svg")
    drawn = (tmp_path / "coupling.svg").read_text(encoding="utf-8")
    assert "<svg" in drawn and len(drawn) > 5000
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"fx_approx\[plot\]"):
        fx_approx.analysis.draw_coupling(transformed(), tmp_path / "other.svg")


def test_without_shapes_there_is_no_coupling() -> None:
    model = fx_approx.transform(Readers(), Uniform(0.5, scope="layer"))
    with pytest.raises(ValueError, match="example_inputs"):
        fx_approx.analysis.coupling_graph(model)
