"""A sweep's runs are ordinary trainings, none is made twice, and the front is the front."""

from __future__ import annotations

import copy
import functools
import importlib.util
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Exact, FlopBudget, Uniform
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.utils import disk_cache

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from policy_sweep.result import SweepResult
from policy_sweep.sweep import sweep

from tests.helpers.models import Cnn

pytestmark = pytest.mark.slow

VALUE = Uniform(0.5)
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
    return sweep(model, given.pop("data"), given.pop("policies"), **given)


def by_hand(model: nn.Module) -> tuple[float, float]:
    """Accuracy and last loss of a plain training loop, with the random numbers that come next."""
    optimizer = torch.optim.SGD(model.train().parameters(), 0.05, momentum=0.9)
    for step in range(5):
        optimizer.zero_grad()
        value = loss(model, DATA[step % 3])
        value.backward()
        optimizer.step()
    with torch.no_grad():
        return evaluate(model.eval()), float(value)


def runs(result: SweepResult, policy: str) -> list[tuple[float | None, float | None]]:
    return [(run.accuracy, run.loss) for run in result.runs if run.policy == policy]


def test_the_exact_run_is_a_training_loop() -> None:
    """Dropout and all, bit by bit."""
    model = Cnn()
    expected = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        expected.append(by_hand(copy.deepcopy(model)))
    assert runs(swept(model=model, seeds=[3, 4]), "exact") == expected


def test_a_policy_that_samples_nothing_is_the_exact_run() -> None:
    """Its BatchNorm statistics are left alone, too."""
    found = swept(policies={"nothing": Exact()})
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
    fx_approx.recalibrate_batchnorm(approx, [DATA[step % 3] for step in range(20)])
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
    expected = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected.append(by_hand(Cnn()))
    assert runs(swept(model=Cnn, seeds=[1, 2]), "exact") == expected
    with pytest.raises(TypeError, match="model: expected the function to make a module"):
        swept(model=lambda: 3)


def test_python_and_numpy_are_seeded_too() -> None:
    def noisy(model: nn.Module, batch: Any) -> Tensor:
        return loss(model, batch) * (1 + random.random() + np.random.random())

    assert swept(loss=noisy, model=Cnn, steps=1).runs == swept(loss=noisy, model=Cnn, steps=1).runs


def test_frozen_parts_stay_frozen() -> None:
    modes: list[tuple[bool, bool]] = []

    def watched(model: nn.Module, batch: Any) -> Tensor:
        modes.append((bool(model.training), bool(model.get_submodule("bn1").training)))
        return loss(model, batch)

    model = Cnn()
    model.bn1.eval()
    swept(model=model, loss=watched)
    assert set(modes) == {(True, False)}
    modes.clear()
    swept(model=Cnn().eval(), loss=watched)
    assert set(modes) == {(True, True)}


def counting(calls: list[int]) -> Callable[[nn.Module, Any], Tensor]:
    def counted(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return loss(model, batch)

    return counted


REHEARSAL = 2
"""Steps before the first training: one for each policy, the exact one too."""


def test_an_interrupted_sweep_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    calls: list[int] = []

    def breaks(model: nn.Module, batch: Any) -> Tensor:
        if len(calls) == REHEARSAL + 12:
            raise KeyboardInterrupt
        return counting(calls)(model, batch)

    given: dict[str, Any] = {"model": Cnn(), "seeds": [0, 1], "directory": tmp_path}
    expected = swept(**{**given, "directory": None})
    with pytest.raises(KeyboardInterrupt):
        swept(**given, loss=breaks)
    assert len(list(tmp_path.iterdir())) == 2  # of four runs, of five steps each
    calls.clear()
    found = swept(**given, loss=counting(calls))
    assert len(calls) == REHEARSAL + 2 * 5 + 2 * 2 * (3 + 2)  # two runs and the times of two policies
    assert found.runs == expected.runs
    calls.clear()
    assert swept(**given, loss=counting(calls)) == found and not calls


def smoother() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(288, 4))


