"""Puts a subnetwork together: the model's own Python where it computes what the graphs do, the graphs elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from fx_approx._compat import children_of
from fx_approx.capture.trace import skeleton
from fx_approx.subnetworks.comparing import differs, recorded
from fx_approx.subnetworks.graph_form import Serves, SubnetworkGraph, graph_module
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
    own = None if example is None else _own(root, parts, narrowing)
    graphs = {part.path: _graph(root, part) for part in parts if part.path}
    for path, module in graphs.items():
        _put(root, path, module)
    graphs |= {part.path: _graph(root, part) for part in parts if not part.path}
    whole = graphs.get("", root)
    if own is None:
        return whole, _NO_EXAMPLE
    given = (example,) if isinstance(example, Tensor) else example
    call = ((), dict(given)) if isinstance(given, Mapping) else (tuple(given), {})
    reasons = []
    for path, calls in recorded(whole, {path: one for path, one in graphs.items() if path}, call).items():
        why = differs(own.get_submodule(path), graphs[path], calls)
        if why:
            _put(own, path, graphs[path])
            reasons.append(f"{path}: {why}")
        else:
            _put(root, path, own.get_submodule(path))
    if "" in graphs:
        why = differs(own, whole, [call])
        if why:
            return whole, "; ".join([why, *reasons])
    return own, "; ".join(reasons)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    holder, _, name = path.rpartition(".")
    children_of(model.get_submodule(holder))[name] = module


def _own(root: nn.Module, parts: list[Part], narrowing: Narrowing) -> nn.Module:
    """A copy, on the same tensors, in which layers read parts of wide values themselves."""
    own, values = skeleton(root), WideValues(narrowing)
    for part in parts:
        values.follow(part.made)
    values.install(own)
    return own


def _graph(root: nn.Module, part: Part) -> SubnetworkGraph:
    owner = root.get_submodule(part.path)
    name = f"{type(owner).__name__}Subnetwork"
    return graph_module(owner, _below(root, part), name, part.made.tensors, part.serves)


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
