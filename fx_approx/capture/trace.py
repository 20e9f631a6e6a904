"""Capture: a model in, one graph for both modes out. The model that is given is not touched.

Tracing works on a copy of the module structure that shares the parameters and buffers (:func:`skeleton`). It is done
twice, in training and in evaluation, and the two graphs are compared: constants that differ become reads of the owning
module's ``training`` flag; where the structure differs, the owners are ``branching`` and the graph serves
training only.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from fx_approx._compat import HOOKS, buffers_of, parameters_of
from fx_approx.capture.error_text import describe
from fx_approx.capture.known_values import KnownValues
from fx_approx.capture.leaf_tracer import LeafTracer
from fx_approx.capture.module_snapshot import AttributeSnapshot
from fx_approx.capture.records import CallForm, Capture, Granted, Opaque, owner
from fx_approx.capture.side_effects import Reads, containers, random_state, recorded, set_random_state
from fx_approx.capture.traced_values import NeedsValues
from fx_approx.core.layer_types import FUSED_LAYERS
from fx_approx.errors import CaptureError

_ENTRY = "_fx_approx_entry"

# Tracing patches torch while it runs.
_one_at_a_time = threading.RLock()


def skeleton(model: nn.Module, shared: bool = True, without: object = None) -> nn.Module:
    """A copy of the module structure with the same parameter and buffer objects, and the user's own hooks.

    Args:
        model: The model.
        shared: False copies the tensors too, their gradients excepted: the copy may be run.
        without: What is not copied: the copy has None in its place.

    Raises:
        CaptureError: A module cannot be copied.
    """
    memo: dict[int, Any] = {id(without): None}
    inside = {id(module) for module in model.modules()}
    seen: set[int] = set()
    for module in model.modules():
        # Results of a forward that a list or dict keeps: only leaf tensors can be copied.
        for value in vars(module).values():
            for container in containers(value, seen):
                elements = container.values() if isinstance(container, dict) else container
                memo.update(_taken(elements, shared))
        for value in (*parameters_of(module).values(), *buffers_of(module).values(), *vars(module).values()):
            memo.update(_taken((value,), shared))
            if isinstance(value, torch.Tensor) and value.is_leaf and value.grad is not None:
                memo[id(value.grad)] = value.grad
        for name in HOOKS:
            for hook in getattr(module, name).values():
                # A bound method would be copied with the user's object; one of the model's own modules must be.
                if id(getattr(hook, "__self__", None)) not in inside:
                    memo[id(hook)] = hook
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(f"model: {type(model).__name__} cannot be copied: {describe(error)}") from error


def _taken(values: Iterable[Any], shared: bool) -> Iterator[tuple[int, torch.Tensor]]:
    """What a copy holds in place of tensors: the same, or a copy of the results, which are not copied by themselves."""
    for value in values:
        if isinstance(value, torch.Tensor) and (shared or not value.is_leaf):
            yield id(value), value if shared else value.detach().clone()


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Restores the random states of torch (all devices), Python and numpy."""
    state = random_state()
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        set_random_state(state)
        if gpu:
            torch.cuda.set_rng_state_all(gpu)


