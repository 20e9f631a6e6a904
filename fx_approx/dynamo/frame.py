"""What Dynamo knows of the frame that it compiles: the modules behind a functional graph, and guards on them.

All that touches Dynamo's own classes stands here. A backend is handed functions and tensors only; but sampling depends
on modules: on their ``training`` flags, and each has its own samples.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from types import CodeType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from fx_approx._compat import (
    CHILDREN_ATTRIBUTE,
    AttrSource,
    BatchNormBase,
    DictGetItemSource,
    GuardBuilder,
    InstructionTranslator,
    UnspecializedNNModuleSource,
    children_of,
    compiles_in_place,
    install_guard,
    is_skipped_code,
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
        inner: Modules that the frame reaches by themselves although they are parts of a root.
        values: Its local variables when it began, those of functions around it too.
        globals: Those of its module.
    """

    roots: tuple[Root, ...]
    code: CodeType
    tensors: dict[str, Tensor]
    sources: dict[int, Any]
    inner: tuple[Root, ...] = ()
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    globals: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def training(self) -> bool:
        """Whether a training step runs it: one of its modules is in training, or there is none and gradients are on."""
        return any(root.module.training for root in self.roots) if self.roots else torch.is_grad_enabled()

    @functools.cached_property
    def _places(self) -> dict[str, tuple[Root, str]]:
        """Root and path of each registered module, by its id as ``nn_module_stack`` writes it."""
        places: dict[str, tuple[Root, str]] = {}
        for root in self.roots:
            for path, module in root.module.named_modules():
                places.setdefault(str(id(module)), (root, path))
        return places

    def place_of(self, key: str, name: str) -> tuple[Root, str] | None:
        """The root of a module in ``nn_module_stack``, and the module's path in it.

        Dynamo's name for a module is the source text that reached it, and that need not be a path: it goes through
        ``__dict__`` where a class has a ``__getattr__``. The key is the module's identity (``@`` counts its calls). The
        name tells of modules that are registered nowhere.
        """
        place = self._places.get(key.partition("@")[0])
        if place is not None:
            return place
        for root in self.roots:
            if name == root.name:
                return root, ""
            if name.startswith(root.name + "."):
                return root, name[len(root.name) + 1 :]
        return None

    def owners(self, paths: Mapping[str, tuple[Root, str] | None]) -> dict[str, weakref.ref[nn.Module] | None]:
        """The modules at some places, None where there is none."""
        modules = {name: None if place is None else place[0].find(place[1]) for name, place in paths.items()}
        return {name: None if module is None else weakref.ref(module) for name, module in modules.items()}

    def guard(self, modules: Iterable[tuple[Root, str]]) -> None:
        """Binds the compiled code to these roots, and to the training flags of these modules in them.

        Another instance of the same class, or another mode, is then compiled by itself.
        """
        for root in (*self.roots, *self.inner):
            install_guard(root.source.make_guard(GuardBuilder.ID_MATCH))
        for root, path in modules:
            module = root.find(path)
            if module is None:
                continue
            source = self.sources.get(id(module)) or _source(root, path)
            install_guard(AttrSource(source, "training").make_guard(GuardBuilder.CONSTANT_MATCH))

    def guard_momenta(self) -> None:
        """Binds the compiled code to the momenta of all BatchNorm layers, which say what a forward is there for."""
        for root in self.roots:
            for path, module in root.module.named_modules():
                if isinstance(module, BatchNormBase):
                    source = self.sources.get(id(module)) or _source(root, path)
                    install_guard(AttrSource(source, "momentum").make_guard(GuardBuilder.CONSTANT_MATCH))


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
    parts = {id(part) for root in roots.values() for part in root.module.modules() if part is not root.module}
    known = {} if known is None else known
    outer = [dataclasses.replace(root, path=_path(root, known)) for key, root in roots.items() if key not in parts]
    inner = [root for key, root in roots.items() if key in parts]
    values = scope["L"], scope["G"]
    return Frame(tuple(outer), output.root_tx.f_code, tensors, sources, tuple(inner), *values)


def module_in_compile() -> tuple[nn.Module | None, bool]:
    """The module that the call of ``torch.compile`` around was given, None for none, and whether by its own method."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module.compile.__code__:
            return frame.f_locals.get("self"), True
        given = frame.f_locals.get("model") if frame.f_code is torch.compile.__code__ else None
        if isinstance(given, nn.Module):
            return given, False
        frame = frame.f_back  # type: ignore[assignment]
    return None, False


def is_skipped(module: nn.Module) -> bool:
    """Whether ``module.compile()`` leaves its own forward to Python, unless a frame around is compiled."""
    skipped = isinstance(module.forward, MethodType) and is_skipped_code(module.forward)
    return skipped and not compiles_in_place(module)


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
