"""What a forward does beside computing on its inputs, watched while it is traced: a graph would drop or freeze it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import os
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from fx_approx._compat import TENSOR_CONSTANT

OWN_FILES = os.path.dirname(__file__) + os.sep
TORCH_FILES = os.path.dirname(torch.__file__) + os.sep

_PLAIN = (bool, int, float, str, type(None))
_NAMED = (enum.Enum, torch.dtype, torch.device, types.FunctionType, types.BuiltinFunctionType)
_CONTAINERS = (list, dict, set, collections.deque)
_LAYER_FILES = os.path.join(os.path.dirname(nn.__file__), "modules") + os.sep
_MODULE_FILE = nn.modules.module.__file__
_GLOBAL_MODES = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "get_autocast_dtype")


class DroppedError(Exception):
    """The code does something that tracing would silently remove."""

    def __init__(self, what: str, where: str = "") -> None:
        super().__init__(f"{what}, which tracing would remove{where}")
        self.placed = bool(where)


class _Poison:
    """Stands for a value that a part which is not traced stores while it runs; no graph node can take it."""


@dataclasses.dataclass
class Reads:
    """Attributes of modules that a forward has read while it was traced.

    Attributes:
        plain: Module, name and value of numbers, flags and strings: a graph holds them as they were.
        training: Modules whose ``training`` flag was read.
    """

    plain: dict[tuple[int, str], tuple[nn.Module, str, Any]] = dataclasses.field(default_factory=dict)
    training: dict[int, nn.Module] = dataclasses.field(default_factory=dict)

    def mark(self) -> tuple[int, int]:
        """Where the reads stand, for :meth:`back_to`."""
        return len(self.plain), len(self.training)

    def back_to(self, mark: tuple[int, int]) -> None:
        """Forgets what was read since ``mark``: it was taken back."""
        for reads, length in ((self.plain, mark[0]), (self.training, mark[1])):
            for key in list(reads)[length:]:
                reads.pop(key)  # type: ignore[call-overload]


@contextlib.contextmanager
def recorded(reads: Reads) -> Iterator[None]:
    """Writes into ``reads`` what user code reads of modules."""

    def read(self: nn.Module, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if _is_constant(value) and not name.startswith("__"):
            file = sys._getframe(1).f_code.co_filename
            if file.startswith(OWN_FILES):
                return value
            if name == "training":
                reads.training.setdefault(id(self), self)
            elif not file.startswith(TORCH_FILES) or (file.startswith(_LAYER_FILES) and file != _MODULE_FILE):
                reads.plain.setdefault((id(self), name), (self, name, value))
        return value

    with _patched(nn.Module, "__getattribute__", read):
        yield


def _is_constant(value: Any) -> bool:
    """Whether a graph would hold ``value`` itself, and it can be compared later."""
    if type(value) is tuple:
        return all(type(element) in _PLAIN for element in value)
    return type(value) in _PLAIN or isinstance(value, _NAMED)


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Stops a forward that enters autocast, asks for global modes, or assigns to ``.data`` or ``.grad``."""
    with contextlib.ExitStack() as stack:
        for name in _GLOBAL_MODES:
            stack.enter_context(_patched(torch, name, _asked(getattr(torch, name), name)))

        def enter(self: torch.autocast) -> None:
            raise DroppedError("torch.autocast")

        def assign(self: fx.Proxy, name: str, value: Any) -> None:
            if name in ("data", "grad"):
                raise DroppedError(f"an assignment to .{name} of a tensor")
            object.__setattr__(self, name, value)

        stack.enter_context(_patched(torch.autocast, "__enter__", enter))
        stack.enter_context(_patched(fx.Proxy, "__setattr__", assign))
        yield


