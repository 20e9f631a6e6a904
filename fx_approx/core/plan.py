"""Decisions and plans: what happens to each candidate, with its reason and its numbers.

A plan is made by a policy, can be looked at and edited, goes to JSON and back, and is accepted wherever a policy is.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from fx_approx.core.candidates import Candidate, Role
from fx_approx.core.token_sampling import TokenSampling
from fx_approx.errors import PlanMismatchError
from fx_approx.sampling.scores import SCORES, get_score
from fx_approx.sampling.spec import SamplerConfig

_FORMAT = "fx_approx.plan/1"


@dataclasses.dataclass(frozen=True)
class Cost:
    """Estimated cost of one training step of one candidate; None where a model does not say.

    Attributes:
        flops: Multiply-adds times two, all roles.
        bytes: Memory traffic in bytes.
        seconds: Time in seconds.
        launches: Kernel launches.
    """

    flops: int | None = None
    bytes: int | None = None
    seconds: float | None = None
    launches: int | None = None


@dataclasses.dataclass(frozen=True)
class CostEstimate:
    """Exact against sampled cost of one candidate, and what the model leaves out."""

    exact: Cost
    sampled: Cost
    omits: str = ""


class CostModel(Protocol):
    """Estimates what sampling a candidate would cost and save."""

    def estimate(
        self, candidate: Candidate, roles: Mapping[Role, SamplerConfig], straight_through: bool = False
    ) -> CostEstimate | None:
        """The estimate, or None where the candidate's shapes are not known."""
        ...


@dataclasses.dataclass(frozen=True)
class Decision:
    """What happens to one candidate.

    Attributes:
        name: The candidate's unique name.
        roles: Sampler of each sampled role; empty means exact.
        reason: Why, in words.
        source: Which policy said so.
        cost: Estimated cost, where known.
        straight_through: OUTPUT is sampled, but gradients are those of the exact product.
        scope: With whom the selection of OUTPUT is shared, if it is made ahead: ``layer``, with no one; ``value``, with
            all that read the same channels; ``group``, also with those that read what additions make of them.

    Raises:
        TypeError: A role's value is no SamplerConfig.
        ValueError: An unknown role or scope, scores that a role does not have or that cannot be shared, or
            ``straight_through`` without OUTPUT.
    """

    name: str
    roles: Mapping[Role, SamplerConfig] = dataclasses.field(default_factory=dict)
    reason: str = ""
    source: str = ""
    cost: CostEstimate | None = None
    straight_through: bool = False
    scope: str = "layer"

    def __post_init__(self) -> None:
        check_roles(self.roles, self.straight_through)
        check_scope(self.scope, self.spec)

    @property
    def spec(self) -> SamplerConfig | None:
        """The sampler of the forward product, or None when it is exact."""
        return self.roles.get(Role.OUTPUT)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "roles": {Role(role).value: spec.to_dict() for role, spec in self.roles.items()},
            "reason": self.reason,
            "source": self.source,
            "cost": None if self.cost is None else dataclasses.asdict(self.cost),
            "straight_through": self.straight_through,
            "scope": self.scope,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Decision:
        cost = data.get("cost")
        if cost is not None:
            cost = CostEstimate(Cost(**cost["exact"]), Cost(**cost["sampled"]), cost["omits"])
        roles = {Role(role): SamplerConfig.from_dict(spec) for role, spec in data["roles"].items()}
        straight_through = data.get("straight_through", False)
        reason, source, scope = data.get("reason", ""), data.get("source", ""), data.get("scope", "layer")
        return cls(data["name"], roles, reason, source, cost, straight_through, scope)


SCOPES = ("layer", "value", "group")
"""With whom a selection is shared, see :class:`Decision`."""


