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

from fx_approx._compat import MEMBERS, TENSOR_CONSTANT, TENSOR_STATE

OWN_FILES = os.path.dirname(__file__) + os.sep
TORCH_FILES = os.path.dirname(torch.__file__) + os.sep

_PLAIN = (bool, int, float, str, type(None))
_NAMED = (enum.Enum, torch.dtype, torch.device, types.FunctionType, types.BuiltinFunctionType)
_CONTAINERS = (list, dict, set, collections.deque)
_LAYER_FILES = os.path.join(os.path.dirname(nn.__file__), "modules") + os.sep
_MODULE_FILE = nn.modules.module.__file__
UNTOLD = ("numpy", "__array__", "grad", "grad_fn", *TENSOR_STATE)
"""Attributes of tensors that are no tensors of a graph, or None at times."""
_unwatched: list[None] = []
_GLOBAL_MODES = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "get_autocast_dtype")


class DroppedError(Exception):
    """The code does something that tracing would silently remove."""

    does = "remove"

    def __init__(self, what: str, where: str = "") -> None:
        super().__init__(f"{what}, which tracing would {self.does}{where}")
        self.placed = bool(where)


class FrozenError(DroppedError):
    """The code reads something that tracing would silently keep as it is today."""

    does = "freeze"


class _Poison:
    """Stands for a value that a part which is not traced stores while it runs; no graph node can take it."""


Members = tuple[tuple[str, bool], ...]
"""Names of what a dict of a module holds, and whether each is None."""


@dataclasses.dataclass(frozen=True)
class Fact:
    """What a graph takes for granted of a tensor that a module holds by a name.

    Attributes:
        query: Attribute or method that was asked; empty if only that there is a tensor.
        args: Arguments of the method; None for an attribute.
        value: The answer.
    """

    query: str = ""
    args: tuple[Any, ...] | None = None
    value: Any = None

    def holds(self, tensor: Any) -> bool:
        """Whether ``tensor`` still gives the answer."""
        if not isinstance(tensor, torch.Tensor):
            return False
        if not self.query:
            return True
        found = getattr(tensor, self.query)
        return bool((found if self.args is None else found(*self.args)) == self.value)


def members(held: dict[str, Any]) -> Members:
    """What a module's dict of parameters, buffers or children holds, to be compared later."""
    return tuple([(name, value is None) for name, value in held.items()])


@dataclasses.dataclass
class Reads:
    """Attributes of modules that a forward has read while it was traced.

    Attributes:
        plain: Module, name and value of numbers, flags and strings: a graph holds them as they were.
        training: Modules whose ``training`` flag was read.
        facts: Module, name of a tensor, what was asked of it with which arguments, and the answer; see :class:`Fact`.
        tied: Two places, each a module and a name, that hold one tensor, of which the graph reads the first.
        members: Module, the name of one of its dicts of parameters, buffers and children, and what it holds.
    """

    plain: dict[tuple[int, str], tuple[nn.Module, str, Any]] = dataclasses.field(default_factory=dict)
    training: dict[int, nn.Module] = dataclasses.field(default_factory=dict)
    facts: dict[Any, tuple[nn.Module, str, Fact]] = dataclasses.field(default_factory=dict)
    tied: dict[tuple[int, str], tuple[nn.Module, str, nn.Module, str]] = dataclasses.field(default_factory=dict)
    members: dict[tuple[int, str], tuple[nn.Module, str, Members]] = dataclasses.field(default_factory=dict)

    def mark(self) -> tuple[int, ...]:
        """Where the reads stand, for :meth:`back_to`."""
        return tuple(map(len, self._all))

    def back_to(self, mark: tuple[int, ...]) -> None:
        """Forgets what was read since ``mark``: it was taken back."""
        for reads, length in zip(self._all, mark, strict=True):
            for key in list(reads)[length:]:
                reads.pop(key)

    @property
    def _all(self) -> tuple[dict[Any, Any], ...]:
        return self.plain, self.training, self.facts, self.tied, self.members

    def fact(self, module: nn.Module, name: str, fact: Fact) -> None:
        """Writes down what the graph takes for granted of the tensor that a module holds."""
        self.facts.setdefault((id(module), name, fact.query, fact.args), (module, name, fact))


@contextlib.contextmanager
def recorded(reads: Reads) -> Iterator[None]:
    """Writes into ``reads`` what user code reads of modules."""

    def read(self: nn.Module, name: str) -> Any:
        try:
            value = object.__getattribute__(self, name)
        except AttributeError:
            held = _held(self, name)
            if held is not _Poison:
                _note(reads, self, name, held, sys._getframe(1).f_code.co_filename)
            raise
        if name in MEMBERS or name == "__dict__":
            if _is_asked_by_user(sys._getframe(1), name):
                for member in MEMBERS if name == "__dict__" else (name,):
                    held = object.__getattribute__(self, member)
                    reads.members.setdefault((id(self), member), (self, member, members(held)))
        elif name == "training" and type(value) is bool:
            if not sys._getframe(1).f_code.co_filename.startswith(OWN_FILES):
                reads.training.setdefault(id(self), self)
        elif (_is_constant(value) or isinstance(value, torch.Tensor) or _is_array(value)) and not name.startswith("__"):
            _note(reads, self, name, value, sys._getframe(1).f_code.co_filename)
        return value

    with patched(nn.Module, "__getattribute__", read):
        yield


