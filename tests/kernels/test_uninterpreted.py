"""The Triton kernels as a GPU would have them, which CI has not: traced by torch.compile, and compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("uninterpreted.py")


def found(what: str, cache: Path) -> Any:
    """What the program says, in a process of its own: here Triton interprets, and that cannot be undone."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-W", "error::UserWarning", str(PROGRAM), what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_compiled_layers_launch_the_kernels_in_one_graph(tmp_path: Path) -> None:
    launches = {"output": [1, 0], "grad_weight": [0, 1], "norms": [1, 0]}  # forward, backward
    assert found("trace", tmp_path) == launches | {f"{name} dynamic": counts for name, counts in launches.items()}


def test_the_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """All but exact float32 products, which tensor cores do not have, run on tensor cores."""
    built = found("build", tmp_path)
    assert len(built) == 10
    assert {name for name, expected in built.items() if not expected} == {"columns fp32 ieee", "rows fp32 ieee"}
