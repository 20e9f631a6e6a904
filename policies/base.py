"""What policies share. A policy sees all candidates of a model and decides about each."""

from __future__ import annotations

from collections.abc import Mapping

from fx_approx.candidate import Candidate, Role
from fx_approx.plan import CostModel, Decision, Policy
from fx_approx.policies.cost_model import FlopModel
from fx_approx.sampling import SamplerSpec

__all__ = ["CostModel", "Policy", "decision", "exact", "sampled"]


def decision(
    candidate: Candidate, roles: Mapping[Role, SamplerSpec], reason: str, source: str, model: CostModel | None = None
) -> Decision:
    """A decision with its cost, by :class:`FlopModel` unless another model is given."""
    estimate = (FlopModel() if model is None else model).estimate(candidate, roles)
    return Decision(candidate.name, roles, reason, source, estimate)


def exact(candidate: Candidate, reason: str, source: str) -> Decision:
    """Leave ``candidate`` exact."""
    return decision(candidate, {}, reason, source)


def sampled(candidate: Candidate, spec: SamplerSpec, reason: str, source: str) -> Decision:
    """Sample ``candidate`` in forward mode; exact, with that reason, if ``spec`` would keep every pair."""
    if candidate.pairs is not None and spec.count(candidate.pairs) >= candidate.pairs and spec.ratio < 1:
        return exact(candidate, f"minimal_k={spec.minimal_k} keeps all {candidate.pairs} pairs", source)
    return decision(candidate, {Role.OUTPUT: spec}, reason, source)
