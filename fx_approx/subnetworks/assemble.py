"""Puts a subnetwork together: the model's own Python where it computes what the graphs do, the graphs elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fx_approx._compat import children_of
from fx_approx.capture.trace import skeleton
from fx_approx.errors import UnsupportedError
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.exact import exact_copy
from fx_approx.subnetworks.comparing import Call, differs, recorded
from fx_approx.subnetworks.graph_form import Serves, graph_module, run_by_graph
from fx_approx.subnetworks.narrowing import Narrowing
from fx_approx.subnetworks.record import tensors_of
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


@dataclasses.dataclass(frozen=True)
class _Trial:
    """A narrow model of the user's own class, and why a part of it cannot be that."""

    model: nn.Module
    problems: Mapping[str, str]


def assembled(
    approx: ApproxModule, root: nn.Module, parts: list[Part], narrowing: Narrowing, example: Any
) -> tuple[nn.Module, str]:
    """The subnetwork, and why it, or a part of it, is no Python of the model's own.

    Args:
        approx: The transformed model.
        root: The copy of the model with narrow layers.
        parts: What has graphs.
        narrowing: How its layers were narrowed.
        example: Inputs of the model, or None.

    Raises:
        UnsupportedError: Neither a graph nor the model's own Python serves ``example``.
    """
    trials = [] if example is None else _trials(root, parts, narrowing)
    graphs = {part.path: _graph(root, part) for part in sorted(parts, key=lambda one: not one.path)}
    whole = graphs.get("", root)
    if example is None:
        return whole, _NO_EXAMPLE if parts else ""
    given = (example,) if isinstance(example, Tensor) else example
    call = ((), dict(given)) if isinstance(given, Mapping) else (tuple(given), {})
    reasons = []
    exact = exact_copy(approx)
    sections = {part.path: exact.get_submodule(part.path) for part in parts if part.path}
    references = _References(approx, narrowing, {part.path: part.serves for part in parts}, graphs)
    for path, calls in recorded(exact, sections, call).items():
        module, why = _serving(trials, path, references.of(path, calls), calls)
        for model in (root, *(trial.model for trial in trials)):
            _put(model, path, module)
        if why:
            reasons.append(f"{path}: {why}")
    if "" not in graphs:
        return root, "; ".join(reasons)
    module, why = _serving(trials, "", references.of("", [call]), [call])
    return module, "; ".join([*([why] if why else []), *reasons])


class _References:
    """What the model's own Python is compared with."""

    def __init__(
        self,
        approx: ApproxModule,
        narrowing: Narrowing,
        serves: Mapping[str, Serves],
        graphs: Mapping[str, nn.Module],
    ) -> None:
        self.approx, self.narrowing, self.serves, self.graphs = approx, narrowing, serves, graphs

    def of(self, path: str, calls: Sequence[Call]) -> tuple[nn.Module, str]:
        """A module that computes what a part should, and why that is not the graph, if so.

        Where the graph does not serve the calls, it is the exact module with zeros for the weights that are not read.
        """
        for args, kwargs in calls:
            problem = self.serves[path].problem(self.graphs[path], args, kwargs)
            if problem:
                return self._masked(path), problem
        return self.graphs[path], ""

    def _masked(self, path: str) -> nn.Module:
        whole = skeleton(exact_copy(self.approx), shared=False)
        tensors = tensors_of(whole)
        for name, cut in self.narrowing.cuts.items():
            if cut.inputs is not None and tensors[name].dim() > 1:
                with torch.no_grad():
                    kept = dataclasses.replace(cut, outputs=None)
                    value = torch.zeros_like(tensors[name])
                    kept.put(value, kept.of(tensors[name]), scaled=False)
                    tensors[name].copy_(value)
        return whole.get_submodule(path)


def _serving(
    trials: Sequence[_Trial], path: str, reference: tuple[nn.Module, str], calls: list[Call]
) -> tuple[nn.Module, str]:
    """The first of ``trials`` that computes what ``reference`` does; else the graph, and why the first did not.

    Raises:
        UnsupportedError: The graph does not serve the calls either.
    """
    graph, problem = reference
    reasons = []
    for trial in trials:
        own = trial.model.get_submodule(path)
        reasons.append(trial.problems.get(path) or differs(own, graph, calls, not problem))
        if not reasons[-1]:
            return own, ""
    if problem:
        part = path or type(graph).__name__
        raise UnsupportedError(f"model: {part}: its graph does not serve example_inputs: {problem}; and {reasons[0]}")
    return graph, reasons[0]


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    holder, _, name = path.rpartition(".")
    children_of(model.get_submodule(holder))[name] = module


def _trials(root: nn.Module, parts: Sequence[Part], narrowing: Narrowing) -> list[_Trial]:
    """Copies, on the same tensors, in which layers read parts of wide values themselves, in one way or another."""
    made: list[_Trial] = []
    ways: list[tuple[Any, ...]] = []
    for widens in (False, True):
        values = WideValues(narrowing, widens)
        values.follow({part.path: part.made for part in parts})
        if (values.writes, values.problems) not in ways:
            ways.append((values.writes, values.problems))
            own = skeleton(root)
            values.install(own)
            made.append(_Trial(own, values.problems))
    return made


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
