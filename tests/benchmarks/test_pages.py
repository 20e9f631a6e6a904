"""The pages of results are what their records make, and say which rows have one seed."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs" / "results"
GENERATED = ("training.md", "tokens-and-examples.md", "steps.md", "gpu.md", "policies.md", "network.md")


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, in this process, where torch is imported already."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module("pages")


def test_no_page_is_stale(pages: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert pages.main(["--check"]) == 0, capsys.readouterr().out + "\nrun: python benchmarks/pages.py"


def test_a_changed_record_and_a_changed_page_make_a_page_stale(
    pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "docs" / "results"
    shutil.copytree(RESULTS, results, copy_function=shutil.copy)
    shutil.copy(RESULTS.parent / "results.md", results.parent)
    for module in (pages, importlib.import_module("_page_parts")):
        monkeypatch.setattr(module, "REPOSITORY", tmp_path)
        monkeypatch.setattr(module, "RESULTS", results)
    record, page = results / "selection.json", results / "gpu.md"
    content = json.loads(record.read_text(encoding="utf-8"))
    content["results"][0]["share"] += 0.01
    record.write_text(json.dumps(content), encoding="utf-8")
    page.write_text(page.read_text(encoding="utf-8").replace("1.44", "1.54"), encoding="utf-8")
    assert pages.main(["--check"]) == 1
    assert capsys.readouterr().out.splitlines() == ["docs/results/steps.md: stale", "docs/results/gpu.md: stale"]


def ran(seed: int, accuracy: float, left_exact: bool) -> dict[str, Any]:
    """A record of the demo with one network."""
    narrow = (None, None, None) if left_exact else (accuracy - 2, 250, 0.002)
    one = {"name": "CNN", "left_exact": left_exact, "saved": None if left_exact else 0.75, "training_ratio": 0.5}
    one |= {"step_ratio": None if left_exact else [0.35, 0.3, 0.4], "accuracies": [90.0, accuracy, narrow[0]]}
    one |= {"parameters": [1000, narrow[1]], "latency": [0.004, narrow[2]]}
    versions = {"name": "a processor", "threads": 1, "python": "3.11", "torch": "2.13", "fx_approx": "0.2"}
    about = {"environment": {**versions, "date": f"day {seed}"}, "images": "digits", "options": {"seed": seed}}
    return {**about, "results": [one]}


def test_the_demo_over_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    page = importlib.import_module("_page_demo")
    records = [ran(0, 88.0, False), ran(1, 86.0, False), ran(2, 90.0, True)]
    row = page.body(*records).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        *("CNN, left exact in 1 of 3", "75 ± 0", "0.35 ± 0.00", "0.50 ± 0.00", "90.0 ± 0.0", "88.0 ± 2.0"),
        *("85.0 ± 1.4", "0.25 ± 0.00", "0.50 ± 0.00"),
    ]
    assert "(one seed)" in page.body(records[0])
    assert page.command(*records).splitlines()[2] == "python -m fx_approx demo --seed 2 --json docs/results/demo-2.json"
    assert page.machines(*records) == (
        "a processor, threads: 1; Python 3.11, torch 2.13, fx_approx 0.2; day 0, day 1, day 2. Images: digits."
    )


def sections(name: str) -> list[str]:
    return re.split(r"^## ", (RESULTS / name).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]


@pytest.mark.parametrize("name", GENERATED)
def test_every_table_has_its_command_machine_and_records(name: str) -> None:
    found = sections(name)
    assert found
    for section in found:
        title = section.partition("\n")[0]
        command = r"(OMP_NUM_THREADS=1 )?python (benchmarks/|examples/|-m fx_approx )"
        assert re.match(rf"[^\n]+\n\n```\n{command}", section), title
        assert "\n|---" in section, title
        if title != "The learning rate":  # of the runs that the other sections of the page have
            assert "torch 2." in section and "Records: [" in section, title


@pytest.mark.parametrize("name", ["training.md", "tokens-and-examples.md", "experiments/tables.md"])
def test_rows_of_one_seed_say_so_and_are_not_bold(name: str) -> None:
    rows = [line.split("|")[1:-1] for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]
    single = [row for row in rows if len(row) > 3 and row[1].strip() == "1"]
    assert single
    for row in single:
        assert "(one seed)" in "".join(row) and "**" not in "".join(row), row


def test_spreads_in_the_findings_are_those_of_the_tables() -> None:
    pages = "".join((RESULTS / name).read_text(encoding="utf-8") for name in GENERATED)
    text = (REPOSITORY / "docs" / "findings.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    found = re.findall(r"−?[\d.]+ ± \d+\.\d+", text)
    assert found and [one for one in found if one not in pages] == []
