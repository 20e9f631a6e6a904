"""Activation checkpoints in a graph: flat while the passes work on it, functions of their own when it runs.

Dynamo writes a checkpoint as an operator that holds a graph. Its nodes are put into the graph around, each with a mark,
so that every pass sees one graph. Before the graph runs, the marked nodes become the body of a checkpoint again. The
selections are made outside of it and are its arguments; so the recomputation takes the same ones.
"""

from __future__ import annotations

import dataclasses
import heapq
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from fx_approx._compat import CHECKPOINT_CONTEXT
from fx_approx.ops.channel_slices import slice_weights

CHECKPOINT_KEY = "fx_approx_checkpoints"
"""Where a node says which checkpoints it stands in, the outermost first."""


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """One call of ``torch.utils.checkpoint.checkpoint`` in a graph.

    Attributes:
        options: How it is called, such as ``preserve_rng_state``.
    """

    options: Mapping[str, Any]

    def caller(self, number: int, function: Callable[..., Any]) -> Callable[..., Any]:
        """Calls ``function`` with a model and the inputs of the body, checkpointed.

        Only tensors are arguments of the checkpoint. What else there is, such as a selection, Dynamo takes as a
        variable of the function around only.
        """
        options = dict(self.options)

        def call(model: Any, *inputs: Any) -> Any:
            places = [place for place, value in enumerate(inputs) if isinstance(value, Tensor)]

            def body(*tensors: Tensor) -> Any:
                values = list(inputs)
                for place, tensor in zip(places, tensors, strict=True):
                    values[place] = tensor
                return function(model, model, *values)

            return checkpoint(body, *[inputs[place] for place in places], use_reentrant=False, **options)

        call.__name__ = call.__qualname__ = f"checkpointed_{number}"
        return call


def checkpoint_of(node: fx.Node, body: fx.GraphModule) -> Checkpoint:
    """The checkpoint that such a node with this body stands for."""
    options = {name: value for name, value in node.kwargs.items() if name in _OPTIONS}
    context = body.meta.get(CHECKPOINT_CONTEXT)  # of a selective checkpoint
    return Checkpoint(options if context is None else {**options, "context_fn": context})


_OPTIONS = ("preserve_rng_state", "determinism_check", "debug", "early_stop")


def is_checkpointed(graph: fx.Graph) -> bool:
    """Whether some node of the graph stands in a checkpoint."""
    return any(node.meta.get(CHECKPOINT_KEY) for node in graph.nodes)


def outlined(graph: fx.Graph, compiled: Callable[[fx.Graph], Callable[..., Any]]) -> fx.Graph:
    """The graph with its checkpoints as calls of functions; its first input is the model.

    Args:
        graph: With marked nodes; it is not changed.
        compiled: Makes a function of the graph of a body, called with the model as ``self`` and the graph's inputs.
    """
    made = fx.Graph()
    model = made.placeholder("model")
    env: dict[fx.Node, fx.Node] = {}
    nodes = list(graph.nodes)
    _Outliner(compiled).copy([node for node in nodes if node.op != "output"], 0, made, model, env)
    (output,) = graph.find_nodes(op="output")
    made.output(fx.map_arg(output.args[0], lambda node: env[node]))
    return made


_Item = fx.Node | Checkpoint


class _Outliner:
    def __init__(self, compiled: Callable[[fx.Graph], Callable[..., Any]]) -> None:
        self.compiled = compiled
        self.count = 0

    def copy(
        self, nodes: Sequence[fx.Node], depth: int, graph: fx.Graph, model: fx.Node, env: dict[fx.Node, fx.Node]
    ) -> None:
        """Copies ``nodes``, which all stand in the same checkpoints up to ``depth``, into ``graph``."""
        inside = _members(nodes, depth)
        bodies: dict[Checkpoint, list[fx.Node]] = {}
        for node in nodes:
            if node in inside:
                bodies.setdefault(inside[node], []).append(node)
        for item in _ordered(nodes, inside):
            if isinstance(item, fx.Node):
                env[item] = graph.node_copy(item, lambda node: env[node])
            else:
                self._call(item, bodies[item], depth, graph, model, env)

    def _call(
        self,
        one: Checkpoint,
        body: Sequence[fx.Node],
        depth: int,
        graph: fx.Graph,
        model: fx.Node,
        env: dict[fx.Node, fx.Node],
    ) -> None:
        here = set(body)
        inputs = list(dict.fromkeys(read for node in body for read in node.all_input_nodes if read not in here))
        outputs = [node for node in body if any(user not in here for user in node.users)]
        inner = fx.Graph()
        own = inner.placeholder("model")
        values = {read: inner.placeholder(read.name) for read in inputs}
        self.copy(body, depth + 1, inner, own, values)
        inner.output(tuple(values[node] for node in outputs))
        self.count += 1
        call = one.caller(self.count, self.compiled(inner))
        result = graph.call_function(call, (model, *(env[read] for read in inputs)))
        for place, node in enumerate(outputs):
            env[node] = graph.call_function(operator.getitem, (result, place))


def _mark(node: fx.Node, depth: int) -> Checkpoint | None:
    marks = node.meta.get(CHECKPOINT_KEY, ())
    return marks[depth] if len(marks) > depth else None


def _members(nodes: Sequence[fx.Node], depth: int) -> dict[fx.Node, Checkpoint]:
    """Which checkpoint each node belongs to: marked ones, what passes have put between them, and slices for them only.

    What was put between reads a value of the body and is read in it again. Slices of weights would otherwise be kept.
    """
    inside = {node: mark for node in nodes if (mark := _mark(node, depth)) is not None}
    for one in dict.fromkeys(inside.values()):
        behind, before = set[fx.Node](), set[fx.Node]()
        for node in nodes:
            if any(inside.get(read) is one or read in behind for read in node.all_input_nodes):
                behind.add(node)
        for node in reversed(nodes):
            if any(inside.get(user) is one or user in before for user in node.users):
                before.add(node)
        inside.update({node: one for node in nodes if node in behind and node in before and node not in inside})
    for node in reversed(nodes):
        users = {inside.get(user) for user in node.users}
        pulled = node.op == "get_attr" or node.target is slice_weights
        only = next(iter(users)) if len(users) == 1 else None
        if node not in inside and pulled and only is not None:
            inside[node] = only
    return inside


def _ordered(nodes: Sequence[fx.Node], inside: Mapping[fx.Node, Checkpoint]) -> list[_Item]:
    """The nodes outside and the checkpoints in an order that serves both, as near to the given one as can be."""
    places: dict[_Item, int] = {inside.get(node, node): place for place, node in enumerate(nodes)}  # its last node
    known = set(nodes)
    waits: dict[_Item, set[_Item]] = {item: set() for item in places}
    frees: dict[_Item, set[_Item]] = {item: set() for item in places}
    for node in nodes:
        item = inside.get(node, node)
        for read in node.all_input_nodes:
            source = inside.get(read, read)
            if read in known and source is not item:
                waits[item].add(source)
                frees[source].add(item)
    ready = [(places[item], item) for item, sources in waits.items() if not sources]
    heapq.heapify(ready)
    order: list[_Item] = []
    while ready:
        _, item = heapq.heappop(ready)
        order.append(item)
        for user in frees[item]:
            waits[user].discard(item)
            if not waits[user]:
                heapq.heappush(ready, (places[user], user))
    if len(order) < len(places):
        raise AssertionError("two checkpoints of a graph need each other's values")
    return order
