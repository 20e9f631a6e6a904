"""What a whole training step multiplies, in captured graphs or not: counted on a copy of the model.

Dynamo leaves parts of a model to Python: what is behind a graph break in a frame of torch, and what it cannot trace. No
code of a backend runs there. But the backend sees what the outermost frame is called with. From that the step can be
run again, on fake tensors, where nothing is computed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import inspect
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fx_approx._compat import (
    RESUMED,
    FakeCopyMode,
    FakeTensorMode,
    tree_leaves,
    tree_map,
    tree_map_only,
)
from fx_approx.capture.error_text import describe
from fx_approx.capture.known_values import quiet
from fx_approx.capture.size_guards import TensorSpec
from fx_approx.capture.trace import kept_random_state
from fx_approx.core.candidates import RoleFlops
from fx_approx.core.flops import measured_flops, role_flops
from fx_approx.dynamo.frame import Frame
from fx_approx.dynamo.layer_recovery import prefix_of
from fx_approx.ops.base import Unsupported, find_op

Products = Mapping[str, Mapping[str, RoleFlops]]
"""Operations of a step by the path of the module that multiplies, and by kind; nothing of a module that only ran."""

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, enum.Enum, range, slice)


class UncountableError(Exception):
    """The whole step cannot be counted; says why."""


@dataclasses.dataclass(frozen=True)
class _ModuleRef:
    """Stands for a module among the arguments."""

    module: weakref.ref[nn.Module]


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A call of the outermost function that was compiled, with the modules that it reaches.

    Attributes:
        roots: The modules, by the names that the graph has for them.
        code: The function's code.
        globals: Those of its module.
        values: Its arguments and the variables of functions around it; tensors as :class:`TensorSpec`.
    """

    roots: Mapping[str, weakref.ref[nn.Module]]
    code: CodeType
    globals: dict[str, Any]
    values: Mapping[str, Any]

    @property
    def resumed(self) -> bool:
        """Whether it is the rest of a frame only, whose beginning multiplies nothing."""
        return self.code.co_name.startswith(RESUMED)

    def products(self) -> Products:
        """What the call multiplies; a recomputation by a checkpoint is not counted.

        Raises:
            UncountableError: The call cannot be repeated on a copy of the modules.
        """
        modules = {name: module for name, root in self.roots.items() if (module := root()) is not None}
        if self.resumed or len(modules) < len(self.roots):
            raise UncountableError("its beginning was not captured" if self.resumed else "the model is gone")
        with kept_random_state(), torch.enable_grad(), _quiet():
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            try:
                with FakeCopyMode(mode):
                    twins = copy.deepcopy(modules)
                with mode:
                    return self._counted(modules, twins, _empty)
            except Exception as error:  # whatever a forward does with tensors that have no values
                reason = describe(error)
            size = sum(p.numel() * p.itemsize for one in modules.values() for p in one.parameters())
            # The other ranks would not take part in what the forward exchanges.
            if size > _SMALL or (torch.distributed.is_available() and torch.distributed.is_initialized()):
                raise UncountableError(reason)
            try:
                return self._counted(modules, copy.deepcopy(modules), _harmless)
            except Exception as error:
                raise UncountableError(describe(error)) from None

    def _counted(
        self,
        modules: Mapping[str, nn.Module],
        twins: Mapping[str, nn.Module],
        make: Callable[[TensorSpec], Tensor],
    ) -> Products:
        counter = _Counter(modules, twins)

        def real(value: Any) -> Any:
            if isinstance(value, TensorSpec):
                return make(value)
            if isinstance(value, _ModuleRef):
                return counter.twins[id(value.module())]
            return value

        leaves = (TensorSpec, _ModuleRef)
        given = tree_map(real, dict(self.values), is_leaf=lambda value: isinstance(value, leaves))
        code = self.code
        cells = tuple(types.CellType(given[name]) for name in code.co_freevars)
        function = types.FunctionType(code, self.globals, code.co_name, None, cells)
        with counter.watching(), torch.compiler.set_stance("force_eager"):
            function(*_positional(code, given), **_keywords(code, given))
        return counter.found


_SMALL = 1 << 28  # bytes of parameters up to which a copy may really run


def step_of(frame: Frame) -> Step | None:
    """The call of a frame, if its arguments can be written down."""
    names = set(frame.code.co_varnames[: _argument_count(frame.code)]) | set(frame.code.co_freevars)
    try:
        values = {name: _written(frame.values[name]) for name in names if name in frame.values}
    except UncountableError:
        return None
    given = {id(one.module()) for one in tree_leaves(values) if isinstance(one, _ModuleRef)}
    if len(values) < len(names) or any(id(root.module) not in given for root in frame.roots):
        return None  # a module that is no argument would be run itself, and not a copy
    roots = {prefix_of(frame, root): weakref.ref(root.module) for root in frame.roots}
    return Step(roots, frame.code, frame.globals, values)


