"""What is known of traced values from the example inputs, and what a later call must share with those inputs.

While a forward is traced its Python may ask a traced value for its number of axes, for the length of a tuple, or for a
number that follows from sizes. The answer is read off fake tensors. So that it may be trusted in later calls, the graph
is run on several fake inputs: the example's own, some with another batch, and one for each other size, up to a number
of them, with that size doubled. What is alike in all of them does not depend on the sizes; what differs is answered
only under a :class:`SizeGuard`, and what depends on the batch is not answered at all.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from fx_approx._compat import FAKE_TENSOR_LOGGER, HOOKS, FakeCopyMode, FakeTensorMode, is_erased
from fx_approx.capture.side_effects import has_drawn, random_state, set_random_state, unwatched
from fx_approx.capture.size_guards import SizeGuard, TensorSpec, places

_MANY = 6
"""Sizes that are varied each; of further ones widths and heights together, others are guarded where any is."""

_SIZE_METHODS = ("size", "dim", "ndimension", "numel", "nelement", "__len__")
_SIZE_ATTRIBUTES = ("shape", "ndim", "is_nested")
_DTYPE_METHODS = ("is_floating_point", "is_complex")
_SCALARS = (bool, int, float, str, type(None), torch.Size)


class NotKnownError(Exception):
    """A question about a traced value that has no answer for all calls."""


@dataclasses.dataclass(frozen=True)
class _Variant:
    """One set of fake inputs. ``kind``: ``batch``, ``one`` (a batch of one) or ``size``; ``dims``: what was changed."""

    kind: str
    dims: tuple[tuple[int, int], ...]


_UNKNOWN = object()


class KnownValues:
    """Values of the nodes of a graph that is being traced, on fake inputs. They are computed when they are asked for.

    Args:
        root: The model; a fake copy of it runs.
        names: Of the graph's inputs.
        inputs: The graph's inputs, with a :class:`TensorSpec` for every tensor.
    """

    def __init__(self, root: nn.Module, names: tuple[str, ...], inputs: list[Any]) -> None:
        self.names, self.inputs = names, inputs
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with FakeCopyMode(self.mode), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.fake = copy.deepcopy(root)
        without_user_hooks(self.fake)
        self.root = root
        self.leaves = places(inputs)
        self.variants = self._make_variants()
        self.busy = False
        self._sizes: set[tuple[int, int]] = set()
        self._not_one: set[tuple[int, int]] = set()
        self._relied = self._relied_on_dtypes = False
        self._clamped: set[int] = set()
        self._varying: dict[fx.Node, frozenset[int]] = {}
        self.begin(True)

    def begin(self, training: bool) -> None:
        """Starts with the graph of another trace; what was relied upon is kept."""
        for module in self.fake.modules():
            module.training = training
        self._computed: dict[fx.Node, list[Any]] = {}
        self._order: list[fx.Node] = []
        self._varying = {}
        with self.mode:
            self._given = [self._inputs(variant) for variant in self.variants]

    @property
    def guard(self) -> SizeGuard | None:
        """What later calls must share with the example; None if nothing was relied upon."""
        if not self._relied:
            return None
        leaves = tuple((path, _axes(one)) for path, one in self.leaves)
        sizes = tuple((leaf, axis, self._size(leaf, axis)) for leaf, axis in sorted(self._sizes))
        dtypes = None
        if self._relied_on_dtypes:
            first = next(self.root.parameters(), None)
            dtypes = (*(one.dtype if isinstance(one, TensorSpec) else None for _, one in self.leaves), _dtype(first))
        return SizeGuard(self.names, leaves, sizes, tuple(sorted(self._not_one - self._sizes)), dtypes)

    def _size(self, leaf: int, axis: int) -> int:
        spec = self.leaves[leaf][1]
        assert isinstance(spec, TensorSpec)
        return spec.shape[axis]

    # The fake inputs

    def _dims(self) -> Iterator[tuple[int, int, int]]:
        """Leaf, axis and size of everything the inputs measure."""
        for leaf, (_, spec) in enumerate(self.leaves):
            if isinstance(spec, TensorSpec):
                yield from ((leaf, axis, size) for axis, size in enumerate(spec.shape))

    def _make_variants(self) -> list[_Variant]:
        dims = list(self._dims())
        batch = next((size for _, axis, size in dims if axis == 0), None)
        rows = tuple((leaf, axis) for leaf, axis, size in dims if axis == 0 and size == batch)
        variants = [_Variant("given", ())]
        if batch:
            variants += [_Variant("batch", rows), _Variant("batch" if batch == 1 else "one", rows)]
        # Width and height change together, features and length do not.
        apart = {
            s for leaf, axis, s in dims if axis == 1 and any(d[0] == leaf and d[1] > 1 and d[2] == s for d in dims)
        }
        others: dict[tuple[int, bool], list[tuple[int, int]]] = {}
        for leaf, axis, size in dims:
            if (leaf, axis) not in rows:
                others.setdefault((size, size in apart and axis == 1), []).append((leaf, axis))
        self._always: set[tuple[int, int]] = set()
        areas: list[tuple[int, int]] = []
        for (size, _), same in others.items():
            if size > 1 and len(variants) < 3 + _MANY:
                variants.append(_Variant("size", tuple(same)))
            elif size > 1 and all(axis > 1 for _, axis in same):  # widths and heights of many feature maps
                areas += same
            else:
                self._always.update(same)
        if areas:
            variants.append(_Variant("size", tuple(areas)))
        return variants

    def _inputs(self, variant: _Variant) -> list[Any]:
        number = self.variants.index(variant)
        made: dict[int, TensorSpec] = {}
        for leaf, axis in variant.dims:
            spec = made.get(leaf, self.leaves[leaf][1])
            shape = list(spec.shape)
            shape[axis] = 1 if variant.kind == "one" else shape[axis] * (number + 1 if variant.kind == "batch" else 2)
            made[leaf] = spec.resized(shape)
        numbers = iter(range(len(self.leaves)))

        def build(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: build(one) for key, one in value.items()}
            if isinstance(value, (list, tuple)):
                parts = [build(one) for one in value]
                return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
            number = next(numbers)
            spec = made.get(number, value)
            return spec.empty().requires_grad_(False) if isinstance(spec, TensorSpec) else _Given(value)

        return [build(value) for value in self.inputs]

    def opened(self, values: Sequence[Any]) -> list[Any]:
        """Traced inputs in the containers of the example inputs, so that Python sees those."""
        return [self._open(value, example) for value, example in zip(values, self.inputs, strict=True)]

    def _open(self, value: Any, example: Any) -> Any:
        if type(example) is dict:
            self._relied = True
            return {key: self._open(value[key], one) for key, one in example.items()}
        if type(example) in (list, tuple):
            self._relied = True
            return type(example)([self._open(value[number], one) for number, one in enumerate(example)])
        return None if example is None else value

    # Values

    def value(self, node: fx.Node) -> Any:
        """What ``node`` gives on the example inputs, with fake tensors in it.

        Raises:
            NotKnownError: It cannot be computed without the values of tensors.
        """
        self._compute(node.graph)
        found = self._computed.get(node, [_UNKNOWN])[0]
        if found is _UNKNOWN or isinstance(found, _Given):
            raise NotKnownError("its value is not known from the example inputs")
        return found

    def _compute(self, graph: fx.Graph) -> None:
        while self._order and is_erased(self._order[-1]):
            self._computed.pop(self._order.pop(), None)
        node = self._order[-1].next if self._order else next(iter(graph.nodes))
        while node.op != "root":
            if node.op != "output":
                self._computed[node] = self._run(node)
                self._order.append(node)
            node = node.next

    def _run(self, node: fx.Node) -> list[Any]:
        self.busy = True
        state = random_state()
        values: list[Any] = []
        try:
            for number in range(len(self.variants)):
                if values and values[0] is _UNKNOWN:
                    values.append(_UNKNOWN)
                    continue
                try:
                    with unwatched(), self.mode, quiet(), torch.no_grad():
                        values.append(self._one(node, number))
                except Exception:  # whatever an operator says of sizes that do not fit, or of missing values
                    values.append(_UNKNOWN)
            if has_drawn(state):
                values = [_UNKNOWN] * len(values)
        finally:
            set_random_state(state)
            self.busy = False
        self._note_clamps(node, values)
        return values

    def _one(self, node: fx.Node, number: int) -> Any:
        def of(source: fx.Node) -> Any:
            found = self._computed[source][number]
            if found is _UNKNOWN or isinstance(found, _Given):
                raise NotKnownError
            return found

        if node.op == "placeholder":
            return self._given[number][self._place(node)]
        if node.op == "get_attr":
            found = _at(self.fake, str(node.target))
            found = _at(self.root, str(node.target)) if found is _UNKNOWN else found
            if isinstance(found, Tensor) and not self.mode.is_our_fake(found):
                return self.mode.from_tensor(found, static_shapes=True)
            return found
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), of)
        if node.op == "call_module":
            return _at(self.fake, str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _place(self, node: fx.Node) -> int:
        return [one for one in node.graph.nodes if one.op == "placeholder"].index(node)

    def settle(self, graph: fx.Graph) -> None:
        """Makes sizes that are the same in every call constants, and erases numbers that no one reads.

        Nothing is done where nothing was relied upon, so that calls are not bound to the example without need.
        """
        if not self._relied:
            return
        self._compute(graph)
        for node in self._order:
            if self._is_number(node) and self._is_constant(node):
                self._rely(self._varies(node), False)
                for user in list(node.users):
                    _put(user, node, self._computed[node][0])
        for node in reversed(self._order):
            pure = node.op == "call_method" or node.target is getattr or _module(node.target) in ("_operator", "math")
            plain = isinstance(self._computed[node][0], (*_SCALARS, tuple, torch.dtype))
            if pure and plain and not node.users and self.is_answered(node):
                graph.erase_node(node)

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether a whole number is known to depend on no size of the inputs that may change."""
        value = self._computed[node]
        if type(value[0]) is not int or node.op not in ("call_method", "call_function") or not self.is_answered(node):
            return False
        others = [value[number] for number in self._varies(node) if self.variants[number].kind != "size"]
        return not others and all(value[number] is _UNKNOWN for number in self._varies(node))

    # Questions

    def is_answered(self, node: fx.Node) -> bool:
        """Whether a value that is no tensor follows from sizes and data types alone."""
        value = self._computed[node][0]
        if isinstance(value, Tensor):
            return True
        if node.op == "call_method" and node.target in (*_SIZE_METHODS, *_DTYPE_METHODS):
            return True
        if node.target in (torch.is_floating_point, torch.is_complex, torch.numel):
            return True
        if node.op == "call_function":
            if node.target is getattr and len(node.args) > 1 and node.args[1] in (*_SIZE_ATTRIBUTES, "dtype"):
                return True
            if isinstance(value, (*_SCALARS, torch.dtype)) or type(value) in (tuple, list):
                sources = node.all_input_nodes
                scalar = not any(isinstance(self._computed[source][0], Tensor) for source in sources)
                return scalar and all(self.is_answered(source) for source in sources)
        return False

    def _asks_dtype(self, node: fx.Node) -> bool:
        if isinstance(self._computed[node][0], torch.dtype) or node.target in _DTYPE_METHODS:
            return True
        if node.target in (torch.is_floating_point, torch.is_complex):
            return True
        sources = [source for source in node.all_input_nodes if not isinstance(self._computed[source][0], Tensor)]
        return any(self._asks_dtype(source) for source in sources)

    def _varies(self, node: fx.Node) -> frozenset[int]:
        """Variants under which a number is another, or those that it is made of."""
        if node not in self._varying:
            found = set(self._differing(node, lambda value: value))
            if not isinstance(self._computed[node][0], Tensor) and not self._is_comparison(node):
                for source in node.all_input_nodes:
                    # One of several sizes differs only where it differs itself.
                    if self._is_number(source) and not (node.target is operator.getitem and source is node.args[0]):
                        found |= self._varies(source)
            self._varying[node] = frozenset(found)
        return self._varying[node]

    def _is_comparison(self, node: fx.Node) -> bool:
        """Whether ``node`` compares sizes, and finds them equal, or unequal where neither depends on the batch."""
        if node.target not in (operator.eq, operator.ne) or len(node.args) != 2 or node.kwargs:
            return False
        known = [number for number, value in enumerate(self._computed[node]) if value is not _UNKNOWN]
        if bool(self._computed[node][0]) == (node.target is operator.eq):
            return all(self._is_size(side) for side in node.args)
        sides: list[list[Any]] = [
            [self._computed[a][number] if isinstance(a, fx.Node) else a for number in known] for a in node.args
        ]
        if not all(isinstance(value, tuple) for side in sides for value in side):
            return False
        if len({len(value) for side in sides for value in side}) != 1:
            return all(len(a) != len(b) for a, b in zip(*sides, strict=True))
        for axis in range(len(sides[0][0])):
            one, other = ([value[axis] for value in side] for side in sides)
            if len(set(one)) == len(set(other)) == 1 and one[0] != other[0]:
                return True
        return False

    def _is_size(self, side: Any) -> bool:
        """Whether a side of a comparison was not computed from sizes: what was may be equal by chance."""
        while isinstance(side, fx.Node) and side.target is operator.getitem and self._is_number(side):
            side = side.args[0]
        if not isinstance(side, fx.Node) or (side.op == "call_method" and side.target in _SIZE_METHODS):
            return True
        return side.target is getattr

    def number(self, node: fx.Node) -> Any:
        """A number or truth value that follows from sizes, and is the same for every batch.

        Raises:
            NotKnownError: It is not known, or depends on the batch.
        """
        value = self.value(node)
        if not isinstance(value, _SCALARS) or not self.is_answered(node):
            raise NotKnownError("its value is not known from the example inputs")
        varies = self._varies(node)
        if any(self.variants[number].kind == "one" for number in varies):
            raise NotKnownError("it depends on the size of the batch")
        self._rely(varies, False)
        self._relied_on_dtypes |= self._asks_dtype(node)
        return value

    def length(self, node: fx.Node) -> int:
        """Entries of a tuple, list or dict, or along the first axis of a tensor.

        Raises:
            NotKnownError: It is not known, or is the size of the batch.
        """
        value = self.value(node)
        if not isinstance(value, (Tensor, tuple, list, Mapping)) or (isinstance(value, Tensor) and not value.dim()):
            raise NotKnownError("it is no tuple of known length")
        varies = self._differing(node, len)
        for source in node.all_input_nodes:
            if self._is_number(source) and not isinstance(self._computed[source][0], torch.Size):
                varies |= self._varies(source)
        self._rely(varies, not isinstance(value, Tensor))
        return len(value)

    def dims(self, node: fx.Node) -> int | None:
        """Number of axes of a tensor; None for anything else."""
        value = self.value(node)
        if not isinstance(value, Tensor):
            return None
        self._rely(self._differing(node, Tensor.dim), False)
        return value.dim()

    def kind(self, node: fx.Node) -> Any:
        """The class of a tensor or container.

        Raises:
            NotKnownError: It is not known.
        """
        value = self.value(node)
        if isinstance(value, _SCALARS) and not isinstance(value, torch.Size):
            raise NotKnownError("it is a number")
        self._rely(self._differing(node, type), False)
        return Tensor if isinstance(value, Tensor) else type(value)

    def keys(self, node: fx.Node) -> list[Any] | None:
        """The keys of a dict; None for anything else."""
        value = self.value(node)
        if not isinstance(value, Mapping):
            return None
        self._rely(self._differing(node, list), False)
        return list(value)

    def _is_number(self, node: fx.Node) -> bool:
        return not isinstance(self._computed[node][0], Tensor) and isinstance(self._computed[node][0], _SCALARS)

    def _differing(self, node: fx.Node, what: Callable[[Any], Any]) -> frozenset[int]:
        """Variants under which ``what`` of a value is another, or is not known.

        A single example may be refused (by BatchNorm, in training): that says nothing.
        """
        own = self._computed[node]
        known = {number: what(value) for number, value in enumerate(own) if value is not _UNKNOWN}
        unknown = {number for number in range(len(own)) if number not in known and self.variants[number].kind != "one"}
        return frozenset(unknown | {number for number, one in known.items() if not _equal(one, known[0])})

    def _rely(self, varies: frozenset[int], batch_too: bool) -> None:
        """Notes what must stay as it is, for an answer that is another under the variants ``varies``."""
        sizes: set[tuple[int, int]] = set(self._always)
        ones: set[tuple[int, int]] = set()
        for number in {*varies, *self._clamped}:
            variant = self.variants[number]
            if variant.kind == "batch" and not batch_too:
                raise NotKnownError("it depends on the size of the batch")
            (ones if variant.kind == "one" else sizes).update(variant.dims)
        self._relied = True
        self._sizes |= sizes
        self._not_one |= ones

    def _note_clamps(self, node: fx.Node, values: list[Any]) -> None:
        """A slice that ends before its axis hides how long that is: the sizes that it depends on are guarded."""
        if node.target is not operator.getitem or not isinstance(values[0], Tensor):
            return
        key: Any = node.args[1]
        if not any(
            isinstance(one, slice) and one != slice(None) for one in (key if isinstance(key, tuple) else (key,))
        ):
            return
        source = self._computed.get(node.args[0])  # type: ignore[arg-type]
        if source is None or not isinstance(source[0], Tensor):
            return
        for number, variant in enumerate(self.variants):
            before, after = source[number], values[number]
            if before is _UNKNOWN or after is _UNKNOWN or variant.kind != "size":
                continue
            if before.shape != source[0].shape and after.shape == values[0].shape:
                self._clamped.add(number)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Torch logs each failure on fake tensors with a traceback; the message is raised as well.

    By a filter: another level would empty the caches of all loggers, at each operation that is computed.
    """

    def is_critical(record: logging.LogRecord) -> bool:  # one for each entry: a logger holds a filter once
        return record.levelno >= logging.CRITICAL

    logger = logging.getLogger(FAKE_TENSOR_LOGGER)
    logger.addFilter(is_critical)
    try:
        yield
    finally:
        logger.removeFilter(is_critical)


def without_user_hooks(fake: nn.Module) -> list[str]:
    """Removes hooks that are not torch's own (weight_norm's and alike are): they may keep what they are shown.

    Returns:
        Paths of the modules that lost a hook.
    """
    changed = []
    for path, module in fake.named_modules():
        for name in HOOKS:
            hooks = getattr(module, name)
            users = [key for key, hook in hooks.items() if not type(hook).__module__.startswith("torch.")]
            for key in users:
                del hooks[key]
            if users:
                changed.append(path or "the model")
    return changed


def _axes(leaf: Any) -> int:
    if isinstance(leaf, TensorSpec):
        return len(leaf.shape)
    return -2 if leaf is None else -1


def _module(target: Any) -> str:
    return str(getattr(target, "__module__", ""))


def _put(user: fx.Node, node: fx.Node, value: int) -> None:
    """Makes ``user`` read ``value`` in the place of ``node``."""
    user.args, user.kwargs = map_aggregate((user.args, user.kwargs), lambda one: value if one is node else one)


def _dtype(value: Tensor | None) -> torch.dtype | None:
    return None if value is None else value.dtype


class _Given:
    """A leaf of the inputs that is no tensor: another call may have another value there."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return type(one) is type(other) and one.shape == other.shape
    if type(one) is not type(other):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))
    try:
        return bool(one == other)
    except Exception:
        return False


def _at(root: Any, path: str) -> Any:
    value = root
    for part in path.split("."):
        value = getattr(value, part, _UNKNOWN)
    return value
