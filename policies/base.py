"""What policies share. A policy sees all candidates of a model and decides about each."""

from __future__ import annotations

from collections.abc import Mapping

from fx_approx.core.candidates import Candidate, Role
from fx_approx.core.flops import role_pairs
from fx_approx.core.plan import CostModel, Decision, Policy
from fx_approx.policies.cost_flops import FlopModel
from fx_approx.sampling.spec import SamplerConfig

__all__ = ["CostModel", "Policy", "decision", "exact", "sampled", "sampled_roles"]


def decision(
    candidate: Candidate,
    roles: Mapping[Role, SamplerConfig],
    reason: str,
    source: str,
    model: CostModel | None = None,
    straight_through: bool = False,
    scope: str = "layer",
) -> Decision:
    """A decision with its cost, by :class:`FlopModel` unless another model is given."""
    estimate = (FlopModel() if model is None else model).estimate(candidate, roles, straight_through)
    return Decision(candidate.name, roles, reason, source, estimate, straight_through, scope)


def exact(candidate: Candidate, reason: str, source: str) -> Decision:
    """A decision that leaves ``candidate`` exact."""
    return decision(candidate, {}, reason, source)


def sampled(candidate: Candidate, spec: SamplerConfig, reason: str, source: str, scope: str = "layer") -> Decision:
    """Sample ``candidate`` in forward mode; exact, with that reason, if ``spec`` would keep every pair."""
    return sampled_roles(candidate, {Role.OUTPUT: spec}, reason, source, scope=scope)


def sampled_roles(
    candidate: Candidate,
    roles: Mapping[Role, SamplerConfig],
    reason: str,
    source: str,
    straight_through: bool = False,
    scope: str = "layer",
) -> Decision:
    """Sample those products of ``candidate`` of which ``min_k`` does not keep every pair."""
    kept: dict[Role, SamplerConfig] = {}
    all_kept = []
    for role, spec in roles.items():
        pairs = role_pairs(candidate, role, spec)
        if pairs is not None and spec.count(pairs) >= pairs and spec.ratio < 1:
            all_kept.append(f"min_k={spec.min_k} keeps all {pairs} pairs")
        else:
            kept[role] = spec
    if not kept and all_kept:
        return exact(candidate, all_kept[0], source)
    through = straight_through and Role.OUTPUT in kept
    return decision(candidate, kept, reason, source, straight_through=through, scope=scope)
