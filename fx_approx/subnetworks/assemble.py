"""Puts a subnetwork together: the model's own Python where it computes what the graphs do, the graphs elsewhere."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from fx_approx._compat import children_of
from fx_approx.capture.trace import skeleton
from fx_approx.errors import UnsupportedError
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.exact import exact_copy
from fx_approx.subnetworks.comparing import (
    UNTOLD,
    Call,
    differs,
    differs_in_evaluation,
    masked,
    recorded,
)
from fx_approx.subnetworks.graph_form import graph_module, run_by_graph, serve_training_only
from fx_approx.subnetworks.model_parts import Part
from fx_approx.subnetworks.narrowing import Narrowing
from fx_approx.subnetworks.own_class import fit_attributes
from fx_approx.subnetworks.same_operations import all_alike
from fx_approx.subnetworks.wide_values import WideValues

Forms = dict[str, bool | None]
"""By path of a part, the form it has: None for a graph; else Python, and whether values that it splits are wide."""

_NO_EXAMPLE = "no example_inputs were given, to see whether the model's own Python serves"


@dataclasses.dataclass(frozen=True)
class _Trial:
    """A narrow model of the user's own class, and why a part of it cannot be that."""

    model: nn.Module
    problems: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Assembled:
    """A subnetwork as it was put together.

    Attributes:
        sub: The subnetwork.
        forms: In which form each part of it is.
        reason: Why it, or a part of it, is no Python of the model's own; empty if all is.
        notes: What could not be seen of Python of the model's own.
    """

    sub: nn.Module
    forms: Forms
    reason: str
    notes: tuple[str, ...] = ()


def assembled(
    approx: ApproxModule,
    root: nn.Module,
    parts: Sequence[Part],
    narrowing: Narrowing,
    example: Any,
    exact_parts: Callable[[Narrowing], Sequence[Part]],
) -> Assembled:
    """The subnetwork.

    Args:
        approx: The transformed model.
        root: The copy of the model with narrow layers.
        parts: What has graphs.
        narrowing: How its layers were narrowed.
        example: Inputs of the model, or None.
        exact_parts: Makes the graphs of the parts without selections.

    Raises:
        UnsupportedError: Neither a graph nor the model's own Python serves ``example``.
    """
    if example is None:
        return Assembled(_of_graphs(root, parts), {part.path: None for part in parts}, _NO_EXAMPLE if parts else "")
    given = (example,) if isinstance(example, Tensor) else example
    call = ((), dict(given)) if isinstance(given, Mapping) else (tuple(given), {})
    exact, inner = exact_copy(approx), [part for part in parts if part.path]
    calls = recorded(exact, {part.path: exact.get_submodule(part.path) for part in inner}, call)
    trials = _trials(root, parts, narrowing)
    whole = functools.cache(lambda: masked(exact, narrowing.cuts))
    forms: Forms = {}
    reasons: list[str] = []
    notes: list[str] = []
    for part in (*inner, *(part for part in parts if not part.path)):
        reference = _reference(whole, root, part, narrowing, calls.get(part.path, [call]))
        own = {widens: one for widens, one in trials.items() if part.path not in one.problems}
        problem = next((one.problems[part.path] for one in trials.values() if part.path in one.problems), "")
        full = exact.get_submodule(part.path)
        found = _serving(part, own, full, reference, calls.get(part.path, [call]), problem)
        form = forms[part.path] = found.form
        only = form is None and part.serves.training_only
        if only and not _evaluates(approx, part.path, calls.get(part.path, [call]), exact_parts):
            serve_training_only(reference.graph)
        above = f"{part.path}: " if part.path else ""
        reasons += [f"{above}{found.why}"] if found.why else []
        notes += [f"{above}{found.note}"] if found.note else []
        if part.path:
            module = reference.graph if form is None else trials[form].model.get_submodule(part.path)
            for model in (root, *(trial.model for trial in trials.values())):
                _put(model, part.path, module)
        elif form is None:
            return Assembled(reference.graph, forms, "; ".join([reasons[-1], *reasons[:-1]]), tuple(notes))
        else:
            return Assembled(trials[form].model, forms, "; ".join(reasons), tuple(notes))
    return Assembled(root, forms, "; ".join(reasons), tuple(notes))


