"""Symbolic tracing that never stops: what cannot be traced becomes a leaf, with module and line as the reason."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx, nn
from torch.nn.utils import parametrize

_OWN_FILES = os.path.dirname(__file__) + os.sep
_TORCH_FILES = os.path.dirname(torch.__file__) + os.sep
_LAYER_FILES = os.path.dirname(nn.__file__) + os.sep
_CHECKPOINT_FILE = torch.utils.checkpoint.__file__

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)

FUSED = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
"""Modules of torch that compute several products in one call."""


class _DroppedError(Exception):
    """The code is inside something that tracing would silently remove."""

    def __init__(self, what: str, where: str = "") -> None:
        super().__init__(f"{what}, which tracing would remove{where}")
        self.placed = bool(where)


def _grad_mode() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@contextlib.contextmanager
def _autocast_refused() -> Iterator[None]:
    """Stops a forward that enters ``torch.autocast``, also with ``enabled=False``."""
    enter = torch.autocast.__enter__

    def refuse(self: torch.autocast) -> None:
        raise _DroppedError("torch.autocast")

    torch.autocast.__enter__ = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]


def random_state() -> tuple[Any, torch.Tensor, Any]:
    """The states of the generators of Python, of torch on the CPU, and of numpy if it is loaded."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), torch.random.get_rng_state(), None if numpy is None else numpy.random.get_state()


def set_random_state(state: tuple[Any, torch.Tensor, Any]) -> None:
    """Makes the generators continue from ``state``."""
    python, cpu, of_numpy = state
    random.setstate(python)
    torch.random.set_rng_state(cpu)
    if of_numpy is not None:
        sys.modules["numpy"].random.set_state(of_numpy)


def _has_drawn(before: tuple[Any, torch.Tensor, Any]) -> bool:
    python, cpu, of_numpy = random_state()
    if python != before[0] or not torch.equal(cpu, before[1]):
        return True
    if before[2] is None:
        return False
    return bool(of_numpy[2:] != before[2][2:] or (of_numpy[1] != before[2][1]).any())


@contextlib.contextmanager
def _no_side_effects(module: nn.Module) -> Iterator[None]:
    """Stops when tracing the forward of ``module`` did what the graph would do never, or always alike."""
    state = random_state()
    before = dict(vars(module))
    yield
    if _has_drawn(state):
        set_random_state(state)
        raise _DroppedError("random numbers that do not depend on an input", _place(module))
    changed = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_tensor_constant") and (name not in before or before[name] is not value)
    ]
    if changed:
        raise _DroppedError(f"an assignment to self.{changed[0]}", _place(module))


def _place(module: nn.Module) -> str:
    code = getattr(type(module).forward, "__code__", None)
    return "" if code is None else f" at {code.co_filename}:{code.co_firstlineno} in forward"


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module runs a user's hook."""
    return any(getattr(module, name, None) for name in HOOKS)


@dataclasses.dataclass(frozen=True)
class Opaque:
    """A module that stays a leaf although it is not a layer of torch: why, and where tracing stopped."""

    path: str
    reason: str

    def __str__(self) -> str:
        """One line for warnings and reports."""
        return f"{self.path or 'the model'}: {self.reason}"


class LeafTracer(fx.Tracer):
    """Traces a model; a submodule whose forward cannot be traced is kept as a call of that submodule.

    Attributes:
        opaque: The submodules kept whole, by path.
    """

    def __init__(self) -> None:
        super().__init__()
        self.opaque: dict[str, Opaque] = {}
        self._cache: dict[str, fx.Proxy] = {}
        self._names: dict[int, str] = {}
        self._outside = _grad_mode()

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of ``root``; what tracing would silently remove from its own forward is an error."""
        with torch.inference_mode(False), torch.enable_grad(), _autocast_refused(), _no_side_effects(root):
            self._outside = _grad_mode()
            return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Layers of torch without children are leaves, and modules that hooks or parametrisations have changed."""
        if is_hooked(m) or isinstance(m, FUSED) or parametrize.is_parametrized(m):
            return True
        return super().is_leaf_module(m, module_qualified_name) and not list(m.children())

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Traces into ``m``, or takes back what was traced of it and calls it as a leaf."""
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            inner = [name for name, _ in m.named_children() if name != "parametrizations"]
            if inner and is_hooked(m):
                self.opaque[path] = Opaque(path, "has hooks, which tracing would skip")
            elif inner and parametrize.is_parametrized(m):
                self.opaque[path] = Opaque(path, "is parametrised: its weights are computed at every access")
            return super().call_module(m, forward, args, kwargs)
        last = next(reversed(self.graph.nodes), None)
        stack, scope = dict(self.module_stack), self.scope
        known = set(self.opaque)
        try:
            with _no_side_effects(m):
                return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # whatever a user's forward does with a Proxy
            self._take_back(last)
            self.scope = scope
            self.module_stack.clear()
            self.module_stack.update(stack)
            for nested in set(self.opaque) - known:
                del self.opaque[nested]
            reason = describe(error)
        result = self._leaf(m, path, args, kwargs)
        self.opaque[path] = Opaque(path, reason)
        return result

    def _leaf(self, m: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.module_stack[path] = (path, type(m))
        try:
            return self.create_proxy("call_module", path, args, kwargs)
        finally:
            self.module_stack.popitem(last=True)

    def _take_back(self, last: fx.Node | None) -> None:
        """Erases the nodes created after ``last``."""
        gone = []
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            gone.append(node)
        for node in gone:
            self.graph.erase_node(node)
        erased = set(gone)
        for stale in [name for name, proxy in self._cache.items() if proxy.node in erased]:
            del self._cache[stale]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers become nodes, so that nothing is frozen at its value of today.

        The base class searches all parameters at every access, which makes tracing quadratic.
        """
        self._cache = parameter_proxy_cache
        if not isinstance(attr_val, torch.Tensor):
            return attr_val
        if not self._names:
            self._names.update((id(p), name) for name, p in self.root.named_buffers())
            self._names.update((id(p), name) for name, p in self.root.named_parameters())
        name = self._names.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Refuses to create a node inside ``torch.utils.checkpoint.checkpoint`` or ``torch.no_grad``."""
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_filename == _CHECKPOINT_FILE:
                raise _DroppedError("torch.utils.checkpoint")
            frame = frame.f_back  # type: ignore[assignment]
        if _grad_mode() != self._outside:
            raise _DroppedError("torch.no_grad or alike")
        return super().create_node(*args, **kwargs)


def describe(error: BaseException) -> str:
    """The error in one line, with the line of the user's code where it arose, or else of a layer of torch."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OWN_FILES)]
    users = [f for f in frames if not f.filename.startswith(_TORCH_FILES)]
    users = users or [f for f in frames if f.filename.startswith(_LAYER_FILES)]
    message = str(error).strip().split("\n")[0]
    where = f" at {users[-1].filename}:{users[-1].lineno} in {users[-1].name}" if users else ""
    if isinstance(error, _DroppedError):
        return message if error.placed else message + where
    return f"{type(error).__name__}: {message}{where}"
