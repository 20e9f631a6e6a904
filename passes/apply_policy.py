"""Decide: the only place where a policy runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fx_approx.core.candidates import Candidate
from fx_approx.core.plan import Decision, Plan, Policy, make_plan
from fx_approx.core.step_cost import Model, is_whole
from fx_approx.errors import ShapesRequiredError

_UNKNOWN = "not shared: its shapes are not known"


def check_policy(policy: Any) -> None:
    """Raises TypeError if ``policy`` is none."""
    if isinstance(policy, type) or not isinstance(policy, Policy):
        got = type(policy).__name__ if isinstance(policy, torch.Tensor) else repr(policy)
        hint = "; example inputs are the third argument" if isinstance(policy, (torch.Tensor, tuple)) else ""
        raise TypeError(
            f"policy: expected a policy such as fx_approx.policies.Uniform(0.5), or a Plan, got {got[:200]}{hint}"
        )


def decide(
    candidates: Sequence[Candidate], policy: Policy, model: Callable[[], Model] | None = None, shaped: bool = True
) -> Plan:
    """The policy's plan for ``candidates``; blocked ones stay exact with the reason that blocks them.

    A layer whose shapes are not known shares its selection with no other, whatever the policy says.

    Args:
        candidates: All of the model.
        policy: What decides.
        model: Makes the view of the whole graph, for policies that decide about it; None where there is none.
        shaped: The model was run on fake tensors, as far as that goes; else no shape is known.

    Raises:
        TypeError: ``policy`` is none.
        ShapesRequiredError: The policy reads shapes, and the model was not run.
    """
    check_policy(policy)
    unknown = [c.name for c in candidates if c.facts is None and not c.blocked]
    if policy.needs_shapes and unknown and not shaped:
        raise ShapesRequiredError(
            f"policy: {type(policy).__name__} decides by shapes, which are not known for {len(unknown)} of "
            f"{len(candidates)} candidates ({', '.join(unknown[:3])}...): give example_inputs, one training batch, or "
            "a policy that needs none, such as fx_approx.policies.Uniform(0.5, scope='layer')"
        )
    if isinstance(policy, Plan):
        decided: Sequence[Decision] | Plan = dataclasses.replace(policy, decisions=tuple(policy.decide(candidates)))
    elif model is not None and is_whole(policy):
        decided = policy.decide_whole(model())
    else:
        decided = policy.decide(candidates)
    tokens = (decided.tokens, decided.why_tokens) if isinstance(decided, Plan) else ()
    return make_plan(candidates, [_apart(one) if one.name in unknown else one for one in decided], *tokens)


def _apart(decision: Decision) -> Decision:
    """The decision about a layer of which nobody knows who else reads its input."""
    if not decision.roles or decision.scope == "layer":
        return decision
    reason = f"{decision.reason}; {_UNKNOWN}" if decision.reason else _UNKNOWN
    return dataclasses.replace(decision, scope="layer", reason=reason)
