"""What every benchmark says first, and how it stores its numbers."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fx_approx

# Read by oneDNN when it first runs. It keeps 1024 primitives by default, more than any one network needs, but fewer
# than several do that are timed in turn: each would make its own anew in every step, which none does in training.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "65536")


def environment() -> dict[str, Any]:
    """Hardware, versions and date, as plain values."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fx_approx": fx_approx.__version__,
    }


def header(title: str) -> str:
    """``title`` and the environment as lines of text."""
    lines = [title, "=" * len(title)]
    lines += [f"{name:12} {value}" for name, value in environment().items() if value is not None]
    return "\n".join(lines)


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """The option ``--json FILE`` that all benchmarks have."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers and the environment there, too")


def parse_ratio(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, among them one ``--ratio``, or an error that says what is wrong with them."""
    options = parser.parse_args(arguments)
    if getattr(options, "runs", 2) < 2 or not 0 < options.ratio < 1:
        parser.error("--runs: expected 2 or more; --ratio: expected a number in (0, 1)")
    for name in ("batch", "threads"):
        if (getattr(options, name, None) or 1) < 1:
            parser.error(f"--{name}: expected 1 or more, not {getattr(options, name)}")
    return options


def store(path: Path | None, results: Any) -> None:
    """Writes ``results`` with the environment to ``path``; does nothing without one."""
    if path is not None:
        content = {"environment": environment(), "results": results}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
