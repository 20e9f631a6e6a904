"""The rules of the repository itself: length, paths, packaging, public names."""

from __future__ import annotations

import importlib
import importlib.resources
import importlib.util
import inspect
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

import fx_approx
from fx_approx.compiler.pipeline import ANALYSIS, GIVEN, REWRITING, Pass
from tests.repository.private_names import own_names, private_names

REPOSITORY = Path(__file__).resolve().parents[2]
MAX_LINES = 600

# A path that exists on one machine only; the look-behind keeps URLs and relative paths out.
MACHINE_PATH = re.compile(r"(?<![\w.~:/-])/(?:home|root|Users|work|opt|mnt|tmp|private)/\w|\b[A-Z]:\\\w")


def repository_files() -> list[Path]:
    """Files that git tracks or would add."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True, text=True).stdout
    return [path for name in listed.split("\0") if name and (path := REPOSITORY / name).is_file()]


def package_sources() -> dict[str, Path]:
    """Module name -> source file, for every module of the installed package."""
    sources = {}
    for package in ("fx_approx", "fx_approx.passes", "fx_approx.policies"):
        root = Path(importlib.import_module(package).__file__ or "").parent
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            sources[name] = path
    return sources


def test_no_python_file_is_above_the_length_limit() -> None:
    lengths = {
        path.relative_to(REPOSITORY).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in repository_files()
        if path.suffix == ".py"
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_no_file_names_a_path_of_one_machine() -> None:
    found = []
    for path in repository_files():
        content = path.read_bytes()
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode("utf-8").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}")
    assert found == []


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("see {root}home/someone/x", True),
        ('open("{root}tmp/x")', True),
        ("https://host{root}work/x", False),
        ("a relative{root}home/x", False),
        ("in the roots {root}work and {root}tmp", False),
    ],
)
def test_machine_paths_are_told_from_others(text: str, matches: bool) -> None:
    assert bool(MACHINE_PATH.search(text.format(root="/"))) == matches


def test_type_marker_is_installed() -> None:
    assert importlib.resources.files("fx_approx").joinpath("py.typed").is_file()


@pytest.mark.parametrize("name", fx_approx.__all__)
def test_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(fx_approx, name)
    if not (callable(value) or inspect.ismodule(value)):
        return  # a constant
    text = value.__doc__ or ""
    assert text.strip()
    # What dataclasses write when there is nothing.
    assert not text.startswith(f"{name}(")


def test_private_names_of_torch_stand_in_one_module() -> None:
    sources = package_sources()
    own = own_names(path.read_text(encoding="utf-8") for path in sources.values())
    found = [
        f"{module}:{line}: {name}"
        for module, path in sorted(sources.items())
        if module != "fx_approx._compat"
        for line, name in private_names(path.read_text(encoding="utf-8"), own)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch._dynamo", ["torch._dynamo"]),
        ("from torch.utils import _pytree", ["torch.utils._pytree"]),
        ("from torch._subclasses.fake_tensor import FakeTensorMode", ["torch._subclasses.fake_tensor.FakeTensorMode"]),
        ("import torch\ntorch._C._functorch.is_batchedtensor", ["_functorch", "_C"]),
        ("module._parameters", ["_parameters"]),
        ("self._buffers", ["_buffers"]),
        ("handle._unknown", ["_unknown"]),
        ("class Layer(nn.Module):\n    def _apply(self, fn): ...", ["_apply"]),
        ("vars(module)['_modules']", ["_modules"]),
        ("getLogger('torch._subclasses.fake_tensor')", ["torch._subclasses.fake_tensor"]),
        ("f'{module}._parameters'", ["_parameters"]),
        ("vars(module).update(_parameters={})", ["_parameters"]),
        ("from torch.nn import functional\nself._own\nsys._getframe(1)\nrow._replace(a=1)\nx.__dict__", []),
        ("def f():\n    'Says what torch._dynamo does.'\n    return a._own", []),
    ],
)
def test_private_names_are_found(source: str, names: list[str]) -> None:
    own = own_names(["self._own = 1"])
    assert [name for _, name in private_names(source, own)] == names


def test_the_public_names_are_few_and_shadow_no_module() -> None:
    assert len(fx_approx.__all__) <= 15
    for name in fx_approx.__all__:
        assert not inspect.ismodule(getattr(fx_approx, name)), name
        assert importlib.util.find_spec(f"fx_approx.{name}") is None, f"a module of the name {name} is hidden"


def test_every_pass_reads_only_what_was_found_before() -> None:
    for given, passes in ((GIVEN["analysis"], ANALYSIS), (GIVEN["rewriting"] + _found(ANALYSIS), REWRITING)):
        there = set(given)
        for one in passes:
            assert set(one.reads) <= there, one
            there |= set(one.writes)


def _found(passes: tuple[Pass[Any], ...]) -> tuple[str, ...]:
    return tuple(name for one in passes for name in one.writes)


def test_every_folder_of_the_package_is_in_the_wheel() -> None:
    listed = set(
        tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    )
    there = {"fx_approx", "fx_approx.passes", "fx_approx.policies"}
    there |= {f"fx_approx.{path.parent.name}" for path in (REPOSITORY / "fx_approx").glob("*/__init__.py")}
    assert listed == there
