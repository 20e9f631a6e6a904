"""From a captured graph to a graph that runs: what every frontend does, see "Flow" in the design."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from torch import nn

from fx_approx.capture.records import Capture, Opaque, UnfitGraphError
from fx_approx.core.candidates import Candidate, with_facts
from fx_approx.core.plan import Plan
from fx_approx.core.plan_effects import Values
from fx_approx.errors import CaptureWarning
from fx_approx.passes.channel_flow import Flow
from fx_approx.passes.channel_liveness import find_facts
from fx_approx.passes.channel_rules import find_flow
from fx_approx.passes.decompose_attention import unfuse
from fx_approx.passes.find_candidates import Found, annotate
from fx_approx.passes.plan_effects import find_effects
from fx_approx.passes.rewrite import rewrite
from fx_approx.passes.shape_prop import propagate
from fx_approx.runtime.graph_runtime import Runtime
from fx_approx.savings.report import SavingsReport, build_report


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A captured model with its candidates: everything before a decision.

    Attributes:
        captured: The graph.
        found: Its candidates.
        called: What the graph was called with (:func:`fx_approx.capture.size_guards.described`); None without example
            inputs.
        values: Shapes of all values; None if they are not known.
    """

    captured: Capture
    found: list[Found]
    called: tuple[Any, Any] | None
    values: Values | None

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The records of the candidates."""
        return tuple(one.candidate for one in self.found)

    def flow(self, root: nn.Module) -> Flow | None:
        """Which values hold the same channels; None if shapes are not known."""
        graph = self.captured.graph
        return None if graph is None or self.values is None else find_flow(root, graph, self.values)

    def predicted(self, root: nn.Module, name: str, plan: Plan, prune_unread: bool) -> SavingsReport:
        """The report of ``plan`` before anything is rewritten."""
        flow = self.flow(root)
        facts = find_facts(self.captured.graph, self.found, plan, flow)
        return build_report(
            name,
            self.candidates,
            plan,
            self.captured.opaque,
            tried=self.called is not None,
            effects=find_effects(self.found, plan, facts, flow, prune_unread),
        )


def prepare(root: nn.Module, captured: Capture, called: tuple[Any, Any] | None) -> Prepared:
    """Finds the candidates, and what they are called with where ``called`` is known."""
    captured = unfuse(root, captured)
    found, values = annotate(root, captured), None
    if called is not None:
        try:
            found, values = with_shapes(root, captured, found, called)
        except UnfitGraphError as error:
            return prepare(root, Capture(None, captured.form, (Opaque("", str(error), True),), (), {}), called)
    return Prepared(captured, found, called, values)


def with_shapes(
    root: nn.Module, captured: Capture, found: list[Found], called: tuple[Any, Any], stacklevel: int = 5
) -> tuple[list[Found], Values | None]:
    """The candidates with the facts that only shapes tell, and the shapes of all values."""
    shapes = propagate(root, captured, found, *called)
    if shapes.stopped:
        warnings.warn(f"shapes are known only in part: {shapes.stopped}", CaptureWarning, stacklevel=stacklevel)
    candidates = with_facts(tuple(one.candidate for one in found), shapes.facts)
    known = [
        dataclasses.replace(
            one,
            candidate=dataclasses.replace(candidate, blocked=candidate.blocked or shapes.blocked.get(candidate.name)),
        )
        for one, candidate in zip(found, candidates, strict=True)
    ]
    return known, shapes.values


def install(
    root: nn.Module, prepared: Prepared, plan: Plan, seed: int, selection_interval: int, prune_unread: bool
) -> Runtime:
    """Rewrites ``root`` in place by ``plan``; the runtime that it returns runs it."""
    runtime = Runtime(prepared.captured, prepared.candidates, plan, seed, selection_interval)
    runtime.called = prepared.called
    runtime.learnt = runtime.shaped = prepared.called is not None
    first = next(root.parameters(), None)
    if first is not None:
        runtime.state = runtime.state.to(first.device)
    runtime.hoisting = prune_unread
    flow = prepared.flow(root)
    facts = rewrite(root, runtime, prepared.found, flow, prune_unread)
    runtime.effects = find_effects(prepared.found, plan, facts, flow, prune_unread)
    return runtime
