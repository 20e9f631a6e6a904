"""A traced value: what stands for a tensor, a size or a container while a forward is traced, and what it answers."""

from __future__ import annotations

import builtins
import contextlib
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.proxy import Attribute, TraceError

from fx_approx.capture.asserts import required, requirement, unpacked
from fx_approx.capture.known_values import KnownValues, NotKnownError
from fx_approx.capture.real_tensors import IN_PLACE_OPERATORS
from fx_approx.capture.side_effects import OWN_FILES, TORCH_FILES, UNTOLD, FrozenError, patched


class NeedsValues(BaseException):
    """A forward that is traced without example inputs at hand asks what they could tell: it is traced again, with them.

    No user's ``except Exception`` is to catch it.
    """


@contextlib.contextmanager
def kinds_told() -> Iterator[None]:
    """Lets ``isinstance`` in the model's code see what a traced value stands for.

    Python's function is replaced and not the attribute ``__class__``, which torch's C++ reads as well: it would take
    the value for a tensor in memory.
    """
    usual = builtins.isinstance

    def told(value: Any, kinds: Any) -> bool:
        if issubclass(type(value), TracedValue):
            frame = sys._getframe(1)
            if frame.f_code is torch.is_tensor.__code__ and frame.f_back is not None:
                frame = frame.f_back
            if not frame.f_code.co_filename.startswith((TORCH_FILES, OWN_FILES)):
                try:
                    return usual(value, kinds) or issubclass(value.told_kind(), kinds)
                except TypeError:  # what is a class only for isinstance, such as torch.FloatTensor
                    return usual(value, kinds)
        return usual(value, kinds)

    with patched(builtins, "isinstance", told):
        yield


