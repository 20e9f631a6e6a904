"""What people read of a savings report: it fits, speaks of modules, and its totals are the sums of its rows."""

from __future__ import annotations

import functools
import itertools
import re

import pytest
import torch
from torch import nn

import fx_approx
from fx_approx.analysis import SavingsReport, StepTimeEstimate
from fx_approx.compiler.transform import analysed
from fx_approx.core.plan import Cost
from fx_approx.core.step_cost import StepTime
from fx_approx.policies import Device, Exact, RooflineModel, Tokens, Uniform
from fx_approx.utils.tables import COLUMNS, FEW, human
from tests.helpers.models import mlp
from tests.helpers.torchvision_compat import import_torchvision

VISION = import_torchvision().models


def vit() -> tuple[nn.Module, torch.Tensor]:
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 6, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128}
    return VISION.VisionTransformer(**sizes), torch.empty(2, 3, 32, 32)


def vit_alone() -> nn.Module:
    """The model, for the command line."""
    return vit()[0]


@functools.cache
def report_of(name: str) -> SavingsReport:
    if name == "resnet50":
        return fx_approx.explain(VISION.resnet50(), Uniform(0.5), torch.empty(2, 3, 64, 64)).report
    if name == "bert":
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
        config = transformers.BertConfig(vocab_size=100, **sizes)
        model = transformers.BertForSequenceClassification(config)
        return fx_approx.backend(Uniform(0.5)).explain(model, torch.randint(100, (2, 16))).report
    model, x = vit()
    policy = Tokens(0.5, layers=Uniform(0.5)) if name == "vit of some tokens" else Uniform(0.5, scope="group")
    return fx_approx.explain(model, policy, x).report


MODELS = ["resnet50", "vit", "vit of some tokens", pytest.param("bert", marks=pytest.mark.slow)]


def expanded(name: str) -> list[str]:
    """The names that a folded one stands for."""
    match = re.search(r"\d+(?:-\d+)?(?:,\d+(?:-\d+)?)+|\d+-\d+", name)
    if match is None:
        return [name]
    spans = [[int(one) for one in span.split("-")] for span in match[0].split(",")]
    numbers = itertools.chain.from_iterable(range(span[0], span[-1] + 1) for span in spans)
    return [f"{name[: match.start()]}{number}{name[match.end() :]}" for number in numbers]


def first_column(text: str) -> list[str]:
    """The layers of a table, those that are wrapped in one piece."""
    lines = text.partition("\n\n")[0].splitlines()
    width = len(lines[1].split()[0])
    found: list[str] = []
    for line in lines[2:]:
        cell = line[:width]
        if cell.startswith("  "):
            found[-1] += cell.strip()
        elif cell.strip():
            found.append(cell.strip())
    return found


@pytest.mark.parametrize("name", MODELS)
def test_it_fits_and_says_every_row_once(name: str) -> None:
    report = report_of(name)
    text = str(report)
    assert max(map(len, text.splitlines())) <= 100
    for width in (60, 80, 130):
        assert max(map(len, report.to_text(width=width).splitlines())) <= width
    assert "op" not in report.to_text(width=60).splitlines()[0]
    header = re.split(r"\s{2,}", text.splitlines()[0].strip())
    assert header == [head for column in FEW for head in COLUMNS[column]]
    assert len(first_column(text)) < len(report.rows) / 2 and len(text.splitlines()) < 60
    said = [one for folded in first_column(text) for one in expanded(folded)]
    assert sorted(said) == sorted(row.name for row in report.rows)
    assert first_column(report.to_text(rows="all")) == [row.name for row in report.rows]
    assert first_column(report.to_text(["layer", "flops"]))[:-1] == [row.name for row in report.rows]


@pytest.mark.parametrize("name", MODELS)
def test_it_speaks_of_modules_and_not_of_nodes(name: str) -> None:
    report = report_of(name)
    text = "\n".join([report.to_text(rows="all"), report.to_markdown(), report.to_html(), *report.stops])
    words = set(re.findall(r"[\w.#]+", text))
    assert report.stops or name == "vit of some tokens"
    if name == "bert":
        assert not {word for word in words if re.fullmatch(r"(\w+_)?(states|add|embeddings|tensor|getitem)_\d+", word)}
        return
    model, x = (VISION.resnet50(), torch.empty(2, 3, 64, 64)) if name == "resnet50" else vit()
    graph = analysed(model, x).captured.graph
    paths = {path for path, _ in model.named_modules()}
    nodes = {n.name for n in graph.nodes if "_" in n.name and n.name not in paths}
    calls = {getattr(n.target, "__name__", n.target) for n in graph.nodes}
    assert len(nodes) > 50 and not words & (nodes - calls)


