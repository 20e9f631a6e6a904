"""Stretches of a rewritten graph that run inside the hooks of ``fully_shard``.

The graph of a transformed model calls layers, not the blocks around them, and reads weights outside of layers: to slice
them, and to score them. The hooks of ``fully_shard`` sit on the blocks. So the stretch of the graph that a block's
parameters are used in becomes one node, and that node runs as a forward method of the block: its parameters are
gathered before it, freed behind it, and its gradients are reduced, as for the block's own forward.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.distributed.fsdp import register_fsdp_forward_method

from fx_approx._compat import tree_leaves
from fx_approx.distributed.norms import ScoreAgreement, ShardNorms
from fx_approx.ops.channel_slices import slice_weights
from fx_approx.runtime.graph_program import PROLOGUE
from fx_approx.runtime.graph_runtime import Runtime
from fx_approx.runtime.sharding import is_sharded

_METHOD = "_fx_approx_segment"
_RESAMPLE, _NORMS = f"{PROLOGUE}.resample", f"{PROLOGUE}.norms"
STAGE = "shards"
"""Name of the graph that this makes, among the stages of the runtime."""


class Segment(nn.Module):
    """One stretch of the graph, run inside the hooks of the module whose parameters it uses.

    Attributes:
        path: Of that module.
    """

    def __init__(self, path: str, block: nn.Module, root: nn.Module, function: Any) -> None:
        """``function(root, *values)`` runs the stretch."""
        super().__init__()
        self.path, self.function = path, function
        self.modules_of = (block, root)
        if _METHOD not in vars(block):
            block.__dict__[_METHOD] = _run
            register_fsdp_forward_method(block, _METHOD)

    def forward(self, *values: Any) -> Any:
        """What of ``values`` gradients flow to is given to the hooks as arguments; selections are none of theirs."""
        block, root = self.modules_of
        seen = [value if _flows(value) else None for value in values]
        aside = _Aside([None if _flows(value) else value for value in values])
        return getattr(block, _METHOD)(self.function, root, aside, *seen)


class _Aside:
    """Values that mixed precision is not to cast; torch looks into lists and tuples, but not into this."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values


def _run(function: Any, root: nn.Module, aside: _Aside, *seen: Any) -> Any:
    pairs = zip(aside.values, seen, strict=True)
    return function(root, *[other if value is None else value for other, value in pairs])


def _flows(value: Any) -> bool:
    leaves = tree_leaves(value)
    return isinstance(value, Tensor) or any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)


def divide(root: nn.Module, runtime: Runtime, graph: fx.Graph, group: Any) -> fx.Graph:
    """A copy of ``graph`` that runs under ``fully_shard``.

    Args:
        root: The transformed model.
        runtime: Of it; gets the new nodes' modules.
        graph: As the passes made it.
        group: Over which running norms are averaged.

    Raises:
        ValueError: Two sharded modules take turns, so that neither's part of the graph is one stretch.
    """
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    blocks = {path: module for path, module in root.named_modules() if path and is_sharded(module)}
    _read_late(new)
    if runtime.resample is not None:
        _score_shards(new, runtime)
        if runtime.resample.learns:
            runtime.add_module("agreement", ScoreAgreement(root, group))  # type: ignore[arg-type]
            with new.inserting_before(next(node for node in new.nodes if node.op == "output")):
                new.call_module(f"{PROLOGUE}.agreement")
    stretches = _stretches(root, new, blocks)
    for place, path in enumerate(sorted(stretches, key=lambda path: (len(stretches[path]), -path.count(".")))):
        nodes = stretches.pop(path)
        target = f"segment{place}"
        part, made = _outline(new, nodes, f"{PROLOGUE}.{target}", path)
        runtime.add_module(target, Segment(path, blocks[path], root, runtime.program.compiled(part)))
        for other, around in stretches.items():
            if nodes[0] in around:
                start = around.index(nodes[0])
                stretches[other] = [*around[:start], *made, *around[start + len(nodes) :]]
    return new


def _outline(graph: fx.Graph, nodes: Sequence[fx.Node], target: str, path: str) -> tuple[fx.Graph, list[fx.Node]]:
    """Makes consecutive nodes a graph of their own, and in their place one call of it, with what it gives."""
    inside = set(nodes)
    inputs = list(dict.fromkeys(one for node in nodes for one in node.all_input_nodes if one not in inside))
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    part = fx.Graph()
    copies = {one: part.placeholder(one.name) for one in inputs}
    for node in nodes:
        copies[node] = part.node_copy(node, copies.__getitem__)
        if node.op == "call_module" and node.target == path:  # by its hooks, which run already, it would be freed here
            with part.inserting_before(copies[node]):
                module = part.create_node("get_attr", path)
                call = part.call_method("forward", (module, *copies[node].args), dict(copies[node].kwargs))
            part.erase_node(copies[node])
            copies[node] = call
    part.output(tuple(copies[node] for node in outputs))
    with graph.inserting_before(nodes[0]):
        whole = graph.call_module(target, tuple(inputs))
        made = [graph.call_function(operator.getitem, (whole, place)) for place in range(len(outputs))]
    for node, item in zip(outputs, made, strict=True):
        node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in inside)
    for node in reversed(nodes):
        graph.erase_node(node)
    return part, [whole, *made]


