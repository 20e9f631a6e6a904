"""The savings report is true: its totals are what torch counts on the running step, in every format."""

from __future__ import annotations

import csv
import html.parser
import io
import itertools
import json
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fx_approx
from fx_approx.core.candidates import Role, RoleFlops
from fx_approx.policies import Exact, Override, Paper, Uniform
from fx_approx.savings.report import Sample
from fx_approx.utils.tables import FEW
from tests.helpers.models import (
    Attention,
    CalledTwice,
    Checkpointed,
    Cnn,
    DataDependent,
    FusedAttention,
    OwnParameters,
    PlainCnn,
    Recurrent,
    WithDataDependent,
    loss_of,
    mlp,
    normed,
)
from tests.helpers.quick import quick, thinned

HALF = Uniform(0.5, scores="online")


def hooked_container() -> nn.Module:
    model = Checkpointed(None)
    model.block.register_forward_hook(lambda *_: None)
    return model


COUNTED: dict[str, tuple[Any, Any]] = {
    "mlp": (mlp, lambda: torch.randn(6, 12)),
    "cnn": (PlainCnn, lambda: torch.randn(4, 3, 8, 8)),
    "attention": (Attention, lambda: torch.randn(3, 5, 8)),
    "own_parameters": (OwnParameters, lambda: torch.randn(6, 12)),
    "called_twice": (CalledTwice, lambda: torch.randn(6, 16)),
    # In float64, since torch's counter does not see its fused float32 LSTM.
    "recurrent": (lambda: Recurrent().double(), lambda: torch.randn(3, 5, 8, dtype=torch.float64)),
    "fused_attention": (FusedAttention, lambda: torch.randn(3, 5, 8)),
    "opaque_part": (hooked_container, lambda: torch.randn(6, 12)),
    "opaque_model": (DataDependent, lambda: torch.randn(6, 16)),
    "normed": (normed, lambda: torch.randn(6, 12)),
}


def transformed(model: nn.Module, policy: Any = HALF, example: Any = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
        warnings.simplefilter("ignore", fx_approx.errors.NoEffectWarning)
        return fx_approx.transform(model, policy, example)


def counted(model: nn.Module, x: Tensor) -> int:
    model.zero_grad()
    with FlopCounterMode(display=False) as counter:
        loss_of(model(x)).backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    ("name", "sampler", "needs_grad"),
    quick(
        [
            *zip(COUNTED, itertools.cycle(["topk", "systematic", "crs"]), itertools.cycle([False])),
            *zip(COUNTED, itertools.cycle(["crs", "topk", "systematic"]), itertools.cycle([True])),
        ],
        lambda name, sampler, needs_grad: needs_grad == bool(list(COUNTED).index(name) % 2),
    ),
)
def test_totals_equal_what_torch_counts(name: str, sampler: str, needs_grad: bool) -> None:
    build, inputs = COUNTED[name]
    model, x = build(), inputs().requires_grad_(needs_grad)
    approx = transformed(model, Uniform(0.5, sampler, scores="online"), x)
    totals = fx_approx.report(approx).totals
    assert totals.executed.total == counted(approx, x)
    assert totals.exact.total == counted(model, x)
    assert totals.executed.total < totals.exact.total
    fx_approx.set_sampling(approx, enabled=False)
    assert counted(approx, x) == totals.exact.total == fx_approx.report(approx).totals.executed.total


def test_totals_with_frozen_layers() -> None:
    model, x = mlp(), torch.randn(6, 12)
    model[0].requires_grad_(False)
    approx = fx_approx.transform(model, HALF, x)
    report = fx_approx.report(approx)
    assert report.totals.executed.total == counted(approx, x)
    assert report["0"].exact == RoleFlops(output=2 * 6 * 16 * 12)
    assert report["2"].exact == RoleFlops(2 * 6 * 16 * 16, 0, 2 * 6 * 16 * 16), "nothing before it learns"


