"""The memory benchmark, on small sizes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_memory_is_that_of_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The script checks the report's bytes against those that autograd saves; rows chosen in forward save memory."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    try:
        memory = importlib.import_module("memory")
        sizes = ["--depth", "1", "--dim", "32", "--heads", "2", "--tokens", "17", "--batch", "32"]
        memory.main([*sizes, "--json", str(tmp_path / "memory.json")])
        with pytest.raises(SystemExit):
            memory.main(["--heads", "5"])
        monkeypatch.setattr(memory, "saved_for_backward", lambda model, x: (0, 0))
        with pytest.raises(AssertionError, match="the report says"):
            memory.main(sizes)
    finally:
        for name in ("_header", "_peak", "memory"):
            sys.modules.pop(name, None)
    exact, weight, both, late = json.loads((tmp_path / "memory.json").read_text(encoding="utf-8"))["results"]
    assert "rows chosen in forward" in capsys.readouterr().out
    assert max(weight["layers"], both["layers"]) <= 0.40 * exact["layers"]
    assert max(weight["step"], both["step"]) <= 0.85 * exact["step"]
    assert late["layers"] >= exact["layers"]
    assert late["step"] >= exact["step"]
    assert max(weight["peak"], both["peak"]) < exact["peak"]
