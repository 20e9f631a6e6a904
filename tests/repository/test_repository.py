"""The rules of the repository: length, paths, packaging, names; its pages run, and a clone works."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.machinery
import importlib.resources
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import networkx
import pytest
import torch
from torch import fx, nn

import fx_approx
from fx_approx.compiler.pipeline import ANALYSIS, GIVEN, REWRITING, Pass

# ---- private names of torch in Python sources, read from the syntax tree


_CLASSES = (
    *(nn.Module, nn.Conv2d, nn.BatchNorm2d, nn.LSTM, nn.MultiheadAttention, torch.Tensor, torch.UntypedStorage),
    *(fx.Graph, fx.Node, fx.GraphModule, fx.Tracer, fx.Proxy, fx.Interpreter, torch.autograd.Function),
    *(torch.optim.Optimizer, torch.utils.data.DataLoader, torch.nn.parallel.DistributedDataParallel),
)
_OBJECTS = (nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.MultiheadAttention(2, 1))
_PYTHON = {"_getframe", "_exit", "_replace", "_asdict", "_fields", "_make"}
"""Of sys, os and named tuples."""
_PATH = re.compile(r"\btorch(?:\.\w+)*?\._[a-zA-Z][\w.]*")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


_TORCH = {name for place in _CLASSES for name in dir(place) if is_private(name)}
_TORCH |= {name for one in _OBJECTS for name in vars(one) if is_private(name)}


def own_names(sources: Iterable[str]) -> set[str]:
    """Private names that these sources define themselves, those left out that objects of torch have as well."""
    found = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("_fx_approx"):
                found.add(node.value)  # an attribute that is set through vars()
    return found - _TORCH


def private_names(source: str, own: Set[str]) -> Iterator[tuple[int, str]]:
    """Line and name of each private name that is not ``own``: imports, attributes, definitions, keywords, strings."""
    tree = ast.parse(source)
    prose = _docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if _of_torch(a.name) and _has_private(a.name))
        elif isinstance(node, ast.ImportFrom) and _of_torch(node.module or ""):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name) for name in names if _has_private(name))
        elif isinstance(node, ast.Attribute):
            if is_private(node.attr) and node.attr not in own | _PYTHON:
                yield node.lineno, node.attr
        elif isinstance(node, (ast.FunctionDef, ast.AnnAssign, ast.keyword)):
            name = _defined(node)
            if name in _TORCH:
                yield node.lineno, name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            paths = _PATH.findall(node.value)
            words = [word for word in re.findall(r"(?<!\w)_[a-zA-Z]\w*", node.value) if word in _TORCH]
            yield from ((node.lineno, name) for name in paths or words)


def _defined(node: ast.FunctionDef | ast.AnnAssign | ast.keyword) -> str:
    if isinstance(node, ast.FunctionDef):
        return node.name
    if isinstance(node, ast.keyword):
        return node.arg or ""
    return node.target.id if isinstance(node.target, ast.Name) else ""


def _docstrings(tree: ast.Module) -> set[int]:
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _of_torch(module: str) -> bool:
    return module.partition(".")[0] == "torch"


def _has_private(path: str) -> bool:
    return any(is_private(part) for part in path.split("."))


# ---- length, paths, names


REPOSITORY = Path(__file__).resolve().parents[2]
MAX_LINES = 600
MAX_CHAIN = 15
"""Of files that import one another. The `__init__` of a room only hands out names, and nothing inside imports it."""

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


def test_imports_are_acyclic_and_their_chains_short() -> None:
    files = {name: path for name, path in package_sources().items() if path.name != "__init__.py"}
    chain = longest_chain({name: path.read_text(encoding="utf-8") for name, path in files.items()})
    assert len(chain) <= MAX_CHAIN, " imports ".join(chain)


def test_a_chain_is_followed_through_all_forms_of_import() -> None:
    sources = {
        "fx_approx": "from fx_approx.a import x",
        "fx_approx.a": "import fx_approx.b",
        "fx_approx.b": "from fx_approx import c",
        "fx_approx.c": "def f():\n    from fx_approx.d.e import g",
        "fx_approx.d": "import torch",
        "fx_approx.d.e": "",
    }
    assert longest_chain(sources) == [f"fx_approx{name}" for name in ("", ".a", ".b", ".c", ".d.e")]


def longest_chain(sources: Mapping[str, str]) -> list[str]:
    """The modules of the longest chain of imports; NetworkXUnfeasible if there is a circle."""
    graph: networkx.DiGraph[str] = networkx.DiGraph()
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                imported = [one for one in inside if one in sources] or [node.module]
            graph.add_edges_from((name, one) for one in imported if one in sources and one != name)
    return list(networkx.dag_longest_path(graph))


def test_every_folder_of_the_package_is_in_the_wheel() -> None:
    listed = set(
        tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    )
    there = {"fx_approx", "fx_approx.passes", "fx_approx.policies"}
    there |= {f"fx_approx.{path.parent.name}" for path in (REPOSITORY / "fx_approx").glob("*/__init__.py")}
    assert listed == there


# ---- code on pages


DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / "schedules.md").read_text(encoding="utf-8")
    blocks = [(text[: match.start()].count("\n") + 2, match[1]) for match in BLOCK.finditer(text)]
    assert len(blocks) == 3
    namespace = {"__name__": "__main__"}
    for line, code in blocks:  # blank lines before it make the numbers in a traceback those of the page
        exec(compile("\n" * (line - 1) + code, "schedules.md", "exec"), namespace)
    written = capsys.readouterr()
    measured = [int(line.split()[0]) for line in written.out.splitlines() if "->" in line]
    assert measured == [10, 20, 30, 40] and written.err == ""
    named = {
        re.sub(r"fx_approx/([a-z_]+)(/.*)?", r"\1", tag) for tag in re.findall(r"\d+ (fx_approx/\S+)", written.out)
    }
    assert named == {"ratio", "mean_ratio", "saved_flops", "saved_memory", "saved", "error"}


def test_advice(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = BLOCK.findall((DOCS / "advice.md").read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(first, "advice.md", "exec"), namespace)
    written = capsys.readouterr()
    assert "multiplies sampled" in written.out and written.err == ""
    exec(compile(second, "advice.md", "exec"), namespace)
    approx, scheduler = namespace["approx"], namespace["scheduler"]
    ratios = []
    for _ in range(namespace["steps"]):
        ratios.append(max(scheduler.get_last_ratio().values()))
        scheduler.step()
    assert ratios == [1.0] * 50 + [0.5] * 930 + [1.0] * 20
    assert sum(bool(row.samples) for row in fx_approx.report(approx).rows) == 0  # the tail is exact


# ---- README


README = REPOSITORY / "README.md"


def blocks() -> list[tuple[int, str]]:
    """Line and code of each ```python block."""
    text = README.read_text(encoding="utf-8")
    return [(text[: match.start()].count("\n") + 2, match[1]) for match in BLOCK.finditer(text)]


def test_there_is_code() -> None:
    assert blocks()


@pytest.mark.parametrize(("line", "code"), [pytest.param(*block, id=f"line{block[0]}") for block in blocks()])
@pytest.mark.parametrize("inner", ["aot_eager", pytest.param(None, marks=pytest.mark.slow)])
def test_block_runs(
    line: int,
    code: str,
    inner: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With Inductor, as they stand, by ``-m slow``: it compiles C++ for half a minute."""
    monkeypatch.chdir(tmp_path)
    if inner is not None:
        monkeypatch.setattr(fx_approx, "backend", functools.partial(fx_approx.backend, inner=inner))
    # Blank lines before it make the numbers in a traceback those of the README.
    program = compile("\n" * (line - 1) + code, str(README), "exec")
    exec(program, {"__name__": "__main__"})
    assert capsys.readouterr().err == ""


def statements(code: str) -> list[str]:
    """What a program does, its imports aside."""
    body = ast.parse(code).body
    program = [node for node in body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    program = [node for node in program if not ast.unparse(node).startswith("sys.path.append(")]
    is_docstring = isinstance(program[0], ast.Expr) and isinstance(program[0].value, ast.Constant)
    return [ast.dump(node) for node in program[is_docstring:]]


def test_quickstart_is_the_first_block() -> None:
    quickstart = (REPOSITORY / "examples" / "quickstart.py").read_text(encoding="utf-8")
    assert statements(quickstart) == statements(blocks()[0][1])


# ---- a clone


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources at another place than the environment knows."""
    place = tmp_path_factory.mktemp("clone")
    for folder in ("fx_approx", "passes", "policies", "tests", "examples"):
        shutil.copytree(REPOSITORY / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", place)
    return place


PROGRAM = """
import runpy, sys
for _ in range(2):  # the helper may run twice
    runpy.run_path("tests/helpers/torchvision_compat.py", run_name="__main__")
import torchvision
import fx_approx, fx_approx.passes, fx_approx.policies
print(*(one.__file__ for one in (fx_approx, fx_approx.passes, fx_approx.policies)))
from fx_approx.__main__ import main
assert main(["explain", "tests.helpers.models:mlp", "--input", "2x12", "--policy", "topk:0.5"]) == 0
sys.argv = ["examples/quickstart.py"]
runpy.run_path("examples/quickstart.py", run_name="__main__")
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/utils/test_disk_cache.py", "-k", "not processes"]))
"""


def test_a_source_checkout_works_as_it_lies(checkout: Path) -> None:
    """Imported, as a command, in the quickstart and in the tests."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FX_APPROX_TEST_INSTALLED")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(Path(place).is_relative_to(checkout) for place in done.stdout.splitlines()[0].split())
