"""The pipeline: all passes from a captured graph to a graph that runs, in order, for both frontends.

A policy decides between the two lists. The passes of torch.fx's own ``PassManager`` take a ``GraphModule`` and give
one. Ours leave the model an instance of its own class, so a pass takes what has been found of the model so far, and
says what of it it reads and what it writes.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from torch import fx, nn

from fx_approx.capture.records import Capture, Opaque, UnfitGraphError
from fx_approx.compiler.compilation import Compilation
from fx_approx.core.candidates import with_facts
from fx_approx.core.plan import Plan
from fx_approx.errors import CaptureWarning
from fx_approx.passes.channel_liveness import ChannelAnalysis
from fx_approx.passes.channel_rules import find_flow
from fx_approx.passes.decompose_attention import decompose
from fx_approx.passes.find_candidates import find_candidates
from fx_approx.passes.mask_tokens import can_mask
from fx_approx.passes.rewrite import guard_graph, make_selectors, sampled_graph
from fx_approx.passes.sample_tokens import TokenStretch, make_token_selections
from fx_approx.passes.shape_prop import propagate
from fx_approx.runtime.graph_runtime import Runtime
from fx_approx.runtime.plan_record import PlanRecord

State = TypeVar("State")


@dataclasses.dataclass(frozen=True)
class Pass(Generic[State]):
    """One pass.

    Attributes:
        run: What it does, in place.
        reads: What must have been found before.
        writes: What it finds or changes.
    """

    run: Callable[[State], None]
    reads: tuple[str, ...]
    writes: tuple[str, ...]


def _decompose_attention(made: Compilation) -> None:
    made.captured = decompose(made.root, made.captured)


def _find_candidates(made: Compilation) -> None:
    made.sites = find_candidates(made.root, made.captured)


def _propagate_shapes(made: Compilation) -> None:
    """Needs example inputs. Where the graph does not run on them, although the model does, the graph is given up."""
    if made.called is None:
        return
    try:
        shapes = propagate(made.root, made.captured, made.sites, *made.called)
    except UnfitGraphError as error:
        made.captured = Capture(None, made.captured.form, (Opaque("", str(error), True),), (), {})
        _find_candidates(made)
        shapes = propagate(made.root, made.captured, made.sites, *made.called)
    if shapes.stopped:
        warnings.warn(f"shapes are known only in part: {shapes.stopped}", CaptureWarning, stacklevel=7)
    candidates = with_facts(made.candidates, shapes.facts)
    made.sites = [
        dataclasses.replace(
            one,
            candidate=dataclasses.replace(candidate, blocked=candidate.blocked or shapes.blocked.get(candidate.name)),
        )
        for one, candidate in zip(made.sites, candidates, strict=True)
    ]
    made.values = shapes.values


def _find_channel_flow(made: Compilation) -> None:
    if made.captured.graph is not None and made.values is not None:
        made.flow = find_flow(made.root, made.captured.graph, made.values)


ANALYSIS: tuple[Pass[Compilation], ...] = (
    Pass(_decompose_attention, reads=("graph",), writes=("graph",)),
    Pass(_find_candidates, reads=("graph",), writes=("candidates",)),
    Pass(_propagate_shapes, reads=("graph", "candidates"), writes=("candidates", "shapes")),
    Pass(_find_channel_flow, reads=("graph", "shapes"), writes=("channel flow",)),
)
"""From a captured graph to all that a policy is shown."""


@dataclasses.dataclass
class Rewriting:
    """A compilation with its plan, and the runtime that the passes fill.

    Attributes:
        made: What the analysis found.
        runtime: What the transformed model will carry.
        prune_unread: Channels that no one reads are not computed.
        analysis: Shared selections and live channels.
        stretches: Blocks that compute some tokens only.
    """

    made: Compilation
    runtime: Runtime
    prune_unread: bool
    analysis: ChannelAnalysis
    stretches: tuple[TokenStretch, ...] = ()


def _choose_tokens(work: Rewriting) -> None:
    """Finds the tokens and the stretches of blocks that compute some of them."""
    sampling = work.runtime.record.plan.tokens
    if sampling is None:
        return
    work.stretches, notes = work.made.token_stretches(sampling)
    make_token_selections(work.runtime, work.stretches, sampling, work.made.root)
    work.runtime.record.token_notes = notes


def _make_selectors(work: Rewriting) -> None:
    make_selectors(work.made.root, work.runtime, work.made.sites, work.analysis)


def _sampled_graph(work: Rewriting, prune: bool, masked: bool = False) -> fx.Graph:
    made = work.made
    return sampled_graph(made.root, work.runtime, made.sites, work.analysis, made.flow, work.stretches, prune, masked)


def _place_selections(work: Rewriting) -> None:
    program = work.runtime.program
    if program.capture.graph is not None:
        program.stages = [("capture", program.capture.graph), ("share", _sampled_graph(work, prune=False))]
        if work.stretches and all(map(can_mask, work.stretches)):
            program.masked = _sampled_graph(work, prune=False, masked=True)


def _prune_channels(work: Rewriting) -> None:
    program = work.runtime.program
    if work.prune_unread and program.capture.graph is not None and work.analysis.narrows:
        program.stages.append(("demand", _sampled_graph(work, prune=True)))


def _compile_graph(work: Rewriting) -> None:
    program = work.runtime.program
    if program.stages:
        program.compile_graph(program.stages[-1][1])
    guard_graph(work.made.root, program)


def _describe_effects(work: Rewriting) -> None:
    record = work.runtime.record
    record.effects = work.made.effects(record.plan, work.analysis, work.prune_unread)


REWRITING: tuple[Pass[Rewriting], ...] = (
    Pass(_choose_tokens, reads=("graph", "plan"), writes=("token stretches",)),
    Pass(_make_selectors, reads=("candidates", "plan", "live channels"), writes=("selectors",)),
    Pass(
        _place_selections,
        reads=("graph", "channel flow", "live channels", "selectors", "token stretches"),
        writes=("sampled graph",),
    ),
    Pass(_prune_channels, reads=("sampled graph", "channel flow", "live channels"), writes=("sampled graph",)),
    Pass(_compile_graph, reads=("sampled graph",), writes=("code", "guards")),
    Pass(_describe_effects, reads=("candidates", "plan", "channel flow", "live channels"), writes=("effects",)),
)
"""From a plan, and the channels that are live under it, to a model that runs."""

GIVEN = {"analysis": ("graph",), "rewriting": ("plan", "live channels")}
"""What is there before each of the lists: the capture, and what the policy decided."""


def _run(passes: Iterable[Pass[State]], state: State) -> State:
    for one in passes:
        one.run(state)
    return state


def prepare(root: nn.Module, captured: Capture, called: tuple[Any, Any] | None) -> Compilation:
    """Runs :data:`ANALYSIS`: the candidates of ``captured``, and what they are called with where that is known."""
    return _run(ANALYSIS, Compilation(root, captured, called))


def install(made: Compilation, plan: Plan, seed: int, selection_interval: int, prune_unread: bool) -> Runtime:
    """Runs :data:`REWRITING`: changes ``made.root`` in place by ``plan``; the runtime that it returns runs it."""
    analysis, shaped = made.analysis(plan), made.called is not None
    record = PlanRecord(plan, made.candidates, made.called, shaped, shaped, prune_unread, analysis)
    runtime = Runtime(made.captured, record, seed, selection_interval)
    first = next(made.root.parameters(), None)
    if first is not None:
        runtime.state = runtime.state.to(first.device)
    _run(REWRITING, Rewriting(made, runtime, prune_unread, analysis))
    return runtime
