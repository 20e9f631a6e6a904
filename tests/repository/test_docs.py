"""Pages of the site: their code runs, the reference has every public name, the menu every page."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fx_approx

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
MENU = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


# ---- code

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""What cannot run, since it needs other packages, data or processes, is fenced as ``python no-run``."""

ELSEWHERE = {
    "advice.md": "tests/repository/test_repository.py",
    "noise.md": "tests/analysis/test_noise_report.py",
    "schedules.md": "tests/repository/test_repository.py",
    "subnetworks.md": "tests/subnetworks/test_shipping.py",
}
"""Pages whose tests also look at what comes out."""


WITH_CODE = [page for page in PAGES if name_of(page) not in ELSEWHERE and BLOCK.search(page.read_text("utf-8"))]


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom, as a reader would type it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = page.read_text(encoding="utf-8")
    namespace = {"__name__": "__main__"}
    with torch.random.fork_rng():
        for block in BLOCK.finditer(text):  # blank lines before it make the numbers in a traceback those of the page
            program = "\n" * (text[: block.start()].count("\n") + 1) + block[1]
            exec(compile(program, str(page), "exec"), namespace)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_pages_that_are_run_elsewhere(name: str) -> None:
    assert BLOCK.search((DOCS / name).read_text(encoding="utf-8"))
    assert name in (REPOSITORY / ELSEWHERE[name]).read_text(encoding="utf-8")


def test_fences_of_python_are_known() -> None:
    found = {
        fence for page in PAGES for fence in re.findall(r"^ *```(python.*)$", page.read_text("utf-8"), re.MULTILINE)
    }
    assert found <= {"python", "python no-run"}


# ---- the reference

ROOMS = (
    *("fx_approx", "fx_approx.analysis", "fx_approx.data", "fx_approx.distributed", "fx_approx.errors"),
    *("fx_approx.ops", "fx_approx.policies", "fx_approx.policies.base", "fx_approx.recipes", "fx_approx.sampling"),
    *("fx_approx.savings.report", "fx_approx.schedules", "fx_approx.subnetworks"),
)
INTEGRATIONS = {"trainer": "RecipeCallback", "lightning": "RecipeCallback", "timm": "step_with_ema"}


def documented() -> list[str]:
    """What the pages of the reference name, with ``:::``."""
    found: list[str] = []
    for page in sorted((DOCS / "reference").glob("*.md")):
        found += re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return found


def public_names(room: str) -> set[str]:
    module = importlib.import_module(room)
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return set(listed)
    return {name for name, value in vars(module).items() if getattr(value, "__module__", None) == room}


def value_of(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_every_room_is_looked_at() -> None:
    assert {f"fx_approx.{name}" for name in fx_approx._ROOMS} <= set(ROOMS)
    found = {path.stem for path in (REPOSITORY / "fx_approx" / "integrations").glob("[!_]*.py")}
    assert found - {"served"} == set(INTEGRATIONS)


@pytest.mark.parametrize("room", ROOMS)
def test_the_reference_has_every_public_name(room: str) -> None:
    """Under the name of this room or of another one that has the same thing."""
    told = {id(value_of(one)) for one in documented() if not one.startswith("fx_approx.integrations.")}
    assert [name for name in sorted(public_names(room)) if id(value_of(f"{room}.{name}")) not in told] == []


def test_the_reference_has_the_integrations() -> None:
    expected = {f"fx_approx.integrations.{module}.{name}" for module, name in INTEGRATIONS.items()}
    assert expected == {one for one in documented() if one.startswith("fx_approx.integrations.")}


def test_nothing_is_told_twice_in_the_reference() -> None:
    names = documented()
    assert sorted(set(names)) == sorted(names)


# ---- the menu


def test_every_page_is_in_the_menu() -> None:
    listed = set(re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", MENU, re.MULTILINE))
    made = {"gallery.md", "contributing.md", "changelog.md"}
    there = {name_of(page) for page in PAGES if not name_of(page).startswith(("_site/", "results/experiments/"))}
    assert listed == there | made