@pytest.mark.parametrize("name", MODELS)
def test_totals_are_the_sums_of_the_rows(name: str) -> None:
    report = report_of(name)
    exact, executed = (sum(getattr(row, kind).total for row in report.rows) for kind in ("exact", "executed"))
    choosing = sum(row.selection for row in report.rows)
    lines = str(report).splitlines()
    (line,) = (line for line in lines if line.startswith("Operations: "))
    assert line.startswith(
        f"Operations: {human(exact)} exact, {human(executed)} now ({100 * (1 - executed / exact):.1f} %"
    )
    assert f"{human(choosing)} to choose: {100 * (1 - (executed + choosing) / exact):.1f} % fewer" in line
    (line,) = (line for line in lines if line.startswith("Memory "))
    assert f"{human(report.totals.memory_exact)}B exact, {human(report.totals.memory)}B now" in line
    assert not any(line.startswith("Time") for line in lines), "nothing predicts it"


def test_short_reports_show_every_row_and_all_columns_can_be_asked_for() -> None:
    report = fx_approx.explain(mlp(), Uniform(0.5), torch.empty(6, 12)).report
    assert first_column(str(report)) == [row.name for row in report.rows]
    alike = fx_approx.explain(nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))), Exact(), torch.empty(6, 8)).report
    assert first_column(str(alike)) == ["0", "1", "2", "3", "4"]
    assert [one for name in first_column(alike.to_text(rows="folded")) for one in expanded(name)] == list("01234")
    said = report.to_text(list(COLUMNS))
    assert all(head in said.splitlines()[0] for heads in COLUMNS.values() for head in heads)
    assert said.partition("\n\n")[0].splitlines()[-1].startswith("total")
    with pytest.raises(ValueError, match="rows: expected one of all, folded, got 'some'"):
        report.to_text(rows="some")
    with pytest.raises(ValueError, match="width: expected an integer of at least 60, got 59"):
        report.to_text(width=59)


def test_a_predicted_time_is_a_line_of_its_own() -> None:
    model, x = mlp(), torch.randn(6, 12)
    report = fx_approx.explain(model, Uniform(0.5), x).report
    device = Device("made up", "torch.float32", 1e9, 1e9, 1e9, 0.0, 1.0, 1.0, 1.0, 1.0)
    estimate = fx_approx.analysis.estimate_step_time(model, Uniform(0.5), x, cost=RooflineModel(device=device))
    timed = report.with_time(estimate)
    times = f"{1000 * estimate.exact.seconds:.3g} ms exact, {1000 * estimate.now.seconds:.3g} ms now"
    assert f"Time, predicted: {times} ({estimate.speedup:.2f} times as fast)." in str(timed)
    assert timed.to_dict()["time"]["now"]["seconds"] == estimate.now.seconds
    unknown = StepTimeEstimate(Cost(flops=2), Cost(flops=1), "time")
    assert "Time" not in str(report.with_time(unknown)), "a cost model without seconds"
    measured = StepTimeEstimate(estimate.exact, estimate.now, "", StepTime(0.1, (1.0, 1.5, 2.0)))
    assert "measured 1.50 [1.00, 2.00])" in str(report.with_time(measured))
    with pytest.raises(TypeError, match=r"estimate: expected what analysis\.estimate_step_time returns, got 2"):
        report.with_time(2)  # type: ignore[arg-type]


def test_explain_predicts_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device("made up", "torch.float32", 1e9, 1e9, 1e9, 1e-6, 1.0, 1.0, 1.0, 1.0)
    monkeypatch.setattr("fx_approx.policies.cost_roofline._calibrated", lambda *_: device)
    model, x = mlp(), torch.randn(6, 12)
    time = fx_approx.explain(model, Uniform(0.5), x, predict=True).report.time
    assert time == fx_approx.analysis.estimate_step_time(model, Uniform(0.5), x)
    with pytest.raises(fx_approx.errors.ShapesRequiredError, match="example_inputs: expected a training batch"):
        fx_approx.explain(model, Uniform(0.5, scores="online"), predict=True)


def test_without_shapes_it_says_what_is_missing() -> None:
    text = str(fx_approx.explain(mlp(), Uniform(0.5, scores="online")).report)
    assert "Operations and memory: not known without shapes" in text
    assert "give example_inputs (a shell: --input), or run one eager forward" in " ".join(text.split())
    assert "0 exact" not in text and "Memory" not in text
