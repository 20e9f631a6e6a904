"""What policies that decide about the graph as a whole have in common: which layers, which ratios, at what error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

from fx_approx.core.candidates import Candidate, Role
from fx_approx.core.flops import role_pairs
from fx_approx.core.plan import Decision, check_roles, check_scope
from fx_approx.core.step_cost import MakeOptimizer, Model, StepWorkload, WholeCostModel
from fx_approx.policies.base import decision, exact
from fx_approx.policies.error_model import predicted_error
from fx_approx.policies.sensitivity import Sensitivity
from fx_approx.sampling.base import get_sampler
from fx_approx.sampling.spec import SamplerConfig

EIGHTHS = tuple(place / 8 for place in range(1, 8))
_LEAST_LEFT = 1e-6
_GRADIENTS = (Role.GRAD_INPUT, Role.GRAD_WEIGHT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphPolicy:
    """Samples linear and convolution layers, in forward mode with selections that are made ahead and shared.

    What it decides about are *sites*: a layer's name for its output, ``name/grad_input`` and ``name/grad_weight`` for
    its gradients.

    Attributes:
        sampler: Name of the sampler.
        scores: ``weight``, ``ema`` or ``uniform``; for gradients any that both have, such as ``uniform`` or
            ``online``.
        mode: ``forward``: outputs are sampled, and gradients follow. ``backward``: outputs are exact, and the two
            gradients of each layer are sampled, each at its own ratio.
        scope: ``layer``, ``value`` or ``group``: which readers share a selection.
        min_k: Keep at least so many pairs; layers with no more stay exact.
        round_to: Round the number of pairs to a multiple of this, for the device's matrix units.
        keep_first: The first convolution stays exact; in a subnetwork, which would never see the rest of the data, any
            layer that no other one stands before.
        keep_last: Layers with no layer after them stay exact, such as the classifier.
        subnetwork: The plan is to be run as a subnetwork (docs/subnetworks.md), and costs what that does. False: in the
            graph, which selects in each step.
        optimizer: Makes the optimiser whose update is part of the step, such as ``torch.optim.AdamW``; None: no update.

    Raises:
        TypeError: At construction, a field of the wrong type.
        ValueError: At construction, a value out of range or an unknown name.
    """

    sampler: str = "topk"
    scores: str = "weight"
    scope: str = "value"
    min_k: int = 16
    round_to: int = 8
    keep_first: bool = True
    keep_last: bool | None = True
    mode: str = "forward"
    subnetwork: bool = False
    optimizer: MakeOptimizer | None = None

    def __post_init__(self) -> None:
        self.spec(0.5)
        check_scope(self.scope, None)
        if self.mode not in ("forward", "backward"):
            raise ValueError(f"mode: expected forward or backward, got {self.mode!r}")
        if self.mode == "backward":
            check_roles(dict.fromkeys(_GRADIENTS, self.spec(0.5)), False)
        elif self.scores not in ("weight", "ema", "uniform"):
            raise ValueError(
                f"scores: expected weight, ema or uniform, which are known before a layer runs, got {self.scores!r}"
            )
        for name in ("keep_first", "keep_last", "subnetwork"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.subnetwork and self.mode != "forward":
            raise ValueError(f"mode: expected forward, since a subnetwork has all of its gradients, got {self.mode!r}")
        if self.optimizer is not None and (isinstance(self.optimizer, Optimizer) or not callable(self.optimizer)):
            raise TypeError(f"optimizer: expected what makes one, such as torch.optim.AdamW, got {self.optimizer!r}")

    @property
    def needs_shapes(self) -> bool:
        """True: costs follow from shapes."""
        return True

    def spec(self, ratio: float) -> SamplerConfig:
        """How a layer is sampled at ``ratio``."""
        return SamplerConfig(self.sampler, ratio, self.min_k, self.scores, self.round_to)

    def decide(self, candidates: Sequence[Candidate]) -> Sequence[Decision]:
        """Refuses: without the graph there is nothing to decide by."""
        raise TypeError(
            f"policy: {type(self).__name__} decides about a graph as a whole; give it to transform, explain or "
            "backend, by itself or in an Override"
        )

    def seen(self, model: Model) -> Model:
        """``model`` with the step that this policy decides about."""
        return model.realized(self.subnetwork, self.optimizer)

    def refusal(self, candidate: Candidate, lowest: float) -> str | None:
        """Why ``candidate`` stays exact whatever it costs; None if it may be sampled."""
        if candidate.blocked is not None:
            return candidate.blocked
        if candidate.facts is None or candidate.facts.shape is None:
            return "its shapes are not known"
        if not candidate.kind.startswith(("linear", "conv")):
            return "a product of activations"
        if self.subnetwork and self.scores != "uniform" and not candidate.facts.rhs_is_parameter:
            return "its weight is computed in each step, so that no fixed network has its selection"
        if self.keep_last and candidate.last:
            return "no layer after it"
        if self.keep_first and candidate.first and candidate.kind.startswith("conv"):
            return "first convolution"
        if self.keep_first and candidate.first and self.subnetwork:
            return "first layer of a subnetwork"
        if self.mode == "backward":
            return None if self._gradients(candidate, lowest) else "its gradients have too few pairs"
        if candidate.pairs is None or self.spec(lowest).count(candidate.pairs) >= candidate.pairs:
            return f"only {candidate.pairs} pairs"
        return None

    def _gradients(self, candidate: Candidate, lowest: float) -> list[str]:
        """The sites of those gradients that are computed at all and have pairs to choose from."""
        found, facts, spec = [], candidate.facts, self.spec(lowest)
        for role in _GRADIENTS:
            pairs = role_pairs(candidate, role, spec)
            if (
                facts is not None
                and getattr(facts.flops, role.value)
                and pairs is not None
                and spec.count(pairs) < pairs
            ):
                found.append(f"{candidate.name}/{role.value}")
        return found

    def groups(self, model: Model, lowest: float) -> tuple[list[tuple[str, ...]], dict[str, str]]:
        """The sites that may be sampled, those with one selection together; and why other layers may not be."""
        refused = {c.name: why for c in model.candidates if (why := self.refusal(c, lowest)) is not None}
        free = [c for c in model.candidates if c.name not in refused]
        if self.mode == "backward":
            return [(site,) for c in free for site in self._gradients(c, lowest)], refused
        names = tuple((c.name,) for c in free)
        return model.tied(self.decisions(names, [lowest] * len(names))), refused

    def decisions(self, groups: Sequence[Sequence[str]], ratios: Sequence[float]) -> dict[str, Decision]:
        """Each group at its ratio; 1 is exact, but keeps its place among those that share."""
        roles: dict[str, dict[Role, SamplerConfig]] = {}
        for sites, ratio in zip(groups, ratios, strict=True):
            for name, role in map(_split, sites):
                roles.setdefault(name, {})[role] = self.spec(ratio)
        scope = "layer" if self.mode == "backward" else self.scope
        return {name: Decision(name, own, scope=scope) for name, own in roles.items()}

    def final(
        self,
        model: Model,
        groups: Sequence[Sequence[str]],
        ratios: Sequence[float],
        refused: Mapping[str, str],
        sampled: Mapping[str, str],
        left: Mapping[str, str],
    ) -> list[Decision]:
        """All decisions with their reasons; those at ratio 1 are exact.

        Args:
            model: The graph.
            groups: Sites with one selection.
            ratios: Of each group.
            refused: Reasons of the layers in no group.
            sampled: Reasons of the sampled sites.
            left: Reasons of those that could have been.
        """
        source, found = type(self).__name__, []
        decided = self.decisions(groups, ratios)
        for one in model.candidates:
            roles = {
                role: spec
                for role, spec in (decided[one.name].roles.items() if one.name in decided else ())
                if spec.ratio < 1 and (pairs := role_pairs(one, role, spec)) is not None and spec.count(pairs) < pairs
            }
            sites = [f"{one.name}/{role.value}" if role in _GRADIENTS else one.name for role in roles]
            if one.name in refused:
                found.append(exact(one, refused[one.name], source))
            elif not roles:
                sites = [one.name, *(f"{one.name}/{role.value}" for role in _GRADIENTS)]
                found.append(exact(one, next((left[site] for site in sites if site in left), "exact"), source))
            else:
                reason = "; ".join(sampled[site] for site in sites if site in sampled)
                found.append(decision(one, roles, reason, source, scope=decided[one.name].scope))
        return found

    def errors(
        self, model: Model, groups: Sequence[Sequence[str]], ratios: Sequence[float], measured: Sensitivity | None
    ) -> list[list[float]]:
        """Predicted error of each group at each ratio; the sum over the groups is what is to be small.

        A layer's squared error as a share of its size, e, comes from the variance formulas on the norms of its weights.
        Biased samplers shrink what passes through, and the shares that are left multiply along the layers, so it counts
        as -log(1 - e); noise that unbiased ones add counts as log(1 + e). Where sensitivities were measured, they give
        the size of a group's error, and the formulas how it depends on the ratio.
        """
        candidates = {c.name: c for c in model.candidates}
        unbiased = get_sampler(self.sampler).unbiased
        found = []
        for names in groups:
            norms = []
            for name, role in map(_split, names):
                scores = model.weight_norms(name) if role is Role.OUTPUT else None
                norms.append((scores, role_pairs(candidates[name], role, self.spec(0.5)) or 1))
            own = [self._formula(norms, ratio, unbiased) for ratio in ratios]
            if measured is not None:
                size, there = measured.error_of(names), self._formula(norms, measured.ratio, unbiased)
                own = [size * value / there if there else 0.0 for value in own]
            found.append(own)
        return found

    def _formula(self, norms: Sequence[tuple[Tensor | None, int]], ratio: float, unbiased: bool) -> float:
        total = 0.0
        for scores, pairs in norms:
            error = predicted_error(scores, self.spec(ratio), pairs)
            total += math.log1p(error) if unbiased else -math.log(max(1 - error, _LEAST_LEFT))
        return total


def step_seconds(cost: WholeCostModel, work: StepWorkload, model: Model) -> float:
    """Seconds of a step; TypeError for a cost model without times."""
    found = cost.step(work, model).seconds
    if found is None:
        raise TypeError(f"cost: {type(cost).__name__} estimates no time; expected RooflineModel or MeasuredModel")
    return found


def _split(site: str) -> tuple[str, Role]:
    """Name and product of a site."""
    name, _, role = site.rpartition("/")
    return (name, Role(role)) if name else (site, Role.OUTPUT)
