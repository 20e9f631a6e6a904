"""Policies that say the same of every candidate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fx_approx.core.candidates import Candidate
from fx_approx.core.plan import Decision, check_scope
from fx_approx.policies.base import exact, sampled
from fx_approx.sampling.scores import get_score
from fx_approx.sampling.spec import SamplerConfig


@dataclasses.dataclass(frozen=True)
class Exact:
    """Samples nothing."""

    needs_shapes = False

    def decide(self, candidates: Sequence[Candidate]) -> list[Decision]:
        return [exact(candidate, "asked for", "Exact") for candidate in candidates]


@dataclasses.dataclass(frozen=True)
class Uniform:
    """The same sampler, ratio and scores for every candidate that can be sampled.

    Attributes:
        ratio: Share of the column-row pairs to keep, in (0, 1].
        sampler: Name of the sampler: ``topk``, ``systematic``, ``bernoulli``, ``crs``, ``wta``, ``wta_unique``.
        scores: ``weight`` or ``ema``, which are known before the layers run, ``uniform``, or ``online``, which reads
            the activations of the step.
        scope: Which readers share a selection that is made ahead (scores ``weight``, ``ema`` or ``uniform``):
            ``layer``, none; ``value``, all that read the same channels; ``group``, also those coupled by residual
            additions. More than ``layer`` needs example inputs. By default ``value``, and ``layer`` for ``online``.
        min_k: Keep at least so many pairs.
        round_to: Round the number of pairs to a multiple of this.
        epsilon: Mix toward uniform probabilities; None for the sampler's default.

    Raises:
        TypeError: At construction, a field of the wrong type.
        ValueError: At construction, a value out of range, an unknown name (the message lists the known ones), or a
            ``scope`` that the scores do not allow.
    """

    ratio: float = 0.5
    sampler: str = "topk"
    scores: str = "weight"
    scope: str = ""
    min_k: int = 1
    round_to: int = 1
    epsilon: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, str):
            raise TypeError(f"sampler: expected a name such as 'topk', behind the ratio, got {self.sampler!r}")
        spec = self.spec
        if self.scope == "":
            object.__setattr__(self, "scope", "value" if get_score(self.scores).ahead else "layer")
        check_scope(self.scope, spec)

    @property
    def needs_shapes(self) -> bool:
        """Whether selections are shared: who reads the same value follows from shapes."""
        return self.scope != "layer"

    @property
    def spec(self) -> SamplerConfig:
        """The sampler of every decision."""
        return SamplerConfig(self.sampler, self.ratio, self.min_k, self.scores, self.round_to, self.epsilon)

    def decide(self, candidates: Sequence[Candidate]) -> list[Decision]:
        return [sampled(candidate, self.spec, "same for all", "Uniform", self.scope) for candidate in candidates]


DEFAULT_POLICY = Uniform(0.65, min_k=16)
"""What is used where no policy is given: the one that docs/advice.md recommends to begin with."""
