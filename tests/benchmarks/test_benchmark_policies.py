"""The benchmarks of policies run, in small, and their numbers are those of the package."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = ("_header", "_models", "predictions", "budgets", "auto")


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    try:
        yield importlib.import_module(request.param)
    finally:
        torch.set_num_threads(threads)
        for name in MODULES:
            sys.modules.pop(name, None)


def results(script: ModuleType, path: Path, arguments: list[str]) -> Any:
    script.main([*arguments, "--json", str(path)])
    return json.loads(path.read_text(encoding="utf-8"))["results"]


@pytest.mark.parametrize("script", ["budgets"], indirect=True)
def test_budgets(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = results(script, tmp_path / "found.json", ["--models", "mlp_4", "--steps", "3", "--batch", "8"])
    assert 0.3 < found["budget"] < 1
    for label in ("predicted", "measured"):
        assert 0.98 * found["budget"] <= found[label]["flops"] <= found["budget"]
        assert found[label]["error"] > 0
    assert "less error than uniform on" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["predictions"], indirect=True)
def test_predictions(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fx_approx.policies import cost_roofline as roofline
    from fx_approx.policies.cost_roofline import Device

    device = Device("made up", "torch.float32", 1e11, 1e10, 1e10, 1e-6, 0.8, 0.7, 0.5, 0.1)
    monkeypatch.setattr(roofline, "calibrate", lambda *args: device)
    monkeypatch.setattr(script, "calibrate", lambda *args: device)
    arguments = ["--models", "wrn_10_2", "--ratios", "0.5", "--runs", "2", "--minimal-k", "8"]
    (found,) = results(script, tmp_path / "found.json", arguments)
    roofline._devices.clear()
    assert found["roofline"] > 1 and found["measured"] > 0 and len(found["clock"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("script", ["auto"], indirect=True)
def test_auto(script: ModuleType, tmp_path: Path) -> None:
    arguments = ["--models", "squeezenet1_1", "--batches", "2", "--runs", "3", "--sweep"]
    (found,) = results(script, tmp_path / "found.json", arguments)
    assert found["layers"] == 26 and set(found["speedup"]) == {
        "auto",
        *(f"{s} {r}" for s in ("layer", "value", "group") for r in (0.5, 0.75)),
    }


@pytest.mark.parametrize("script", ["predictions", "budgets", "auto"], indirect=True)
def test_bad_options(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--models", "nothing"], ["--ratio", "2"], ["--runs", "0"], ["--ratios", "0"]):
        with pytest.raises(SystemExit):
            script.main(arguments)
    assert "error:" in capsys.readouterr().err
