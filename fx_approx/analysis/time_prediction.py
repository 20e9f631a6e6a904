"""What a plan will save in time, predicted by a cost model and, if wanted, measured beside it."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from fx_approx.compiler.transform import view_of
from fx_approx.core.plan import Policy
from fx_approx.core.step_cost import MakeOptimizer, StepTimeEstimate, WholeCostModel
from fx_approx.policies.cost_roofline import RooflineModel


def estimate_step_time(
    model: nn.Module,
    policy: Policy,
    example_inputs: Any,
    *,
    cost: WholeCostModel | None = None,
    check: bool = False,
    compiled: bool = False,
    repeats: int = 9,
    prune_unread: bool = True,
    subnetwork: bool = False,
    optimizer: MakeOptimizer | None = None,
) -> StepTimeEstimate:
    """What a policy or plan will do to the time of a training step, without transforming the model.

    Args:
        model: As in :func:`fx_approx.transform`; it is not changed.
        policy: A policy, or a plan.
        example_inputs: As there.
        cost: The cost model; by default :class:`fx_approx.policies.RooflineModel` of the model's device.
        check: Time steps, too, in turn with the exact one, with the mean of the squares of the outputs as the loss.
        compiled: The step will be compiled. With ``check`` both are, which takes the time of two compilations.
        repeats: Steps that are timed, of each.
        prune_unread: As in ``transform``.
        subnetwork: The plan is run as a subnetwork, which :func:`fx_approx.subnetworks.extract` makes.
        optimizer: Makes the optimiser whose update is part of the step, such as ``torch.optim.AdamW``; None: no update.

    Raises:
        ValueError: ``repeats`` is below 1; and as ``transform``.
        UnsupportedError: The plan has no subnetwork.
    """
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"repeats: expected an integer of at least 1, got {repeats!r}")
    if example_inputs is None:
        raise ValueError("example_inputs: expected a training batch, since times depend on shapes, got None")
    seen, plan = view_of(model, policy, example_inputs, prune_unread)
    view = seen.realized(subnetwork, optimizer)
    estimate = view.estimate(plan, RooflineModel(compiled) if cost is None else cost)
    if not check:
        return estimate
    decisions = {decision.name: decision for decision in plan.sampled}
    _, measured = view.time([decisions], tokens=[plan.tokens], compiled=compiled, repeats=repeats)
    return dataclasses.replace(estimate, measured=measured)
