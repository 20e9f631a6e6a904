"""Sets the ratios of a model by schedules, as torch's learning-rate schedulers set rates."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fx_approx.analysis.scalar_logger import ScalarLogger
from fx_approx.core.candidates import Role, matches
from fx_approx.errors import NoEffectWarning
from fx_approx.runtime.approx_module import ApproxModule, find
from fx_approx.runtime.batchnorm import warn_of_short_tail
from fx_approx.runtime.controls import set_each, set_tokens
from fx_approx.runtime.handle import GraphHandle, pieces_of
from fx_approx.runtime.selector import Selector
from fx_approx.runtime.token_selection import TOKENS
from fx_approx.schedules.preserve import check_preservable
from fx_approx.schedules.preserve import preserve as preserve_layers
from fx_approx.schedules.schedule import Schedule, check_ratio, check_step, exact_tail


class RatioScheduler:
    """Drives the sample ratios of a transformed model: call :meth:`step` after each step, or each epoch.

    The ratio of step 0 is set at once. Exact steps switch sampling off and leave the ratio as it is, so that a compiled
    model has one graph for exact steps, whatever the ratios, and one for each distinct ratio.

    There is no method ``approx.step()``: the transformed model is an instance of the user's own class, which may have
    one.

    Attributes:
        schedules: By glob on the names of the layers.
        last_step: The step that the ratios are set for.
    """

    def __init__(
        self,
        model: nn.Module | GraphHandle,
        schedule: Schedule | Mapping[str, Schedule],
        *,
        preserve: bool = False,
        log: ScalarLogger | None = None,
    ) -> None:
        """Sets the ratios of step 0.

        Args:
            model: A transformed model, what wraps it, or a backend: of that the graphs that appear later follow, too.
            schedule: For all layers and for tokens, or by glob on the names of the layers; the first that matches
                decides. ``tokens`` is the name of the share of the tokens (:class:`fx_approx.policies.Tokens`).
            preserve: Where :meth:`step` raises a ratio, or makes a layer exact, first set to zero what the selection
                leaves out, see :func:`fx_approx.schedules.zero_unread_weights`: for ratios that rise once or a few
                times and do not fall again. Of tokens there is nothing to preserve: no weight belongs to them.
            log: Told the ratios whenever they change.

        Raises:
            TypeError: ``schedule`` is none, or ``preserve`` no bool.
            ValueError: ``model`` is not transformed, or a glob matches no sampled layer, or none that an earlier one
                does not match; with ``preserve``, a sampler scales what it reads, or parameters are sharded.
            ShapesRequiredError: ``preserve`` for a model that was transformed without example inputs.

        Warns:
            BatchNormWarning: An :class:`fx_approx.schedules.ExactTail` is too short for the model's BatchNorm
                statistics, if a step is a batch.
        """
        rules = dict(schedule) if isinstance(schedule, Mapping) else {"*": schedule}
        for pattern, one in rules.items():
            if not isinstance(one, Schedule):
                raise TypeError(f"schedule[{pattern!r}]: expected a schedule such as Constant(0.5), got {one!r}")
        if not isinstance(preserve, bool):
            raise TypeError(f"preserve: expected True or False, got {preserve!r}")
        if log is not None and not isinstance(log, ScalarLogger):
            raise TypeError(f"log: expected a ScalarLogger or None, got {log!r}")
        pieces = pieces_of(model)
        if preserve:
            for approx in pieces:
                check_preservable(approx, "preserve")
            if pieces and not any(approx._fx_approx.record.effects.classes for approx in pieces):
                message = "preserve: no selection of channels is made ahead, so nothing is known to be left out"
                warnings.warn(message, NoEffectWarning, stacklevel=2)
        self._model, self._log, self._preserve = model, log, preserve
        self.schedules: dict[str, Schedule] = rules
        self._layers = self._matched(strict=bool(pieces) or not isinstance(model, GraphHandle))
        if preserve and set(self._layers) == {TOKENS} and self._sites():
            message = "preserve: the schedule drives tokens only, to which no weight belongs, so nothing is set to zero"
            warnings.warn(message, NoEffectWarning, stacklevel=2)
        self._planned = {site: selector.spec.ratio for site, selector in self._sites().items()}
        self._plan_tokens()
        self._check_tails()
        self.last_step = 0
        self._set(0)
        if isinstance(model, GraphHandle):
            model.follow(self._joined)

    def _sites(self) -> dict[str, Selector]:
        """By layer and product, such as ``fc1/output``, in the graph that was compiled last."""
        return {
            f"{name}/{role.value}": selector
            for approx in pieces_of(self._model)
            for (name, role), selector in approx._fx_approx.selectors.items()
        }

    def _plan_tokens(self) -> None:
        for approx in pieces_of(self._model):
            for one in approx._fx_approx.tokens:
                self._planned.setdefault(TOKENS, one.ratio)

    def _joined(self, approx: ApproxModule, new: bool) -> None:
        """A graph has appeared: its layers get the ratios of this step."""
        if self._preserve:
            check_preservable(approx, "preserve")
        for (name, role), selector in approx._fx_approx.selectors.items():
            self._planned.setdefault(f"{name}/{role.value}", selector.spec.ratio)
        self._plan_tokens()
        self._layers = self._matched(strict=False)
        if new:
            self._check_tails()
        self._set(self.last_step)

    def _matched(self, strict: bool = True) -> dict[str, str]:
        """Layer -> its pattern; ``strict``: an error where a pattern decides about none."""
        found: dict[str, str] = {}
        for runtime in (approx._fx_approx for approx in pieces_of(self._model)):
            candidates = {candidate.name: candidate for candidate in runtime.record.candidates}
            for name, _ in runtime.selectors:
                fit = next((pattern for pattern in self.schedules if matches(pattern, candidates[name])), None)
                if fit is not None:
                    found.setdefault(name, fit)
            fit = next((pattern for pattern in self.schedules if pattern in (TOKENS, "*")), None)
            if runtime.tokens and fit is not None:
                found[TOKENS] = fit
        unused = [pattern for pattern in self.schedules if pattern not in found.values()]
        if unused and strict:
            names = dict.fromkeys(site.rpartition("/")[0] for site in self._sites())
            there = ", ".join(names) or "none, nothing is sampled"
            raise ValueError(
                f"schedule: {', '.join(map(repr, unused))} decides about no sampled layer; there are: {there}"
            )
        return found

    def _check_tails(self) -> None:
        """Warns where the shortest exact tail of the layers whose outputs are sampled is too short."""
        if isinstance(self._model, GraphHandle) and not self._model.pieces:
            return
        outputs = {name for name, _, role in (site.rpartition("/") for site in self._sites()) if role == Role.OUTPUT}
        patterns = {self._layers.get(name) for name in outputs}
        tails = [exact_tail(self.schedules[pattern]) for pattern in patterns if pattern is not None]
        found = [steps for steps in tails if steps is not None]
        models = self._model.models if isinstance(self._model, GraphHandle) else (find(self._model),)
        for model in models:
            if found:
                warn_of_short_tail(model, min(found))

    def step(self) -> None:
        """Goes on to the next step, and sets its ratios."""
        self._set(self.last_step + 1, self._preserve)

    def get_last_ratio(self) -> dict[str, float]:
        """The ratio in force by layer; 1 where sampling is off. Of a layer with several samplers, the first."""
        found: dict[str, float] = {}
        for site, selector in self._sites().items():
            found.setdefault(site.rpartition("/")[0], selector.spec.ratio if selector.enabled else 1.0)
        for approx in pieces_of(self._model):
            for one in approx._fx_approx.tokens:
                found.setdefault(TOKENS, one.ratio if one.enabled else 1.0)
        return found

    def changes_next(self) -> tuple[bool, bool]:
        """Whether :meth:`step` will change anything, and whether some layers will read more after it."""
        changed = rising = False
        for approx in pieces_of(self._model):
            settings = self._settings(approx, self.last_step + 1)
            changed, rising = changed or bool(settings), rising or bool(_rising(approx, settings))
        return changed, rising

    def _settings(self, approx: ApproxModule, step: int) -> dict[Selector, tuple[float, bool]]:
        """Ratio and switch at ``step`` of the selectors that have others now."""
        settings: dict[Selector, tuple[float, bool]] = {}
        for (name, role), selector in approx._fx_approx.selectors.items():
            pattern = self._layers.get(name)
            if pattern is None:
                continue
            ratio = self.schedules[pattern].ratio(step)
            ratio = self._planned[f"{name}/{role.value}"] if ratio is None else ratio
            setting = (ratio, True) if ratio < 1 else (selector.spec.ratio, False)
            if setting != (selector.spec.ratio, selector.enabled):
                settings[selector] = setting
        return settings

    def _set(self, step: int, preserve: bool = False) -> None:
        changed = False
        for approx in pieces_of(self._model):
            settings = self._settings(approx, step)
            if preserve and (rising := _rising(approx, settings)):
                preserve_layers(approx, rising)
            if settings:
                set_each(approx, settings)
                changed = True
            changed |= self._set_tokens(approx, step)
        self.last_step = step
        if self._log is not None and (changed or step == 0):
            self._log.ratios(self.get_last_ratio(), step)

    def _set_tokens(self, approx: ApproxModule, step: int) -> bool:
        pattern, tokens = self._layers.get(TOKENS), approx._fx_approx.tokens
        if pattern is None or not tokens:
            return False
        ratio = self.schedules[pattern].ratio(step)
        ratio = self._planned[TOKENS] if ratio is None else ratio
        wanted = (ratio, True) if ratio < 1 else (tokens[0].ratio, False)
        if wanted == (tokens[0].ratio, tokens[0].enabled):
            return False
        set_tokens(approx, *wanted)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the step and the schedules. Ratios and switches follow from them."""
        return {
            "last_step": self.last_step,
            "schedules": {pattern: schedule.to_dict() for pattern, schedule in self.schedules.items()},
            "planned": dict(self._planned),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another one was, with its schedules.

        Raises:
            TypeError: A value of the wrong type; nothing is changed then.
            ValueError: That is no such state, or of another model; nothing is changed then.
        """
        if set(state) != {"last_step", "schedules", "planned"}:
            raise ValueError(f"state: expected last_step, schedules and planned, got {sorted(state)}")
        sites = {*self._sites(), *({TOKENS} & set(self._planned))}
        if set(state["planned"]) != sites and (sites or not isinstance(self._model, GraphHandle)):
            raise ValueError(f"state: of another model: it has {sorted(state['planned'])}, this one {sorted(sites)}")
        for site, ratio in state["planned"].items():
            check_ratio(f"planned[{site!r}]", ratio)
        step = state["last_step"]
        check_step("last_step", step)
        schedules = {pattern: Schedule.from_dict(data) for pattern, data in state["schedules"].items()}
        before, self.schedules = self.schedules, schedules
        try:
            self._layers = self._matched(strict=bool(sites) or not isinstance(self._model, GraphHandle))
        except ValueError:
            self.schedules = before
            raise
        self._planned = dict(state["planned"])
        self._set(step)


def _rising(approx: ApproxModule, settings: Mapping[Selector, tuple[float, bool]]) -> set[str]:
    """Layers that will read more. Of those that share a selection the largest ratio decides, or one that is off."""
    rising: set[str] = set()
    runtime = approx._fx_approx
    for one in runtime.record.effects.classes:
        readers = [runtime.selectors[reading.name, Role.OUTPUT] for reading in one.readings]
        now = [(selector.spec.ratio, selector.enabled) for selector in readers]
        then = [settings.get(selector, own) for selector, own in zip(readers, now, strict=True)]
        if _largest(then) > _largest(now):
            rising.update(reading.name for reading in one.readings)
    return rising


def _largest(settings: Iterable[tuple[float, bool]]) -> float:
    return max(ratio if enabled else 1.0 for ratio, enabled in settings)