def test_grouped_convolutions_against_integers_by_hand() -> None:
    """Torch's counter ignores the groups of the weight gradient (torch 2.13)."""
    report = fx_approx.report(fx_approx.transform(Cnn(), HALF, torch.randn(4, 3, 8, 8)))
    positions = 4 * 8 * 8
    grouped, depthwise = report["grouped"], report["depthwise"]
    one = 2 * positions * 8 * (8 // 2) * 9
    assert grouped.exact == RoleFlops(one, one, one)
    assert grouped.executed == RoleFlops(one // 2, one // 2, one // 2)
    assert (grouped.sample().k, grouped.pairs) == (2, 4)
    one = 2 * positions * 8 * 1 * 9
    assert depthwise.exact == depthwise.executed == RoleFlops(one, one, one)
    conv1 = report["conv1"]
    assert conv1.exact == RoleFlops(2 * positions * 8 * 27, 0, 2 * positions * 8 * 27)
    assert conv1.executed == RoleFlops(2 * positions * 8 * 18, 0, 2 * positions * 8 * 18), "2 of 3 channels"


def test_a_row_says_everything_of_its_layer() -> None:
    policy = Uniform(0.25, "crs", scope="layer")
    row = fx_approx.report(fx_approx.transform(mlp(), policy, torch.randn(6, 12), prune_unread=False))["2"]
    assert (row.name, row.op, row.shape) == ("2", "linear", "(6, 16, 16)")
    assert row.samples == (Sample(Role.OUTPUT, "crs", "weight", 0.25, 4, 16),) and row.pairs == 16
    assert row.saved == 0.75
    assert row.selection == 2 * 16 * 16, "the squared norm of every weight row"
    assert row.kept_exact == 6 * 16 * 4
    assert row.kept == 6 * 4 * 4 + 16 * 4 * 4 + 4 * (8 + 4), "slices of both operands, indices and scales"
    assert row.reason


def test_rows_are_in_the_order_in_which_the_model_runs() -> None:
    rows = fx_approx.report(fx_approx.transform(Cnn(), HALF)).rows
    assert [row.name for row in rows] == ["conv1", "conv2", "grouped", "depthwise", "fc"]


def test_blocked_rows_say_why_and_are_counted() -> None:
    report = fx_approx.report(fx_approx.transform(Recurrent(), HALF, torch.randn(3, 5, 8)))
    assert "recurrent" in report["lstm"].reason and report["lstm"].samples == ()
    assert report["lstm"].exact == report["lstm"].executed
    report = fx_approx.report(fx_approx.transform(FusedAttention(), HALF, torch.randn(3, 5, 8)))
    for name in ("attention.scaled_dot_product_attention", "scaled_dot_product_attention"):
        assert "fused attention" in report[name].reason
        assert report[name].exact == report[name].executed
    assert report["scaled_dot_product_attention"].exact != RoleFlops(), "by formula, also where torch counts none"
    assert report["attention.linear"].samples and report["attention.out_proj"].samples


def test_notes_name_what_was_not_traced() -> None:
    report = fx_approx.report(transformed(hooked_container()))
    assert any("block" in note and "hooks" in note for note in report.notes)
    said = " ".join(str(report).split())
    assert all(note in said and note in report.to_markdown() for note in report.notes)


@pytest.mark.parametrize("name", thinned(COUNTED))
def test_without_example_inputs_the_first_forward_fills_the_report(name: str) -> None:
    build, inputs = COUNTED[name]
    model, x = build(), inputs()
    approx = transformed(model)
    before = fx_approx.report(approx)
    assert before.rows and all(row.exact is None for row in before.rows)
    assert before.totals.exact.total == 0 and "rows without shapes" in before.notes[-1]
    assert "?" in str(before) and before.to_json() and before.to_csv() and before.to_html()
    approx(x)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "shapes are known only in part", fx_approx.errors.CaptureWarning)
        after = fx_approx.report(approx).to_dict()
        given = fx_approx.report(transformed(model, HALF, x)).to_dict()
    if name == "opaque_model":  # why it is not traced depends on whether there were inputs to ask
        assert [len(one.pop("notes")) for one in (after, given)] == [1, 1]
    assert after == given


def test_rows_behind_data_dependent_control_flow_stay_unknown() -> None:
    with pytest.warns(fx_approx.errors.CaptureWarning):
        approx = fx_approx.transform(WithDataDependent(), HALF, torch.randn(6, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
        report = fx_approx.report(approx)
    assert report["fc1"].exact is not None and report["middle.fc"].exact is not None
    assert report["fc2"].exact is None
    assert any("without shapes" in note for note in report.notes)


@pytest.mark.parametrize(
    ("name", "policy"), thinned(zip(COUNTED, itertools.cycle([HALF, Paper(0.3), Exact()]), strict=False))
)
def test_explain_predicts_the_report(name: str, policy: Any) -> None:
    build, inputs = COUNTED[name]
    model, x = build(), inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explanation = fx_approx.explain(model, policy, x)
    report = fx_approx.report(transformed(model, policy, x))
    assert explanation.report == report
    assert str(explanation) == str(report)
    assert [row.name for row in report.rows] == [decision.name for decision in explanation.plan]


def test_ratios_and_switches_are_those_of_now() -> None:
    x = torch.randn(6, 12)
    approx = fx_approx.transform(mlp(), HALF, x)
    fx_approx.set_sampling(approx, {"2": 0.25})
    report = fx_approx.report(approx)
    assert (report["2"].sample().ratio, report["2"].sample().k, report["2"].saved) == (0.25, 4, 0.75)
    assert report["0"].sample().ratio == 0.5
    assert report.totals.executed.total == counted(approx, x)
    fx_approx.set_sampling(approx, enabled={"0": False})
    report = fx_approx.report(approx)
    assert (report["0"].samples, report["0"].saved, report["0"].reason) == ((), 0.0, "switched off")
    assert report.totals.executed.total == counted(approx, x)
    fx_approx.set_sampling(approx, 1.0)
    report = fx_approx.report(approx)
    assert report.totals.executed == report.totals.exact and "keeps all 16 pairs" in report["2"].reason
    fx_approx.set_sampling(approx, enabled=True)
    fx_approx.set_sampling(approx, 0.5)
    assert fx_approx.report(approx) == fx_approx.report(fx_approx.transform(mlp(), HALF, x))


def test_a_random_count_is_reported_as_expected_and_last() -> None:
    approx = fx_approx.transform(mlp(), Uniform(0.5, "bernoulli", scores="online"), torch.randn(6, 12))
    assert fx_approx.report(approx)["2"].sample().last_k is None
    seen = set()
    for _ in range(10):
        approx(torch.randn(6, 12))
        row = fx_approx.report(approx)["2"].sample()
        assert row.k == 8 and row.last_k is not None
        seen.add(row.last_k)
        assert f"~8 of 16 (last {row.last_k})" in str(fx_approx.report(approx))
    assert len(seen) > 1


def mixed() -> fx_approx.analysis.SavingsReport:
    policy = Override({"conv1": Exact(), "fc": Uniform(0.25, "systematic", scores="uniform", scope="layer")}, HALF)
    return fx_approx.report(fx_approx.transform(Cnn(), policy, torch.randn(4, 3, 8, 8)))


def table_of(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


class Cells(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        self.inside = tag in ("td", "th")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data.strip()


def test_dict_and_json() -> None:
    report = mixed()
    data = report.to_dict()
    assert json.loads(report.to_json()) == json.loads(json.dumps(data)) == data
    assert [row["name"] for row in data["rows"]] == [row.name for row in report.rows]
    for role in ("output", "grad_input", "grad_weight"):
        for kind in ("exact", "executed"):
            assert data["totals"][kind][role] == sum(row[kind][role] for row in data["rows"])
    for count in ("selection", "kept_exact", "kept"):
        assert data["totals"][count] == sum(row[count] for row in data["rows"])
    assert data["totals"]["saved"] == report.totals.saved > data["totals"]["saved_net"]


def test_csv() -> None:
    report = mixed()
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [row["name"] for row in rows] == [row.name for row in report.rows]
    for parsed, row in zip(rows, report.rows, strict=True):
        assert row.exact is not None and row.executed is not None
        assert int(parsed["exact_output"]) == row.exact.output
        assert int(parsed["executed_grad_weight"]) == row.executed.grad_weight
        sample = row.sample()
        assert parsed["output_k"] == ("" if sample is None else str(sample.k)) and parsed["grad_weight_k"] == ""
        assert float(parsed["saved"]) == row.saved and parsed["reason"] == row.reason


def test_markdown_html_and_text_hold_the_same_cells() -> None:
    report = mixed()
    markdown = table_of(report.to_markdown().splitlines())
    header, _, *body = markdown
    assert len({len(row) for row in markdown}) == 1
    assert [row[0] for row in body] == [*(row.name for row in report.rows), "total"]
    assert Cells(report.to_html(FEW)).rows == [header, *body]
    text = report.to_text(width=200)
    for cells in body[:-1]:
        assert any(all(cell in line for cell in cells) for line in text.splitlines()), cells
    assert "Cnn: 3 of 5 multiplies sampled" in text


def test_unknown_rows_are_a_clear_error() -> None:
    with pytest.raises(KeyError, match=r"no candidate 'conv9'; there are: conv1"):
        mixed()["conv9"]


def test_a_report_that_stays_incomplete_says_why_and_warns_once() -> None:
    x = torch.randn(6, 12)
    with pytest.warns(fx_approx.errors.CaptureWarning, match="not traced"):
        approx = fx_approx.transform(WithDataDependent(), HALF)
    approx(x)
    with pytest.warns(fx_approx.errors.CaptureWarning, match="shapes are known only in part"):
        first = fx_approx.report(approx)
    assert "fake tensors do not get there" in first.notes[-1]
    assert fx_approx.report(approx).to_dict() == first.to_dict()
