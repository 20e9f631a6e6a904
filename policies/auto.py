"""The policy to begin with: sample where it pays, and nothing where it does not."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence

from fx_approx.plan import Decision
from fx_approx.policies.graph import GraphPolicy, step_seconds
from fx_approx.policies.roofline import RooflineModel
from fx_approx.work import Model, WholeCostModel

_LEAST = 1e-3
"""Of the exact step: a selection that saves less is not worth its error."""


@dataclasses.dataclass(frozen=True)
class Auto(GraphPolicy):
    """Samples the layers for which a cost model says that the whole step gets faster, all at one ratio.

    From all layers that may be sampled, it leaves out those without which the step is predicted to be no slower, one
    selection after the other, since each changes what its neighbours save. Then the plan is timed against the exact
    step on the example inputs, unless ``check`` is off; where its lower quartile gains less than ``margin``, all layers
    stay exact.

    Attributes:
        ratio: Sample ratio, in (0, 1).
        cost: The cost model.
        compiled: The model is to be compiled; timed as such it takes the time of two compilations.
        check: Time the plan. Needs example inputs with values, which the Dynamo frontend does not have.
        margin: The least speed-up.
        repeats: Steps that are timed, of each.
    """

    ratio: float = 0.5
    cost: WholeCostModel | None = None
    compiled: bool = False
    check: bool = True
    margin: float = 1.02
    repeats: int = 9

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        if self.mode != "forward":
            raise ValueError(f"mode: expected forward, where the steps of neighbours shrink too, got {self.mode!r}")
        if not 0 < self.spec(self.ratio).ratio < 1:
            raise ValueError(f"ratio: expected a number in (0, 1), got {self.ratio!r}")
        for name in ("compiled", "check"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if isinstance(self.margin, bool) or not isinstance(self.margin, numbers.Real) or not self.margin >= 1:
            raise ValueError(f"margin: expected a number of at least 1, got {self.margin!r}")
        if isinstance(self.repeats, bool) or not isinstance(self.repeats, int) or self.repeats < 3:
            raise ValueError(f"repeats: expected an integer of at least 3, got {self.repeats!r}")

    def decide_whole(self, model: Model) -> Sequence[Decision]:
        """The plan, with numbers in its reasons."""
        groups, refused = self.groups(model, self.ratio)
        if not groups:
            return self.final(model, [], [], refused, {}, {})
        cost = RooflineModel(self.compiled) if self.cost is None else self.cost
        whole = step_seconds(cost, model.work({}), model)
        chosen, gains = self._chosen(model, cost, groups, whole)
        predicted = self._predicted(model, cost, groups, chosen)
        step = f"the step {whole / predicted:.2f} times as fast, predicted"
        sampled = {name: f"saves {100 * gains[names]:.1f} % of the step; {step}" for names in groups for name in names}
        left = {name: f"saves {100 * gains[names]:.1f} % of the step, predicted" for names in groups for name in names}
        ratios = [self.ratio if one else 1.0 for one in chosen]
        if any(chosen) and self.check and model.runs:
            decisions = {n: d for n, d in self.decisions(groups, ratios).items() if d.spec and d.spec.ratio < 1}
            low, middle, high = model.time([decisions], compiled=self.compiled, repeats=self.repeats)[1].speedup
            measured = f"measured {middle:.2f} [{low:.2f}, {high:.2f}]"
            if low < self.margin:
                left = dict.fromkeys(left, f"{step}, but {measured}, below {self.margin:g}")
                ratios = [1.0] * len(groups)
            sampled = {name: f"{reason}, {measured}" for name, reason in sampled.items()}
        elif any(chosen) and whole / predicted < self.margin:
            left = dict.fromkeys(left, f"{step}, below {self.margin:g}")
            ratios = [1.0] * len(groups)
        return self.final(model, groups, ratios, refused, sampled, left)

    def _chosen(
        self, model: Model, cost: WholeCostModel, groups: Sequence[tuple[str, ...]], whole: float
    ) -> tuple[list[bool], Mapping[tuple[str, ...], float]]:
        """Which groups are sampled, and what each saves with those, or would save with them."""
        chosen = [True] * len(groups)
        while True:
            now = self._predicted(model, cost, groups, chosen)
            gains = {}
            for place, names in enumerate(groups):
                other = self._predicted(model, cost, groups, [*chosen[:place], not chosen[place], *chosen[place + 1 :]])
                gains[names] = (other - now if chosen[place] else now - other) / whole
            worst = min(
                (names for names, one in zip(groups, chosen, strict=True) if one), key=gains.__getitem__, default=None
            )
            if worst is None or gains[worst] >= _LEAST:
                return chosen, gains
            chosen[groups.index(worst)] = False

    def _predicted(
        self, model: Model, cost: WholeCostModel, groups: Sequence[tuple[str, ...]], chosen: Sequence[bool]
    ) -> float:
        decisions = self.decisions(groups, [self.ratio if one else 1.0 for one in chosen])
        return step_seconds(cost, model.work(decisions), model)
