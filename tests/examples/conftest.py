"""The modules of the experiments, for the tests of several files."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "examples" / "experiments"

MODULES = (
    *("config", "records", "images", "texts", "sources", "networks", "minilm"),
    *("costs", "measured", "narrow", "variants", "reading", "training", "run"),
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