def check_scope(scope: Any, spec: SamplerConfig | None) -> None:
    """ValueError if ``scope`` is no scope, or one in which selections by ``spec`` cannot be shared."""
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    if scope == "layer" or spec is None:
        return
    if not get_score(spec.scores).ahead:
        ahead = [repr(kind.name) for kind in SCORES.values() if kind.ahead and "output" in kind.products]
        raise ValueError(
            f"scope: {scope!r} shares a selection that is made before the layers run, but scores {spec.scores!r} read "
            f"the activations; set scores to {', '.join(ahead[:-1])} or {ahead[-1]}, or scope to 'layer'"
        )
    if spec.per_batch:
        raise ValueError(f"scope: {scope!r} is one selection for all, per_batch=True many; set one of them otherwise")


def check_roles(roles: Mapping[Role, SamplerConfig], straight_through: bool) -> None:
    """Raises the errors of :class:`Decision` for what it cannot hold."""
    known = [role.value for role in Role]
    for name, spec in roles.items():
        if name not in known:
            raise ValueError(f"roles: expected names from {', '.join(known)}, got {name!r}")
        role = Role(name).value
        if not isinstance(spec, SamplerConfig):
            raise TypeError(f"{role}: expected a SamplerConfig, got {spec!r}")
        if role not in get_score(spec.scores).products:
            fit = ", ".join(kind.name for kind in SCORES.values() if role in kind.products)
            raise ValueError(f"{role}: scores {spec.scores!r} say nothing of it; expected one of {fit}")
        if spec.positions and role != Role.GRAD_WEIGHT:
            raise ValueError(f"{role}: positions=True is for {Role.GRAD_WEIGHT.value} only")
    if not isinstance(straight_through, bool):
        raise TypeError(f"straight_through: expected True or False, got {straight_through!r}")
    if straight_through and Role.OUTPUT not in roles:
        raise ValueError("straight_through: says how gradients pass a sampled output; expected a sampler for output")


@runtime_checkable
class Policy(Protocol):
    """Sees all candidates of a model and decides about each."""

    @property
    def needs_shapes(self) -> bool:
        """Whether :meth:`decide` reads ``candidate.facts``, so that example inputs must be given.

        Even then the facts of a layer are None where the run on fake tensors does not get to it: one that is not
        called, or that stands behind a branch on values. Such a layer shares its selection with no other.
        """
        ...

    def decide(self, candidates: Sequence[Candidate]) -> Sequence[Decision]:
        """One decision per candidate, in the same order. Blocked candidates are exact whatever it says."""
        ...


