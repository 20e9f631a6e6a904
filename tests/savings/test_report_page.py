"""The page of a savings report: it stands by itself, has every row, and draws what is computed of each."""

from __future__ import annotations

import html.parser
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fx_approx
from fx_approx.policies import Exact, Override, Uniform
from fx_approx.savings.drawing import DrawnNode, Stretch, joined
from fx_approx.savings.graph_svg import graph_svg
from fx_approx.utils.tables import COLUMNS
from tests.helpers.models import mlp
from tests.savings.test_report_text import report_of

VOID = ("meta", "circle", "path")


class Page(html.parser.HTMLParser):
    """Tables, texts of drawings, bars, and whether each tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[tuple[str, str | None]]] = []
        self.texts: list[str] = []
        self.bars: list[dict[str, str]] = []
        self.counts: dict[str, int] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in ("meta",):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append(("", given.get("data-sort")))
        elif tag == "rect":
            self.bars.append(given)
        elif tag == "text":
            self.texts.append("")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            text, key = self.rows[-1][-1]
            self.rows[-1][-1] = (text + data, key)
        elif self.open and self.open[-1] == "text":
            self.texts[-1] += data


@pytest.mark.parametrize("name", ["resnet50", "vit", pytest.param("bert", marks=pytest.mark.slow)])
def test_it_stands_by_itself_and_has_every_row(name: str) -> None:
    report = report_of(name)
    text = report.to_html()
    page = Page(text)
    assert page.open == [], "every tag is closed"
    assert not re.search(r"(src|href)=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    head, *rows, total = page.rows
    assert [row[0][0] for row in rows] == [row.name for row in report.rows]
    assert len({len(row) for row in page.rows}) == 1 and total[0][0] == "total"
    assert all(row.name in page.texts for row in report.rows), "and draws it"
    assert all(stop in text.replace("&#x27;", "'") for stop in report.stops)
    assert page.counts["circle"] == len(report.drawing) >= len(report.rows)
    assert {row.name for row in report.rows} == {node.name for node in report.drawing if node.is_row}
    marks = [bar for bar in page.bars if bar.get("class") == "stop"]
    assert len(marks) == sum(bool(node.stops) for node in report.drawing) > 0
    place = [cell for cell, _ in head].index("saved %")
    values = [float(row[place][1] or "nan") for row in rows]
    assert values == [row.saved for row in report.rows], "what it is sorted by"


def test_columns_and_their_numbers() -> None:
    report = report_of("resnet50")
    head, first, *_ = Page(report.to_html(list(COLUMNS))).rows
    assert [cell for cell, _ in head] == [head for heads in COLUMNS.values() for head in heads]
    row = report.rows[0]
    keys = [key for _, key in first]
    place = [cell for cell, _ in head].index("out")
    assert row.exact is not None
    assert [float(key or 0) for key in keys[place : place + 3]] == [
        row.exact.output,
        row.exact.grad_input,
        row.exact.grad_weight,
    ]
    alone = report.to_html(["layer", "k"], whole=False)
    assert alone.startswith("<table>") and [row[0][0] for row in Page(alone).rows[1:-1]] == [
        r.name for r in report.rows
    ]
    for whole in (True, False):
        with pytest.raises(ValueError, match="columns: expected"):
            report.to_html(["nothing"], whole=whole)


def test_bars_are_what_is_computed() -> None:
    """Two layers that share a selection have one colour; what reads less makes the layer before compute less."""
    model = mlp()
    report = fx_approx.explain(model, Override({"0": Exact()}, Uniform(0.25)), torch.empty(6, 12)).report
    nodes = {node.name: node for node in report.drawing}
    assert nodes["0"].reads == (Stretch(12, 12),)
    (made,) = nodes["0"].makes
    assert (made.kept, made.units) == (4, 16) and nodes["2"].reads == (made,)
    assert [report.drawing[parent].name for parent in nodes["2"].parents] == ["0"]
    coloured = [bar for bar in Page(report.to_html()).bars if bar.get("fill")]
    by_colour: dict[str, list[float]] = {}
    for bar in coloured:
        by_colour.setdefault(bar["fill"], []).append(float(bar["width"]))
    assert all(widths == [pytest.approx(130 / 4, abs=0.1)] * 2 for widths in by_colour.values())
    assert len(by_colour) == sum(node.is_row for node in report.drawing) - 1


def test_a_random_online_sample_is_drawn_without_sharing() -> None:
    report = fx_approx.explain(mlp(), Uniform(0.5, scores="online"), torch.empty(6, 12)).report
    assert all(node.reads == (Stretch(node.reads[0].units // 2, node.reads[0].units),) for node in report.drawing)


def test_without_shapes_the_rows_are_drawn_all_the_same() -> None:
    report = fx_approx.explain(mlp(), Uniform(0.5, scores="online")).report
    page = Page(report.to_html())
    assert report.drawing == () and page.open == []
    assert [text for text in page.texts if text in {row.name for row in report.rows}] == [r.name for r in report.rows]


def test_graphs_of_one_report_have_selections_of_their_own() -> None:
    one = (DrawnNode("a", True, makes=(Stretch(1, 2, 0),)), DrawnNode("b", True, (0,), (Stretch(1, 2, 0),)))
    both = joined([one, one])
    assert both[:2] == one
    assert both[3] == DrawnNode("b", True, (2,), (Stretch(1, 2, 1),))


def test_edges_that_skip_nodes_lie_beside_each_other() -> None:
    nodes = [DrawnNode("x", True), *(DrawnNode(f"n{i}", True, (i - 1,)) for i in range(1, 8))]
    nodes[3] = DrawnNode("n3", False, (2, 0))
    nodes[6] = DrawnNode("n6", False, (5, 3, 1))
    paths = re.findall(r'<path class="edge" d="M\d+ \d+C(-?\d+)', graph_svg(nodes))
    assert len(paths) == 3 and len(set(paths)) == 2, "0 to 3 and 3 to 6 share a lane, 1 to 6 has another"


def test_names_are_escaped() -> None:
    text = graph_svg([DrawnNode("<script>", True, stops=("a & b",))])
    assert "<script>" not in text and "&lt;script&gt;" in text and "a &amp; b" in text


def test_bars_of_operations(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = report_of("resnet50")
    figure = report.plot(tmp_path / "bars.png")
    (axes,) = figure.axes
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    assert widths == [[getattr(row, kind).total for row in report.rows] for kind in ("exact", "executed")]
    assert [label.get_text() for label in axes.get_yticklabels()] == [row.name for row in report.rows]
    assert (tmp_path / "bars.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="no layer of Sequential has operations that could be drawn"):
        fx_approx.explain(mlp(), Uniform(0.5, scores="online")).report.plot()
