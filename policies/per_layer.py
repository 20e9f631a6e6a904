"""A ratio for each layer, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from fx_approx.core.plan import Policy
from fx_approx.policies.override import Override
from fx_approx.policies.uniform import Exact, Uniform

_OTHERS, _UNIFORM = Exact(), Uniform(scores="online")


class PerLayer(Override):
    """Its own ratio for each layer, all else alike: an :class:`Override` of :class:`Uniform`, in short."""

    def __init__(self, ratios: Mapping[str, float], others: Policy = _OTHERS, uniform: Uniform = _UNIFORM) -> None:
        """The override.

        Args:
            ratios: Glob on the fully-qualified name -> sample ratio in (0, 1]; the first that matches decides.
            others: Policy of the layers that no glob matches; by default they are exact.
            uniform: Sampler, scores, scope and so on of the layers, by default those of ``Uniform()``; its own ratio is
                not used.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: No ratios, or one out of range; when deciding, a glob that decides nothing.
        """
        if not isinstance(ratios, Mapping):
            raise TypeError(f"ratios: expected globs with ratios such as {{'layer1.*': 0.25}}, got {ratios!r}")
        if not ratios:
            raise ValueError("ratios: expected at least one glob with a ratio, got none")
        if not isinstance(uniform, Uniform):
            raise TypeError(f"uniform: expected a Uniform, got {uniform!r}")
        rules = {pattern: dataclasses.replace(uniform, ratio=ratio) for pattern, ratio in ratios.items()}
        super().__init__(rules, others)
