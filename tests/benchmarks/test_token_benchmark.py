"""The benchmark of tokens, in small: what is stored, that other settings stay, and memory."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script as when it is run, forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("tokens")
    for name in ("tokens", "_device", "_header", "_models", "_peak", "_profile", "_steps"):
        sys.modules.pop(name, None)


def test_steps_are_checked_timed_stored_and_kept(
    benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = tmp_path / "tokens.json"
    small = ["--models", "small", "--runs", "2", "--warmup", "0", "--json", str(numbers)]
    benchmark.main([*small, "--first", "0", "1", "--variants", "tokens", "--optimizers", "none", "sgd"])
    benchmark.main([*small, "--variants", "both", "--optimizers", "sgd"])
    rows = json.loads(numbers.read_text(encoding="utf-8"))["results"]
    kinds = [(one["variant"], one["first"], one["optimizer"]) for one in rows]
    assert len(kinds) == len(set(kinds)) == 7
    left = {(one["variant"], one["first"]): one["operations"] for one in rows}
    assert left["exact", 0] == 1 and left["tokens", 0] < 0.5 < left["tokens", 1] and left["both", 1] < 0.5
    assert all(len(one["speedup"]) == 3 and one["seconds"] > 0 and one["peak"] is None for one in rows)
    assert "exact / this" in capsys.readouterr().out


def test_the_peak_falls_with_the_tokens(benchmark: Any) -> None:
    exact, some = (benchmark.peak("small", 64, variant, 0, 0.5, "sgd") for variant in ("exact", "tokens"))
    assert 0.4 < some / exact < 0.7


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own(benchmark: Any, tmp_path: Path) -> None:
    numbers = tmp_path / "tokens.json"
    small = ["--models", "small", "--batch", "64", "--optimizers", "sgd", "--variants", "tokens", "--first", "0"]
    benchmark.main([*small, "--memory", "--json", str(numbers)])
    benchmark.main([*small, "--runs", "2", "--warmup", "0", "--json", str(numbers)])
    rows = json.loads(numbers.read_text(encoding="utf-8"))["results"]
    assert [(one["variant"], one["peak"] is None) for one in rows] == [
        *(("exact", False), ("tokens", False)),
        *(("exact", True), ("tokens", True)),
    ]
    assert rows[0]["of_exact"] == 1 and 0.4 < rows[1]["of_exact"] < 0.7


@pytest.mark.parametrize(
    ("given", "message"),
    [(["--ratio", "1"], "--ratio: expected"), (["--first", "-1"], "--first: expected"), (["--runs", "1"], "--runs")],
)
def test_options_that_make_no_sense(
    benchmark: Any, given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(given)
    assert message in capsys.readouterr().err
