"""What people look at: the graph after each pass, and who is coupled with whom."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fx_approx
from fx_approx.policies import Uniform
from tests.helpers.ahead import Readers
from tests.helpers.hoisting import Layers


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
    with pytest.raises(ImportError, match=r"fx_approx\[figures\]"):
        fx_approx.analysis.draw_coupling(transformed(), tmp_path / "other.svg")


def test_without_shapes_there_is_no_coupling() -> None:
    model = fx_approx.transform(Readers(), Uniform(0.5, scope="layer"))
    with pytest.raises(ValueError, match="example_inputs"):
        fx_approx.analysis.coupling_graph(model)