class TracedValue(fx.Proxy):
    """A traced value that knows what the example inputs tell of it.

    ``x += y`` and ``x[i] = y`` are recorded as the changes in place that they are. (``fx.Proxy`` leaves the first to
    Python, which falls back to ``x = x + y``: another name of ``x`` would keep the old value.)
    """

    def _known(self) -> KnownValues | None:
        known: KnownValues | None = self.tracer.known()  # type: ignore[attr-defined]
        return known

    def told_kind(self) -> type:
        """The class that the model's code is to see, whose branch it will take later; this one if it is not known."""
        known = self._known()
        if known is None:
            return type(self)
        try:
            found: type = known.kind(self.node)
            return found
        except NotKnownError:
            return type(self)

    def __getattr__(self, name: str) -> Any:
        if name in UNTOLD:
            raise FrozenError(f".{name} of a value that depends on an input")
        if name == "ndim":
            found = self._dims()
            if found is not None:
                return found
        return (_View if name in _View.of else TracedAttribute)(self, name)

    def _dims(self) -> int | None:
        known = self.tracer.now_known()  # type: ignore[attr-defined]
        try:
            return None if known is None else known.dims(self.node)
        except NotKnownError:
            return None

    def dim(self) -> Any:
        """The number of axes, if it is known."""
        found = self._dims()
        return self.tracer.create_proxy("call_method", "dim", (self,), {}) if found is None else found

    def __len__(self) -> int:
        known = self._known()
        if known is None:
            raise TraceError("the length of a traced value is not known without example_inputs")
        return _answer(known.length, self)

    def __iter__(self) -> Iterator[Any]:
        frame = sys._getframe(1)
        count = unpacked(frame)
        if count is not None and self.tracer.now_known() is None:  # type: ignore[attr-defined]
            return (self[number] for number in range(count))  # type: ignore[index]
        known = self._known()
        if known is None:
            raise TraceError("a traced value cannot be iterated over without example_inputs")
        try:
            keys = known.keys(self.node)
            return iter(self._parts(known) if keys is None else keys)
        except NotKnownError as error:
            if count is not None:
                return (self[number] for number in range(count))  # type: ignore[index]
            raise TraceError(f"a traced value cannot be iterated over: {error}") from None

    def _parts(self, known: KnownValues) -> list[Any]:
        made: dict[fx.Node, list[Any]] = self.tracer.parts  # type: ignore[attr-defined]
        length = known.length(self.node)
        if self.node not in made:
            made[self.node] = self._summands(known) or [self[number] for number in range(length)]  # type: ignore[index]
        return made[self.node]

    def _summands(self, known: KnownValues) -> list[Any] | None:
        """The parts of a sum or a slice of tuples, which are those of what it was made of."""
        node = self.node
        if node.op != "call_function" or node.target not in (operator.add, operator.getitem):
            return None
        if not isinstance(known.value(node), tuple):
            return None
        sources = [self._listed(known, one) for one in node.args[: 2 if node.target is operator.add else 1]]
        if any(source is None for source in sources):
            return None
        if node.target is operator.add:
            return [part for source in sources for part in source or ()]
        key = node.args[1]
        edges = (key.start, key.stop, key.step) if isinstance(key, slice) else (0.5,)
        if any(not isinstance(edge, (int, type(None))) for edge in edges):
            return None
        return list((sources[0] or [])[key]) if isinstance(key, slice) else None

    def _listed(self, known: KnownValues, source: Any) -> list[Any] | None:
        if isinstance(source, fx.Node):
            if not isinstance(known.value(source), tuple):
                return None
            made: TracedValue = self.tracer.proxy(source)  # type: ignore[assignment]
            return made._parts(known)
        if not isinstance(source, tuple):
            return None
        return [self.tracer.proxy(part) if isinstance(part, fx.Node) else part for part in source]

    def keys(self) -> Any:
        """The keys of a dict, if they are known."""
        return _View(self, "keys")()

    def __hash__(self) -> int:
        """By identity, as of a tensor; the hash of a number is not known while it is traced."""
        known = self.tracer.now_known()  # type: ignore[attr-defined]
        if known is not None and not sys._getframe(1).f_code.co_filename.startswith((TORCH_FILES, OWN_FILES)):
            try:
                if known.kind(self.node) is not torch.Tensor:
                    raise TypeError("a traced container has no hash")
            except NotKnownError:
                raise TypeError("a traced value has no hash") from None
        return id(self)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __bool__(self) -> bool:
        needed = requirement(sys._getframe(1))
        known = self.tracer.now_known()  # type: ignore[attr-defined]
        if needed is not None and known is None and not self._is_of_sizes():
            return self._require(needed)
        known = self._known()
        if known is not None:
            try:
                return bool(known.number(self.node))
            except NotKnownError as error:
                if needed is None:
                    raise TraceError(f"a traced value decides what Python does: {error}") from None
        if needed is not None:
            return self._require(needed)
        return super().__bool__()

    def _require(self, needed: Any) -> bool:
        self.tracer.create_proxy(
            "call_function", required(needed.error), (self, needed.expected, needed.message), {}, name="require"
        )
        return bool(needed.expected)

    def _is_of_sizes(self) -> bool:
        waiting, reads = [self.node], False
        while waiting:
            node = waiting.pop()
            attribute = node.target is getattr and len(node.args) > 1 and node.args[1] in ("shape", "ndim")
            if attribute or (node.op == "call_method" and node.target in ("size", "dim", "numel")):
                reads = True
            elif node.op == "call_function" and getattr(node.target, "__module__", "") in ("_operator", "math"):
                waiting += node.all_input_nodes
            else:
                return False
        return reads

    def _number(self) -> Any:
        known = self._known()
        if known is None:
            raise TypeError("a traced value is no number")
        try:
            return known.number(self.node)
        except NotKnownError as error:
            raise TypeError(f"a traced value is no number: {error}") from None

    def __index__(self) -> int:
        return operator.index(self._number())

    def __int__(self) -> int:
        return int(self._number())

    def __float__(self) -> float:
        return float(self._number())


class TracedAttribute(TracedValue, Attribute):
    """An attribute or method of a traced value."""


class _View(TracedAttribute):
    """What may be a method of a dict, whose keys are perhaps known."""

    of: ClassVar[dict[str, Callable[[Any, list[Any]], Any]]] = {
        "keys": lambda root, keys: keys,
        "values": lambda root, keys: [root[key] for key in keys],
        "items": lambda root, keys: [(key, root[key]) for key in keys],
    }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        known = self._known()
        try:
            keys = None if known is None else known.keys(self.root.node)
        except NotKnownError:
            keys = None
        return super().__call__(*args, **kwargs) if keys is None else self.of[self.attr](self.root, keys)


def _answer(ask: Callable[[fx.Node], int], value: TracedValue) -> int:
    try:
        return ask(value.node)
    except NotKnownError as error:
        raise TraceError(f"a traced value does not tell its length: {error}") from None


def _in_place(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    target = getattr(operator, name)

    def change(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return change


for _name in IN_PLACE_OPERATORS:
    setattr(TracedValue, f"__{_name}__", _in_place(_name))
