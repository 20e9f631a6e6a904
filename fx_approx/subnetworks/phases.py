"""Trains by phases: the full model where a schedule says exact, else a subnetwork, selected anew now and then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fx_approx.runtime.approx_module import find
from fx_approx.runtime.controls import set_sampling
from fx_approx.runtime.handle import GraphHandle
from fx_approx.sampling.base import Selection
from fx_approx.schedules.schedule import Schedule, check_step
from fx_approx.subnetworks.extract import extract, reselect
from fx_approx.subnetworks.merge import merge
from fx_approx.subnetworks.optimizers import Rest, full_moments, narrow_optimizer, restore_moments, widen_optimizer
from fx_approx.subnetworks.record import record_of


class Phases:
    """Swaps between a full model and its subnetworks, with one optimiser that follows.

    ::

        phases = Phases(approx, optimizer, ExactTail(ExactWarmup(PlanRatios(), 50), total=1000, steps=20))
        for x, y in batches:
            loss = F.cross_entropy(phases.model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            phases.step()

    Attributes:
        model: What is to be called in this step: the full model, of a backend compiled by it, or a subnetwork.
        last_step: The step that it is for.
    """

    def __init__(
        self,
        model: nn.Module | GraphHandle,
        optimizer: Optimizer,
        schedule: Schedule,
        *,
        interval: int | None = None,
        preserve: bool = True,
        rest: Rest = "cpu",
        example_inputs: Any = None,
    ) -> None:
        """Begins with step 0.

        Args:
            model: A transformed model whose selections are made ahead, or a backend that compiles one.
            optimizer: Of its parameters.
            schedule: The ratio at each step; where it is 1 the full model trains exactly.
            interval: Steps from one selection to the next within a phase; None keeps the first.
            preserve: Where a phase ends in a wider one, first set to zero what the subnetwork does not read, so that
                what was trained goes on as it is.
            rest: Where the moments of what the subnetwork does not have wait, see
                :func:`fx_approx.subnetworks.narrow_optimizer`.
            example_inputs: A batch, so that subnetworks may run the model's own Python, see
                :func:`fx_approx.subnetworks.extract`; required with a backend.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: ``model`` is not transformed, or ``interval`` is below 1; of a backend, it compiles no model
                yet, or there are no ``example_inputs``.
        """
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule: expected a schedule such as Constant(0.5), got {schedule!r}")
        if interval is not None:
            check_step("interval", interval, 1)
        if isinstance(model, GraphHandle) and example_inputs is None:
            raise ValueError("example_inputs: expected a batch, which a subnetwork of a backend's model is tried on")
        self._full: nn.Module
        self._source: nn.Module | GraphHandle
        if isinstance(model, GraphHandle):
            self._full, self._source = model.compiled(model.model("Phases")), model
        else:
            self._full = self._source = find(model)
        self._optimizer, self._schedule = optimizer, schedule
        self._interval, self._preserve, self._rest, self._example = interval, preserve, rest, example_inputs
        self._sub: nn.Module | None = None
        self._ratio: float | None = 1.0
        self._since = 0
        self.last_step = 0
        self._enter(schedule.ratio(0))

    @property
    def model(self) -> nn.Module:
        return self._full if self._sub is None else self._sub

    def step(self) -> None:
        """Goes on to the next step; to be called after the optimiser's."""
        self.last_step += 1
        ratio = self._schedule.ratio(self.last_step)
        self._since += 1
        if ratio != self._ratio:
            self._leave(ratio)
            self._enter(ratio)
        elif self._sub is not None and self._interval is not None and self._since >= self._interval:
            self._write_back(False)
            reselect(self._sub, self._source)
            narrow_optimizer(self._optimizer, self._sub, self._source, rest=self._rest)
            self._since = 0

    def finish(self) -> nn.Module:
        """Writes the subnetwork back, if there is one; returns the full model, which computes what that did."""
        self._leave(1.0)
        self._enter(1.0)
        return self._full

    def _leave(self, ratio: float | None) -> None:
        if self._sub is not None:
            before, now = (1.0 if one is None else one for one in (self._ratio, ratio))
            self._write_back(self._preserve and (now > before or ratio == 1))
            self._sub = None

    def _write_back(self, preserve: bool) -> None:
        assert self._sub is not None
        merge(self._sub, self._source, preserve=preserve)
        widen_optimizer(self._optimizer, self._sub)

    def _enter(self, ratio: float | None, selections: tuple[Selection | None, ...] | None = None) -> None:
        self._ratio, self._since = ratio, 0
        if ratio == 1:
            set_sampling(self._source, enabled=False)
            return
        set_sampling(self._source, ratio, enabled=True)
        self._sub = extract(self._source, selections, example_inputs=self._example)
        self._sub.train(self._full.training)
        narrow_optimizer(self._optimizer, self._sub, self._source, rest=self._rest)

    def state_dict(self) -> dict[str, Any]:
        """All that goes on from here, beside the states of the full model and of the optimiser."""
        if self._sub is None:
            return {"last_step": self.last_step, "since": self._since, "sub": None}
        chosen = [None if one is None else tuple(one) for one in record_of(self._sub).selections]
        return {
            "last_step": self.last_step,
            "since": self._since,
            "sub": self._sub.state_dict(),
            "selections": chosen,
            "moments": full_moments(self._optimizer),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another one was.

        Call it after the full model has loaded its state, and before the optimiser loads its own.

        Raises:
            ValueError: That is no such state.
        """
        if not {"last_step", "since", "sub"} <= set(state):
            raise ValueError(f"state: expected what Phases.state_dict gives, got the keys {sorted(state)}")
        if self._sub is not None:
            widen_optimizer(self._optimizer, self._sub)
            self._sub = None
        self.last_step = state["last_step"]
        ratio = self._schedule.ratio(self.last_step)
        if state["sub"] is None:
            self._enter(ratio)
        else:
            self._enter(ratio, tuple(None if one is None else Selection(*one) for one in state["selections"]))
            assert self._sub is not None
            with torch.no_grad():
                self._sub.load_state_dict(state["sub"])
            restore_moments(self._optimizer, state["moments"])
        self._since = state["since"]
