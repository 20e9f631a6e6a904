"""Budgets: a goal for the whole step, and the ratios that meet it with the least predicted error."""

from __future__ import annotations

import abc
import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from fx_approx.core.plan import Decision, Plan, make_plan
from fx_approx.core.step_cost import Model, StepWorkload, WholeCostModel
from fx_approx.policies.budget_solver import Levels, Problem, cheapest, least_cost, least_error
from fx_approx.policies.cost_flops import FlopModel
from fx_approx.policies.cost_roofline import RooflineModel
from fx_approx.policies.error_model import token_error
from fx_approx.policies.graph_policy import EIGHTHS, GraphPolicy, step_seconds
from fx_approx.policies.sensitivity import Sensitivity
from fx_approx.policies.tokens import Tokens, check_tokens

_CLOSE = 40


def _fraction(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number in (0, 1], got {value!r}")
    if not 0 < float(value) <= 1:
        raise ValueError(f"{name}: expected a number in (0, 1], got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ladder(GraphPolicy):
    """Adds a ladder of ratios to :class:`GraphPolicy`.

    Attributes:
        ratios: The ratios to choose from, beside exact.
        sensitivity: Measured errors by layer, from :func:`fx_approx.analysis.sensitivity`; None: predicted from the
            norms of the weights, layers weighed alike.
    """

    ratios: tuple[float, ...] = EIGHTHS
    sensitivity: Sensitivity | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ratios:
            raise ValueError("ratios: expected at least one number in (0, 1), got none")
        for ratio in self.ratios:
            _fraction("ratios", ratio)
        if self.sensitivity is not None and not isinstance(self.sensitivity, Sensitivity):
            raise TypeError(f"sensitivity: expected a Sensitivity or None, got {self.sensitivity!r}")
        if self.sensitivity is not None and self.mode != "forward":
            raise ValueError("sensitivity: measured for outputs only; expected None, or mode='forward'")

    @property
    def _levels(self) -> list[float]:
        return [1.0, *sorted({float(ratio) for ratio in self.ratios if ratio < 1}, reverse=True)]


@dataclasses.dataclass(frozen=True)
class _Budget(_Ladder, abc.ABC):
    """A limit on some cost of the step, as a share of the exact step's.

    Attributes:
        budget: In (0, 1].
        tokens: How tokens may be left out, at its ratio or more: the budget decides. None: all are computed.
    """

    budget: float
    tokens: Tokens | None = dataclasses.field(default=None, kw_only=True)

    _moves: ClassVar[bool] = True
    """Whether the cost reads the bytes moved and kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _fraction("budget", self.budget)
        check_tokens(self.tokens, self.subnetwork)
        if self.tokens is not None and self.sensitivity is not None:
            raise ValueError("sensitivity: says nothing of tokens; expected None, or no tokens")

    @abc.abstractmethod
    def _cost(self, work: StepWorkload, model: Model) -> float:
        """The cost of a step, in the unit of the budget."""

    def _share(self, cost: float, whole: float) -> float:
        """``cost`` as a share of the exact step's; all of it where that is not known."""
        return cost / whole if whole else 1.0

    def decide_whole(self, model: Model) -> Plan:
        """The plan of least predicted error within the budget.

        Raises:
            ValueError: No plan meets it; the message says what is the least.
        """
        model = self.seen(model)
        levels, limit = self._levels, float(self.budget)
        groups, refused = self.groups(model, levels[-1])
        asked = None if self.tokens is None else self.tokens.tokens
        stretches, none = ((), ()) if asked is None else model.token_shares(asked)
        rungs = [1.0] if asked is None else sorted({*(r for r in levels if r > asked.ratio), asked.ratio}, reverse=True)
        ladders = [levels] * len(groups) + [rungs] * bool(stretches)
        exact = model.with_tokens(None)
        whole = self._cost(exact.work({}, self._moves), exact)

        def share(ratios: Sequence[float]) -> float:
            view = model
            if asked is not None and stretches:
                view = model.with_tokens(dataclasses.replace(asked, ratio=ratios[-1]))
            work = view.work(self.decisions(groups, ratios[: len(groups)]), self._moves)
            return self._share(self._cost(work, view), whole)

        errors = self.errors(model, groups, levels, self.sensitivity)
        problem = Problem(
            errors + [[token_error(stretches, rung) for rung in rungs]] * bool(stretches),
            lambda chosen: share([ladder[level] for ladder, level in zip(ladders, chosen, strict=True)]),
        )
        found = least_error(problem, limit)
        if found is None:
            least = problem.price(cheapest(problem))
            what = (
                f"{len(groups)} selections can be sampled, at {levels[-1]:g} or more" if groups else "no layer can be"
            ) + (f", and tokens at {rungs[-1]:g} or more" if stretches else "")
            raise ValueError(
                f"budget: {limit:g} of the exact step cannot be met; the least is {least:.3f} ({what}). Expected a "
                "larger budget, smaller ratios, scope='group', or a smaller min_k"
            )
        ratios = _filled(problem, found, ladders, share, limit)
        if stretches:
            ratios[-1] = max(rungs[found[-1]], math.floor(1000 * ratios[-1]) / 1000)
        spent = share(ratios)
        left, step = "within the budget without it", f"the step {spent:.3f} of exact, asked {limit:g}"
        reasons = {
            name: f"predicted error {own[level]:.3g}; {step}"
            for names, own, level in zip(groups, errors, found[: len(groups)], strict=True)
            for name in names
        }
        decisions = self.final(model, groups, ratios[: len(groups)], refused, reasons, dict.fromkeys(reasons, left))
        if asked is None:
            return make_plan(model.candidates, decisions)
        if not stretches:
            return make_plan(model.candidates, decisions, None, f"all are computed: {'; '.join(none)}")
        if ratios[-1] == 1:
            return make_plan(model.candidates, decisions, None, "all are computed: within the budget without fewer")
        own, others = token_error(stretches, ratios[-1]), problem.error(found) - problem.errors[-1][found[-1]]
        error = f"predicted error {own:.3g} of {own + others:.3g} in all"
        some = dataclasses.replace(asked, ratio=ratios[-1])
        return make_plan(model.candidates, decisions, some, f"{ratios[-1]:.3g} of them are computed: {error}; {step}")


def _filled(
    problem: Problem,
    levels: Levels,
    ladders: Sequence[Sequence[float]],
    share: Callable[[Sequence[float]], float],
    limit: float,
) -> list[float]:
    """The ratios of ``levels``, one of them raised between two rungs to use up what is left of the budget."""
    ratios = [ladder[level] for ladder, level in zip(ladders, levels, strict=True)]
    best, spent = ratios, share(ratios)
    for place, level in enumerate(levels):
        if level == 0 or limit - spent < 1e-4:
            continue
        low, high = ratios[place], ladders[place][level - 1]
        for _ in range(_CLOSE):
            middle = (low + high) / 2
            tried = [*ratios[:place], middle, *ratios[place + 1 :]]
            low, high = (middle, high) if share(tried) <= limit else (low, middle)
        tried = [*ratios[:place], low, *ratios[place + 1 :]]
        now = share(tried)
        if spent < now <= limit:
            best, spent = tried, now
    return best


@dataclasses.dataclass(frozen=True)
class FlopBudget(_Budget):
    """At most ``budget`` of the exact step's operations, those for the scores included, at the least predicted error.

    Operations are not time: see :class:`TimeBudget`.

    Attributes:
        budget: Share of the operations of all products in a training step, in (0, 1].
    """

    _moves: ClassVar[bool] = False

    def _cost(self, work: StepWorkload, model: Model) -> float:
        return FlopModel().step(work, model).flops or 0

    def _share(self, cost: float, whole: float) -> float:
        return cost / max(1.0, whole)


@dataclasses.dataclass(frozen=True)
class MemoryBudget(_Budget):
    """At most ``budget`` of the bytes that the exact step keeps for backward, at the least predicted error.

    What it does not know: see :func:`fx_approx.savings.memory_model.memory`.

    Attributes:
        budget: Share of the bytes kept, parameters and buffers left out, in (0, 1].
    """

    def _cost(self, work: StepWorkload, model: Model) -> float:
        return work.memory


@dataclasses.dataclass(frozen=True)
class TimeBudget(_Budget):
    """At most ``budget`` of the exact step's time, as a cost model predicts it, at the least predicted error.

    Attributes:
        budget: Share of the time of a training step, the update by ``optimizer`` included, in (0, 1].
        cost: The model; with :class:`MeasuredModel` give few ``ratios``, since each layer is timed at each pair of its
            own ratio and of its readers'.
    """

    cost: WholeCostModel = dataclasses.field(default_factory=RooflineModel)

    def _cost(self, work: StepWorkload, model: Model) -> float:
        return step_seconds(self.cost, work, model)


@dataclasses.dataclass(frozen=True)
class ErrorBudget(_Ladder):
    """The least time whose sampling noise stays within ``noise`` of the noise that the batches make anyway.

    Noise is the variance of the gradient of the whole step; that of sampling is taken to add up over the layers. Source
    of the criterion: VCAS (Wang et al., ICLR 2024).

    Attributes:
        noise: Squared error by sampling as a share of the variance of the gradient over batches, above 0.
        cost: The cost model whose time is to be small; one without times is asked for operations.
        sensitivity: Must be given, with ``sgd_noise``.
    """

    noise: float
    cost: WholeCostModel = dataclasses.field(default_factory=RooflineModel)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.noise, bool) or not isinstance(self.noise, numbers.Real):
            raise TypeError(f"noise: expected a number above 0, got {self.noise!r}")
        if not self.noise > 0:
            raise ValueError(f"noise: expected a number above 0, got {self.noise!r}")
        if self.sensitivity is None or self.sensitivity.sgd_noise is None:
            raise ValueError(
                "sensitivity: expected one with sgd_noise, as fx_approx.analysis.sensitivity gives it of two "
                "batches or more"
            )

    def decide_whole(self, model: Model) -> Sequence[Decision]:
        """The cheapest plan within the noise."""
        assert self.sensitivity is not None and self.sensitivity.sgd_noise is not None
        model = self.seen(model)
        levels, allowed = self._levels, self.noise * self.sensitivity.sgd_noise
        groups, refused = self.groups(model, levels[-1])

        before = self.cost.step(model.work({}), model)

        def price(chosen: Levels) -> float:
            now = self.cost.step(model.work(self.decisions(groups, [levels[level] for level in chosen])), model)
            if now.seconds is not None and before.seconds:
                return now.seconds / before.seconds
            return (now.flops or 0) / max(1, before.flops or 0)

        problem = Problem(self.errors(model, groups, levels, self.sensitivity), price)
        found = least_cost(problem, allowed)
        error, spent = problem.error(found), problem.price(found)
        reasons = {
            name: f"error {own[level]:.3g} of {error:.3g} in all, allowed {allowed:.3g}; the step {spent:.3f} of exact"
            for names, own, level in zip(groups, problem.errors, found, strict=True)
            for name in names
        }
        left = dict.fromkeys(reasons, f"its error would exceed {allowed:.3g} in all, or it saves nothing")
        return self.final(model, groups, [levels[level] for level in found], refused, reasons, left)
