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
from fx_approx.subnetworks import Phases, extract, record_of
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
        """Of a training of so many ``steps``, after which the full network has what was learnt."""
        self._full, self._optimizer, self._schedule = model, optimizer, schedule or PlanRatios()
        self._variant, self._steps, self._example = variant, steps, example
        self._shown, self._step = model, 0
        self._phases: Phases | None = None
        self._cut: dict[float | None, nn.Module] = {}

    @property
    def model(self) -> nn.Module:
        """What is trained in this step, and in evaluation says how good it is."""
        return self._shown if self._phases is None else self._phases.model

    def jump(self, step: int) -> None:
        """Before the training: to such a network as ``step`` has, cut out of the full one once for each ratio."""
        ratio = self._schedule.ratio(step)
        if ratio == 1:
            fx_approx.set_sampling(self._full, enabled=False)
            self._shown = self._full
        else:
            fx_approx.set_sampling(self._full, ratio, enabled=True)
            if ratio not in self._cut:
                self._cut[ratio] = extract(self._full, example_inputs=self._example)
            self._shown = self._cut[ratio]

    def begin(self) -> None:
        """To step 0 of the training."""
        self._cut.clear()
        self._phases = Phases(
            self._full,
            self._optimizer,
            self._schedule,
            interval=self._variant.every or None,
            preserve=self._variant.preserve,
            example_inputs=self._example,
        )

    def step(self) -> None:
        """To the network of the next step."""
        assert self._phases is not None
        self._step += 1
        if self._step < self._steps:
            self._phases.step()
        else:
            self._phases.finish()

    def state(self) -> Any:
        """For :meth:`resume`."""
        return None if self._phases is None or self._step == self._steps else self._phases.state_dict()

    def resume(self, step: int, state: Any) -> None:
        """Goes on at ``step``; the full network and its sampling have been loaded, the optimiser has not."""
        self._step = step
        if state is None:  # all steps were made
            self._shown = self._full
            return
        self.begin()
        assert self._phases is not None
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
