"""A model on its way from a captured graph to a graph that runs: what the passes have found of it so far."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from fx_approx.capture.records import Capture
from fx_approx.core.candidates import Candidate
from fx_approx.core.plan import Plan
from fx_approx.core.plan_effects import PlanEffects
from fx_approx.core.token_axis import TokenStack
from fx_approx.core.token_sampling import TokenSampling
from fx_approx.core.values import Values
from fx_approx.passes.channel_flow import Flow
from fx_approx.passes.channel_liveness import ChannelAnalysis, analyse_channels
from fx_approx.passes.find_candidates import CandidateSite
from fx_approx.passes.plan_effects import find_effects
from fx_approx.passes.sample_tokens import TokenStretch, choose_stretches
from fx_approx.passes.token_flow import TokenStream, find_tokens
from fx_approx.passes.token_map import map_tokens
from fx_approx.savings.build import build_report
from fx_approx.savings.report import SavingsReport


@dataclasses.dataclass
class Compilation:
    """What the passes of ``pipeline.py`` read and write.

    Attributes:
        root: The model's structure on its parameters; rewriting changes it in place.
        captured: Its graph.
        called: What the graph was called with (:func:`fx_approx.capture.size_guards.described`); None without example
            inputs.
        sites: The candidates, with their places in the graph.
        values: Shapes of all values; None if they are not known.
        flow: Which values hold the same channels; None if shapes are not known.
    """

    root: nn.Module
    captured: Capture
    called: tuple[Any, Any] | None
    sites: list[CandidateSite] = dataclasses.field(default_factory=list)
    values: Values | None = None
    flow: Flow | None = None
    _streams: dict[int, tuple[tuple[TokenStream, ...], tuple[str, ...]]] = dataclasses.field(
        default_factory=dict, init=False
    )
    _stretches: dict[TokenSampling, tuple[tuple[TokenStretch, ...], tuple[str, ...]]] = dataclasses.field(
        default_factory=dict, init=False
    )
    _stacks: dict[TokenSampling | None, tuple[TokenStack, ...]] = dataclasses.field(default_factory=dict, init=False)

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The records of the candidates."""
        return tuple(one.candidate for one in self.sites)

    def analysis(self, plan: Plan) -> ChannelAnalysis:
        """Which readers share a selection under ``plan``, and which channels anyone reads."""
        return analyse_channels(self.captured.graph, self.sites, plan, self.flow)

    def effects(self, plan: Plan, analysis: ChannelAnalysis, prune_unread: bool) -> PlanEffects:
        """The same as plain data, of every product and value."""
        stretches, _ = self.token_stretches(plan.tokens)
        found = find_effects(self.sites, plan, analysis, self.flow, prune_unread, stretches)
        if plan.tokens is None:
            return found
        return dataclasses.replace(
            found, blocks=tuple(one for stack in self.token_stacks(plan) for one in stack.blocks)
        )

    def token_streams(self, keep: int = 0) -> tuple[tuple[TokenStream, ...], tuple[str, ...]]:
        """The stacks of blocks whose tokens can be followed, and why there are no more; of ``keep`` tokens each."""
        if self.captured.graph is None or self.captured.sections or self.values is None:
            return (), ("tokens: the forward is not traced as one graph; use backend=fx_approx.backend(policy)",)
        if keep not in self._streams:
            streams, reasons = find_tokens(self.root, self.captured.graph, self.values, keep)
            self._streams[keep] = tuple(streams), tuple(reasons)
        return self._streams[keep]

    def token_stretches(self, tokens: TokenSampling | None) -> tuple[tuple[TokenStretch, ...], tuple[str, ...]]:
        """The blocks that compute some tokens only, and why there are no more."""
        if tokens is None:
            return (), ()
        if tokens not in self._stretches:
            streams, reasons = self.token_streams(tokens.keep)
            found, more = choose_stretches(streams, tokens)
            self._stretches[tokens] = tuple(found), (*reasons, *more)
        return self._stretches[tokens]

    def token_stacks(self, plan: Plan) -> tuple[TokenStack, ...]:
        """The stacks block by block, with what ``plan`` makes of them."""
        tokens = plan.tokens
        if tokens not in self._stacks:
            streams, _ = self.token_streams(0 if tokens is None else tokens.keep)
            self._stacks[tokens] = map_tokens(streams, self.token_stretches(tokens)[0], tokens)
        return self._stacks[tokens]

    def predicted(self, name: str, plan: Plan, prune_unread: bool) -> SavingsReport:
        """The report of ``plan`` before anything is rewritten."""
        return build_report(
            name,
            self.candidates,
            plan,
            self.captured.opaque,
            tried=self.called is not None,
            effects=self.effects(plan, self.analysis(plan), prune_unread),
            token_notes=self.token_stretches(plan.tokens)[1],
        )
