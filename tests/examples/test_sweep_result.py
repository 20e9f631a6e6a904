"""What a sweep found, on numbers made by hand: the front, the table, CSV, JSON and the figure."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from policy_sweep.result import SweepResult, SweepRun, SweepTime


def result(points: dict[str, tuple[float | None, float]], second: dict[str, float | None] | None = None) -> SweepResult:
    """Policies with accuracy (None: diverged) and speed-up; ``second``: the accuracies of another seed."""
    seeds = [{name: accuracy for name, (accuracy, _) in points.items()}, second or {}]
    runs = [
        SweepRun(name, seed, accuracy, None if accuracy is None else 1.0 + seed, accuracy is None)
        for seed, of in enumerate(seeds)
        for name, accuracy in of.items()
    ]
    times = [SweepTime(name, 0.1 / fast, (fast, fast, fast), 0.5, 1) for name, (_, fast) in points.items()]
    return SweepResult(tuple(runs), tuple(times))


def test_the_front() -> None:
    points = {
        "exact": (90.0, 1.0),
        "a": (89.0, 2.0),
        "b": (88.0, 1.5),
        "c": (80.0, 3.0),
        "d": (None, 9.0),
        "e": (89.0, 1.9),
    }
    assert result(points).front() == ["exact", "a", "c"]
    assert result({"exact": (1.0, 1.0), "same": (1.0, 1.0)}).front() == ["exact", "same"]
    twice = {name: 90.0 if name == "b" else accuracy for name, (accuracy, _) in points.items()}
    assert result(points, {**twice, "a": 86.0}).front() == ["exact", "e", "a", "c"]  # e as good as b
    assert result(points, {"c": None}).front() == ["exact", "a"]  # a run of c diverged
    with pytest.raises(KeyError, match="no policy 'z'; there are: exact, a"):
        result(points).accuracy("z")


def test_csv_json_and_table() -> None:
    found = result({"exact": (90.0, 1.0), "half": (89.0, 2.0)}, second={"exact": 92.0, "half": None})
    assert SweepResult.from_json(found.to_json()) == found
    with pytest.raises(ValueError, match="format: expected"):
        SweepResult.from_json("{}")
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [(row["policy"], int(row["seed"]), float(row["accuracy"])) for row in rows[:3]] == [
        (run.policy, run.seed, run.accuracy) for run in found.runs[:3]
    ]
    last = {**rows[3]}
    assert (last["policy"], last["accuracy"], last["loss"], last["diverged"]) == ("half", "", "", "True")
    assert [float(last[name]) for name in ("seconds", "speedup_low", "speedup", "speedup_high")] == [0.05, 2, 2, 2]
    lines = [[cell.strip() for cell in line.split("  ") if cell] for line in str(found).splitlines()]
    assert lines[2] == ["exact *", "91 ± 1.4", "1.5", "100.00", "1.00 [1.00, 1.00]", "50.0", "1"]
    assert lines[3] == ["half", "89 ± 0 (1 of 2 diverged)", "1", "50.00", "2.00 [2.00, 2.00]", "50.0", "1"]


def test_the_figure_has_every_policy(tmp_path: Path) -> None:
    figure = result({"exact": (90.0, 1.0), "a": (89.0, 2.0), "lost": (None, 3.0)}).plot(tmp_path / "front.png")
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert [list(data) for data in lines["front"].get_data()] == [[1.0, 2.0], [90.0, 89.0]]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(labels) == {"exact", "a", "front"} and (tmp_path / "front.png").stat().st_size > 1000