def capture(root: nn.Module, form: CallForm, called: tuple[Any, Any] | None = None, path: str = "") -> Capture:
    """Traces ``root`` (a :func:`skeleton`; its attributes and training flags are as before afterwards).

    Args:
        root: The model.
        form: How it is called, or the module at ``path``.
        called: Example inputs, see :func:`fx_approx.capture.size_guards.described`. Where tracing would stop or go
            wrong for want of a length or a size, the model is traced again with what they tell.
        path: Trace the forward of this module in ``root`` only; all names in the graph are still those of ``root``.
    """
    inputs = None if called is None else form.bind(*called)
    with _one_at_a_time, kept_random_state(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the model says of Proxies is of no use to anyone
        try:
            captured, failed = _capture(root, form, path, None, inputs is not None)
        except NeedsValues:
            captured, failed = None, True
        if inputs is not None and failed:
            captured, _ = _capture(root, form, path, _known_values(root, form, inputs), False)
    assert captured is not None
    return captured


def _known_values(root: nn.Module, form: CallForm, inputs: list[Any]) -> KnownValues | None:
    try:
        return KnownValues(root, form.dynamic, inputs)
    except Exception:  # whatever a user's __deepcopy__ says of fake tensors
        return None


def _capture(
    root: nn.Module, form: CallForm, path: str, known: KnownValues | None, may_ask: bool
) -> tuple[Capture, bool]:
    """The capture, and whether anything could not be traced for want of knowledge."""
    if isinstance(root, FUSED_LAYERS):
        return Capture(
            None, form, (Opaque("", "a layer of torch that is several products in one call"),), (), {}
        ), False
    reads = Reads()
    # A forward may store a Proxy in a module, and fx adds constants. Reads are recorded once for both traces: to watch
    # them changes nn.Module, which empties the caches of all its subclasses.
    with AttributeSnapshot(root.modules()).kept(), recorded(reads):
        try:
            tracer, graph, constants = _trace(root, form, path, reads, True, known, may_ask)
        except Exception as error:  # whatever a user's forward does with a Proxy
            return Capture(None, form, (Opaque("", describe(error), True),), (), {}), True
        failed = tracer.failed
        paths = {id(module): path for path, module in root.named_modules()}
        try:
            other, evaluation, others = _trace(root, form, path, reads, False, known, may_ask)
            failed |= other.failed
            readers = [paths[key] for key in reads.training if key in paths]
            branching = _merge(graph, evaluation, readers[0] if readers else None)
            if not _alike(constants, others):
                branching.add("")
        except Exception:  # the evaluation path alone cannot be traced: the model's own forward runs it
            failed = True
            readers, branching = [paths[key] for key in reads.training if key in paths], {""}
    frozen = tuple((paths[key], name, value) for (key, name), (_, _, value) in reads.plain.items() if key in paths)
    granted = Granted(
        tuple((paths[id(m)], name, fact) for m, name, fact in reads.facts.values() if id(m) in paths),
        tuple((paths[id(m)], a, paths[id(n)], b) for m, a, n, b in reads.tied.values() if {id(m), id(n)} <= set(paths)),
        tuple((paths[id(m)], name, held) for m, name, held in reads.members.values() if id(m) in paths),
    )
    opaque, branches = tuple(tracer.opaque.values()), tuple(sorted(branching))
    guard = None if known is None else known.guard
    return Capture(graph, form, opaque, branches, constants, tuple(readers), frozen, granted, guard), failed


def _alike(constants: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> bool:
    return constants.keys() == others.keys() and all(torch.equal(t, others[name]) for name, t in constants.items())


def _trace(
    root: nn.Module, form: CallForm, path: str, reads: Reads, training: bool, known: KnownValues | None, may_ask: bool
) -> tuple[LeafTracer, fx.Graph, dict[str, torch.Tensor]]:
    for module in root.modules():
        module.training = training
    before = set(vars(root))
    if known is not None:
        known.begin(training)
    tracer = LeafTracer(reads, known, may_ask)
    tracer.traced_func_name = _ENTRY
    with _entry(root, form, path, known):
        graph = tracer.trace(root)
    constants = {name: value for name, value in vars(root).items() if name not in before}
    for name in constants:
        delattr(root, name)  # the second trace is to use the same names
    used = {node.target for node in graph.nodes if node.op == "get_attr"}
    constants = {name: value for name, value in constants.items() if name in used}
    _copy_constants(graph, constants)
    return tracer, graph, constants


def _copy_constants(graph: fx.Graph, constants: Mapping[str, Any]) -> None:
    """Gives every forward its own copy of a tensor that the model makes anew in each: it may be changed in place."""
    copies: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr" or not isinstance(constants.get(str(node.target)), torch.Tensor):
            continue
        if node.target in copies:
            node.replace_all_uses_with(copies[node.target])
            graph.erase_node(node)
            continue
        with graph.inserting_after(node):
            made = copies[node.target] = graph.call_function(torch.clone, (node,))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)


@contextlib.contextmanager
def _entry(root: nn.Module, form: CallForm, path: str, known: KnownValues | None) -> Iterator[None]:
    """Gives root's class a method whose parameters are the graph's inputs and which calls ``forward``, or a module."""
    cls, module = type(root), root.get_submodule(path)

    def call(self: nn.Module, *values: Any) -> Any:
        opened = values if known is None else known.opened(values)
        arguments = {**form.constants, **dict(zip(form.dynamic, opened, strict=True))}
        positional = [arguments[name] for name in form.names if name not in form.by_name]
        named = {name: arguments[name] for name in form.by_name if name in arguments}
        return module(*positional, **named) if path else cls.forward(self, *positional, **named)

    # fx reads the names of the inputs from the code object, so the function must really have them.
    listed = ", ".join(form.dynamic)
    namespace: dict[str, Any] = {"call": call}
    exec(f"def entry(self, {listed}):\n    return call(self, {listed})", namespace)
    setattr(cls, _ENTRY, namespace["entry"])
    try:
        yield
    finally:
        delattr(cls, _ENTRY)


def select_by_mode(training: bool, in_training: Any, in_evaluation: Any) -> Any:
    """A constant that the model's Python chose by its ``training`` flag."""
    return in_training if training else in_evaluation


@fx.has_side_effect
def add_in_training_(buffer: torch.Tensor, number: float, training: bool) -> None:
    """What the model's Python adds to a buffer in training only, such as a count of batches; by its name, in place."""
    if training:
        buffer.add_(number)


def _merge(graph: fx.Graph, evaluation: fx.Graph, reader: str | None) -> set[str]:
    """Makes ``graph`` serve both modes where it can; returns the owners of what it cannot.

    The flag that decides is that of ``reader``: the graph runs only where all whose flags are read agree.
    Nodes are matched by owner, target and occurrence, so that an extra node in one graph does not shift the others.
    """
    twins = _matched(graph, evaluation)
    paired = set(twins.values())
    branching = {owner(node) for node in evaluation.nodes if node not in paired}
    flag = _Flag(graph, reader)
    for node in list(graph.nodes):
        twin = twins.get(node)
        if twin is None:
            if node.op == "get_attr" and node.users and all(map(_counts, node.users)):
                continue  # what is counted in
            if not _counts(node) or reader is None:
                branching.add(owner(node))
            continue
        merge = _Merge(graph, node, twins, flag)
        arguments = merge.value(node.args, twin.args), merge.value(dict(node.kwargs), dict(twin.kwargs))
        if merge.differs:
            branching.add(owner(node))
        else:
            node.args, node.kwargs = arguments
    if not branching:
        for node in [node for node in graph.nodes if node not in twins and _counts(node)]:
            node.op, node.target, node.args = "call_function", add_in_training_, (*node.args, flag.node())
    return branching


def _counts(node: fx.Node) -> bool:
    """Whether a node adds a number to a tensor of the model, and nothing else."""
    if node.op != "call_method" or node.target != "add_" or node.users or node.kwargs or len(node.args) != 2:
        return False
    buffer, number = node.args
    return isinstance(buffer, fx.Node) and buffer.op == "get_attr" and isinstance(number, (int, float))


def _matched(graph: fx.Graph, evaluation: fx.Graph) -> dict[fx.Node, fx.Node]:
    def keyed(nodes: Any) -> dict[tuple[Any, ...], fx.Node]:
        seen: dict[tuple[Any, ...], int] = {}
        keys = {}
        for node in nodes:
            key = (owner(node), node.op, node.target)
            seen[key] = seen.get(key, 0) + 1
            keys[(*key, seen[key])] = node
        return keys

    others = keyed(evaluation.nodes)
    return {node: others[key] for key, node in keyed(graph.nodes).items() if key in others}


class _Merge:
    """One node's arguments in both modes, made one where only constants differ."""

    def __init__(self, graph: fx.Graph, node: fx.Node, twins: Mapping[fx.Node, fx.Node], flag: _Flag) -> None:
        self.graph, self.node, self.twins, self.flag = graph, node, twins, flag
        self.differs = False

    def value(self, ours: Any, theirs: Any) -> Any:
        if isinstance(ours, fx.Node) or isinstance(theirs, fx.Node):
            self.differs |= not isinstance(ours, fx.Node) or self.twins.get(ours) is not theirs
            return ours
        if isinstance(ours, (list, tuple)) and type(ours) is type(theirs) and len(ours) == len(theirs):
            parts = [self.value(a, b) for a, b in zip(ours, theirs, strict=True)]
            return type(ours)(*parts) if hasattr(ours, "_fields") else type(ours)(parts)
        if isinstance(ours, dict) and isinstance(theirs, dict) and list(ours) == list(theirs):
            return {key: self.value(ours[key], theirs[key]) for key in ours}
        if isinstance(ours, slice) and isinstance(theirs, slice):
            return slice(*(self.value(getattr(ours, f), getattr(theirs, f)) for f in ("start", "stop", "step")))
        if _holds_node(ours) or _holds_node(theirs):  # containers of another form
            self.differs = True
            return ours
        if ours is theirs or (type(ours) is type(theirs) and ours == theirs):
            return ours
        flag = self.flag.node()
        if flag is None:
            self.differs = True
            return ours
        if (ours, theirs) == (True, False):
            return flag
        with self.graph.inserting_before(self.node):
            return self.graph.call_function(select_by_mode, (flag, ours, theirs))


def _holds_node(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return bool(found)


class _Flag:
    """The node that reads the ``training`` flag of the module at ``path``; None if no flag is read."""

    def __init__(self, graph: fx.Graph, path: str | None) -> None:
        self.graph, self.path = graph, path
        self._node: fx.Node | None = None

    def node(self) -> fx.Node | None:
        if self._node is None and self.path is not None:
            first = next(node for node in self.graph.nodes if node.op != "placeholder")
            with self.graph.inserting_before(first):
                self._node = self.graph.create_node("get_attr", f"{self.path}.training" if self.path else "training")
        return self._node
