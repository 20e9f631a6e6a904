"""Plans to choose from: all layers at one ratio, and those of them that a cost model says to pay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from fx_approx.core.plan import Decision
from fx_approx.core.step_cost import Model, StepWorkload, WholeCostModel
from fx_approx.core.token_sampling import TokenSampling
from fx_approx.policies.graph_policy import GraphPolicy, step_seconds

_LEAST = 1e-3
"""Of the exact step: a selection that saves less is not worth its error."""
_AS_FAST = 1.03
_HOPELESS = 0.8

_Seconds = Callable[[Sequence[bool]], float]


@dataclasses.dataclass(frozen=True)
class Draft:
    """A plan at one ratio.

    Attributes:
        policy: Whose layers, scope and sampler it has.
        groups: Sites that may be sampled, those with one selection together.
        refused: Reasons of the layers that may not be.
        ratios: Of each group; 1 is exact.
        gains: What each group saves of the exact step, or would save beside those that are sampled.
        work: Of the step.
        speedup: Predicted.
        tokens: Which tokens are computed, where the plan says so.
    """

    policy: GraphPolicy
    groups: Sequence[tuple[str, ...]]
    refused: Mapping[str, str]
    ratios: Sequence[float]
    gains: Mapping[tuple[str, ...], float]
    work: StepWorkload
    speedup: float
    tokens: TokenSampling | None = None

    @property
    def samples(self) -> bool:
        """Whether anything is."""
        return bool(self.decisions) or self.tokens is not None

    @property
    def decisions(self) -> dict[str, Decision]:
        """The decisions of the draft that sample something."""
        decided = self.policy.decisions(self.groups, self.ratios)
        return {name: one for name, one in decided.items() if one.spec is not None and one.spec.ratio < 1}


def drafts(
    policy: GraphPolicy, ratio: float, model: Model, cost: WholeCostModel, tokens: TokenSampling | None = None
) -> list[Draft]:
    """What ``cost`` says to pay under ``policy``, and all that may be sampled; one draft where they are the same.

    With ``tokens`` a third one that samples these alone comes first.
    """
    whole = step_seconds(cost, model.work({}), model)
    model = model if tokens is None else model.with_tokens(tokens)
    groups, refused = policy.groups(model, ratio)

    def work(chosen: Sequence[bool]) -> StepWorkload:
        return model.work(policy.decisions(groups, [ratio if one else 1.0 for one in chosen]))

    def seconds(chosen: Sequence[bool]) -> float:
        return step_seconds(cost, work(chosen), model)

    everything = [True] * len(groups)
    saved = _gains(everything, seconds, whole)
    pays, left = _prune(saved, seconds, whole)
    kinds = [(pays, left), *([] if pays == everything else [(everything, saved)])]
    if tokens is not None and any(pays):
        kinds.insert(0, ([False] * len(groups), left))
    found = []
    for chosen, gains in kinds:
        ratios = [ratio if one else 1.0 for one in chosen]
        gained = dict(zip(groups, gains, strict=True))
        now = work(chosen)
        speedup = whole / step_seconds(cost, now, model)
        found.append(Draft(policy, groups, refused, ratios, gained, now, speedup, tokens))
    return found


def _gain(chosen: Sequence[bool], place: int, now: float, seconds: _Seconds, whole: float) -> float:
    """What the group at ``place`` saves, as a share of the exact step; ``now`` is the step of ``chosen``."""
    other = seconds([*chosen[:place], not chosen[place], *chosen[place + 1 :]])
    return (other - now if chosen[place] else now - other) / whole


def _gains(chosen: Sequence[bool], seconds: _Seconds, whole: float) -> list[float]:
    now = seconds(chosen)
    return [_gain(chosen, place, now, seconds, whole) for place in range(len(chosen))]


def _prune(gains: Sequence[float], seconds: _Seconds, whole: float) -> tuple[list[bool], list[float]]:
    """Which groups are left, and what each saves then; ``gains`` is what they save where all are sampled.

    In each round those that save too little are left out, the least first, unless they save enough by then: readers of
    one value gain from each other, and each that is left out changes what its neighbours save.
    """
    chosen, known = [True] * len(gains), list(gains)
    while little := [place for place, one in enumerate(chosen) if one and known[place] < _LEAST]:
        now = seconds(chosen)
        for place in sorted(little, key=known.__getitem__):
            if _gain(chosen, place, now, seconds, whole) < _LEAST:
                chosen[place] = False
                now = seconds(chosen)
        known = _gains(chosen, seconds, whole)
    return chosen, known


def worth_trying(scopes: Sequence[Sequence[Draft]], limit: int) -> list[Draft]:
    """At most ``limit`` drafts that differ, from the scopes with the best predictions, in the order given.

    A prediction tells scopes apart better than it tells what slicing a weight costs, so that both drafts of a scope are
    tried before the next scope is. None is tried that is predicted to be much slower than exact.
    """
    best = sorted(range(len(scopes)), key=lambda place: -max(one.speedup for one in scopes[place]))
    found: list[tuple[int, Draft]] = []
    for place in best:
        for one in scopes[place]:
            if one.samples and one.speedup > _HOPELESS and all(one.work != other.work for _, other in found):
                found.append((place, one))
    return [one for _, one in sorted(found[:limit], key=lambda pair: pair[0])]


def first_of_the_fastest(drafts: Sequence[Draft], speedups: Sequence[float]) -> Draft:
    """The first one that is as fast as the fastest, but for 3 per cent."""
    fastest = max(speedups)
    return next(one for one, speedup in zip(drafts, speedups, strict=True) if speedup * _AS_FAST >= fastest)