@dataclasses.dataclass(frozen=True)
class Plan:
    """All decisions of a model, one per candidate, exact ones included.

    Attributes:
        decisions: In the order in which the model runs.
        identities: What each candidate was (kind, pairs, groups), to recognise the model.
        tokens: Which tokens of its blocks a transformer computes; None for all.
        why_tokens: Why these, where a policy chose.
    """

    decisions: tuple[Decision, ...]
    identities: Mapping[str, Mapping[str, Any]]
    tokens: TokenSampling | None = None
    why_tokens: str = ""

    @property
    def needs_shapes(self) -> bool:
        """Whether selections are shared, or tokens chosen: who reads what is told by shapes."""
        return self.tokens is not None or any(
            decision.roles and decision.scope != "layer" for decision in self.decisions
        )

    def __post_init__(self) -> None:
        counts = collections.Counter(decision.name for decision in self.decisions)
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise ValueError(f"decisions: two decisions for the same candidate: {', '.join(twice)}")

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)

    def __getitem__(self, name: str) -> Decision:
        """The decision about the candidate ``name``; KeyError lists near names."""
        found = self._by_name.get(name)
        if found is None:
            raise KeyError(f"no candidate {name!r}; there are: {', '.join(self._by_name)}")
        return found

    @functools.cached_property
    def _by_name(self) -> dict[str, Decision]:
        return {decision.name: decision for decision in self.decisions}

    @property
    def sampled(self) -> tuple[Decision, ...]:
        """The decisions that sample something."""
        return tuple(decision for decision in self.decisions if decision.roles)

    def part(self, candidates: Sequence[Candidate]) -> Plan:
        """The decisions about some of the candidates, those of one graph of several."""
        here = {candidate.name for candidate in candidates}
        identities = {name: identity for name, identity in self.identities.items() if name in here}
        own = tuple(decision for decision in self.decisions if decision.name in here)
        return dataclasses.replace(self, decisions=own, identities=identities)

    def edit(
        self,
        name: str,
        spec: SamplerConfig | Mapping[Role, SamplerConfig] | None,
        reason: str = "edited by hand",
        *,
        straight_through: bool = False,
        scope: str = "layer",
    ) -> Plan:
        """A copy in which candidate ``name`` is sampled otherwise.

        Args:
            name: The candidate.
            spec: The sampler of its output, or one for each role (``{"grad_weight": ...}``), or None for exact.
            reason: What the report shows.
            straight_through: Gradients do not follow the sampled output.
            scope: With whom the selection is shared, see :class:`Decision`.

        Raises:
            KeyError, TypeError, ValueError: As :class:`Decision` and ``plan[name]``.
        """
        self[name]
        roles = {} if spec is None else {Role.OUTPUT: spec} if isinstance(spec, SamplerConfig) else dict(spec)
        edited = Decision(name, roles, reason, "edit", straight_through=straight_through, scope=scope)
        decisions = tuple(edited if decision.name == name else decision for decision in self.decisions)
        return dataclasses.replace(self, decisions=decisions)

    def decide(self, candidates: Sequence[Candidate]) -> Sequence[Decision]:
        """The plan's own decisions, if it was made for a model with these candidates.

        Raises:
            PlanMismatchError: Names what differs between the plan's model and this one.
        """
        own, given = set(self.identities), {candidate.name for candidate in candidates}
        problems = [f"only in the plan: {name}" for name in sorted(own - given)]
        problems += [f"only in the model: {name}" for name in sorted(given - own)]
        for candidate in candidates:
            planned = self.identities.get(candidate.name, {})
            for key, value in candidate.identity.items():
                then = planned.get(key, value)
                # A pair count is unknown until shapes are: that is no difference.
                if then != value and None not in (then, value):
                    problems.append(f"{candidate.name}: {key} is {value!r}, the plan has {then!r}")
        for candidate in candidates:
            if candidate.blocked and candidate.name in own and self[candidate.name].roles:
                problems.append(f"{candidate.name}: the plan samples it, but it must stay exact: {candidate.blocked}")
        if problems:
            shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
            raise PlanMismatchError(f"plan: made for another model: {shown}")
        return [self[candidate.name] for candidate in candidates]

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "decisions": [decision.to_dict() for decision in self.decisions],
            "candidates": {name: dict(identity) for name, identity in self.identities.items()},
            **({} if self.tokens is None else {"tokens": self.tokens.to_dict()}),
            **({"why_tokens": self.why_tokens} if self.why_tokens else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of :meth:`to_dict`; ValueError for another format."""
        if data.get("format") != _FORMAT:
            raise ValueError(f"format: expected {_FORMAT!r}, got {data.get('format')!r}")
        decisions, tokens = tuple(Decision.from_dict(entry) for entry in data["decisions"]), data.get("tokens")
        sampling = None if tokens is None else TokenSampling.from_dict(tokens)
        return cls(decisions, data["candidates"], sampling, data.get("why_tokens", ""))

    def to_json(self, indent: int | None = 2) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        return cls.from_dict(json.loads(text))


def make_plan(
    candidates: Sequence[Candidate],
    decisions: Sequence[Decision] | Plan,
    tokens: TokenSampling | None = None,
    why_tokens: str = "",
) -> Plan:
    """The plan for ``candidates``; blocked ones become exact with the reason that blocks them."""
    if len(candidates) != len(decisions):
        raise ValueError(f"decisions: the policy made {len(decisions)} for {len(candidates)} candidates")
    final = []
    for candidate, decision in zip(candidates, decisions, strict=True):
        if decision.name != candidate.name:
            raise ValueError(f"decisions: expected one about {candidate.name!r}, got {decision.name!r}")
        if candidate.blocked:
            decision = Decision(candidate.name, {}, candidate.blocked, "blocked")
        final.append(decision)
    return Plan(tuple(final), {candidate.name: candidate.identity for candidate in candidates}, tokens, why_tokens)
