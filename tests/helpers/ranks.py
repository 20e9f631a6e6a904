"""Starts the ranks of a test, one process each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run(script: Path, folder: Path, size: int, names: list[str]) -> None:
    """``size`` ranks of ``script`` go through scenarios, and leave their results in ``folder``."""
    command = [sys.executable, str(script)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(size), str(folder), *names], cwd=folder) for rank in range(size)
    ]
    try:
        ended = [rank.wait(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:  # those that wait for one that failed
            rank.kill()
            rank.wait()
    failed = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("failed.*"))]
    assert ended == [0] * size, "\n".join(failed)
