"""What was decided for a transformed model, and what is known of it: plain data."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from fx_approx.core.candidates import Candidate
from fx_approx.core.plan import Plan
from fx_approx.core.plan_effects import PlanEffects


@dataclasses.dataclass
class PlanRecord:
    """The plan of a transformed model, what it was made from, and what it does.

    No value in it is ever changed in place, so copies of a model share them all.

    Attributes:
        plan: What was decided.
        candidates: All products that could be sampled.
        called: Arguments of a forward, with a :class:`fx_approx.capture.size_guards.TensorSpec` for each tensor: those
            of the example, or of the first forward since; None before that.
        shaped: The shapes of the candidates were known at the transform.
        learnt: They are known now.
        prunes: Channels that no one reads are not computed.
        analysis: The shared selections and live channels, a :class:`fx_approx.passes.channel_liveness.ChannelAnalysis`;
            not typed, since passes stand above the runtime, which hands it on and never looks at it.
        effects: What the passes do to each product and value.
        selection_time: What the selections were measured to cost, a :class:`fx_approx.savings.rows.SelectionTime`,
            which stands above the runtime, too; None unless they were measured.
        token_notes: Where tokens are computed whole although the plan samples them, and why.
    """

    plan: Plan
    candidates: tuple[Candidate, ...]
    called: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    shaped: bool = False
    learnt: bool = False
    prunes: bool = True
    analysis: Any = None
    effects: PlanEffects = dataclasses.field(default_factory=PlanEffects)
    selection_time: Any = None
    token_notes: tuple[str, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> PlanRecord:
        return copy.copy(self)

    def for_parts(self) -> PlanRecord:
        """What is pickled with a part of the model: the graph that the rest tells of stays behind."""
        return dataclasses.replace(self, analysis=None, effects=PlanEffects())