def _asked(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    def ask(*args: Any) -> Any:
        if not sys._getframe(1).f_code.co_filename.startswith((TORCH_FILES, OWN_FILES)):
            raise DroppedError(f"a question for torch.{name}()")
        return original(*args)

    return ask


@contextlib.contextmanager
def _patched(place: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(place).get(name, _Poison)
    setattr(place, name, value)
    try:
        yield
    finally:
        if own is _Poison:
            delattr(place, name)
        else:
            setattr(place, name, own)


def grad_mode() -> tuple[bool, bool]:
    """Whether gradients and inference mode are on."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


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
def no_side_effects(module: nn.Module) -> Iterator[None]:
    """Stops when tracing the forward of ``module`` did what the graph would do never, or always alike.

    After any error the attributes that were changed are poisoned, so that who reads them cannot be traced either.
    """
    state = random_state()
    before = [(inner, dict(vars(inner)), _contents(inner)) for inner in module.modules()]
    tensors = [kept for inner in module.modules() for kept in _plain_tensors(inner)]
    try:
        yield
        if _has_drawn(state):
            set_random_state(state)
            raise DroppedError("random numbers that do not depend on an input", _place(module))
        if any(_is_changed(*kept) for kept in tensors):
            raise DroppedError("an in-place change of a tensor or array of self", _place(module))
        for inner, attributes, contents in before:
            changed = _changed(inner, attributes, contents)
            if changed:
                raise DroppedError(f"an assignment to {_named(module, inner, changed[0])}", _place(module))
    except Exception:
        for inner, attributes, contents in before:
            for name in _changed(inner, attributes, contents):
                vars(inner)[name] = _Poison()
        for value, copy in tensors:
            if _is_changed(value, copy):
                _restore(value, copy)
        raise


def _plain_tensors(module: nn.Module) -> list[tuple[Any, Any]]:
    """Tensors and arrays that are neither parameters nor buffers, which the copy shares with the user's model."""
    numpy = sys.modules.get("numpy")
    found: list[tuple[Any, Any]] = []
    for value in vars(module).values():
        if isinstance(value, torch.Tensor):
            found.append((value, value.detach().clone()))
        elif numpy is not None and isinstance(value, numpy.ndarray):
            found.append((value, value.copy()))
    return found


def _is_changed(value: Any, copy: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not torch.equal(torch.nan_to_num(value.detach()), torch.nan_to_num(copy))
    return bool((value != copy).any() and not ((value != value) & (copy != copy)).any())


@torch.no_grad()
def _restore(value: Any, copy: Any) -> None:
    if isinstance(value, torch.Tensor):
        value.copy_(copy)
    else:
        value[...] = copy


Contents = list[tuple[Any, list[Any]]]


def containers(value: Any, seen: set[int]) -> Iterator[Any]:
    """``value`` and what it holds, as far as that are lists, dicts, sets and deques."""
    if not isinstance(value, _CONTAINERS) or id(value) in seen:
        return
    seen.add(id(value))
    yield value
    for element in list(value.values() if isinstance(value, dict) else value):
        yield from containers(element, seen)


def _contents(module: nn.Module) -> dict[str, Contents]:
    seen: set[int] = set()
    return {
        name: [(container, _elements(container)) for container in containers(value, seen)]
        for name, value in vars(module).items()
        if isinstance(value, _CONTAINERS)
    }


def _elements(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def _changed(module: nn.Module, attributes: dict[str, Any], contents: dict[str, Contents]) -> list[str]:
    """Names of the attributes that are new, other, or hold containers with other elements."""
    names = []
    for name, value in vars(module).items():
        if name.startswith(TENSOR_CONSTANT) or type(value) is _Poison:
            continue
        if (
            name not in attributes
            or attributes[name] is not value
            or any(_is_refilled(container, elements) for container, elements in contents.get(name, ()))
        ):
            names.append(name)
    return names


def _is_refilled(container: Any, elements: list[Any]) -> bool:
    now = _elements(container)
    return len(now) != len(elements) or any(a is not b for a, b in zip(now, elements, strict=True))


def _named(module: nn.Module, inner: nn.Module, name: str) -> str:
    path = next(path for path, found in module.named_modules() if found is inner)
    return f"self.{path}.{name}" if path else f"self.{name}"


def _place(module: nn.Module) -> str:
    code = getattr(type(module).forward, "__code__", None)
    return "" if code is None else f" at {code.co_filename}:{code.co_firstlineno} in forward"
