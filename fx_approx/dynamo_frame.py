"""What Dynamo knows of the frame that it compiles: the modules behind a functional graph, and guards on them.

All that touches Dynamo's own classes stands here. A backend is handed functions and tensors only; but sampling depends
on modules: on their ``training`` flags, and each has its own samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, MutableMapping
from types import CodeType
from typing import Any

from torch import Tensor, fx, nn

from fx_approx._compat import (
    CHILDREN_ATTRIBUTE,
    AttrSource,
    DictGetItemSource,
    GuardBuilder,
    InstructionTranslator,
    UnspecializedNNModuleSource,
    children_of,
    install_guard,
)
from fx_approx.errors import CaptureError


@dataclasses.dataclass(frozen=True)
class Root:
    """A module that a frame reaches by itself, not as a part of another: ``self``, an argument, a global.

    Attributes:
        name: How the frame calls it, such as ``L['self']``.
        module: The user's own module.
        source: Dynamo's word for it.
        path: Its path in a module of an earlier frame, if it is a part of one, as behind a graph break.
    """

    name: str
    module: nn.Module
    source: Any
    path: str = ""

    def find(self, path: str) -> nn.Module | None:
        """The submodule at ``path``; None if it is not registered there, so that ``eval()`` does not reach it."""
        here: nn.Module | None = self.module
        for part in path.split(".") if path else ():
            here = None if here is None else children_of(here).get(part)
        return here


@dataclasses.dataclass(frozen=True)
class Frame:
    """The frame that Dynamo is compiling.

    Attributes:
        roots: Its modules, outermost ones only.
        code: Its code.
        tensors: What parameters, buffers and other tensors its graph's inputs stand for, by the name of the input.
        sources: Dynamo's word for each module with parameters or buffers, by the module's id.
    """

    roots: tuple[Root, ...]
    code: CodeType
    tensors: dict[str, Tensor]
    sources: dict[int, Any]

    def root_of(self, name: str) -> tuple[Root, str] | None:
        """The root of a module named as in ``nn_module_stack``, and the module's path in it."""
        for root in self.roots:
            if name == root.name:
                return root, ""
            if name.startswith(root.name + "."):
                return root, name[len(root.name) + 1 :]
        return None

    def guard(self, modules: Iterable[tuple[Root, str]]) -> None:
        """Binds the compiled code to these roots, and to the training flags of these modules in them.

        Another instance of the same class, or another mode, is then compiled by itself.
        """
        for root in self.roots:
            install_guard(root.source.make_guard(GuardBuilder.ID_MATCH))
        for root, path in modules:
            module = root.find(path)
            if module is None:
                continue
            source = self.sources.get(id(module)) or _source(root, path)
            install_guard(AttrSource(source, "training").make_guard(GuardBuilder.CONSTANT_MATCH))


def _source(root: Root, path: str) -> Any:
    source = root.source
    for part in path.split(".") if path else ():
        source = UnspecializedNNModuleSource(DictGetItemSource(AttrSource(source, CHILDREN_ATTRIBUTE), part))
    return source


Known = MutableMapping[nn.Module, str]
"""Paths of the modules that frames have had so far, in the outermost module that held them."""


def current_frame(known: Known | None = None) -> Frame:
    """The frame that is being compiled.

    Args:
        known: Tells the path of a module that the frame has got without what holds it; is added to.

    Raises:
        CaptureError: None is: the backend was called by hand.
    """
    try:
        output = InstructionTranslator.current_tx().output
    except AttributeError:
        raise CaptureError(
            "the backend was called outside torch.compile; use torch.compile(model, backend=fx_approx.backend(policy))"
        ) from None
    scope = {"L": output.root_tx.f_locals, "G": output.root_tx.f_globals}
    tensors: dict[str, Tensor] = {}
    sources: dict[int, Any] = {}
    roots: dict[int, Root] = {}
    for node in output.graph.find_nodes(op="placeholder"):
        source = _source_of(node)
        if source is None:
            continue
        value = _value(source, scope)
        if isinstance(value, Tensor):
            tensors[node.name] = value
        outermost = None
        for one in _bases(source):
            found = _value(one, scope)
            if isinstance(found, nn.Module):
                sources.setdefault(id(found), one)
                outermost = Root(_name(one), found, one)
        if outermost is not None:
            roots.setdefault(id(outermost.module), outermost)
    named = [dataclasses.replace(root, path=_path(root, {} if known is None else known)) for root in roots.values()]
    return Frame(tuple(named), output.root_tx.f_code, tensors, sources)


def _path(root: Root, known: Known) -> str:
    if root.module not in known:
        for path, module in root.module.named_modules():
            known.setdefault(module, path)
    return known.get(root.module, "")


def _source_of(node: fx.Node) -> Any:
    argument = node.meta.get("grapharg")
    return None if argument is None else argument.source


def _name(source: Any) -> str:
    return str(source.name() if callable(source.name) else source.name)


def _value(source: Any, scope: dict[str, Any]) -> Any:
    """What ``source`` stands for in the frame; None where its name is no plain expression."""
    try:
        return eval(_name(source), dict(scope))
    except Exception:  # names of guards' own helpers, values that do not exist yet
        return None


def _bases(source: Any) -> Iterator[Any]:
    """What ``source`` is an attribute or item of, from the inside out."""
    base = getattr(source, "base", None)
    while base is not None:
        yield base
        base = getattr(base, "base", None)
