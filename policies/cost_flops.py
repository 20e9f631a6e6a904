"""Cost models: what sampling a candidate is estimated to save. The first counts operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from fx_approx.core.candidates import Candidate, Role
from fx_approx.core.flops import executed_flops, kept_pairs, selection_flops
from fx_approx.core.plan import Cost, CostEstimate
from fx_approx.core.step_cost import Model, StepWorkload
from fx_approx.sampling.spec import SamplerConfig


@dataclasses.dataclass(frozen=True)
class FlopModel:
    """Counts multiply-adds times two of the products and of the scores.

    It promises nothing about time: a gather, a sort and a kernel launch cost no operation and yet take time.
    """

    def estimate(
        self, candidate: Candidate, roles: Mapping[Role, SamplerConfig], straight_through: bool = False
    ) -> CostEstimate | None:
        """Exact and sampled operations of a training step, or None where the candidate's shapes are not known."""
        facts = candidate.facts
        if facts is None:
            return None
        exact = facts.flops.total
        kept = kept_pairs(candidate, roles, straight_through)
        sampled = executed_flops(facts, kept).total
        sampled += sum(
            selection_flops(candidate, role, spec) for role, spec in roles.items() if kept.of(role) is not None
        )
        return CostEstimate(Cost(flops=exact), Cost(flops=sampled), omits=self.omits)

    @property
    def omits(self) -> str:
        """What it does not model."""
        return "time: memory traffic, gathers, sorting, kernel launches"

    def step(self, work: StepWorkload, model: Model) -> Cost:
        """Operations of a whole training step, what demand spares included; no time."""
        return Cost(flops=work.flops + work.selection_flops)