def rougher() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))


def slow(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.001)


@pytest.mark.parametrize(
    "changes",
    [
        {"tag": "other data"},
        {"model": smoother},
        {"optimizer": slow},
        {"steps": 6},
        {"recalibration": 3},
        {"policies": {"half": Uniform(0.75)}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_runs_are_told_apart(tmp_path: Path, changes: dict[str, Any]) -> None:
    """With what was kept for another sweep, it finds what it finds without."""
    given: dict[str, Any] = {"model": rougher, "directory": tmp_path}
    swept(**given)
    before = len(list(tmp_path.iterdir()))
    found = swept(**{**given, **changes})
    assert found.runs == swept(**{**given, **changes, "directory": None}).runs
    assert len(list(tmp_path.iterdir())) > before


def test_other_first_values_are_another_model(tmp_path: Path) -> None:
    one, other = Cnn(), Cnn()
    swept(model=one, directory=tmp_path)
    assert swept(model=other, directory=tmp_path).runs == swept(model=other).runs != swept(model=one).runs


class Nameless:
    """A policy as Python writes it: by its address."""

    needs_shapes = True

    def decide(self, candidates: Any) -> Any:
        return VALUE.decide(candidates)


def test_a_policy_that_cannot_be_known_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"policies\['own'\]: its runs cannot be known again in directory"):
        swept(policies={"own": Nameless()}, directory=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    model = Cnn()
    assert runs(swept(model=model, policies={"own": Nameless()}), "own") == runs(swept(model=model), "half")


def test_a_plan_is_kept_too(tmp_path: Path) -> None:
    plan = fx_approx.explain(Cnn(), VALUE, DATA[0][0]).plan
    model, calls = Cnn(), []
    swept(model=model, policies={"plan": plan}, directory=tmp_path)
    again = swept(model=model, policies={"plan": plan}, directory=tmp_path, loss=counting(calls))
    assert not calls and runs(again, "plan") == runs(swept(model=model), "half")
    fewer = swept(model=model, policies={"plan": plan.edit("conv2", None)}, directory=tmp_path, loss=counting(calls))
    assert calls and fewer.times[1].sampled == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"policies": {"good": VALUE, "other": fx_approx.explain(rougher(), VALUE, DATA[0][0]).plan}},
            "plan: made for",
        ),
        ({"policies": {"good": VALUE, "shapes": FlopBudget(0.5)}, "example_inputs": None}, "example_inputs"),
        ({"evaluate": lambda model: None}, "evaluate: expected it to return a number, got None"),
    ],
)
def test_errors_come_before_the_first_training(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    calls: list[int] = []
    with pytest.raises(ValueError, match=message):
        swept(**changes, loss=counting(calls), directory=tmp_path)
    assert len(calls) <= REHEARSAL and not list(tmp_path.iterdir())


def test_a_corrupt_file_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_cache, "_warned", set())
    model = Cnn()
    found = swept(model=model, directory=tmp_path)
    for path in tmp_path.iterdir():
        path.write_text("{")
    with pytest.warns(fx_approx.errors.CacheWarning, match="made anew"):
        again = swept(model=model, directory=tmp_path)
    assert again.runs == found.runs


def explosive(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 1e30)


@pytest.mark.parametrize("steps", [1, 5])
def test_a_run_that_diverges_is_written_down(steps: int, tmp_path: Path) -> None:
    """Of one step the loss is finite, but not what comes out of the model then."""
    found = swept(optimizer=explosive, steps=steps, directory=tmp_path)
    assert all(run.diverged and run.accuracy is None for run in found.runs)
    assert all((run.loss is None) == (steps > 1) for run in found.runs)
    assert found.front() == [] and "diverged" in str(found)
    assert SweepResult.from_json(found.to_json()) == found
    found.plot()


