"""Rewrite: puts selectors and sampled products where the plan says, on the same parameters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from fx_approx.capture import owner
from fx_approx.modules import SampledLayer, Selector, swap
from fx_approx.passes.annotate import Found, attribute
from fx_approx.runtime import Runtime
from fx_approx.sampling import SamplerSpec

PROLOGUE = "_fx_approx"


def rewrite(root: nn.Module, runtime: Runtime, found: list[Found]) -> None:
    """Applies ``runtime.plan`` to ``root`` in place and gives the runtime the graph that runs.

    A layer becomes its sampled subclass, at its path, with its parameters; a functional call becomes a call of our op.
    Selections are values of the graph: a selector makes one, the sampled product takes it. Selectors whose scores do
    not read the activation stand at the beginning, behind the prologue that hands out the step.
    """
    chosen = {one.candidate.name: one for one in found if runtime.plan[one.candidate.name].roles}
    sites = {one.candidate.name: site for site, one in enumerate(found)}
    for name, one in chosen.items():
        spec = runtime.plan[name].spec
        assert spec is not None
        _prepare(root, runtime, one, spec, sites[name])
    runtime.lay_out()
    for path, value in runtime.capture.constants.items():
        runtime.register_buffer(f"c{path}", value, persistent=False)
    _watch(root, runtime)
    runtime.sampling_swapped = any(not one.candidate.node for one in chosen.values())
    if runtime.capture.graph is not None:
        runtime.compile_graph(_graph(root, runtime, runtime.capture.graph, chosen))


def _watch(root: nn.Module, runtime: Runtime) -> None:
    """Tells the runtime what the graph depends on: flags, attributes, and the children of what was traced through."""
    captured = runtime.capture
    readers = captured.readers or (("",) if captured.branching else ())
    runtime.readers = tuple(root.get_submodule(path) for path in readers)
    runtime.frozen = tuple((root.get_submodule(path), name, value) for path, name, value in captured.frozen)
    through = {""}
    for node in captured.graph.nodes if captured.graph is not None else ():
        path = owner(node)
        while path and path not in through:
            through.add(path)
            path = path.rpartition(".")[0]
    traced = [root.get_submodule(path) for path in sorted(through)]
    inside = {id(module) for module in traced}
    runtime.structure = tuple((module, _children(module, inside)) for module in traced)


def _children(module: nn.Module, inside: set[int]) -> tuple[tuple[str, nn.Module | None], ...]:
    """Names of the children, with those that the graph cannot do without: sampled, or traced through themselves.

    Any other layer may be replaced, such as a classifier that stays exact.
    """
    return tuple(
        (name, child if isinstance(child, SampledLayer) or id(child) in inside else None)
        for name, child in module._modules.items()
    )


def _prepare(root: nn.Module, runtime: Runtime, one: Found, spec: SamplerSpec, site: int) -> None:
    assert one.op is not None
    owner = root.get_submodule(one.owner)
    candidate = one.candidate
    selector = Selector(one.op.kind, one.static, spec, site, candidate.pairs, owner, candidate.groups)
    runtime.add(candidate.name, selector)
    if one.module is not None:
        swap(owner, (selector, runtime))


def _graph(root: nn.Module, runtime: Runtime, captured: fx.Graph, chosen: Mapping[str, Found]) -> fx.Graph:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(captured, copies)
    graph.output(output)
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in runtime.capture.constants:
            node.target = f"{PROLOGUE}.c{node.target}"
    if not chosen:
        return graph
    inputs = tuple(node for node in graph.nodes if node.op == "placeholder")
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        key = graph.call_module(PROLOGUE, inputs)
    by_name = {node.name: copies[node] for node in captured.nodes if node in copies}
    for name, one in chosen.items():
        if one.candidate.node:
            _sample(root, graph, runtime.selectors[name], one, by_name[one.candidate.node], key)
    _keep_exact(chosen, by_name)
    return graph


def _keep_exact(chosen: Mapping[str, Found], by_name: Mapping[str, fx.Node]) -> None:
    """Other calls of a sampled layer say that they are exact: left alone, the layer would take its own sample."""
    sampled = {one.candidate.node for one in chosen.values()}
    layers = {one.module for one in chosen.values() if one.module is not None}
    for name, node in by_name.items():
        if node.op == "call_module" and node.target in layers and name not in sampled:
            node.args, node.kwargs = (node.args[0] if node.args else next(iter(node.kwargs.values())), None), {}


def _sample(root: nn.Module, graph: fx.Graph, selector: Selector, one: Found, node: fx.Node, key: fx.Node) -> None:
    """Makes ``node`` a sampled product of the selection that a new selector node hands it."""
    assert one.op is not None
    target = f"{PROLOGUE}.s{selector.site}"
    ahead = selector.score.ahead
    if one.module is not None:
        lhs = node.args[0] if node.args else next(iter(node.kwargs.values()))
        with graph.inserting_after(key) if ahead else graph.inserting_before(node):
            weight = graph.create_node("get_attr", f"{one.module}.weight")
        with graph.inserting_after(weight):
            selection = graph.call_module(target, (None if ahead else lhs, weight, key))
        node.args, node.kwargs = (lhs, selection), {}
        return
    bound = one.op.bind(node.args, dict(node.kwargs))
    lhs, rhs = bound[one.op.lhs], bound[one.op.rhs]
    early = ahead and attribute(root, rhs) is not None
    if early:
        with graph.inserting_after(key):
            rhs = graph.create_node("get_attr", rhs.target)
    with graph.inserting_after(rhs) if early else graph.inserting_before(node):
        selection = graph.call_module(target, (None if ahead else lhs, rhs, key))
    with graph.inserting_before(node):
        sampled = graph.call_function(one.op.function, node.args, {**node.kwargs, "selection": selection})
    sampled.meta = dict(node.meta)
    node.replace_all_uses_with(sampled)
    graph.erase_node(node)
