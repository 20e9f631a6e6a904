"""From a variant to the model that is trained: its policy, its schedule of ratios, and when that changes."""

from __future__ import annotations

import collections
import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import costs
from config import Config, ConfigError, Variant, one_of
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import (
    Auto,
    Exact,
    FlopBudget,
    GradientSampling,
    MemoryBudget,
    Override,
    Paper,
    TimeBudget,
    Tokens,
    Uniform,
)
from fx_approx.schedules import schedule as schedules

POLICIES: dict[str, Callable[..., Any]] = {
    "paper": Paper,
    "uniform": Uniform,
    "backward": GradientSampling.backward,
    "weight_gradient": GradientSampling.weight_gradient,
    "straight": GradientSampling.straight,
    "auto": Auto,
    "flops": FlopBudget,
    "time": TimeBudget,
    "memory": MemoryBudget,
    "tokens": Tokens,
}

_ALWAYS = 2**31 - 1

PLANNED, EXACT = "sampled", "exact"
"""The phases of a training without moving ratios; a ratio on the way is a phase by its number."""


def policy_of(config: Config, name: str, compiled: bool = False) -> Any:
    """The policy of a variant, None for exact training.

    Raises:
        ConfigError: Names variant, key, value and what would be right.
    """
    variant = config.variants[name]
    if not variant.policy:
        return None
    return _policy(f"{config.path.name}: variants.{name!r}.policy", variant.policy, variant.exact, compiled)


def _policy(where: str, table: Mapping[str, Any], exact: Sequence[str], compiled: bool) -> Any:
    options = dict(table)
    kind = options.pop("kind", None)
    if kind == "tokens" and "layers" in options:
        options["layers"] = _policy(f"{where}.layers", options["layers"], exact, compiled)
    try:
        one_of("kind", kind, list(POLICIES))
        if kind == "auto":
            options.setdefault("compiled", compiled)
        policy = POLICIES[kind](**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None
    if exact and kind != "tokens":
        policy = Override(dict.fromkeys(exact, Exact()), policy)
    return policy


def with_sensitivity(
    policy: Any, model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], smoothing: float
) -> tuple[Any, int]:
    """The budget ``policy`` with errors measured on ``batches``, and the exact steps that this took at most."""
    fields = ("sampler", "scores", "scope", "min_k", "round_to", "keep_first", "keep_last")
    steps = 0

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal steps
        steps += 1
        return costs.loss_of(model(batch[0]), batch[1], smoothing)

    options = {field: getattr(policy, field) for field in fields}
    found = fx_approx.analysis.sensitivity(model, batches, loss, batches[0][0], **options)
    return dataclasses.replace(policy, sensitivity=found), steps


def schedule_of(config: Config, name: str, steps: int) -> schedules.Schedule | None:
    """The schedule of a variant in a training of so many steps, None if its ratios never change.

    Raises:
        ConfigError: It moves to another ratio, but its policy has none to begin with.
    """
    variant = config.variants[name]
    warmup, tail = round(variant.warmup * steps), round(variant.tail * steps)
    schedule: schedules.Schedule = schedules.PlanRatios()
    if variant.end_ratio:
        ratio = variant.policy.get("ratio")
        if not isinstance(ratio, float):
            raise ConfigError(f"{config.path.name}: variants.{name!r}.policy.ratio: expected a number, got {ratio!r}")
        moving = {"linear": schedules.Linear, "cosine": schedules.Cosine}[variant.along]
        schedule = moving(ratio, variant.end_ratio, max(1, steps - warmup - tail), levels=variant.levels)
    if variant.interleave:
        schedule = schedules.PeriodicExact(schedule, variant.interleave)
    if warmup:
        schedule = schedules.ExactWarmup(schedule, warmup)
    if tail:
        schedule = schedules.ExactTail(schedule, steps, tail)
    return None if isinstance(schedule, schedules.PlanRatios) else schedule


@dataclasses.dataclass(frozen=True)
class Phases:
    """Which step of a training belongs to which phase.

    Attributes:
        names: The phase of each step.
        first: The first step of each phase.
    """

    names: tuple[str, ...]
    first: Mapping[str, int]

    @property
    def counts(self) -> dict[str, int]:
        """Steps of each phase."""
        return dict(collections.Counter(self.names))


def phases(variant: Variant, schedule: schedules.Schedule | None, steps: int) -> Phases:
    """Of a training with ``schedule``."""
    if schedule is None:
        names = [PLANNED if variant.policy else EXACT] * steps
    else:
        names = [_phase(schedule.ratio(step)) for step in range(steps)]
    first: dict[str, int] = {}
    for step, name in enumerate(names):
        first.setdefault(name, step)
    return Phases(tuple(names), first)


def _phase(ratio: float | None) -> str:
    if ratio is None:
        return PLANNED
    return EXACT if ratio >= 1 else f"{ratio:g}"


def approximate(model: nn.Module, policy: Any, example: Tensor, variant: Variant, seed: int) -> nn.Module:
    """``model`` transformed; itself without a policy."""
    if policy is None:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.NoEffectWarning)  # Auto may find nothing; the record says so
        return fx_approx.transform(
            model, policy, example, seed=seed, selection_interval=variant.every or _ALWAYS, prune_unread=variant.demand
        )


def samples(model: nn.Module) -> bool:
    """Whether anything of a transformed ``model`` is sampled: products, or tokens."""
    return bool(model._fx_approx.tokens) or any(row.samples for row in fx_approx.report(model).rows)


class Ratios:
    """Moves the ratios of a model along its schedule; does nothing without one.

    Attributes:
        model: What is trained in this step.
    """

    def __init__(self, model: nn.Module, schedule: schedules.Schedule | None, preserve: bool = False) -> None:
        """Sets the ratios of step 0; ``preserve`` as in :class:`fx_approx.schedules.RatioScheduler`."""
        self.model = model
        self._scheduler = None
        if schedule is not None and samples(model):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", fx_approx.errors.BatchNormWarning)  # recalibrated ones are recorded
                self._scheduler = fx_approx.schedules.RatioScheduler(model, schedule, preserve=preserve)

    def jump(self, step: int) -> None:
        """To the ratios of ``step``."""
        if self._scheduler is not None:
            self._scheduler.load_state_dict({**self._scheduler.state_dict(), "last_step": step})

    def step(self) -> None:
        """To those of the next step."""
        if self._scheduler is not None:
            self._scheduler.step()

    def begin(self) -> None:
        """To step 0 of the training."""
        self.jump(0)

    def state(self) -> Any:
        """None: the step says all."""

    def resume(self, step: int, state: Any) -> None:
        """Goes on at ``step``."""
        self.jump(step)