def _written(value: Any) -> Any:
    def leaf(one: Any) -> Any:
        if isinstance(one, Tensor):
            return TensorSpec(tuple(one.shape), one.stride(), one.dtype, one.device, one.requires_grad)
        if isinstance(one, nn.Module):
            return _ModuleRef(weakref.ref(one))
        plain = isinstance(one, types.FunctionType) and one.__closure__ is None  # what is around it would live on
        if plain or isinstance(one, (*_PLAIN, type, types.BuiltinFunctionType)):
            return one
        raise UncountableError(f"it is called with a {type(one).__name__}")

    return tree_map(leaf, value)


def _argument_count(code: CodeType) -> int:
    stars = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    return code.co_argcount + code.co_kwonlyargcount + stars


def _positional(code: CodeType, given: Mapping[str, Any]) -> list[Any]:
    names = code.co_varnames
    values = [given[name] for name in names[: code.co_argcount]]
    star = code.co_argcount + code.co_kwonlyargcount
    return [*values, *given[names[star]]] if code.co_flags & inspect.CO_VARARGS else values


def _keywords(code: CodeType, given: Mapping[str, Any]) -> dict[str, Any]:
    names, last = code.co_varnames, code.co_argcount + code.co_kwonlyargcount
    values = {name: given[name] for name in names[code.co_argcount : last]}
    star = last + bool(code.co_flags & inspect.CO_VARARGS)
    return {**values, **given[names[star]]} if code.co_flags & inspect.CO_VARKEYWORDS else values


def _empty(spec: TensorSpec) -> Tensor:
    return spec.empty()


def _harmless(spec: TensorSpec) -> Tensor:
    """Values that serve as indices, labels and masks of any size."""
    made = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=spec.device)
    with torch.no_grad():
        made.fill_(1 if spec.dtype == torch.bool else 0)
    return made.requires_grad_(spec.requires_grad)


class _Counter(TorchFunctionMode):
    """Counts what functions of torch multiply, by the module in whose forward they are called."""

    def __init__(self, modules: Mapping[str, nn.Module], twins: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.found: dict[str, dict[str, RoleFlops]] = {}
        self.twins: dict[int, nn.Module] = {}
        self.paths: dict[nn.Module, str] = {}
        for name, model in modules.items():
            for (path, one), other in zip(model.named_modules(prefix=name), twins[name].modules(), strict=True):
                self.twins[id(one)] = other
                self.paths.setdefault(other, path)
        self.stack: list[str] = []
        self.flops = FlopCounterMode(display=False)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Counts what is called inside."""
        for module, path in self.paths.items():

            def enter(module: nn.Module, args: Any, path: str = path) -> None:
                self.stack.append(path)
                self.found.setdefault(path, {})

            def leave(module: nn.Module, args: Any, result: Any) -> None:
                self.stack.pop()

            module.register_forward_pre_hook(enter, prepend=True)
            module.register_forward_hook(leave, always_call=True)
        with self.flops, self:
            yield

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls ``func`` and counts what it multiplies."""
        kwargs = {} if kwargs is None else kwargs
        before = self.flops.get_total_flops()
        result = func(*args, **kwargs)
        done = self.flops.get_total_flops() - before
        if done:
            kinds = self.found.setdefault(self.stack[-1] if self.stack else "", {})
            kind = str(getattr(func, "__name__", func)).strip("_")
            kinds[kind] = kinds.get(kind, RoleFlops()) + _roles(func, args, kwargs, done)
        return result


def _roles(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], done: int) -> RoleFlops:
    """The operations of a call that did so many in its forward, by role."""
    op = find_op(func) or find_op(getattr(func, "__name__", ""))
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    weights: list[Tensor] = [leaf for leaf in inputs if isinstance(leaf, nn.Parameter)]
    values = [leaf for leaf in inputs if not isinstance(leaf, nn.Parameter)]
    try:
        if op is not None:
            bound = op.bind(args, kwargs)
            lhs, rhs = bound[op.lhs], bound[op.rhs]
            shape = op.geometry(lhs.shape, rhs.shape, {name: bound[name] for name in op.kwarg_names})
            flops = role_flops(shape, lhs.requires_grad, rhs.requires_grad)
            if flops.output == done:
                return flops
        else:
            copies = {id(t): t.detach().requires_grad_(t.requires_grad) for t in values}
            again, others = tree_map_only(Tensor, lambda t: copies.get(id(t), t), (args, kwargs))
            flops = measured_flops(lambda: func(*again, **others), list(copies.values()), weights)
            if flops.output == done:
                return flops
    except (Unsupported, RuntimeError, ValueError, TypeError):  # in a function transform, or no product of two
        pass
    to_inputs = done if any(value.requires_grad for value in values) else 0
    return RoleFlops(done, to_inputs, done if any(weight.requires_grad for weight in weights) else to_inputs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nor does the model say again what it warns of."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
