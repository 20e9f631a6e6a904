"""Policies that say the same of every candidate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fx_approx.core.candidates import Candidate
from fx_approx.core.plan import Decision, check_share
from fx_approx.policies.base import exact, sampled
from fx_approx.sampling.spec import SamplerSpec


@dataclasses.dataclass(frozen=True)
class Exact:
    """Samples nothing."""

    needs_shapes = False

    def decide(self, candidates: Sequence[Candidate]) -> list[Decision]:
        """All exact."""
        return [exact(candidate, "asked for", "Exact") for candidate in candidates]


@dataclasses.dataclass(frozen=True)
class Uniform:
    """The same sampler, ratio and scores for every candidate that can be sampled.

    Attributes:
        sampler: Name of the sampler: ``topk``, ``systematic``, ``bernoulli``, ``crs``, ``wta``, ``wta_unique``.
        ratio: Share of the column-row pairs to keep, in (0, 1].
        minimal_k: Keep at least so many pairs.
        scores: ``online``, ``weight``, ``stale`` or ``uniform``.
        granularity: Round the number of pairs to a multiple of this.
        epsilon: Mix toward uniform probabilities; None for the sampler's default.
        share: Which readers share a selection that is made ahead (scores ``weight``, ``stale`` or ``uniform``):
            ``site``, none; ``value``, all that read the same channels; ``group``, also those coupled by residual
            additions. More than ``site`` needs example inputs.

    Raises:
        TypeError: At construction, a field of the wrong type.
        ValueError: At construction, a value out of range, an unknown name (the message lists the known ones), or a
            ``share`` that the scores do not allow.
    """

    sampler: str = "topk"
    ratio: float = 0.5
    minimal_k: int = 1
    scores: str = "online"
    granularity: int = 1
    epsilon: float | None = None
    share: str = "site"

    def __post_init__(self) -> None:
        """Checks the fields."""
        check_share(self.share, self.spec)

    @property
    def needs_shapes(self) -> bool:
        """Who reads what is told by shapes."""
        return self.share != "site"

    @property
    def spec(self) -> SamplerSpec:
        """The sampler specification of every decision."""
        return SamplerSpec(self.sampler, self.ratio, self.minimal_k, self.scores, self.granularity, self.epsilon)

    def decide(self, candidates: Sequence[Candidate]) -> list[Decision]:
        """All sampled alike."""
        return [sampled(candidate, self.spec, "same for all", "Uniform", self.share) for candidate in candidates]
