"""Trains narrow networks in the place of the full one where it would be sampled; measures one that is shipped."""

from __future__ import annotations

from typing import Any

import costs
import torch
from config import Variant
from torch import Tensor, nn

import fx_approx
from fx_approx.schedules import PlanRatios
from fx_approx.schedules.schedule import Schedule
from fx_approx.subnetworks import Phases, record_of
from fx_approx.utils.timing import in_turn

_ROUNDS = 20
"""Forward passes of each network that are timed, in turn."""

_BOTH = ("full", "sub")


class Subnetworks:
    """In the place of :class:`variants.Ratios`: where a step is not exact, a narrow network of its own is trained."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule | None,
        variant: Variant,
        steps: int,
        example: Tensor,
    ) -> None:
        """Begins with step 0; after ``steps`` the full network has what was learnt."""
        self._full, self._steps, self._step = model, steps, 0
        self._phases = Phases(
            model,
            optimizer,
            schedule or PlanRatios(),
            interval=variant.every or None,
            preserve=variant.preserve,
            example_inputs=example,
        )

    @property
    def model(self) -> nn.Module:
        """What is trained in this step, and in evaluation says how good it is."""
        return self._phases.model

    def jump(self, step: int) -> None:
        """To the network of ``step``, cut out of the full one as it is; what a narrow one has learnt is lost."""
        self._step = step
        self._phases.load_state_dict({"last_step": step, "since": 0, "sub": None})

    def step(self) -> None:
        """To that of the next step."""
        self._step += 1
        if self._step < self._steps:
            self._phases.step()
        else:
            self._phases.finish()

    def state(self) -> Any:
        """For :meth:`resume`."""
        return None if self._step == self._steps else self._phases.state_dict()

    def resume(self, step: int, state: Any) -> None:
        """Goes on at ``step``; the full network and its sampling have been loaded, the optimiser has not."""
        self._step = step
        if state is None:  # all steps were made
            kept = {name: value.clone() for name, value in self._full.state_dict().items()}
            self._phases.finish().load_state_dict(kept)
        else:
            self._phases.load_state_dict(state)


def shipped(model: nn.Module, sub: nn.Module, x: Tensor, device: torch.device, clock: Any) -> dict[str, Any]:
    """What ``sub`` is beside the full network: parameters, and the time of a forward pass in evaluation mode.

    ``latency`` has, by the examples of a batch, quartiles of milliseconds of either, and of the full network's time
    over that of the pass of ``sub`` beside it; both are plain modules of torch, called eagerly, in turn.
    """
    full, was = fx_approx.restore(model).eval(), sub.training
    sub.eval()
    latency: dict[str, Any] = {}
    with torch.inference_mode():
        for batch in (x[:1], x):
            calls = [lambda batch=batch: full(batch), lambda batch=batch: sub(batch)]
            taken = in_turn(calls, device, _ROUNDS, warmup=costs.WARM, back_and_forth=True, clock=clock)
            latency[str(len(batch))] = {
                **{name: costs.quartiles([1000 * one for one in own]) for name, own in zip(_BOTH, taken, strict=True)},
                "speedup": costs.quartiles([one / other for one, other in zip(*taken, strict=True)]),
            }
    sub.train(was)
    record = record_of(sub)
    sizes = {
        name: sum(one.numel() for one in module.parameters()) for name, module in zip(_BOTH, (full, sub), strict=True)
    }
    return {"parameters": sizes, "latency": latency, "own_forward": record.own_forward, "reason": record.reason}
