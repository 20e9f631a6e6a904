"""The helper that makes torchvision importable: no schema where a library brings it, whatever that is called."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import torchvision_compat

HELPER = Path(torchvision_compat.__file__)


class Machine:
    """A torchvision with libraries of these names, of which ``good`` loads and has the operators."""

    def __init__(self, folder: Path, good: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = importlib.machinery.ModuleSpec("torchvision", None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        self.good, self.tried, self.defined = good, list[str](), list[str]()
        self.loaded = False
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
        monkeypatch.setattr(torch.ops, "load_library", self.load)
        monkeypatch.setattr(torch.library, "Library", lambda name, kind: self)
        monkeypatch.setattr(torchvision_compat, "_are_defined", lambda: self.loaded)
        monkeypatch.setattr(torch.ops.torchvision, "fx_approx_schemas", None, raising=False)
        for name in ("_C_renamed.so", "image.so", "extension.py"):
            (folder / name).touch()

    def load(self, path: str) -> None:
        self.tried.append(Path(path).name)
        if Path(path).name != self.good:
            raise OSError("libcudart.so: cannot open shared object file")
        self.loaded = True

    def define(self, schema: str) -> None:
        self.defined.append(schema.partition("(")[0])


def test_no_schema_beside_a_library_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, "_C_renamed.so", monkeypatch)
    torchvision_compat.define_missing_schemas()
    assert machine.tried == ["_C_renamed.so"] and machine.defined == []


def test_schemas_where_no_library_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, None, monkeypatch)
    torchvision_compat.define_missing_schemas()
    assert machine.tried == ["_C_renamed.so", "image.so"] and machine.defined == ["nms", "qnms"]


def test_torchvision_imports_after_the_helper_ran_twice() -> None:
    code = f"import runpy; [runpy.run_path({str(HELPER)!r}, run_name='__main__') for _ in range(2)]; import torchvision"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
