"""A sweep's runs are ordinary trainings, none is made twice, and the front is the front."""

from __future__ import annotations

import copy
import csv
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx import SweepResult, SweepRun, SweepTime, disk_cache
from fx_approx.policies import Exact, Uniform

from .models import Cnn

VALUE = Uniform("topk", 0.5, scores="weight", share="value")
DATA = [(torch.randn(8, 3, 8, 8), torch.randint(4, (8,))) for _ in range(3)]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def evaluate(model: nn.Module) -> float:
    assert not model.training
    return float(loss(model, DATA[0]))


def swept(**changes: Any) -> SweepResult:
    given: dict[str, Any] = {
        "data": DATA,
        "policies": {"half": VALUE},
        "loss": loss,
        "evaluate": evaluate,
        "example_inputs": DATA[0][0],
        "steps": 5,
        "repeats": 2,
        "progress": False,
        **changes,
    }
    model = given.pop("model") if "model" in given else Cnn()
    return fx_approx.sweep(model, given.pop("data"), given.pop("policies"), **given)


def by_hand(model: nn.Module, seed: int) -> float:
    torch.manual_seed(seed)
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(5):
        optimizer.zero_grad()
        loss(model, DATA[step % 3]).backward()
        optimizer.step()
    with torch.no_grad():
        return evaluate(model.eval())


def test_the_exact_run_is_a_training_loop() -> None:
    """Dropout and all, bit by bit."""
    model = Cnn()
    found = swept(model=model, seeds=[3, 4])
    assert [run.accuracy for run in found.runs if run.policy == "exact"] == [by_hand(model, 3), by_hand(model, 4)]


def test_a_policy_that_samples_nothing_is_the_exact_run() -> None:
    found = swept(policies={"nothing": Exact()}, recalibration=0)
    assert found.runs[0].accuracy == found.runs[1].accuracy and found.runs[0].loss == found.runs[1].loss


def test_sampled_runs_are_recalibrated() -> None:
    """As a hand-written loop is that recalibrates on 20 batches."""
    model = Cnn()
    torch.manual_seed(0)
    approx = fx_approx.transform(copy.deepcopy(model).train(), VALUE, DATA[0][0], seed=0)
    optimizer = torch.optim.SGD(approx.parameters(), 0.05, momentum=0.9)
    for step in range(5):
        optimizer.zero_grad()
        loss(approx, DATA[step % 3]).backward()
        optimizer.step()
    fx_approx.recalibrate(approx, [DATA[step % 3] for step in range(20)])
    with torch.no_grad():
        expected = evaluate(approx.eval())
    assert swept(model=model).runs[1].accuracy == expected


def test_nothing_outside_changes() -> None:
    model = Cnn().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    swept(model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2] and not model.training


def test_a_factory_is_called_under_the_seed() -> None:
    found = swept(model=Cnn, seeds=[1, 2])
    one, two = (run.accuracy for run in found.runs if run.policy == "exact")
    torch.manual_seed(1)
    assert one == by_hand(Cnn(), 1) or one != two
    assert one != two
    with pytest.raises(TypeError, match="model: expected the function to make a module"):
        swept(model=lambda: 3)


def counting(calls: list[int]) -> Callable[[nn.Module, Any], Tensor]:
    def counted(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return loss(model, batch)

    return counted


def test_an_interrupted_sweep_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    whole, calls = swept(seeds=[0, 1]), []

    def breaks(model: nn.Module, batch: Any) -> Tensor:
        if len(calls) == 12:
            raise KeyboardInterrupt
        return counting(calls)(model, batch)

    given: dict[str, Any] = {"model": Cnn(), "seeds": [0, 1], "directory": tmp_path}
    expected = swept(**{**given, "directory": None})
    with pytest.raises(KeyboardInterrupt):
        swept(**given, loss=breaks)
    assert len(list(tmp_path.glob("*.json"))) == 2  # of four runs, of five steps each
    calls.clear()
    found = swept(**given, loss=counting(calls))
    assert len(calls) == 2 * 5 + 2 * 2 * (3 + 2)  # two runs and the times of two policies
    assert found.runs == expected.runs and len(found.runs) == len(whole.runs)
    calls.clear()
    assert swept(**given, loss=counting(calls)) == found and not calls
    swept(**given, loss=counting(calls), tag="other data")
    assert calls


def test_a_corrupt_file_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_cache, "_warned", set())
    model = Cnn()
    found = swept(model=model, directory=tmp_path)
    for path in tmp_path.iterdir():
        path.write_text("{")
    with pytest.warns(fx_approx.CacheWarning, match="made anew"):
        again = swept(model=model, directory=tmp_path)
    assert again.runs == found.runs


