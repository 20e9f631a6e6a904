"""Real tensors in a forward that is traced.

A forward meets them beside the traced values: parameters, buffers and tensors that are plain attributes, however it
reaches them, and those that it makes itself. What is computed of the first must follow the model, so every operation on
one becomes a node that reads it by its path, and its value is not to be had. Those that a forward makes are computed at
once: they depend on nothing. Of any other tensor (in a list, in a closure, another name of a parameter's memory) no
path is known, and the forward is not traced.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from fx_approx._compat import TENSOR_STATE, TorchDispatchMode, buffers_of, parameters_of, storage_key
from fx_approx.capture.side_effects import DroppedError, Fact, FrozenError, Reads, is_unwatched, unwatched

DESCRIBING = frozenset(
    {"shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "itemsize", "nbytes", "names", "is_meta"}
    | {"is_cuda", "is_cpu", "is_mps", "is_xpu", "is_sparse", "is_quantized", "is_nested", "is_sparse_csr", "is_mkldnn"}
)
DESCRIBING_METHODS = frozenset(
    {"size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "__len__"}
    | {
        "is_floating_point",
        "is_complex",
        "is_signed",
        "is_contiguous",
        "get_device",
        "is_inference",
        "is_conj",
        "is_neg",
    }
    | {"has_names", "is_shared", "is_pinned", "is_distributed"}
)
"""What describes a tensor and is no tensor: constants of the graph, which is used only as long as they are true."""

READING = frozenset(
    {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "data_ptr", "untyped_storage", "storage"}
    | {"__bool__", "__int__", "__float__", "__complex__", "__index__", "__array__", "__contains__", "__repr__"}
    | {"__format__", "__dlpack__", "__reduce_ex__", "__deepcopy__", "__array_wrap__", "grad", "grad_fn"}
    | {"retains_grad", "output_nr", "typed_storage", *TENSOR_STATE}
)
"""What tells values, memory or gradients of a tensor as they are now."""

CHANGING = frozenset(
    {"requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "retain_grad", "backward", "set_"}
    | {"share_memory_", "resize_", "resize_as_", "rename_", "swap_tensors", "detach_", "__setstate__"}
)
"""What changes a tensor otherwise than its values."""


class Reader(Protocol):
    """What :class:`RealTensors` needs of a tracer."""

    def read(self, tensor: Tensor) -> fx.Proxy:
        """The node that reads a tensor of the model, or one that the graph has changed."""


class RealTensors:
    """Tells the tensors of ``root`` from those that its forward makes."""

    def __init__(self, root: nn.Module, reads: Reads) -> None:
        self.reads = reads
        self._places: dict[int, list[tuple[nn.Module, str, str]]] = {}
        self._made: set[Any] = set()
        self._changed: dict[Any, int] = {}
        self._kept: list[Tensor] = []
        self._attributes: list[tuple[Tensor, dict[str, Any]]] = []
        for path, module in root.named_modules(remove_duplicate=False):
            for held in (parameters_of(module), buffers_of(module), vars(module)):
                for name, value in held.items():
                    if isinstance(value, Tensor):
                        self._places.setdefault(id(value), []).append((module, path, name))
                        self._attributes.append((value, dict(vars(value))))

    def path(self, tensor: Tensor) -> str | None:
        """Where the model holds ``tensor``; None if nowhere."""
        places = self._places.get(id(tensor))
        if places is None:
            return None
        _, path, name = places[0]
        return f"{path}.{name}" if path else name

    def note_read(self, tensor: Tensor) -> None:
        """Writes down that the graph reads ``tensor`` by its first path, for all its names."""
        places = [(module, name) for module, _, name in self._places[id(tensor)]]
        first = places[0]
        self.reads.fact(*first, Fact())
        for other in places[1:]:
            if other[0] is not first[0] or other[1] != first[1]:
                self.reads.tied.setdefault((id(other[0]), other[1]), (*first, *other))

    def note_made(self, value: Any) -> None:
        """Writes down the tensors that an operation made."""
        for tensor in tensors_in(value):
            self._made.add(self._memory(tensor))

    def is_made(self, tensor: Tensor) -> bool:
        """Whether the forward made it, so that it depends on nothing."""
        return id(tensor) not in self._places and self._memory(tensor) in self._made

    def is_in_graph(self, tensor: Tensor) -> bool:
        """Whether only the graph knows its value: the model's own, and what the forward made and a node changes.

        Raises:
            DroppedError: Neither: no path is known, or it is another name of what a node changes.
        """
        if id(tensor) in self._places:
            return True
        memory = self._memory(tensor)
        if memory not in self._made:
            raise FrozenError(
                f"a tensor of shape {tuple(tensor.shape)} that is neither an attribute of a module nor made here"
            )
        changed = self._changed.get(memory)
        if changed is not None and changed != id(tensor):
            raise DroppedError("another name of a tensor that is changed in place")
        return changed is not None

    def note_changed(self, tensor: Tensor) -> None:
        """Writes down that a node changes the tensor, which the forward made."""
        if self.is_made(tensor):
            self._kept.append(tensor)
            self._changed.setdefault(self._memory(tensor), id(tensor))

    def check_attributes(self) -> None:
        """Takes back what the forward has stored in tensors of the model as Python attributes.

        Raises:
            DroppedError: There was something.
        """
        stored = [(tensor, before) for tensor, before in self._attributes if vars(tensor) != before]
        for tensor, before in stored:
            vars(tensor).clear()
            vars(tensor).update(before)
        if stored:
            raise DroppedError(f"an assignment to an attribute of {self.path(stored[0][0])}")

    def describe(self, tensor: Tensor, query: str, args: tuple[Any, ...] | None) -> Any:
        """What describes a tensor, as a constant that is written down."""
        with unwatched():
            found = getattr(tensor, query)
            value = found if args is None else found(*args)
        places = self._places.get(id(tensor))
        if places is not None:
            module, _, name = places[0]
            self.reads.fact(module, name, Fact(query, args, value))
        return value

    def _memory(self, tensor: Tensor) -> Any:
        try:
            with unwatched():
                return storage_key(tensor.untyped_storage())
        except (NotImplementedError, RuntimeError):  # sparse ones, and those inside function transforms
            return "object", id(tensor)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of an operation's arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, set)):
        for element in value:
            yield from tensors_in(element)
    elif isinstance(value, dict):
        for element in value.values():
            yield from tensors_in(element)
    elif isinstance(value, slice):
        yield from tensors_in((value.start, value.stop, value.step))


def _replaced(value: Any, read: dict[int, fx.Proxy]) -> Any:
    if isinstance(value, Tensor):
        return read.get(id(value), value)
    if isinstance(value, (list, tuple)):
        found = [_replaced(element, read) for element in value]
        return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
    if isinstance(value, dict):
        return {key: _replaced(element, read) for key, element in value.items()}
    if isinstance(value, slice):
        return slice(*(_replaced(part, read) for part in (value.start, value.stop, value.step)))
    return value


def _has_proxy(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_proxy, value))
    if isinstance(value, dict):
        return any(map(_has_proxy, value.values()))
    if isinstance(value, slice):
        return _has_proxy((value.start, value.stop, value.step))
    return isinstance(value, fx.Proxy)


def _changes_in_place(name: str, kwargs: Mapping[str, Any]) -> bool:
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and hasattr(operator, name[2:-2]))
    return name.endswith("_") or kwargs.get("inplace") is True


IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
"""Names in ``operator`` of Python's ``x += y`` and alike."""

