"""The kernel of the uniforms as a GPU would have it, which CI has not: compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_kernel_compiles_for_gpus(tmp_path: Path) -> None:
    """In a process of its own: here Triton interprets, and that cannot be undone."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    program = Path(__file__).with_name("uninterpreted.py")
    command = [sys.executable, "-W", "error::UserWarning", str(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "[80, 90]"
