"""Samples the tokens that all layers of a transformer share, and leaves the layers to another policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fx_approx.core.candidates import Candidate
from fx_approx.core.plan import Decision, Plan, Policy, make_plan
from fx_approx.core.step_cost import Model, is_whole
from fx_approx.core.token_sampling import TokenSampling
from fx_approx.policies.uniform import Exact


@dataclasses.dataclass(frozen=True)
class Tokens(TokenSampling):
    """A stretch of blocks computes some tokens only, in every forward others.

    Dropping serves models that pool, or read a class token: what is dropped is not seen by the loss, as PatchDropout
    does it (Liu et al., 2022). Skipping serves models that put out every position: tokens that are left out pass the
    stretch by unchanged and come back behind it, as random layerwise token dropping does it (Yao et al., 2022). Tokens
    keep their order, so causal attention stays causal, and positions, rotary tables, masks and biases go along.

    Attributes:
        layers: Policy of the layers' own products; by default all are exact.

    All others are those of :class:`fx_approx.core.token_sampling.TokenSampling`, in its order and with its errors.

    Raises:
        TypeError: At construction, a field of the wrong type.
        ValueError: At construction, a value out of range or an unknown name.
    """

    layers: Policy = dataclasses.field(default_factory=Exact)

    needs_shapes = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.layers, Policy):
            raise TypeError(f"layers: expected a policy such as Uniform(0.5), got {self.layers!r}")
        if getattr(self.layers, "tokens", None) is not None:
            raise ValueError(f"layers: expected a policy that decides about layers only, got {self.layers!r}")

    @property
    def tokens(self) -> TokenSampling:
        """What is asked for, without the layers."""
        names = (field.name for field in dataclasses.fields(TokenSampling))
        return TokenSampling(**{name: getattr(self, name) for name in names})

    def decide(self, candidates: Sequence[Candidate]) -> Sequence[Decision]:
        return self.layers.decide(candidates)

    def decide_whole(self, model: Model) -> Plan:
        """The same, with the tokens; a policy of the layers that sees the whole graph sees it with these."""
        layers, own = self.layers, self.tokens
        if is_whole(layers):
            return make_plan(model.candidates, layers.decide_whole(model.with_tokens(own)), own)
        return make_plan(model.candidates, layers.decide(model.candidates), own)


def check_tokens(tokens: Any, subnetwork: bool) -> None:
    """TypeError or ValueError unless ``tokens`` says how a policy that decides about the layers may sample them."""
    if tokens is None:
        return
    if not isinstance(tokens, Tokens):
        raise TypeError(f"tokens: expected Tokens(...) or None, got {tokens!r}")
    if not isinstance(tokens.layers, Exact):
        raise ValueError(f"tokens: the layers are decided about already; expected no layers, got {tokens.layers!r}")
    if subnetwork:
        raise ValueError("tokens: a subnetwork computes all of them; expected None, or subnetwork=False")