def _read_late(graph: fx.Graph) -> None:
    """Reads each parameter right before each use, and slices weights right before the first: gathered by then."""
    for node in list(graph.nodes):
        if node.op == "get_attr":
            for user in list(node.users):
                with graph.inserting_before(user):
                    user.replace_input_with(node, graph.node_copy(node, lambda one: one))
            graph.erase_node(node)
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is slice_weights and node.users:
            first = min(node.users, key=order.__getitem__)
            reads = [one for one in node.all_input_nodes if one.op == "get_attr"]
            for moved in (*reads, node):
                first.prepend(moved)


def _score_shards(graph: fx.Graph, runtime: Runtime) -> None:
    """Puts norms in the place of the weights that selections are made from."""
    assert runtime.resample is not None
    node = next((node for node in graph.nodes if node.op == "call_module" and node.target == _RESAMPLE), None)
    if node is None:
        return
    runtime.add_module("norms", ShardNorms(runtime.resample))
    key, *weights = node.args
    with graph.inserting_before(node):
        norms = graph.call_module(_NORMS, tuple(weights))
        node.args = (key, *[graph.call_function(operator.getitem, (norms, place)) for place in range(len(weights))])


def _stretches(root: nn.Module, graph: fx.Graph, blocks: Mapping[str, nn.Module]) -> dict[str, list[fx.Node]]:
    """The nodes of each sharded module that the graph does not call as a whole, from the first to the last."""
    owner: dict[Tensor, str] = {}
    for path in sorted(blocks, key=lambda path: -path.count(".")):
        for parameter in blocks[path].parameters():
            owner.setdefault(parameter, path)
    nodes = list(graph.nodes)
    touched: dict[str, list[int]] = {path: [] for path in blocks}
    for place, uses in enumerate(_uses(root, nodes, owner)):
        for path in uses:
            touched[path].append(place)
    found = {}
    for path, places in touched.items():
        calls = [nodes[place].op == "call_module" and _within(path, str(nodes[place].target)) for place in places]
        given = any(len(nodes[place].args) > 1 for place in places if nodes[place].target == path)
        if all(calls) and not given:
            continue  # its own call runs its hooks
        if any(call and nodes[place].target != path for call, place in zip(calls, places, strict=True)):
            raise ValueError(
                f"model: the graph uses parameters of {path} inside and outside of a part that could not be traced; "
                "call fully_shard on the module around both, or on the root only"
            )
        inside = [place for place, node in enumerate(nodes) if path in _stack(node)]
        first, last = min(places + inside), max(places + inside)
        own = set(nodes[first : last + 1])
        while nodes[last + 1].target is operator.getitem and nodes[last + 1].args[0] in own:
            last += 1
            own.add(nodes[last])
        found[path] = first, last
    for one, (first, last) in found.items():
        for other, (start, end) in found.items():
            if first < start <= last < end:
                raise ValueError(
                    f"model: {one} and {other} take turns in the graph, so that neither can be gathered for its part "
                    "alone; call fully_shard on the module around them, or on the root only"
                )
    return {path: nodes[first : last + 1] for path, (first, last) in found.items()}


def _within(path: str, whole: str) -> bool:
    return f"{path}.".startswith(f"{whole}.")


def _uses(root: nn.Module, nodes: Sequence[fx.Node], owner: Mapping[Tensor, str]) -> list[set[str]]:
    """The sharded modules whose parameters each node uses, itself or what is made of them alone.

    Those that the head of the graph scores are used as shards, and do not count.
    """
    derived: dict[fx.Node, set[str]] = {}
    result = []
    for node in nodes:
        target, inputs = str(node.target), node.all_input_nodes
        uses = set().union(*(derived.get(one, set()) for one in inputs))
        if node.op == "get_attr" and not any(user.target == _NORMS for user in node.users):
            value: Any = root
            for name in target.split("."):
                value = getattr(value, name)
            uses = derived[node] = {owner[value]} if isinstance(value, Tensor) and value in owner else set()
        elif node.op == "call_module" and target.partition(".")[0] != PROLOGUE:
            uses |= {owner[one] for one in root.get_submodule(target).parameters() if one in owner}
        elif node.target is slice_weights or (inputs and all(derived.get(one) for one in inputs)):
            derived[node] = uses
        result.append(uses)
    return result


def _stack(node: fx.Node) -> set[str]:
    """Paths of the modules whose forwards made a node."""
    return {path for path, _ in (node.meta.get("nn_module_stack") or {}).values()}
