"""A tiny experiment: its configuration, and images for it."""

from __future__ import annotations

import importlib
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "examples" / "experiments"

MODULES = (
    "config",
    "records",
    "images",
    "texts",
    "sources",
    "networks",
    "minilm",
    "costs",
    "measured",
    "variants",
    "training",
    "run",
)

TINY = """
title = "tiny"
seeds = [0]

[data]
kind = "images"
folder = "mnist"

[network]
kind = "{network}"
{options}

[training]
batch = 16
epochs = 4
rate = 0.05
schedule = "onecycle"

[variants.exact]

[variants."value, tail"]
policy = {{ kind = "uniform", sampler = "topk", ratio = 0.5, scores = "ema", scope = "value" }}
exact = ["{last}"]
tail = 0.25
preserve = true
every = 0

[variants."moving"]
policy = {{ kind = "uniform", sampler = "systematic", ratio = 0.25, scores = "ema", scope = "value" }}
end_ratio = 0.75
warmup = 0.25
interleave = 3
distill = 0.5

[variants."fewer"]
equal = "flops"
to = "value, tail"
by = "epochs"

[variants."narrower"]
equal = "flops"
to = "value, tail"
by = "width"

[variants."fewer seconds"]
equal = "time"
to = "value, tail"
by = "epochs"
"""


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules of the experiments, imported as when one of them is run; forgotten afterwards."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        for name in MODULES:
            sys.modules.pop(name, None)
