"""The one command for a machine with a GPU: how measurements end, and that all of them are known to their scripts."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module("gpu")
    for name in set(sys.modules) - before:
        if (BENCHMARKS / f"{name}.py").exists():
            sys.modules.pop(name)


def test_what_is_measured_is_written_as_it_comes(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts = {
        "good": "import sys; open(sys.argv[sys.argv.index('--json') + 1], 'w').write('1'); print('said')",
        "bad": "raise SystemExit(3)",
        "slow": "import time; time.sleep(60)",
    }
    for name, text in scripts.items():
        (tmp_path / f"{name}.py").write_text(text)
    boxes = [gpu.Box(name, str(tmp_path / f"{name}.py"), ("--x",), (), 1 if name == "slow" else 30) for name in scripts]
    monkeypatch.setattr(gpu, "BOXES", [*boxes, gpu.Box("long", "never.py", (), (), 10_000)])
    assert gpu.main(["--out", str(tmp_path / "out"), "--small"]) == 1
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {name: one["ended"] for name, one in found["results"].items()} == {
        **{"good": "done", "bad": "failed", "slow": "out of time", "long": "left out"}
    }
    assert found["small"] and "torch" in found["environment"]
    assert (tmp_path / "out" / "good.json").read_text() == "1"
    assert (tmp_path / "out" / "good.txt").read_text() == "said\n"
    assert "out of time" in capsys.readouterr().out


def test_they_fit_into_ten_minutes_in_order_of_worth(gpu: ModuleType) -> None:
    assert gpu.BOXES[0].name == "correctness"
    assert sum(box.seconds for box in gpu.BOXES[:7]) <= 600, "the rest runs where the first ones need less"


def test_each_script_understands_its_arguments(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Parsed(Exception):
        pass

    def stop(*args: Any) -> None:
        raise Parsed

    for box in gpu.BOXES[1:]:
        module = importlib.import_module(box.script.removesuffix(".py"))
        monkeypatch.setattr(module, "header", stop)  # what a script says first, after it has read its arguments
        arguments = ["cpu" if one == "cuda" else one for one in box.arguments]
        with pytest.raises(Parsed):
            module.main([*arguments, "--json", "x.json"])


@pytest.mark.slow
def test_all_of_it_in_small(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FX_APPROX_TEST_INSTALLED", raising=False)  # whoever has a GPU runs it in a checkout
    assert gpu.main(["--out", str(tmp_path), "--small"]) == 0
    for box in gpu.BOXES[1:]:
        assert json.loads((tmp_path / f"{box.name}.json").read_text())["results"]
