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
from fx_approx.subnetworks.graph_form import graph_module, run_by_graph
from fx_approx.subnetworks.model_parts import Part
from fx_approx.subnetworks.narrowing import Narrowing
from fx_approx.subnetworks.own_class import fit_attributes
from fx_approx.subnetworks.record import tensors_of
from fx_approx.subnetworks.wide_values import WideValues

Forms = dict[str, bool | None]
"""By path of a part, the form it has: None for a graph; else Python, and whether values that it splits are wide."""

_NO_EXAMPLE = "no example_inputs were given, to see whether the model's own Python serves"


@dataclasses.dataclass(frozen=True)
class _Trial:
    """A narrow model of the user's own class, and why a part of it cannot be that."""

    model: nn.Module
    problems: Mapping[str, str]


def assembled(
    approx: ApproxModule, root: nn.Module, parts: Sequence[Part], narrowing: Narrowing, example: Any
) -> tuple[nn.Module, Forms, str]:
    """The subnetwork, and why it, or a part of it, is no Python of the model's own.

    Args:
        approx: The transformed model.
        root: The copy of the model with narrow layers.
        parts: What has graphs.
        narrowing: How its layers were narrowed.
        example: Inputs of the model, or None.

    Returns:
        The subnetwork, in which form each part of it is, and the reasons.

    Raises:
        UnsupportedError: Neither a graph nor the model's own Python serves ``example``.
    """
    if example is None:
        forms: Forms = {part.path: None for part in parts}
        return _of_graphs(root, parts), forms, _NO_EXAMPLE if parts else ""
    given = (example,) if isinstance(example, Tensor) else example
    call = ((), dict(given)) if isinstance(given, Mapping) else (tuple(given), {})
    exact, inner = exact_copy(approx), [part for part in parts if part.path]
    calls = recorded(exact, {part.path: exact.get_submodule(part.path) for part in inner}, call)
    trials = _trials(root, parts, narrowing)
    forms, reasons = {}, []
    for part in (*inner, *(part for part in parts if not part.path)):
        reference = _reference(approx, root, part, narrowing, calls.get(part.path, [call]))
        own = {widens: one for widens, one in trials.items() if part.path not in one.problems}
        problem = next((one.problems[part.path] for one in trials.values() if part.path in one.problems), "")
        full = exact.get_submodule(part.path)
        forms[part.path], why = _serving(part, own, full, reference, calls.get(part.path, [call]), problem)
        if why:
            reasons.append(f"{part.path}: {why}" if part.path else why)
        if part.path:
            chosen = forms[part.path]
            module = reference.graph if chosen is None else trials[chosen].model.get_submodule(part.path)
            for model in (root, *(trial.model for trial in trials.values())):
                _put(model, part.path, module)
        elif forms[""] is None:
            return reference.graph, forms, "; ".join([reasons[-1], *reasons[:-1]])
        else:
            return trials[forms[""]].model, forms, "; ".join(reasons)
    return root, forms, "; ".join(reasons)


def _of_graphs(root: nn.Module, parts: Sequence[Part]) -> nn.Module:
    """The subnetwork in which every part runs its graph."""
    for part in sorted(parts, key=lambda one: not one.path):
        module = _graph(root, part)
        if not part.path:
            return module
        _put(root, part.path, module)
    return root


def index_tensors(sub: nn.Module, parts: Sequence[Part], narrowing: Narrowing, forms: Forms) -> dict[str, Tensor]:
    """By name in ``sub``, a subnetwork of these forms, the indices that it reads by.

    Args:
        sub: The subnetwork, cut by other selections of the same sizes.
        parts: The graphs for the present ones.
        narrowing: How they read the tensors.
        forms: As :func:`assembled` gave them.
    """
    found = dict(narrowing.outside_indices())
    ways = {form for form in forms.values() if form is not None}
    seen = {form: _seen(sub, parts, narrowing, form) for form in ways}
    for part in parts:
        form, above = forms[part.path], f"{part.path}." if part.path else ""
        if form is None:
            found |= {f"{above}{name}": tensor for name, tensor in part.made.tensors.items()}
        else:
            found |= {name: tensor for name, tensor in seen[form].items() if name.startswith(above)}
    return found


def _seen(sub: nn.Module, parts: Sequence[Part], narrowing: Narrowing, widens: bool) -> dict[str, Tensor]:
    values = WideValues(narrowing, widens, sub)
    values.follow({part.path: part.made for part in parts})
    return values.index_tensors()


@dataclasses.dataclass(frozen=True)
class _Reference:
    """What the model's own Python is compared with.

    Attributes:
        graph: The graph of the part.
        module: That, or the exact module with zeros for the weights that are not read.
        problem: Why the graph does not serve the calls, if so.
    """

    graph: nn.Module
    module: nn.Module
    problem: str


def _reference(
    approx: ApproxModule, root: nn.Module, part: Part, narrowing: Narrowing, calls: Sequence[Call]
) -> _Reference:
    graph = _graph(root, part)
    found = (part.serves.problem(graph, args, kwargs) for args, kwargs in calls)
    problem = next((one for one in found if one), "")
    return _Reference(graph, _masked(approx, narrowing, part.path) if problem else graph, problem)


def _masked(approx: ApproxModule, narrowing: Narrowing, path: str) -> nn.Module:
    """The exact module at ``path`` with zeros for the weights that the subnetwork does not read."""
    whole = skeleton(exact_copy(approx), shared=False)
    tensors = tensors_of(whole)
    with torch.no_grad():
        for name, cut in narrowing.cuts.items():
            if cut.inputs is not None and tensors[name].dim() > 1:
                kept = dataclasses.replace(cut, outputs=None)
                value = torch.zeros_like(tensors[name])
                kept.put(value, kept.of(tensors[name]), scaled=False)
                tensors[name].copy_(value)
    return whole.get_submodule(path)


def _serving(
    part: Part,
    trials: Mapping[bool, _Trial],
    full: nn.Module,
    reference: _Reference,
    calls: Sequence[Call],
    problem: str,
) -> tuple[bool | None, str]:
    """The first of ``trials`` that computes what it should, or None for the graph; and why, if so.

    Raises:
        UnsupportedError: The graph does not serve the calls either.
    """
    reasons = [problem] if problem else []

    def check(module: nn.Module) -> str:
        return differs(module, reference.module, calls, not reference.problem)

    for widens, trial in trials.items():
        own = trial.model.get_submodule(part.path)
        why = check(own)
        if not why or not fit_attributes(own, full, why, check):
            return widens, ""
        reasons.append(why)
    if reference.problem:
        name = part.path or "the model"
        raise UnsupportedError(
            f"model: {name}: its graph does not serve example_inputs: {reference.problem}; and {reasons[0]}"
        )
    hints = "; ".join(dict.fromkeys(part.made.hints))
    return None, f"{reasons[0]} ({hints})" if hints else reasons[0]


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    holder, _, name = path.rpartition(".")
    children_of(model.get_submodule(holder))[name] = module


def _trials(root: nn.Module, parts: Sequence[Part], narrowing: Narrowing) -> dict[bool, _Trial]:
    """Copies, on the same tensors, in which layers read parts of wide values themselves.

    By whether values are made wide that Python splits by number.
    """
    made: dict[bool, _Trial] = {}
    ways: list[tuple[Any, ...]] = []
    for widens in (False, True):
        values = WideValues(narrowing, widens)
        values.follow({part.path: part.made for part in parts})
        if (values.writes, values.problems) not in ways:
            ways.append((values.writes, values.problems))
            own = skeleton(root)
            values.install(own)
            made[widens] = _Trial(own, values.problems)
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
