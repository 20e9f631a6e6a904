"""Rewrite: puts selectors and sampled products where the plan says, on the same parameters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx, nn

from fx_approx.candidate import Role
from fx_approx.capture import owner
from fx_approx.modules import SampledLayer, Selector, Site, swap
from fx_approx.ops import SAMPLING_ARGUMENTS
from fx_approx.passes.annotate import Found, attribute
from fx_approx.runtime import PROLOGUE, Runtime, selector_target


def rewrite(root: nn.Module, runtime: Runtime, found: list[Found]) -> None:
    """Applies ``runtime.plan`` to ``root`` in place and gives the runtime the graph that runs.

    A layer becomes its sampled subclass, at its path, with its parameters; a functional call becomes a call of our op.
    Selections are values of the graph: a selector makes one, the sampled product takes it. Selectors whose scores do
    not read the activation stand at the beginning, behind the prologue that hands out the step.
    """
    chosen = {one.candidate.name: one for one in found if runtime.plan[one.candidate.name].roles}
    places = {one.candidate.name: place for place, one in enumerate(found)}
    for name, one in chosen.items():
        _prepare(root, runtime, one, places[name], len(found))
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


def _prepare(root: nn.Module, runtime: Runtime, one: Found, place: int, places: int) -> None:
    """Makes the selectors of a candidate, one for each role; all of a model have numbers of their own."""
    assert one.op is not None
    owner = root.get_submodule(one.owner)
    candidate = one.candidate
    decision = runtime.plan[candidate.name]
    selectors = {}
    for number, role in enumerate(Role):
        spec = decision.roles.get(role)
        if spec is None:
            continue
        pairs, groups = candidate.pairs, candidate.groups
        if role is not Role.OUTPUT:
            weight = owner.weight if one.module is not None else None
            known = role is Role.GRAD_INPUT and isinstance(weight, Tensor)
            pairs = weight.shape[0] // groups if known and isinstance(weight, Tensor) else None
        site = place + number * places
        selectors[role] = Selector(one.op.kind, one.static, spec, site, pairs, owner, groups, role)
        runtime.add(candidate.name, selectors[role])
    if one.module is not None:
        swap(owner, Site(selectors, decision.straight_through, runtime))


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
    for one in chosen.values():
        if one.candidate.node:
            _sample(root, graph, runtime, one, by_name[one.candidate.node], key)
    _keep_exact(chosen, by_name)
    return graph


def _keep_exact(chosen: Mapping[str, Found], by_name: Mapping[str, fx.Node]) -> None:
    """Other calls of a sampled layer say that they are exact: left alone, the layer would take its own sample."""
    sampled = {one.candidate.node for one in chosen.values()}
    layers = {one.module for one in chosen.values() if one.module is not None}
    for name, node in by_name.items():
        if node.op == "call_module" and node.target in layers and name not in sampled:
            node.args, node.kwargs = (node.args[0] if node.args else next(iter(node.kwargs.values())), None), {}


def _sample(root: nn.Module, graph: fx.Graph, runtime: Runtime, one: Found, node: fx.Node, key: fx.Node) -> None:
    """Makes ``node`` a product of the selections that new selector nodes hand it."""
    assert one.op is not None
    bound = one.op.bind(node.args, dict(node.kwargs)) if one.module is None else {}
    lhs = bound[one.op.lhs] if bound else node.args[0] if node.args else next(iter(node.kwargs.values()))
    rhs = bound.get(one.op.rhs)
    choices: dict[Role, fx.Node | None] = dict.fromkeys(Role)
    for role in Role:
        selector = runtime.selectors.get((one.candidate.name, role))
        if selector is None:
            continue
        early = selector.ahead and (rhs is None or attribute(root, rhs) is not None)
        weight = rhs
        if rhs is None or early:
            with graph.inserting_after(key) if early else graph.inserting_before(node):
                weight = graph.create_node("get_attr", f"{one.module}.weight" if rhs is None else rhs.target)
        with graph.inserting_after(weight) if early else graph.inserting_before(node):
            choices[role] = graph.call_module(selector_target(selector), (None if selector.ahead else lhs, weight, key))
    straight_through = runtime.plan[one.candidate.name].straight_through
    if one.module is not None:
        node.args, node.kwargs = (lhs, *choices.values(), straight_through), {}
        return
    how = dict(zip(SAMPLING_ARGUMENTS, (*choices.values(), straight_through), strict=True))
    with graph.inserting_before(node):
        sampled = graph.call_function(one.op.function, node.args, {**node.kwargs, **how})
    sampled.meta = dict(node.meta)
    node.replace_all_uses_with(sampled)
    graph.erase_node(node)