def test_times_and_savings() -> None:
    exact, half = swept().times
    assert (exact.policy, exact.speedup, exact.saved, exact.sampled) == ("exact", (1.0, 1.0, 1.0), 0.0, 0)
    totals = fx_approx.explain(Cnn(), VALUE, DATA[0][0]).report.totals
    assert half.saved == totals.saved_net and half.sampled == 4 and half.seconds > 0
    assert 0 < half.speedup[0] <= half.speedup[1] <= half.speedup[2]


def test_timed_steps_take_turns_on_one_batch() -> None:
    steps: list[tuple[bool, int]] = []

    def watched(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        steps.append((isinstance(model, ApproxModule), [id(one) for one in DATA].index(id(batch))))
        return loss(model, batch)

    swept(loss=watched, repeats=4)
    timed = steps[-2 * (3 + 4) :]  # of the policy, the last that is timed
    assert {batch for _, batch in timed} == {0}
    assert all({timed[place][0], timed[place + 1][0]} == {True, False} for place in range(0, len(timed), 2))


def test_compiled_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What trains and is timed is compiled whole, what is evaluated is not, and the numbers are the eager ones."""
    compiling = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    seen: list[tuple[bool, bool]] = []

    def watched(model: nn.Module, batch: Any) -> Tensor:
        seen.append((isinstance(model, torch._dynamo.OptimizedModule), model.training))
        return loss(model, batch)

    def uncompiled(model: nn.Module) -> float:
        assert not isinstance(model, torch._dynamo.OptimizedModule)
        return evaluate(model)

    model = rougher()
    monkeypatch.setattr(torch, "compile", compiling)
    found = swept(model=model, compile=True, loss=watched, evaluate=uncompiled)
    assert seen == [(False, True)] * REHEARSAL + [(True, True)] * (2 * 5 + 2 * 2 * (3 + 2))
    eager = swept(model=model)
    for one, other in zip(found.runs, eager.runs, strict=True):
        assert one.accuracy == pytest.approx(other.accuracy, rel=1e-4) and one.loss == pytest.approx(
            other.loss, rel=1e-4
        )


def test_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    swept()
    said = capsys.readouterr()
    assert said.out + said.err == ""
    swept(progress=True)
    said = capsys.readouterr()
    assert "2/2" in said.err and said.out == ""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tqdm" else find(name, *rest))
    swept(progress=True)
    said = capsys.readouterr()
    assert said.out.splitlines() == ["run 1 of 2: exact, seed 0", "run 2 of 2: half, seed 0"] and said.err == ""


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
        ({"data": lambda seed: iter(())}, ValueError, "data: it gives no batches"),
        ({"seeds": [2**63]}, ValueError, r"seed: expected an integer from .* to 2\*\*63 - 1"),
        ({"seeds": [0.5]}, TypeError, "seeds: expected an integer"),
        ({"optimizer": 0.1}, TypeError, "optimizer: expected a function, got 0.1"),
        ({"optimizer": list}, TypeError, "optimizer: expected the function to make a torch.optim.Optimizer"),
        ({"compile": "yes"}, TypeError, "compile: expected True or False, got 'yes'"),
        ({"progress": 1}, TypeError, "progress: expected True or False, got 1"),
        ({"tag": 3}, TypeError, "tag: expected a string, got 3"),
        ({"directory": 3}, TypeError, "directory: expected a folder's path or None, got 3"),
        ({"loss": None}, TypeError, "loss: expected a function"),
        ({"loss": lambda model, batch: model(batch[0])}, ValueError, "loss: expected it to return a scalar"),
        ({"loss": lambda model, batch: torch.tensor(1.0)}, ValueError, "loss: it depends on no parameter"),
        ({"evaluate": lambda model: "good"}, ValueError, "evaluate: expected it to return a number, got 'good'"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        swept(**changes)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"directory: expected a folder that can be written to, got '.*file'"):
        swept(directory=tmp_path / "file")
