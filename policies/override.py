"""Another policy for some layers, chosen by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fx_approx.core.candidates import Candidate, matches
from fx_approx.core.plan import Decision, Plan, Policy, make_plan
from fx_approx.core.step_cost import Model, is_whole
from fx_approx.policies.partial_view import PartialView


@dataclasses.dataclass(frozen=True)
class Override:
    """Applies other policies to the candidates whose names match, ``base`` to the rest.

    Attributes:
        rules: Glob on the fully-qualified name -> policy; the first that matches decides. ``layer1.*`` matches
            everything below ``layer1``; ``fc`` all calls of ``fc``, ``fc#2`` its second call only.
        base: Policy of the candidates that no glob matches.

    Raises:
        TypeError: At construction, a rule or the base is no policy.
        ValueError: When deciding, a glob matches no candidate (the message lists names), or none that an earlier rule
            does not match.
    """

    rules: Mapping[str, Policy]
    base: Policy

    def __post_init__(self) -> None:
        for pattern, policy in self.rules.items():
            if not isinstance(pattern, str):
                raise TypeError(f"rules: expected a glob such as 'layer1.*', got {pattern!r}")
            if not isinstance(policy, Policy):
                raise TypeError(f"rules[{pattern!r}]: expected a policy, got {policy!r}")
            if getattr(policy, "tokens", None) is not None:
                raise ValueError(f"rules[{pattern!r}]: tokens are those of all layers; expected them in base")
        if not isinstance(self.base, Policy):
            raise TypeError(f"base: expected a policy, got {self.base!r}")

    @property
    def tokens(self) -> Any:
        """What the base says of tokens."""
        return getattr(self.base, "tokens", None)

    @property
    def needs_shapes(self) -> bool:
        """Whether any of the policies needs shapes."""
        return any(policy.needs_shapes for policy in (*self.rules.values(), self.base))

    def part(self, candidates: Sequence[Candidate]) -> Override:
        """Without the rules that match none of ``candidates``, those of one graph of several."""
        rules = {p: policy for p, policy in self.rules.items() if any(matches(p, c) for c in candidates)}
        return Override(rules, self.base)

    def decide(self, candidates: Sequence[Candidate]) -> list[Decision]:
        """Each policy sees the candidates that are its own, in order."""
        return self._decide(candidates, lambda policy, own, decided: policy.decide(own))

    def decide_whole(self, model: Model) -> Plan:
        """The same, with the tokens of the base; policies for a whole graph come last, and see what others decided."""
        tokens: list[Any] = []

        def ask(policy: Policy, own: Sequence[Candidate], decided: Mapping[str, Decision]) -> Sequence[Decision]:
            if not is_whole(policy):
                return policy.decide(own)
            found = policy.decide_whole(PartialView(model, own, decided))
            if isinstance(found, Plan):
                tokens[:] = found.tokens, found.why_tokens
            return list(found)

        return make_plan(model.candidates, self._decide(model.candidates, ask), *tokens)

    def _decide(
        self,
        candidates: Sequence[Candidate],
        ask: Callable[[Policy, Sequence[Candidate], Mapping[str, Decision]], Sequence[Decision]],
    ) -> list[Decision]:
        owners = [self._owner(candidate) for candidate in candidates]
        unused = [pattern for pattern in self.rules if not any(matches(pattern, c) for c in candidates)]
        if unused:
            names = ", ".join(candidate.name for candidate in candidates)
            raise ValueError(f"rules: no candidate matches {', '.join(map(repr, unused))}; there are: {names}")
        shadowed = [pattern for pattern in self.rules if pattern not in owners]
        if shadowed:
            raise ValueError(f"rules: {', '.join(map(repr, shadowed))} decides nothing: rules before it match first")
        decided: dict[str, Decision] = {}
        policies: list[tuple[str | None, Policy]] = [*self.rules.items(), (None, self.base)]
        for pattern, policy in sorted(policies, key=lambda one: is_whole(one[1])):
            own = [candidate for candidate, owner in zip(candidates, owners, strict=True) if owner == pattern]
            if own:
                decided.update((decision.name, decision) for decision in ask(policy, own, decided))
        return [decided[candidate.name] for candidate in candidates]

    def _owner(self, candidate: Candidate) -> str | None:
        return next((pattern for pattern in self.rules if matches(pattern, candidate)), None)