def _held(module: nn.Module, name: str) -> Any:
    """The parameter or buffer, None included, that a module holds by that name; the class _Poison without one."""
    attributes = object.__getattribute__(module, "__dict__")
    for held in map(attributes.get, MEMBERS[:2]):
        if held and name in held:
            return held[name]
    return _Poison


def _note(reads: Reads, module: nn.Module, name: str, value: Any, file: str) -> None:
    """Writes down what a forward reads of ``module``, unless code of torch or of this package in ``file`` does."""
    if not _is_of_user(file):
        return
    if isinstance(value, torch.Tensor):
        reads.fact(module, name, Fact())
    elif _is_array(value):
        raise FrozenError(f"the values of the NumPy array self.{name}")
    else:
        reads.plain.setdefault((id(module), name), (module, name, value))


def _is_of_user(file: str) -> bool:
    """Whether a file is user code, or that of a layer of torch."""
    if file.startswith(OWN_FILES):
        return False
    return not file.startswith(TORCH_FILES) or (file.startswith(_LAYER_FILES) and file != _MODULE_FILE)


def _is_asked_by_user(frame: types.FrameType | None, name: str) -> bool:
    """Whether user code iterates over the members of a module, by itself or by a method such as ``parameters()``."""
    assert frame is not None
    if name == "__dict__" or frame.f_code.co_filename != _MODULE_FILE:
        return _is_of_user(frame.f_code.co_filename)
    while frame is not None and frame.f_code.co_filename.startswith(TORCH_FILES):
        frame = frame.f_back
    return frame is not None and not frame.f_code.co_filename.startswith(OWN_FILES)


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """For code of this package that runs in the middle of a traced forward: tensors that it touches are its own."""
    _unwatched.append(None)
    try:
        yield
    finally:
        _unwatched.pop()


def is_unwatched() -> bool:
    """Whether code of this package runs."""
    return bool(_unwatched)


def _is_constant(value: Any) -> bool:
    """Whether a graph would hold ``value`` itself, and it can be compared later."""
    if type(value) is tuple:
        return all(type(element) in _PLAIN for element in value)
    return type(value) in _PLAIN or isinstance(value, _NAMED)


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Stops a forward that enters autocast, asks for global modes, or for what a traced value cannot tell of itself."""
    with contextlib.ExitStack() as stack:
        for name in _GLOBAL_MODES:
            stack.enter_context(patched(torch, name, _asked(getattr(torch, name), name)))

        def enter(self: torch.autocast) -> None:
            raise DroppedError("torch.autocast")

        def assign(self: fx.Proxy, name: str, value: Any) -> None:
            if name in ("data", "grad"):
                raise DroppedError(f"an assignment to .{name} of a tensor")
            object.__setattr__(self, name, value)

        stack.enter_context(patched(torch.autocast, "__enter__", enter))
        stack.enter_context(patched(fx.Proxy, "__setattr__", assign))
        yield


def _asked(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    def ask(*args: Any) -> Any:
        if not sys._getframe(1).f_code.co_filename.startswith((TORCH_FILES, OWN_FILES)):
            raise DroppedError(f"a question for torch.{name}()")
        return original(*args)

    return ask


@contextlib.contextmanager
def patched(place: Any, name: str, value: Any) -> Iterator[None]:
    """Gives ``place`` another attribute ``name`` for a while."""
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


def has_drawn(before: tuple[Any, torch.Tensor, Any]) -> bool:
    """Whether the generators have moved on since :func:`random_state` gave ``before``."""
    python, cpu, of_numpy = random_state()
    with unwatched():
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
    arrays = [(value, value.copy()) for inner in module.modules() for value in vars(inner).values() if _is_array(value)]
    try:
        yield
        if has_drawn(state):
            set_random_state(state)
            raise DroppedError("random numbers that do not depend on an input", _place(module))
        if any(_is_changed(*kept) for kept in arrays):
            raise DroppedError("an in-place change of an array of self", _place(module))
        for inner, attributes, contents in before:
            changed = _changed(inner, attributes, contents)
            if changed:
                raise DroppedError(f"an assignment to {_named(module, inner, changed[0])}", _place(module))
    except BaseException:
        for inner, attributes, contents in before:
            for name in _changed(inner, attributes, contents):
                vars(inner)[name] = _Poison()
        for value, copy in arrays:
            if _is_changed(value, copy):
                value[...] = copy
        raise


def _is_changed(array: Any, copy: Any) -> bool:
    """Whether a bit differs: NaN is equal to itself, and hides no other change."""
    if array.shape != copy.shape or array.dtype != copy.dtype:
        return True
    if array.dtype.hasobject:
        return any(a is not b for a, b in zip(array.ravel(), copy.ravel(), strict=True))
    return bool(array.tobytes() != copy.tobytes())


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
