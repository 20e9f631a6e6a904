"""Puts a subnetwork together: the model's own Python where it computes what the graphs do, the graphs elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from fx_approx._compat import children_of
from fx_approx.capture.trace import skeleton
from fx_approx.subnetworks.comparing import Call, differs, recorded
from fx_approx.subnetworks.graph_form import Serves, graph_module, run_by_graph
from fx_approx.subnetworks.narrowing import Narrowing
from fx_approx.subnetworks.specialize import Specialised
from fx_approx.subnetworks.wide_values import WideValues

_NO_EXAMPLE = "no example_inputs were given, to see whether the model's own Python serves"


@dataclasses.dataclass(frozen=True)
class Part:
    """The model, or a section of it.

    Attributes:
        path: Of the module; "" for the model.
        made: Its graph.
        serves: Which calls the graph serves.
    """

    path: str
    made: Specialised
    serves: Serves


def assembled(root: nn.Module, parts: list[Part], narrowing: Narrowing, example: Any) -> tuple[nn.Module, str]:
    """The subnetwork, and why it, or a part of it, is no Python of the model's own.

    Args:
        root: The copy of the model with narrow layers.
        parts: What has graphs.
        narrowing: How its layers were narrowed.
        example: Inputs of the model, or None.
    """
    trials = [] if example is None else [_own(root, parts, narrowing, widens) for widens in (False, True)]
    graphs = {part.path: _graph(root, part) for part in sorted(parts, key=lambda one: not one.path)}
    whole = graphs.get("", root)
    if not trials:
        return whole, _NO_EXAMPLE
    given = (example,) if isinstance(example, Tensor) else example
    call = ((), dict(given)) if isinstance(given, Mapping) else (tuple(given), {})
    reasons = []
    for path, calls in recorded(whole, {path: one for path, one in graphs.items() if path}, call).items():
        module, why = _serving([trial.get_submodule(path) for trial in trials], graphs[path], calls)
        for model in (root, *trials):
            _put(model, path, module)
        if why:
            reasons.append(f"{path}: {why}")
    if "" not in graphs:
        return root, "; ".join(reasons)
    module, why = _serving(trials, whole, [call])
    return module, "; ".join([*([why] if why else []), *reasons])


def _serving(trials: list[nn.Module], graph: nn.Module, calls: list[Call]) -> tuple[nn.Module, str]:
    """The first of ``trials`` that computes what ``graph`` does; else that, and why the first did not."""
    reasons = []
    for own in trials:
        reasons.append(differs(own, graph, calls))
        if not reasons[-1]:
            return own, ""
    return graph, reasons[0]


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    holder, _, name = path.rpartition(".")
    children_of(model.get_submodule(holder))[name] = module


def _own(root: nn.Module, parts: list[Part], narrowing: Narrowing, widens: bool) -> nn.Module:
    """A copy, on the same tensors, in which layers read parts of wide values themselves."""
    own, values = skeleton(root), WideValues(narrowing, widens)
    for part in parts:
        values.follow(part.made)
    values.install(own)
    return own


def _graph(root: nn.Module, part: Part) -> nn.Module:
    """A module that runs the graph: of a section one of its own class, whose methods others may call."""
    if not part.path:
        return graph_module(root, part.made.graph, f"{type(root).__name__}Subnetwork", part.made.tensors, part.serves)
    run_by_graph(root.get_submodule(part.path), _below(root, part), part.made.tensors, part.serves)
    return root.get_submodule(part.path)


def _below(root: nn.Module, part: Part) -> fx.Graph:
    """The graph of a section, whose targets are paths in its own module."""
    graph, above = part.made.graph, f"{part.path}."
    if not part.path:
        return graph
    own = {id(module): path for path, module in root.get_submodule(part.path).named_modules(remove_duplicate=False)}
    for node in graph.nodes:
        target = str(node.target)
        if node.op not in ("call_module", "get_attr") or target in part.made.tensors:
            continue
        if target.startswith(above):
            node.target = target.removeprefix(above)
            continue
        holder, _, name = (target, "", "") if node.op == "call_module" else target.rpartition(".")
        inside = own[id(root.get_submodule(holder))]
        node.target = ".".join(one for one in (inside, name) if one)
    return graph
