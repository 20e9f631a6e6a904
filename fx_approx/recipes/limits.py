"""Which layers a recipe may sample: those that a user names, and all but adapters where none are named."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from torch import nn

from fx_approx.core.candidates import Candidate
from fx_approx.core.plan import Decision, Plan, Policy, make_plan
from fx_approx.core.step_cost import Model, is_whole
from fx_approx.policies.base import exact
from fx_approx.policies.override import Rule, fits
from fx_approx.policies.partial_view import PartialView


@dataclasses.dataclass(frozen=True)
class Limited:
    """Applies a policy to some layers; the others are exact.

    Attributes:
        layers: The policy.
        rule: Which layers, a glob on their names or a function of name and module; None for all.
        adapters: Paths of small modules that stay exact where there is no rule.
        found: Names of the layers that the rule means; added to while it decides.
    """

    layers: Policy
    rule: Rule | None
    adapters: tuple[str, ...] = ()
    found: set[str] = dataclasses.field(default_factory=set, compare=False)

    needs_shapes = True

    def decide(self, candidates: Sequence[Candidate]) -> Sequence[Decision]:
        """Refuses: which modules the layers are follows from the model."""
        raise TypeError("policy: the layers of a recipe are chosen in a model; give it to transform or backend")

    def decide_whole(self, model: Model) -> Plan:
        """Decisions of the policy about the layers that may be sampled; the others are exact, with the reason."""
        why = {one.name: reason for one in model.candidates if (reason := self._why_not(one, model))}
        own = [one for one in model.candidates if one.name not in why]
        self.found.update(one.name for one in own)
        others = {one.name: exact(one, why[one.name], "recipe") for one in model.candidates if one.name in why}
        view = PartialView(model, own, others)
        decided = list(self.layers.decide_whole(view) if is_whole(self.layers) else self.layers.decide(own))
        found = {**others, **{one.name: one for one in decided}}
        return make_plan(model.candidates, [found[one.name] for one in model.candidates])

    def _why_not(self, candidate: Candidate, model: Model) -> str | None:
        if self.rule is None:
            inside = any(candidate.fqn == path or candidate.fqn.startswith(f"{path}.") for path in self.adapters)
            return "an adapter: it is small" if inside else None
        meant = fits(self.rule, candidate, model.module(candidate.name))
        return None if meant else "not among the layers asked for"


def adapters(model: nn.Module) -> tuple[str, ...]:
    """Paths of the adapters that PEFT has put into a model, and says so: ``adapter_layer_names`` of each layer."""
    return tuple(_adapters(model))


def _adapters(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        names = getattr(module, "adapter_layer_names", ())
        if not isinstance(names, tuple) or not hasattr(module, "base_layer"):
            continue
        yield from (f"{path}.{name}".removeprefix(".") for name in names if hasattr(module, name))


def has_frozen(model: nn.Module) -> bool:
    """Whether the weight matrix of a layer, other than an embedding, is not trained."""
    layers = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    own = [parameter for layer in layers for parameter in layer.parameters(recurse=False)]
    return any(parameter.dim() > 1 and not parameter.requires_grad for parameter in own)
