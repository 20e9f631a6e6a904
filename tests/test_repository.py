"""The rules of the repository itself: length, layers, paths, packaging, public names."""

from __future__ import annotations

import ast
import importlib
import importlib.resources
import inspect
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import fx_approx

from .private_names import own_names, private_names

REPOSITORY = Path(__file__).resolve().parents[1]
MAX_LINES = 600

_REPORTS = {"report", "rows", "demand_report", "tables", "noise", "noise_report", "figures", "coupling"}

# Layer -> (rank, its modules and packages, named below fx_approx). A module may import modules of a lower
# rank and of its own layer, so layers of equal rank know nothing of each other. A new module is placed here.
_TRAINING = {"gradients", "schedules", "scheduler", "scalars", "controller", "growth", "sweep_report"}
_SWEEP = {"sweep", "sweep_job"}
_DYNAMO = {f"dynamo_{part}" for part in ("backend", "frame", "report", "run", "step")} | {"lifted"}
LAYERS: dict[str, tuple[int, set[str]]] = {
    "foundation": (0, {"_compat", "errors", "sampling", "flops", "candidate", "plan", "work", "disk_cache"}),
    "kernels": (1, {"kernels"}),
    "ops": (2, {"ops"}),
    "modules": (3, {"layers", "state", "modules", "batchnorm", "channelwise", "published", "resample", "shards"}),
    "capture": (
        4,
        {
            "watch",
            "real_tensors",
            "branches",
            "containers",
            "known_values",
            "size_guards",
            "traced",
            "tracer",
            "capture",
            "fake_model",
            "sections",
            "split",
            "guards",
        },
    ),
    "runtime": (5, {"print_passes", "checkpoints", "runtime", "approx"}),
    "passes": (6, {"passes"}),
    "policies": (6, {"policies"}),
    "surface": (
        7,
        {*_REPORTS, "checks", "operations", "controls", "repeatable", "verify", "overhead", "distributed", *_TRAINING},
    ),
    "pipeline": (8, {"pipeline", "whole"}),
    "api": (9, {"api", *_DYNAMO, "sensitivity", "prediction", *_SWEEP}),
    "entry": (10, {"__init__", "__main__", "cli"}),
}

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


def layer_of(module: str) -> str:
    head = module.removeprefix("fx_approx").removeprefix(".").partition(".")[0] or "__init__"
    for layer, (_, members) in LAYERS.items():
        if head in members:
            return layer
    raise LookupError(f"{module} stands in no layer; place {head!r} in LAYERS")


def imports(module: str, path: Path, known: set[str]) -> Iterator[str]:
    """Modules of fx_approx that ``module`` imports, inside functions and for type checking too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "fx_approx")
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*base, *filter(None, [node.module])])
            if source.partition(".")[0] == "fx_approx":
                for alias in node.names:
                    submodule = f"{source}.{alias.name}"
                    yield submodule if submodule in known else source


def layer_violations(sources: dict[str, Path]) -> list[str]:
    found = []
    for module, path in sorted(sources.items()):
        try:
            layer = layer_of(module)
            others = {imported: layer_of(imported) for imported in imports(module, path, set(sources))}
        except LookupError as error:
            found.append(f"{module}: {error}")
            continue
        found += [
            f"{module} ({layer}) imports {imported} ({other})"
            for imported, other in others.items()
            if other != layer and LAYERS[other][0] >= LAYERS[layer][0]
        ]
    return found


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


def test_modules_import_only_from_layers_below() -> None:
    assert layer_violations(package_sources()) == []


@pytest.mark.parametrize(
    ("module", "line", "allowed"),
    [
        ("fx_approx.core.plan", "from fx_approx.core.candidates import Candidate", True),
        ("fx_approx.core.plan", "from . import candidate", True),
        ("fx_approx.core.plan", "from .ops import linear", False),
        ("fx_approx.core.plan", "import fx_approx", False),
        ("fx_approx.ops.linear", "from ..sampling import base", True),
        ("fx_approx.passes.rewrite", "def f():\n    from fx_approx.policies.base import Policy", False),
        ("fx_approx.policies.uniform", "from ..passes import base", False),
        ("fx_approx.capture.trace", "from fx_approx import passes", False),
        ("fx_approx.passes.base", "from fx_approx import capture", True),
        ("fx_approx.compiler.transform", "from fx_approx import passes, policies, report", True),
    ],
)
def test_layer_rule(tmp_path: Path, module: str, line: str, allowed: bool) -> None:
    names = ["candidate", "ops", "ops.linear", "sampling", "sampling.base", "passes", "passes.base"]
    names += ["policies", "policies.base", "report", "capture"]
    empty = tmp_path / "empty.py"
    empty.write_text("")
    source = tmp_path / "source.py"
    source.write_text(line)
    known = {"fx_approx": empty, **{f"fx_approx.{name}": empty for name in names}, module: source}
    assert (layer_violations(known) == []) == allowed


def test_a_module_in_no_layer_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "newcomer.py"
    source.write_text("")
    (message,) = layer_violations({"fx_approx.newcomer.part": source})
    assert "place 'newcomer' in LAYERS" in message


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