def _evaluates(
    approx: ApproxModule, path: str, calls: Sequence[Call], exact_parts: Callable[[Narrowing], Sequence[Part]]
) -> bool:
    """Whether the graph of a part computes in evaluation what the model's Python does, both without selections."""
    root = skeleton(exact_copy(approx))
    narrowing = Narrowing(root, approx)
    part = next(part for part in exact_parts(narrowing) if part.path == path)
    return all_alike(_graph(root, part), skeleton(exact_copy(approx)).get_submodule(path), calls)


def _of_graphs(root: nn.Module, parts: Sequence[Part]) -> nn.Module:
    """The subnetwork in which every part runs its graph."""
    for part in sorted(parts, key=lambda one: not one.path):
        module = _graph(root, part)
        if part.serves.training_only:
            serve_training_only(module)
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
        problem: Why the graph does not serve the calls, if so.
        full: The exact module with zeros for the weights that are not read, where the graph does not serve the calls,
            or not in evaluation; else None.
        untold: Why that does not compute what the subnetwork does in evaluation, if so.
    """

    graph: nn.Module
    problem: str
    full: nn.Module | None
    untold: str


def _reference(
    whole: Callable[[], nn.Module], root: nn.Module, part: Part, narrowing: Narrowing, calls: Sequence[Call]
) -> _Reference:
    graph = _graph(root, part)
    found = (part.serves.problem(graph, args, kwargs) for args, kwargs in calls)
    problem = next((one for one in found if one), "")
    full = None
    if problem or part.serves.training_only:
        full = whole().get_submodule(part.path)
    sliced = next(iter(narrowing.sliced), "")
    return _Reference(graph, problem, full, f"{UNTOLD}: {sliced} takes a selection of its own" if sliced else "")


@dataclasses.dataclass(frozen=True)
class _Serving:
    """Which form of a part serves.

    Attributes:
        form: As in ``Forms``.
        why: Why it is the graph, if so.
        note: What could not be seen of Python of the model's own.
    """

    form: bool | None
    why: str = ""
    note: str = ""


def _serving(
    part: Part,
    trials: Mapping[bool, _Trial],
    full: nn.Module,
    reference: _Reference,
    calls: Sequence[Call],
    problem: str,
) -> _Serving:
    """The first of ``trials`` that computes what it should, in both modes, or the graph.

    Raises:
        UnsupportedError: The graph does not serve the calls either.
    """
    reasons = [problem] if problem else []
    note = ""

    def check(module: nn.Module) -> str:
        nonlocal note
        other = reference.full if reference.problem else reference.graph
        assert other is not None
        why = differs(module, other, calls, not reference.problem)
        if why or not part.serves.training_only:
            return why
        assert reference.full is not None
        why, note = ("", reference.untold) if reference.untold else differs_in_evaluation(module, reference.full, calls)
        return why

    for widens, trial in trials.items():
        own = trial.model.get_submodule(part.path)
        why = check(own)
        if not why or not fit_attributes(own, full, why, check):
            return _Serving(widens, note=note)
        reasons.append(why)
    if reference.problem:
        name = part.path or "the model"
        raise UnsupportedError(
            f"model: {name}: its graph does not serve example_inputs: {reference.problem}; and {reasons[0]}"
        )
    hints = "; ".join(dict.fromkeys(part.made.hints))
    return _Serving(None, f"{reasons[0]} ({hints})" if hints else reasons[0])


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
    """A module that runs the graph: of a section one of its own class, whose methods others may call.

    Whether it serves training only is to be seen.
    """
    serves = dataclasses.replace(part.serves, training_only=False)
    if not part.path:
        return graph_module(root, part.made.graph, f"{type(root).__name__}Subnetwork", part.made.tensors, serves)
    run_by_graph(root.get_submodule(part.path), _below(root, part), part.made.tensors, serves)
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