_ALIASES = frozenset(
    {"data", "T", "mT", "H", "mH", "real", "imag", "detach", "view", "view_as", "reshape", "flatten", "squeeze", "t"}
    | {
        "unsqueeze",
        "transpose",
        "permute",
        "movedim",
        "swapaxes",
        "getitem",
        "__getitem__",
        "select",
        "narrow",
        "ravel",
    }
    | {"expand", "expand_as", "unbind", "chunk", "split", "diagonal", "contiguous", "to", "float", "double", "type_as"}
)
"""Names of what may give the memory of its first argument."""


def changed_attributes(node: fx.Node) -> Iterator[str]:
    """Paths of the tensors of the model that ``node`` changes in place."""
    if node.op not in ("call_function", "call_method"):
        return
    name = _target_name(node)
    waiting = []
    if _changes_in_place(name, node.kwargs) or name in (*IN_PLACE_OPERATORS, "setitem"):
        waiting.append(node.args[0] if node.args else next(iter(node.kwargs.values()), None))
    waiting.append(node.kwargs.get("out"))
    while waiting:
        value = waiting.pop()
        if isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, fx.Node) and value.op == "get_attr":
            yield str(value.target)
        elif isinstance(value, fx.Node) and value.args:
            name = str(value.args[1]) if value.target is getattr else _target_name(value)
            if name in _ALIASES or _changes_in_place(name, value.kwargs):
                waiting.append(value.args[0])


def _target_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", ""))


_TAKING_SIZES = ("expand", "new_empty", "new_ones", "new_zeros")
"""Methods of a tensor whose sizes torch counts before it asks who overrides them, where the first is no number."""


