"""The Python code of pages whose blocks are one program runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import fx_approx

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / "schedules.md").read_text(encoding="utf-8")
    blocks = [(text[: match.start()].count("\n") + 2, match[1]) for match in BLOCK.finditer(text)]
    assert len(blocks) == 3
    namespace = {"__name__": "__main__"}
    for line, code in blocks:  # blank lines before it make the numbers in a traceback those of the page
        exec(compile("\n" * (line - 1) + code, "schedules.md", "exec"), namespace)
    written = capsys.readouterr()
    measured = [int(line.split()[0]) for line in written.out.splitlines() if "->" in line]
    assert measured == [10, 20, 30, 40] and written.err == ""
    named = {
        re.sub(r"fx_approx/([a-z_]+)(/.*)?", r"\1", tag) for tag in re.findall(r"\d+ (fx_approx/\S+)", written.out)
    }
    assert named == {"ratio", "mean_ratio", "saved_flops", "saved_memory", "saved", "error"}


def test_advice(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = BLOCK.findall((DOCS / "advice.md").read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(first, "advice.md", "exec"), namespace)
    written = capsys.readouterr()
    assert "topk" in written.out and written.err == ""
    exec(compile(second, "advice.md", "exec"), namespace)
    approx, scheduler = namespace["approx"], namespace["scheduler"]
    ratios = []
    for _ in range(namespace["steps"]):
        ratios.append(max(scheduler.get_last_ratio().values()))
        scheduler.step()
    assert ratios == [1.0] * 50 + [0.5] * 930 + [1.0] * 20
    assert sum(bool(row.samples) for row in fx_approx.report(approx).rows) == 0  # the tail is exact
