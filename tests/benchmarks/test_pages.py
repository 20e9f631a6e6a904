"""The pages of results are what their records make, and say which rows have one seed."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs" / "results"
GENERATED = ("training.md", "tokens-and-examples.md", "steps.md", "gpu.md", "policies.md", "network.md")


def check(repository: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository / "benchmarks" / "pages.py"), "--check"]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_no_page_is_stale() -> None:
    done = check(REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr + "\nrun: python benchmarks/pages.py"


def test_a_changed_record_and_a_changed_page_make_a_page_stale(tmp_path: Path) -> None:
    for folder in ("benchmarks", "docs", "examples", "tests/helpers"):
        shutil.copytree(
            REPOSITORY / folder,
            tmp_path / folder,
            ignore=shutil.ignore_patterns("__pycache__"),
            copy_function=shutil.copy,
        )
    record, page = (tmp_path / "docs" / "results" / name for name in ("selection.json", "gpu.md"))
    content = json.loads(record.read_text(encoding="utf-8"))
    content["results"][0]["share"] += 0.01
    record.write_text(json.dumps(content), encoding="utf-8")
    page.write_text(page.read_text(encoding="utf-8").replace("1.44", "1.54"), encoding="utf-8")
    done = check(tmp_path)
    assert done.returncode == 1 and done.stdout.splitlines() == [
        "docs/results/steps.md: stale",
        "docs/results/gpu.md: stale",
    ]


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
