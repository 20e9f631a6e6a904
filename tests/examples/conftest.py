"""The modules of the experiments, for the tests of several files."""

from __future__ import annotations

import gzip
import importlib
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "examples" / "experiments"

SMALL_MLP = """
[data]
kind = "images"
folder = "mnist"

[network]
kind = "mlp"
hidden = 16

[training]
batch = 16
epochs = 2
rate = 0.05
schedule = "onecycle"
"""
"""Of a configuration: an MLP on the images of :func:`data`, for two epochs."""

MODULES = (
    *("config", "records", "choices", "images", "texts", "sources", "networks", "minilm"),
    *("costs", "measured", "narrow", "variants", "reading", "training", "run", "equal_noise"),
)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules of the experiments, imported as when one of them is run; forgotten afterwards."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        for name in MODULES:
            sys.modules.pop(name, None)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with IDX files of 96 and 40 images of 8 x 8, three classes that differ in brightness."""
    folder, random = tmp_path / "data" / "mnist", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name, count in (("train", 96), ("t10k", 40)):
        labels = (np.arange(count) % 3).astype(np.uint8)
        images = (random.integers(0, 90, (count, 8, 8)) + 80 * labels[:, None, None]).astype(np.uint8)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels), mtime=0))
    return tmp_path / "data"