class Functions(TorchFunctionMode):
    """Makes nodes of what a forward computes of the model's own tensors."""

    def __init__(self, real: RealTensors, reader: Reader) -> None:
        super().__init__()
        self.real, self.reader = real, reader
        self._methods: dict[Any, Callable[..., Any]] = {}

    def __enter__(self) -> Functions:
        """Begins, methods that would refuse a traced size as their first argument included."""
        is_tensor_method_or_property(Tensor.expand)  # torch looks for all methods once: now, not with ours in place
        for name in _TAKING_SIZES:
            method = getattr(Tensor, name)
            ours = self._taking_sizes(name, method)
            self._methods[ours] = method
            setattr(Tensor, name, ours)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        for name in _TAKING_SIZES:
            delattr(Tensor, name)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _taking_sizes(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def called(tensor: Tensor, *sizes: Any, **kwargs: Any) -> Any:
            first = sizes[0] if sizes else None
            if is_unwatched() or not isinstance(first, fx.Proxy):
                return method(tensor, *sizes, **kwargs)
            source = self.reader.read(tensor) if self.real.is_in_graph(tensor) else tensor
            return first.tracer.create_proxy("call_method", name, (source, *sizes), kwargs)

        return called

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Runs ``func`` on what the forward has made, and records it otherwise."""
        kwargs = kwargs or {}
        real = self.real
        func = self._methods.get(func, func)  # torch finds the method by its name
        if is_unwatched():
            return func(*args, **kwargs)
        found = list(tensors_in((args, kwargs)))
        if not found:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "__delete__"):
            return self._property(func, name, args)
        if name == "__hash__":
            return func(*args)
        first = args[0] if args else None
        traced = _has_proxy((args, kwargs))
        if name in DESCRIBING_METHODS and isinstance(first, Tensor) and not traced and len(found) == 1 and not kwargs:
            return real.describe(first, name, args[1:])
        if traced or any([real.is_in_graph(tensor) for tensor in found]):
            if _changes_in_place(name, kwargs):
                real.note_changed(first if isinstance(first, Tensor) else found[0])
            for tensor in tensors_in(kwargs.get("out")):
                real.note_changed(tensor)
        read = {id(tensor): tensor for tensor in found if real.is_in_graph(tensor)}
        if not read:
            return func(*args, **kwargs)
        for tensor in read.values():
            what = real.path(tensor) or "a tensor"
            if name in READING:
                raise FrozenError(f"the value of {what} as Python sees it ({name})")
            if name in CHANGING:
                raise DroppedError(f"a change of {what} ({name})")
        proxies = {key: self.reader.read(tensor) for key, tensor in read.items()}
        args, kwargs = _replaced(args, proxies), _replaced(kwargs, proxies)
        if name.startswith("__") and not kwargs and isinstance(args[0], fx.Proxy) and hasattr(type(args[0]), name):
            return getattr(args[0], name)(*args[1:])
        result = fx.Proxy.__torch_function__(func, types, args, kwargs)
        if name == "unbind" and len(read) == 1:
            return self._parts(next(iter(read.values())), result, args[1:], kwargs)
        return result

    def _property(self, func: Any, kind: str, args: tuple[Any, ...]) -> Any:
        tensor, name = args[0], func.__self__.__name__
        if not isinstance(tensor, Tensor):
            return func(*args)
        if kind == "__get__" and name in DESCRIBING:
            return self.real.describe(tensor, name, None)
        if not self.real.is_in_graph(tensor):
            return func(*args)
        what = self.real.path(tensor) or "a tensor"
        if kind != "__get__":
            raise DroppedError(f"an assignment to .{name} of {what}")
        if name in READING:
            raise FrozenError(f"the value of {what} as Python sees it (.{name})")
        return getattr(self.reader.read(tensor), name)

    def _parts(self, tensor: Tensor, result: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The rows of a tensor whose number is known."""
        dim = kwargs.get("dim", rest[0] if rest else 0)
        return tuple(result[i] for i in range(self.real.describe(tensor, "shape", None)[dim]))


class Operators(TorchDispatchMode):
    """Sees each operation that really runs: none may read or change what the forward has not made.

    What torch's overrides do not see comes by here: scripted functions, say.
    """

    def __init__(self, real: RealTensors) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.real = real

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Runs ``func``, unless it is about other tensors."""
        kwargs = kwargs or {}
        real = self.real
        if is_unwatched():
            return func(*args, **kwargs)
        if func is not torch.ops.aten.lift_fresh.default:  # the first that is seen of a tensor made of Python's numbers
            for tensor in tensors_in((args, kwargs)):
                if not real.is_made(tensor):
                    raise FrozenError(f"{func} of {real.path(tensor) or 'a tensor that is no attribute of a module'}")
        with unwatched():
            result = func(*args, **kwargs)
        real.note_made(result)
        return result
