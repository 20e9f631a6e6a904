"""What a plan will save in time, predicted by a cost model and, if wanted, measured beside it."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from fx_approx.compiler.transform import view_of
from fx_approx.core.plan import Cost, Policy
from fx_approx.core.step_cost import MakeOptimizer, StepTime, WholeCostModel
from fx_approx.policies.cost_roofline import RooflineModel


@dataclasses.dataclass(frozen=True)
class StepTimeEstimate:
    """A training step, exact and under a plan.

    Attributes:
        exact: Predicted cost of the exact step.
        now: Predicted cost under the plan.
        omits: What the cost model leaves out.
        measured: The step under the plan as it was timed; None if it was not.
    """

    exact: Cost
    now: Cost
    omits: str
    measured: StepTime | None = None

    @property
    def speedup(self) -> float | None:
        """Predicted: exact / now; None if the cost model has no times."""
        if self.exact.seconds is None or not self.now.seconds:
            return None
        return self.exact.seconds / self.now.seconds

    def __str__(self) -> str:
        if self.exact.seconds is None or self.now.seconds is None:
            text = f"{self.exact.flops:.4g} operations exact, {self.now.flops:.4g} now, predicted"
        else:
            times = f"{1000 * self.exact.seconds:.1f} ms exact, {1000 * self.now.seconds:.1f} ms now"
            text = f"{self.speedup:.2f} times as fast, predicted ({times})"
        if self.measured is not None:
            text += f"; measured {self.measured} ({1000 * self.measured.seconds:.1f} ms)"
        return f"{text}. Left out: {self.omits}."


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
    decisions = {decision.name: decision for decision in plan.sampled}
    chosen = RooflineModel(compiled) if cost is None else cost
    some = view.with_tokens(plan.tokens)
    exact, now = chosen.step(view.work({}), view), chosen.step(some.work(decisions), some)
    timed = view.time([decisions], tokens=[plan.tokens], compiled=compiled, repeats=repeats) if check else None
    measured = None if timed is None else timed[1]
    return StepTimeEstimate(exact, now, chosen.omits, measured)
