"""A ratio for each layer, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from fx_approx.candidate import Candidate
from fx_approx.plan import Decision, Policy
from fx_approx.policies.fixed import Exact, Uniform
from fx_approx.policies.override import Override
from fx_approx.work import Model


@dataclasses.dataclass(frozen=True)
class PerLayer:
    """Its own ratio for each layer, all else alike: an :class:`Override` of :class:`Uniform`, in short.

    Attributes:
        ratios: Glob on the fully-qualified name -> sample ratio in (0, 1]; the first that matches decides.
        others: Policy of the layers that no glob matches.
        uniform: Sampler, scores, scope and so on of the layers; its own ratio is not used.

    Raises:
        TypeError: At construction, a field of the wrong type.
        ValueError: At construction, no ratios, or one out of range; when deciding, a glob that decides nothing.
    """

    ratios: Mapping[str, float]
    others: Policy = dataclasses.field(default_factory=Exact)
    uniform: Uniform = dataclasses.field(default_factory=Uniform)

    def __post_init__(self) -> None:
        """Checks the fields."""
        if not isinstance(self.ratios, Mapping):
            raise TypeError(f"ratios: expected globs with ratios such as {{'layer1.*': 0.25}}, got {self.ratios!r}")
        if not self.ratios:
            raise ValueError("ratios: expected at least one glob with a ratio, got none")
        if not isinstance(self.uniform, Uniform):
            raise TypeError(f"uniform: expected a Uniform, got {self.uniform!r}")
        self.override  # noqa: B018  (building it is the check)

    @property
    def override(self) -> Override:
        """The same in full."""
        rules: dict[str, Policy] = {
            pattern: dataclasses.replace(self.uniform, ratio=ratio) for pattern, ratio in self.ratios.items()
        }
        return Override(rules, self.others)

    @property
    def needs_shapes(self) -> bool:
        """Whether any of the policies needs shapes."""
        return self.override.needs_shapes

    def decide(self, candidates: Sequence[Candidate]) -> list[Decision]:
        """Each layer at its ratio."""
        return self.override.decide(candidates)

    def decide_whole(self, model: Model) -> list[Decision]:
        """The same, where the policy of the others decides about the graph as a whole."""
        return self.override.decide_whole(model)
