"""Where results and unfinished runs are kept: JSON lines, one for each run, safe for several processes at a time.

Also which of its accuracies is that of a run, and how a try is told.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

_EXACT_FORWARD = ("backward", "weight_gradient")
"""Policies that sample gradients alone: BatchNorm sees what it would see in exact training."""


def digest(settings: Any) -> str:
    """A short name for plain values, the same for equal ones."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def slug(text: str) -> str:
    """``text`` as a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


class Records:
    """The runs of one configuration in one folder.

    Attributes:
        path: The file with a line for each finished run.
        scratch: Where unfinished runs and last weights are kept.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Makes the folders."""
        self.path = folder / f"{slug(name)}.jsonl"
        self.scratch = folder / "checkpoints" / slug(name)
        self.scratch.mkdir(parents=True, exist_ok=True)

    def all(self) -> list[dict[str, Any]]:
        """The finished runs, in the order in which they ended."""
        return read(self.path)

    def find(self, run: str) -> dict[str, Any] | None:
        """The finished run of that key."""
        return next((one for one in reversed(self.all()) if one["run"] == run), None)

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line; writers wait for one another."""
        with self.path.open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            cut = self.path.stat().st_size > 0 and not self.path.read_bytes().endswith(b"\n")
            file.write(("\n" if cut else "") + json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def claim(self, run: str, wait: bool = False) -> Iterator[bool]:
        """Whether this process may do ``run``: no other is at it. The claim ends with the process, whatever ends it."""
        with (self.scratch / f"{run}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True

    def save(self, run: str, state: Any, kind: str = "checkpoint") -> None:
        """Keeps the state of an unfinished run; the file is replaced whole."""
        path = self._file(run, kind)
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, run: str, kind: str = "checkpoint") -> Any:
        """What :meth:`save` kept, None if nothing."""
        path = self._file(run, kind)
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None

    def forget(self, run: str, kind: str = "checkpoint") -> None:
        """Removes what :meth:`save` kept."""
        self._file(run, kind).unlink(missing_ok=True)

    def _file(self, run: str, kind: str) -> Path:
        return self.scratch / f"{run}.{kind}.pt"


def read(path: Path) -> list[dict[str, Any]]:
    """The records in a file of JSON lines; lines that were cut short, by a full disk or a crash, are left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def sampled_forward(options: Mapping[str, Any]) -> bool:
    """Whether forward passes of a variant are sampled."""
    policy = options["policy"]
    return bool(policy) and policy.get("kind") not in _EXACT_FORWARD


def mended(record: Mapping[str, Any]) -> bool:
    """Whether the accuracy of a run is that after re-estimating statistics: the last forward passes are sampled."""
    options = record["options"]
    sampled = sampled_forward(options) and not options.get("subnetwork")  # the statistics of a narrow one are its own
    return sampled and not options["tail"] and record["final"].get("recalibrated") is not None


def accuracy(record: Mapping[str, Any]) -> float:
    """Of the end of a run, per cent."""
    return float(record["final"]["recalibrated" if mended(record) else "accuracy"])


def told(values: Mapping[str, Any]) -> str:
    """The values of a try, for people."""
    return ", ".join(f"{name} = {value}" for name, value in values.items())