def test_a_run_that_diverges_is_written_down() -> None:
    found = swept(optimizer=lambda parameters: torch.optim.SGD(parameters, 1e30))
    assert all(run.diverged and run.accuracy is None for run in found.runs)
    assert found.front() == [] and "diverged" in str(found)
    found.plot()


def test_times_and_savings() -> None:
    exact, half = swept().times
    assert (exact.policy, exact.speedup, exact.saved, exact.sampled) == ("exact", (1.0, 1.0, 1.0), 0.0, 0)
    totals = fx_approx.explain(Cnn(), VALUE, DATA[0][0]).report.totals
    assert half.saved == totals.saved_net and half.sampled == 4 and half.seconds > 0
    assert 0 < half.speedup[0] <= half.speedup[1] <= half.speedup[2]


def result(points: dict[str, tuple[float | None, float]]) -> SweepResult:
    runs = [SweepRun(name, 0, accuracy, 1.0, accuracy is None) for name, (accuracy, _) in points.items()]
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
    with pytest.raises(KeyError, match="no policy 'z'; there are: exact, a"):
        result(points).accuracy("z")


def test_csv_json_and_table() -> None:
    found = swept(seeds=[0, 1])
    assert SweepResult.from_json(found.to_json()) == found
    with pytest.raises(ValueError, match="format: expected"):
        SweepResult.from_json("{}")
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [(row["policy"], int(row["seed"]), float(row["accuracy"])) for row in rows] == [
        (run.policy, run.seed, run.accuracy) for run in found.runs
    ]
    assert float(rows[-1]["speedup"]) == found.times[1].speedup[1]
    lines = str(found).splitlines()
    assert lines[2].startswith("exact") and "half" in lines[3] and "±" in lines[2]


def test_the_figure_has_every_policy(tmp_path: Path) -> None:
    figure = result({"exact": (90.0, 1.0), "a": (89.0, 2.0), "lost": (None, 3.0)}).plot(tmp_path / "front.png")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(labels) == {"exact", "a", "front"} and (tmp_path / "front.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"policies": {}}, ValueError, "policies: expected at least one"),
        ({"policies": {"exact": VALUE}}, ValueError, "policies: 'exact' is the name of the baseline"),
        ({"policies": {"a": 0.5}}, TypeError, r"policies\['a'\]: .*expected a policy"),
        ({"policies": [VALUE]}, TypeError, "policies: expected names with policies"),
        ({"policies": {1: VALUE}}, TypeError, "policies: expected names as keys"),
        ({"steps": 0}, ValueError, "steps: expected an integer of at least 1"),
        ({"repeats": 1}, ValueError, "repeats: expected an integer of at least 2"),
        ({"seeds": []}, ValueError, "seeds: expected at least one"),
        ({"seeds": [1, 1]}, ValueError, "seeds: expected different ones"),
        ({"model": 3}, TypeError, "model: expected a module"),
        ({"data": 3}, TypeError, "data: expected batches"),
        ({"data": []}, ValueError, "data: it gives no batches"),
        ({"data": iter(DATA)}, ValueError, "data: it can be gone through once only"),
        ({"loss": None}, TypeError, "loss: expected a function"),
        ({"loss": lambda model, batch: model(batch[0])}, ValueError, "loss: expected it to return a scalar"),
        ({"evaluate": lambda model: "good"}, ValueError, "evaluate: expected it to return a number, got 'good'"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        swept(**changes)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        swept(directory=tmp_path / "file")
