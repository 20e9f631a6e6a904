"""Decide: the only place where a policy runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fx_approx.candidate import Candidate
from fx_approx.errors import ShapesNeededError
from fx_approx.plan import Plan, Policy, make_plan
from fx_approx.work import Model, is_whole


def check_policy(policy: Any) -> None:
    """Raises TypeError if ``policy`` is none."""
    if isinstance(policy, type) or not isinstance(policy, Policy):
        got = type(policy).__name__ if isinstance(policy, torch.Tensor) else repr(policy)
        hint = "; example inputs are the third argument" if isinstance(policy, (torch.Tensor, tuple)) else ""
        raise TypeError(
            f"policy: expected a policy such as fx_approx.policies.Paper(0.5), or a Plan, got {got[:200]}{hint}"
        )


def decide(candidates: Sequence[Candidate], policy: Policy, model: Callable[[], Model] | None = None) -> Plan:
    """The policy's plan for ``candidates``; blocked ones stay exact with the reason that blocks them.

    Args:
        candidates: All of the model.
        policy: What decides.
        model: Makes the view of the whole graph, for policies that decide about it; None where there is none.

    Raises:
        TypeError: ``policy`` is none.
        ShapesNeededError: The policy reads shapes, and some are not known.
    """
    check_policy(policy)
    if policy.needs_shapes:
        unknown = [c.name for c in candidates if c.facts is None and not c.blocked]
        if unknown:
            raise ShapesNeededError(
                f"policy: {type(policy).__name__} decides by shapes, which are not known for {len(unknown)} of "
                f"{len(candidates)} candidates ({', '.join(unknown[:3])}...): give example_inputs"
            )
    if model is not None and is_whole(policy):
        return make_plan(candidates, policy.decide_whole(model()))
    return make_plan(candidates, policy.decide(candidates))
