"""The rule of the paper's experiments."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fx_approx.core.candidates import Candidate
from fx_approx.core.plan import Decision, check_scope
from fx_approx.policies.base import exact, sampled
from fx_approx.sampling.spec import SamplerConfig


@dataclasses.dataclass(frozen=True)
class Paper:
    """TopK-CRS on linear and convolution layers, but the first convolution and the classifier exact.

    Source: "Faster Neural Network Training with Approximate Tensor Operations", NeurIPS 2021, section 5.

    Attributes:
        ratio: Share of the column-row pairs to keep, in (0, 1].
        min_k: Keep at least so many pairs; smaller layers stay exact.
        sampler: Another sampler than the paper's ``topk``.
        scores: Other scores than the paper's ``online``.
        scope: Which readers share a selection that is made ahead (scores ``weight``, ``ema`` or ``uniform``):
            ``layer``, none; ``value``, all that read the same channels; ``group``, also those coupled by residual
            additions. More than ``layer`` needs example inputs.

    Raises:
        TypeError: At construction, a field of the wrong type.
        ValueError: At construction, a value out of range, an unknown name (the message lists the known ones), or a
            ``scope`` that the scores do not allow.
    """

    ratio: float = 0.5
    min_k: int = 1
    sampler: str = "topk"
    scores: str = "online"
    scope: str = "layer"

    def __post_init__(self) -> None:
        check_scope(self.scope, self.spec)

    @property
    def needs_shapes(self) -> bool:
        """Whether selections are shared: who reads the same value follows from shapes."""
        return self.scope != "layer"

    @property
    def spec(self) -> SamplerConfig:
        """The sampler specification of every sampled decision."""
        return SamplerConfig(self.sampler, self.ratio, self.min_k, self.scores)

    def decide(self, candidates: Sequence[Candidate]) -> list[Decision]:
        """One decision per candidate."""
        return [self._one(candidate) for candidate in candidates]

    def _one(self, candidate: Candidate) -> Decision:
        if not candidate.kind.startswith(("linear", "conv")):
            return exact(candidate, "the paper samples linear and convolution layers", "Paper")
        if candidate.last:
            return exact(candidate, "classifier: no layer after it", "Paper")
        if candidate.first and candidate.kind.startswith("conv"):
            return exact(candidate, "first convolution", "Paper")
        return sampled(candidate, self.spec, "inner layer", "Paper", self.scope)
