"""Private names of torch in Python sources: which there are, read from the syntax tree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Set

import torch
from torch import fx, nn

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
