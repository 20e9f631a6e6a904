"""Leaves the residual stream and the data whole: layers are sampled where they read hidden units."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from fx_approx.core.candidates import Candidate
from fx_approx.core.plan import Decision, Plan, Policy, make_plan
from fx_approx.core.step_cost import Model, is_whole
from fx_approx.policies.base import exact, sampled
from fx_approx.policies.partial_view import PartialView
from fx_approx.policies.uniform import Uniform
from fx_approx.sampling.spec import SamplerConfig

_PROBE = SamplerConfig("topk", 0.5, scores="weight")


@dataclasses.dataclass(frozen=True)
class HiddenUnits:
    """Applies another policy to the layers that read hidden units, and leaves those exact that read anything else.

    Hidden units are channels that one layer makes for another, and that no addition couples with others: those of an
    MLP block, the values of attention, the inner channels of a residual block, all but the input of a network without
    residual connections. A layer that reads them lets the layer before compute less. In a pre-trained transformer the
    residual stream is worth leaving whole (docs/advice.md).

    Attributes:
        layers: Policy of the layers that read hidden units.

    Raises:
        TypeError: At construction, ``layers`` is no policy.
        ValueError: At construction, ``layers`` samples tokens: give this policy to :class:`Tokens` instead.
    """

    layers: Policy = dataclasses.field(default_factory=lambda: Uniform(0.5, min_k=16, round_to=8))

    needs_shapes = True

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Policy):
            raise TypeError(f"layers: expected a policy such as Uniform(0.5), got {self.layers!r}")
        if getattr(self.layers, "tokens", None) is not None:
            raise ValueError(f"layers: expected a policy that decides about layers only, got {self.layers!r}")

    def decide(self, candidates: Sequence[Candidate]) -> Sequence[Decision]:
        """Refuses: which channels are coupled follows from the graph."""
        raise TypeError(
            "policy: HiddenUnits decides about a graph as a whole; give it to transform, explain or backend, by "
            "itself, in Tokens or in an Override"
        )

    def decide_whole(self, model: Model) -> Plan:
        """Decisions of ``layers`` about those that read hidden units; the others are exact, with the reason."""
        why = _others(model)
        own = [candidate for candidate in model.candidates if candidate.name not in why]
        if not is_whole(self.layers):
            decided = self.layers.decide(own)
        else:
            others = {
                name: exact(one, why[name], "HiddenUnits") for one in model.candidates if (name := one.name) in why
            }
            decided = list(self.layers.decide_whole(PartialView(model, own, others)))
        found = {one.name: one for one in decided}
        return make_plan(
            model.candidates,
            [found.get(one.name) or exact(one, why[one.name], "HiddenUnits") for one in model.candidates],
        )


def _others(model: Model) -> dict[str, str]:
    """The candidates that do not read hidden units, and why."""
    coupled = model.coupled()
    found = {one.name: "it reads a residual stream" for one in model.candidates if one.name in coupled}
    own = {one.name: one for one in model.candidates if one.blocked is None and one.name not in found}
    for names in model.tied(_probes(own.values())):
        if not _narrows(model, [own[name] for name in names]):
            found |= dict.fromkeys(names, "no layer before it could compute less")
    return found


def _narrows(model: Model, readers: Sequence[Candidate]) -> bool:
    """Whether a layer computes less where ``readers`` alone read a part."""
    products = model.work(_probes(readers), memory=False).products
    return any(one.kept.columns is not None or one.kept.share != (1, 1) for one in products)


def _probes(candidates: Iterable[Candidate]) -> dict[str, Decision]:
    return {one.name: sampled(one, _PROBE, "", "HiddenUnits", "value") for one in candidates}
