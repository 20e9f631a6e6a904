"""Examples and benchmarks that have no file of their own, as small as they go."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.torchvision_compat import define_missing_schemas

REPOSITORY = Path(__file__).resolve().parents[2]


def scripts(folder: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ModuleType]]:
    """Modules of a folder of scripts, imported as when one of them is run; forgotten afterwards."""
    monkeypatch.syspath_prepend(str(REPOSITORY / folder))
    try:
        yield [importlib.import_module(name) for name in names]
    finally:
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture
def transform_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    for modules in scripts("benchmarks", ("_header", "transform_time"), monkeypatch):
        yield modules[1]


# ---- benchmarks


def test_transform_time(transform_time: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "numbers.json"
    transform_time.main(["--chains", "2", "5", "--runs", "1", "--without-resnet", "--json", str(target)])
    assert "chain of 5" in capsys.readouterr().out
    stored = json.loads(target.read_text(encoding="utf-8"))
    assert [each["products"] for each in stored["results"]] == [2, 5]
    assert {"processor", "cores", "torch", "fx_approx"} <= set(stored["environment"])


# ---- a recipe beside timm


def test_recipe_timm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    define_missing_schemas()  # timm imports torchvision
    pytest.importorskip("timm")
    for (module,) in scripts("examples", ("recipe_timm",), monkeypatch):
        said = module.train(40).splitlines()
    assert capsys.readouterr().out.startswith("finetune: 40 steps of VisionTransformer")
    assert [line.split()[0] for line in said] == ["40", "accuracy"]
    assert " 26 sampled, each with 50 % fewer operations" in said[0]


# ---- pictures of tokens


@pytest.mark.slow
def test_token_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for (module,) in scripts("examples", ("token_pictures",), monkeypatch):
        module.main(["--out", str(tmp_path)])
    assert (tmp_path / "tokens.png").stat().st_size > 1000
    shown = (REPOSITORY / "docs" / "tokens.md").read_text(encoding="utf-8")
    skipped = capsys.readouterr().out.split('== Tokens(0.5, mode="skip")\n')[1].split("\n\n==")[0]
    assert skipped in shown, "the page shows what is printed"
    assert "python examples/token_pictures.py --out docs/figures" in shown


# ---- sweep


@pytest.mark.slow
def test_sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for (module,) in scripts("examples", ("sweep",), monkeypatch):
        figure = tmp_path / "front.png"
        module.main(["--steps", "2", "--seeds", "0", "--figure", str(figure), "--directory", str(tmp_path / "runs")])
        assert figure.stat().st_size > 1000 and len(list((tmp_path / "runs").iterdir())) == 2 * 6
        names = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[2:8]]
        assert [name.removesuffix(" *") for name in names] == [
            *("exact", "paper 0.5", "value 0.75", "value 0.5", "value 0.25", "half of the FLOPs")
        ]
