"""Two commits by turns: what counts as slower, and what is said where a commit cannot be measured."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def regression(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("regression")
    for name in ("regression", "_header"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("base", "this", "slower"),
    [
        ((2.0, 2.1), (1.8, 1.7), True),
        ((2.0, 2.1), (1.99, 1.98), False),  # within the tolerance
        ((2.0, 2.1), (1.7, 2.05), False),  # the rounds overlap
        ((2.0, 2.1), (2.5, 2.6), False),
    ],
)
def test_a_row_is_slower_by_more_than_the_tolerance_in_every_round(
    regression: ModuleType, base: tuple[float, ...], this: tuple[float, ...], slower: bool
) -> None:
    assert regression.Row("case", "variant", base, this).is_slower(0.05) is slower


def tree(folder: Path, ratio: float, log: Path) -> Path:
    """A checkout whose measurement takes no time, and says where it ran."""
    (folder / "benchmarks").mkdir(parents=True)
    (folder / "benchmarks" / "made.py").write_text(
        "import json, sys\n"
        f"open({str(log)!r}, 'a').write({folder.name!r} + ' ')\n"
        "rows = [{'variant': 'exact', 'speedup': [1, 1, 1]}, "
        f"{{'variant': 'value', 'speedup': [0, {ratio}, 9]}}]\n"
        "json.dump({'results': rows}, open(sys.argv[sys.argv.index('--json') + 1], 'w'))\n"
    )
    return folder


def test_both_are_measured_by_turns(regression: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(regression, "CASES", {"made": ("benchmarks/made.py",)})
    log = tmp_path / "log"
    trees = tree(tmp_path / "base", 2.0, log), tree(tmp_path / "this", 1.5, log)
    (row,) = regression.compared("made", trees, 2)
    assert log.read_text().split() == ["base", "this", "this", "base"]
    assert (row.variant, row.base, row.this) == ("value", (2.0, 2.0), (1.5, 1.5)) and row.is_slower(0.05)


def test_what_cannot_be_measured_is_told(
    regression: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if subprocess.run(["git", "rev-parse"], cwd=regression.ROOT, capture_output=True, check=False).returncode:
        pytest.skip("not a git checkout")
    assert regression.main(["--base", "no-such-commit"]) == 2
    assert "--base: " in capsys.readouterr().err
    monkeypatch.setattr(regression, "CASES", {"made": ("benchmarks/nowhere.py",)})
    with pytest.raises(RuntimeError, match=r"benchmarks/nowhere.py in .* ended with 2"):
        regression.compared("made", (tmp_path, tmp_path), 1)


def test_the_scripts_understand_their_arguments(regression: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Parsed(Exception):
        pass

    def stop(*args: object) -> None:
        raise Parsed

    for script, *arguments in regression.CASES.values():
        module = importlib.import_module(Path(script).stem)
        monkeypatch.setattr(module, "header", stop)
        with pytest.raises(Parsed):
            module.main([*arguments, "--json", "x.json"])
