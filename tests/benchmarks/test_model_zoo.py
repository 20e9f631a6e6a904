"""The zoo: its oracle agrees with small networks, catches what is wrong in them, and the command tells of both."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.sampling import Selection

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = ("sppf", "encoder")
FAMILIES = ("nets", "timm", "transformers", "torchvision", "segmentation", "video", "flow", "detection")


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, imported as when it is run; it and what it imports are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    try:
        yield importlib.import_module("model_zoo")
    finally:
        torch.set_num_threads(threads)
        for name in [name for name in sys.modules if name.startswith("_zoo_") or name in ("model_zoo", "_models")]:
            sys.modules.pop(name)
        sys.modules.pop("_header", None)


def entry(zoo: ModuleType, name: str) -> Any:
    (found,) = [one for one in zoo.entries() if one.name == name]
    return found


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_agree_with_the_oracle(zoo: ModuleType, name: str) -> None:
    result = zoo.examine(entry(zoo, name))
    assert result.passed, result
    assert result.error < 1e-12
    assert result.verified and result.narrowed
    assert result.sampled >= result.products // 2
    assert not result.untraced


def test_the_oracle_is_not_the_exact_model(zoo: ModuleType) -> None:
    """Else it could not tell a model in which nothing is sampled."""
    run, oracle = sys.modules["_zoo_run"], sys.modules["_zoo_oracle"]
    made = entry(zoo, "sppf").make()
    exact = run._train(made.model, made.model, made)
    layers = {name: one for name, one in made.model.named_modules() if isinstance(one, nn.Conv2d)}
    factors = {}
    for name, layer in layers.items():
        factor = torch.ones(layer.in_channels, dtype=torch.float64)
        factor[0] = 0
        factors[name] = sys.modules["_zoo_selections"].Factors((factor,))
    watching = oracle.Oracle(made.model, factors)
    with watching.following():
        left_out = run._train(made.model, made.model, made)
    watching.check()
    assert not torch.equal(exact.outputs[0], left_out.outputs[0])
    for name in layers:
        assert left_out.grads[f"{name}.weight"][:, 0].count_nonzero() == 0
        assert exact.grads[f"{name}.weight"][:, 0].count_nonzero() > 0


Break = Callable[[nn.Module], None]


def reads_other_channels(model: nn.Module) -> None:
    """All that follows reads a neighbour of what one selection says, so that ``verify`` sees no difference."""

    def wrong(module: nn.Module, args: Any, made: tuple[Selection | None, ...]) -> tuple[Selection | None, ...]:
        last = made[-1]
        assert last is not None
        units = list(module.each())[-1].pairs
        return (*made[:-1], Selection((last.indices + 1) % units, last.scale))

    model._fx_approx.resample.register_forward_hook(wrong)


def loses_some_gradient(model: nn.Module) -> None:
    parameters = [p for p in model.parameters() if p.dim() == 4]

    def less(grad: Tensor) -> Tensor:
        return grad * (1 - 1e-6)

    parameters[1].register_hook(less)


def calls_a_layer_twice(model: nn.Module) -> None:
    runtime = model._fx_approx
    runtime.record.candidates = (*runtime.record.candidates, runtime.record.candidates[-1])


@pytest.mark.parametrize("broken", [reads_other_channels, loses_some_gradient, calls_a_layer_twice])
def test_the_oracle_catches_what_is_wrong(zoo: ModuleType, monkeypatch: pytest.MonkeyPatch, broken: Break) -> None:
    transform = fx_approx.transform

    def defective(*args: Any, **kwargs: Any) -> nn.Module:
        model = transform(*args, **kwargs)
        broken(model)
        return model

    monkeypatch.setattr(fx_approx, "transform", defective)
    result = zoo.examine(entry(zoo, "sppf"))
    assert not result.passed
    assert result.verified  # only the oracle sees it
    assert "called" in result.failure or result.error > result.tolerance


def test_the_command_writes_table_and_numbers_and_keeps_what_is_there(
    zoo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(zoo, "entries", lambda: sys.modules["_zoo_nets"].net_entries())
    numbers, page = tmp_path / "zoo.json", tmp_path / "zoo.md"
    files = ["--json", str(numbers), "--markdown", str(page)]
    for name in ("sppf", "mobile"):
        assert zoo.main(["--model", name, *files]) == 0
    stored = json.loads(numbers.read_text(encoding="utf-8"))
    assert [one["name"] for one in stored["results"]] == ["sppf", "mobile"]
    assert stored["environment"]["torch"] == torch.__version__
    text = page.read_text(encoding="utf-8")
    assert "| sppf " in text and "| mobile " in text
    assert "2 of 2 models" in text and "1 of 1 models" in capsys.readouterr().out


def test_the_command_fails_with_a_model_that_cannot_be_built(
    zoo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build() -> Any:
        raise RuntimeError("no such layer")

    run = sys.modules["_zoo_run"]
    monkeypatch.setattr(zoo, "entries", lambda: [run.Entry("made_up", "nets", build)])
    page = tmp_path / "zoo.md"
    assert zoo.main(["--markdown", str(page)]) == 1
    assert "FAILED made_up: RuntimeError: no such layer" in capsys.readouterr().out
    assert "no such layer" in page.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_zoo(zoo: ModuleType, family: str) -> None:
    if family in ("timm", "transformers"):
        pytest.importorskip(family)
    results = [zoo.examine(one) for one in zoo.entries() if one.family == family]
    assert results
    assert [one for one in results if not one.passed] == []
