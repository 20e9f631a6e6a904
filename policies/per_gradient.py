"""The same samplers for every candidate, one for each of its three products."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fx_approx.core.candidates import Candidate, Role
from fx_approx.core.plan import Decision, check_roles
from fx_approx.policies.base import exact, sampled_roles
from fx_approx.sampling.spec import SamplerConfig


@dataclasses.dataclass(frozen=True)
class GradientSampling:
    """Samples each product of training by its own sampler, or leaves it exact.

    The weight gradient is sampled over rows: batch times positions for a linear layer, examples for a convolution. The
    input gradient is sampled over out-features or output channels. Sampling gradients only leaves the forward pass
    exact, and with an unbiased sampler the gradient of the whole network unbiased (paper, section 3.3).

    Attributes:
        output: Sampler of the forward product, None for exact.
        grad_input: Sampler of the gradient of the input.
        grad_weight: Sampler of the gradient of the weight.
        straight_through: Gradients do not follow the sampled output, as if it were exact.

    Raises:
        TypeError: At construction, a field of the wrong type.
        ValueError: At construction, scores that a product does not have, or nothing to sample.
    """

    output: SamplerConfig | None = None
    grad_input: SamplerConfig | None = None
    grad_weight: SamplerConfig | None = None
    straight_through: bool = False

    needs_shapes = False

    def __post_init__(self) -> None:
        for name in ("output", "grad_input", "grad_weight"):
            spec = getattr(self, name)
            if spec is not None and not isinstance(spec, SamplerConfig):
                raise TypeError(f"{name}: expected a SamplerConfig or None, got {spec!r}")
        check_roles(self.roles, self.straight_through)
        if not self.roles:
            raise ValueError(
                "output, grad_input, grad_weight: expected a SamplerConfig for one at least, got None for all"
            )

    @classmethod
    def backward(cls, ratio: float = 0.5, sampler: str = "systematic", **options: Any) -> GradientSampling:
        """Backward mode: the output exact, both gradients sampled; ``options`` as in :class:`SamplerConfig`."""
        spec = SamplerConfig(sampler, ratio, **options)
        return cls(grad_input=spec, grad_weight=spec)

    @classmethod
    def weight_gradient(
        cls, ratio: float = 0.3, sampler: str = "wta", scores: str = "input", **options: Any
    ) -> GradientSampling:
        """The weight gradient only, from rows chosen in the forward pass, so that only those are kept for backward."""
        return cls(grad_weight=SamplerConfig(sampler, ratio, scores=scores, **options))

    @classmethod
    def straight(cls, ratio: float = 0.5, sampler: str = "topk", **options: Any) -> GradientSampling:
        """Straight-through: the output sampled, both gradients exact (the paper's "black box")."""
        return cls(output=SamplerConfig(sampler, ratio, **options), straight_through=True)

    @property
    def roles(self) -> Mapping[Role, SamplerConfig]:
        """The samplers by role."""
        return {role: spec for role in Role if (spec := getattr(self, role.value)) is not None}

    def decide(self, candidates: Sequence[Candidate]) -> list[Decision]:
        """All sampled alike; a product that autograd never runs is left alone."""
        return [self._one(candidate) for candidate in candidates]

    def _one(self, candidate: Candidate) -> Decision:
        flops = None if candidate.facts is None else candidate.facts.flops
        roles = {
            role: spec
            for role, spec in self.roles.items()
            if flops is None or getattr(flops, role.value) or not flops.total
        }
        if not roles:
            return exact(candidate, f"autograd does not run its {', '.join(self.roles)}", "GradientSampling")
        return sampled_roles(candidate, roles, "same for all", "GradientSampling", self.straight_through)
