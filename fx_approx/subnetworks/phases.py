"""Trains by phases: the full model where a schedule says exact, else a subnetwork, selected anew now and then."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fx_approx.analysis.scalar_logger import ScalarLogger
from fx_approx.errors import BatchNormWarning, NoEffectWarning
from fx_approx.runtime.controls import follow_modes, set_each
from fx_approx.runtime.handle import GraphHandle
from fx_approx.runtime.upcoming import use_up
from fx_approx.sampling.base import Selection
from fx_approx.schedules.preserve import check_preservable
from fx_approx.schedules.ratio_scheduler import RatioScheduler
from fx_approx.schedules.schedule import Schedule, check_step
from fx_approx.subnetworks.merge import write_back
from fx_approx.subnetworks.optimizers import (
    Rest,
    check_optimizer,
    check_parameters,
    check_widening,
    full_moments,
    narrow_optimizer,
    restore_moments,
    widen_optimizer,
)
from fx_approx.subnetworks.record import record_of
from fx_approx.subnetworks.selections import Selections
from fx_approx.subnetworks.source import source_of
from fx_approx.subnetworks.stale import StaleWatch

_KEYS = {"scheduler", "since", "sub"}
_PATIENCE = 5
"""Steps without one of the optimiser before that is said: a gradient scaler leaves out some at the beginning."""


@dataclasses.dataclass
class _Phase:
    """A subnetwork.

    Attributes:
        sub: As it was cut out.
        outer: What wraps it, and is called.
        setting: Ratios and switches that it was cut out by.
    """

    sub: nn.Module
    outer: nn.Module
    setting: tuple[Any, ...]


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

    For selections that are kept for some tens of steps at least, since each swap copies weights and moments. Where
    selections are to be others in every step, follow the activations (scores ``online``), or parameters must stay full
    size, train the transformed model itself (``fx_approx.schedules.RatioScheduler``).

    To validate the full model during a phase warns: it has the weights from before.

    Attributes:
        model: What is to be called in this step: the full model, or a subnetwork; in what ``wrap`` made of it.
        last_step: The step that it is for.
    """

    def __init__(
        self,
        model: nn.Module | GraphHandle,
        optimizer: Optimizer,
        schedule: Schedule | Mapping[str, Schedule],
        *,
        interval: int | None = None,
        preserve: bool = True,
        rest: Rest = "cpu",
        example_inputs: Any = None,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
        log: ScalarLogger | None = None,
    ) -> None:
        """Begins with step 0.

        Args:
            model: A transformed model whose selections are made ahead, or a backend that has compiled one.
            optimizer: Of its parameters.
            schedule: The ratio at each step, for all layers or by glob on their names, as in
                :class:`fx_approx.schedules.RatioScheduler`; where all layers are exact the full model trains.
            interval: Steps from one selection to the next within a phase. None takes the ``selection_interval`` of the
                transform where that is above 1, and else keeps the first selection of a phase.
            preserve: Where a ratio rises at the end of a phase, first set to zero what the subnetwork does not read, so
                that what was trained goes on as it is. For ratios that rise once or a few times; not for
                ``PeriodicExact``.
            rest: Where the moments of what the subnetwork does not have wait, see
                :func:`fx_approx.subnetworks.narrow_optimizer`.
            example_inputs: A batch, so that subnetworks may run the model's own Python, see
                :func:`fx_approx.subnetworks.extract`. Required with a backend.
            wrap: Makes of the full model, and of each subnetwork, what is called: ``torch.compile``, or
                ``DistributedDataParallel``. It is called once for each; a new selection goes into the same tensors, so
                that nothing is compiled again. The last subnetwork waits through full phases, and serves again where
                the ratios are the same. The ranks of a ``DistributedDataParallel`` compare their selections.
            log: Told the ratios whenever they change.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: ``model`` is not transformed, ``interval`` is below 1, ``schedule`` names no layer, the
                optimiser is of other parameters, or, with ``preserve``, a sampler scales what it reads. Nothing is
                changed then, nor by the next.
            UnsupportedError: No subnetwork follows from the model, or the optimiser cannot move; see
                :func:`fx_approx.subnetworks.extract` and :func:`fx_approx.subnetworks.narrow_optimizer`.
            DistributedMismatchError: The selections differ between the ranks.

        Warns:
            BatchNormWarning: An exact tail is too short for the BatchNorm statistics, without ``preserve``.
        """
        if interval is not None:
            check_step("interval", interval, 1)
        if not isinstance(preserve, bool):
            raise TypeError(f"preserve: expected True or False, got {preserve!r}")
        if rest not in ("cpu", "keep", "drop"):
            raise ValueError(f"rest: expected 'cpu', 'keep' or 'drop', got {rest!r}")
        if wrap is not None and not callable(wrap):
            raise TypeError(f"wrap: expected what makes a module of a module, such as torch.compile, got {wrap!r}")
        self._source = source_of(model, example_inputs)
        self._full, self._optimizer, self._wrap = self._source.full, optimizer, wrap
        every = self._source.interval
        self._interval = interval if interval is not None or every == 1 else every
        self._preserve, self._rest = preserve, rest
        for piece in self._source.pieces if preserve else ():
            check_preservable(piece, "preserve")
        self._try()
        self._outer: nn.Module | None = None
        self._phase: _Phase | None = None
        self._idle: _Phase | None = None
        self._since = 0
        self._stepped = False
        self._missed = 0
        self._trains: bool | None = None
        self._watch = StaleWatch(self._full)
        before = self._source.settings()
        with warnings.catch_warnings():
            if preserve:  # what a phase gathers fits the exact model then, see merge
                warnings.simplefilter("ignore", BatchNormWarning)
            self._scheduler = RatioScheduler(self._source.given, schedule, log=log)
        try:
            self._enter()
        except BaseException:
            set_each(self._source.given, before)
            raise
        reference = weakref.WeakMethod(self._note_step)
        optimizer.register_step_post_hook(lambda *_: None if (note := reference()) is None else note())

    @property
    def model(self) -> nn.Module:
        if self._phase is not None:
            return self._phase.outer
        if self._outer is None:
            self._outer = self._wrapped(self._full)
        return self._outer

    @property
    def subnetwork(self) -> nn.Module | None:
        """The narrow network that trains in this step, without what wraps it; None while the full model does."""
        return None if self._phase is None else self._phase.sub

    def changes_next(self) -> tuple[bool, bool]:
        """Whether :meth:`step` will change a ratio, and whether some layers will read more after it."""
        return self._scheduler.changes_next()

    def get_last_ratio(self) -> dict[str, float]:
        """The ratio in force by layer, see :meth:`RatioScheduler.get_last_ratio`."""
        return self._scheduler.get_last_ratio()

    @property
    def last_step(self) -> int:
        return self._scheduler.last_step

    def step(self) -> None:
        """Goes on to the next step; to be called after the optimiser's.

        Where the model changes, gradients that the optimiser has taken its step by are cleared; others, of which a
        step has yet to come, go along.

        Raises:
            ValueError: A phase begins, and scores ``ema`` have learnt nothing yet; or the full model was changed
                during a phase.
            DistributedMismatchError: The selections differ between the ranks.

        Warns:
            NoEffectWarning: The optimiser's first step in a phase changed no parameter of the subnetwork; or it has not
                stepped for some steps.
        """
        self._check_trained()
        self._check_stepped()
        steps = self._since + 1
        changed, rising = self._scheduler.changes_next()
        if changed:
            self._leave(self._preserve and rising, steps)
            self._scheduler.step()
            self._enter()
        else:
            if self._phase is not None and self._interval is not None and steps >= self._interval:
                self._anew(self._phase, steps)
            else:
                self._since = steps
            self._scheduler.step()
        self._stepped = False

    def finish(self) -> nn.Module:
        """Writes the subnetwork back, if there is one; returns the full model, exact, which computes what that did."""
        self._leave(self._preserve, self._since)
        self._source.switch_off()
        return self._full

    def _check_trained(self) -> None:
        """Warns once a phase where it is not :attr:`model` that trains: an older one was called, or kept in a name."""
        if self._phase is not None and self._trains is False:
            warnings.warn(
                "step: the optimiser has changed no parameter of the subnetwork, none of which has a gradient; call "
                "phases.model, or recipe.model, afresh in each step: it is another module from phase to phase",
                NoEffectWarning,
                stacklevel=3,
            )
            self._trains = True

    def _check_stepped(self) -> None:
        """Warns where another optimiser seems to train."""
        self._missed = 0 if self._stepped else self._missed + 1
        if self._missed == _PATIENCE:
            warnings.warn(
                f"step: the optimiser that was given has not stepped in the last {_PATIENCE} steps; give the recipe, "
                "or Phases, the one that trains, and call its step() before this one: only that one follows into a "
                "subnetwork",
                NoEffectWarning,
                stacklevel=3,
            )

    def _note_step(self) -> None:
        self._stepped = True
        if self._phase is not None and self._trains is None:
            self._trains = any(parameter.grad is not None for parameter in self._phase.sub.parameters())

    def _wrapped(self, module: nn.Module) -> nn.Module:
        outer = module if self._wrap is None else self._wrap(module)
        if not isinstance(outer, nn.Module):
            raise TypeError(f"wrap: expected that it returns a module, got {outer!r}")
        return outer

    def _try(self) -> None:
        """Makes a subnetwork and throws it away: what does not work is said before the training, and not within it."""
        sub = self._source.sample_sub()
        if sub is None:
            check_parameters(self._optimizer, {id(parameter) for parameter in self._full.parameters()})
        else:
            check_optimizer(self._optimizer, sub, self._source.given)

    def _leave(self, preserve: bool, steps: int) -> None:
        """Back to the full model."""
        phase = self._phase
        if phase is None:
            return
        self._write_back(phase, preserve, steps)
        follow_modes(self._full, phase.sub)
        self._end(phase)

    def _write_back(self, phase: _Phase, preserve: bool, steps: int) -> bool:
        """After so many steps; returns whether the next selection is another one."""
        graphs = self._source.graphs(phase.sub)
        self._clear_spent()
        check_widening(self._optimizer, phase.sub)  # before anything is written
        held = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        write_back(phase.sub, self._source.given, preserve, lambda one: one.requires_grad and id(one) in held)
        widen_optimizer(self._optimizer, phase.sub)
        return any([use_up(approx, chosen, steps) for approx, chosen in graphs])

    def _clear_spent(self) -> None:
        if self._stepped:
            self._optimizer.zero_grad()

    def _anew(self, phase: _Phase, steps: int) -> None:
        """Another selection within a phase."""
        if not self._write_back(phase, False, steps):
            for approx, chosen in self._source.graphs(phase.sub):
                use_up(approx, chosen)
        self._end(phase)
        self._begin(self._source.chosen(self._group()))

    def _end(self, waits: _Phase | None) -> None:
        """The full model has all that was trained; the subnetwork may wait for its next phase."""
        self._phase, self._idle = None, waits
        self._watch.set(False)

    def _enter(self) -> None:
        """A phase by the ratios of the moment, if they sample."""
        self._since = 0
        self._clear_spent()
        if self._source.samples:
            self._begin(self._source.chosen(self._group()))

    def _begin(self, chosen: Selections | None) -> None:
        """A phase by these selections, in the subnetwork that waits where that has their sizes."""
        phase, setting, known = self._idle, self._source.setting, self._group()
        if phase is None or phase.setting != setting or not self._source.anew(phase.sub, chosen, known):
            phase = self._idle = None  # before the next one takes memory
            phase = self._made(self._source.make(chosen, known))
        self._train(phase)

    def _made(self, sub: nn.Module) -> _Phase:
        """A phase in a new subnetwork; selections are compared where its wrapper is the first to name other ranks."""
        phase, known = _Phase(sub, self._wrapped(sub), self._source.setting), self._group()
        group = _group(phase.outer)
        if group is not None and known is None:
            self._source.compare(sub, group)
        return phase

    def _train(self, phase: _Phase) -> None:
        """The optimiser goes over to a subnetwork."""
        narrow_optimizer(self._optimizer, phase.sub, self._source.given, rest=self._rest)
        self._phase, self._idle, self._since = phase, None, 0
        self._trains = None
        self._watch.set(True)

    def _group(self) -> Any:
        """The process group that is known so far."""
        return _group(self._outer) or _group(None if self._idle is None else self._idle.outer)

    def state_dict(self) -> dict[str, Any]:
        """All that goes on from here, beside the states of the full model and of the optimiser."""
        state = {"scheduler": self._scheduler.state_dict(), "since": self._since, "sub": None}
        if self._phase is None:
            return state
        sub = self._phase.sub
        return {
            **state,
            "sub": sub.state_dict(),
            "selections": [None if one is None else tuple(one) for one in record_of(sub).selections],
            "moments": full_moments(self._optimizer),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another one was, with its schedules.

        Call it after the full model has loaded its state, and before the optimiser loads its own. A subnetwork that is
        there is thrown away.

        Raises:
            ValueError: That is no such state, or of another model. Nothing is changed then.
        """
        if not set(state) >= _KEYS or (state["sub"] is not None and not {"selections", "moments"} <= set(state)):
            raise ValueError(f"state: expected what Phases.state_dict gives, got the keys {sorted(state)}")
        check_step("since", state["since"])
        sub = None if state["sub"] is None else self._restored(state)
        if self._phase is not None:
            check_widening(self._optimizer, self._phase.sub)
        elif sub is not None:
            check_optimizer(self._optimizer, sub, self._source.given)
        self._scheduler.load_state_dict(state["scheduler"])
        if self._phase is not None:
            widen_optimizer(self._optimizer, self._phase.sub)
        self._end(None)
        if sub is not None:
            self._train(self._made(sub))
            restore_moments(self._optimizer, state["moments"])
        self._since = state["since"]

    def _restored(self, state: Mapping[str, Any]) -> nn.Module:
        """The subnetwork of a checkpoint; ValueError if it is of another model."""
        given = tuple(None if one is None else Selection(*one) for one in state["selections"])
        sub = self._source.make(given, self._group())
        try:
            sub.load_state_dict(state["sub"])
        except RuntimeError as error:
            raise ValueError(f"state: of another model: {error}") from error
        unknown = sorted(set(state["moments"]) - {name for name, _ in record_of(sub).identity})
        if unknown:
            raise ValueError(f"state: of another model: it has moments of {unknown[0]}, which this one has not")
        return sub


def _group(outer: nn.Module | None) -> Any:
    """The process group over which a module is trained in parallel; None if it is not."""
    modules = () if outer is None else outer.modules()
    found = [module for module in modules if isinstance(module, DistributedDataParallel)]
    return found[0].process_group if found else None
