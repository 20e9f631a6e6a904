"""Another policy for some layers, chosen by name or by a function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from torch import nn

from fx_approx.core.candidates import Candidate, matches
from fx_approx.core.plan import Decision, Plan, Policy, make_plan
from fx_approx.core.step_cost import Model, is_whole
from fx_approx.policies.partial_view import PartialView

LayerFilter = Callable[[str, nn.Module], bool]
"""Whether a layer is meant, by its fully-qualified name and the module itself."""

Rule = str | LayerFilter
"""A glob on the names of layers, or a function of name and module."""

ModuleOf = Callable[[str], nn.Module | None]
"""The module of a candidate, by its unique name."""


def is_rule(rule: Any) -> TypeGuard[Rule]:
    """Whether ``rule`` is a glob, or a function; a module can be called, too, and is none."""
    return isinstance(rule, str) or (callable(rule) and not isinstance(rule, (type, nn.Module)))


def rule_text(rule: Rule) -> str:
    """A rule in an error or a note."""
    return repr(rule) if isinstance(rule, str) else getattr(rule, "__qualname__", type(rule).__name__)


def fits(rule: Rule, candidate: Candidate, module: nn.Module | None) -> bool:
    """Whether ``rule`` means ``candidate``; a function means none whose module is not known.

    Raises:
        TypeError: A function does not return a bool.
    """
    if isinstance(rule, str):
        return matches(rule, candidate)
    return module is not None and ask(rule, candidate.fqn, module)


def ask(rule: LayerFilter, name: str, module: nn.Module) -> bool:
    """What a function says of a layer.

    Raises:
        TypeError: It does not return a bool.
        ValueError: It raises an error itself; names the function and the layer.
    """
    try:
        found = rule(name, module)
    except Exception as error:
        text = f"{rule_text(rule)}({name!r}, {type(module).__name__}) failed: {type(error).__name__}: {error}"
        raise ValueError(text) from error
    if not isinstance(found, bool):
        raise TypeError(f"{rule_text(rule)}({name!r}, module): expected True or False, got {found!r}")
    return found


@dataclasses.dataclass(frozen=True)
class Override:
    """Applies other policies to the candidates that rules match, ``base`` to the rest.

    A function is called with the fully-qualified name of each candidate and with the user's own module, the layer
    itself, or that in whose forward a functional call stands:
    ``lambda name, module: isinstance(module, nn.Linear) and module.in_features > 512``. The plan that comes of it holds
    names only.

    Attributes:
        rules: Glob on the fully-qualified name, or a function of name and module -> policy; the first that matches
            decides. ``layer1.*`` matches everything below ``layer1``; ``fc`` all calls of ``fc``, ``fc#2`` its second
            call only.
        base: Policy of the candidates that no rule matches.

    Raises:
        TypeError: At construction, a rule or the base is no policy; when deciding, a function returns no bool.
        ValueError: When deciding, a rule matches no candidate (the message lists names), or none that an earlier rule
            does not match.
    """

    rules: Mapping[Rule, Policy]
    base: Policy

    def __post_init__(self) -> None:
        for rule, policy in self.rules.items():
            if not is_rule(rule):
                raise TypeError(
                    f"rules: expected a glob such as 'layer1.*' or a function of (name, module), got {rule!r}"
                )
            if not isinstance(policy, Policy):
                raise TypeError(f"rules[{rule_text(rule)}]: expected a policy, got {policy!r}")
            if getattr(policy, "tokens", None) is not None:
                raise ValueError(f"rules[{rule_text(rule)}]: tokens are those of all layers; expected them in base")
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

    def part(self, model: Model) -> Override:
        """Without the rules that match no candidate of ``model``, one graph of several."""
        found = {rule for one in model.candidates for rule in self._matching(one, model.module)}
        return Override({rule: policy for rule, policy in self.rules.items() if rule in found}, self.base)

    def decide(self, candidates: Sequence[Candidate]) -> list[Decision]:
        """Each policy sees the candidates that are its own, in order.

        Raises:
            TypeError: A rule is a function, which needs the model: see :meth:`decide_whole`.
        """
        functions = [rule_text(rule) for rule in self.rules if not isinstance(rule, str)]
        if functions:
            raise TypeError(
                f"rules: {', '.join(functions)} reads modules, and candidates alone were given; give the policy to "
                "transform, explain or backend, or take globs"
            )
        return self._decide(candidates, lambda name: None, lambda policy, own, decided: policy.decide(own))

    def decide_whole(self, model: Model) -> Plan:
        """The same, with the tokens of the base; policies for a whole graph come last, and see what others decided."""
        tokens: list[Any] = []

        def decided_by(policy: Policy, own: Sequence[Candidate], decided: Mapping[str, Decision]) -> Sequence[Decision]:
            if not is_whole(policy):
                return policy.decide(own)
            found = policy.decide_whole(PartialView(model, own, decided))
            if isinstance(found, Plan):
                tokens[:] = found.tokens, found.why_tokens
            return list(found)

        return make_plan(model.candidates, self._decide(model.candidates, model.module, decided_by), *tokens)

    def _decide(
        self,
        candidates: Sequence[Candidate],
        module_of: ModuleOf,
        decided_by: Callable[[Policy, Sequence[Candidate], Mapping[str, Decision]], Sequence[Decision]],
    ) -> list[Decision]:
        matching = [self._matching(candidate, module_of) for candidate in candidates]
        owners = [rules[0] if rules else None for rules in matching]
        used = {rule for rules in matching for rule in rules}
        unused = [rule_text(rule) for rule in self.rules if rule not in used]
        if unused:
            names = ", ".join(candidate.name for candidate in candidates)
            raise ValueError(f"rules: no candidate matches {', '.join(unused)}; there are: {names}")
        shadowed = [rule_text(rule) for rule in self.rules if rule not in owners]
        if shadowed:
            raise ValueError(f"rules: {', '.join(shadowed)} decides nothing: rules before it match first")
        decided: dict[str, Decision] = {}
        policies: list[tuple[Rule | None, Policy]] = [*self.rules.items(), (None, self.base)]
        for rule, policy in sorted(policies, key=lambda one: is_whole(one[1])):
            own = [candidate for candidate, owner in zip(candidates, owners, strict=True) if owner == rule]
            if own:
                decided.update((decision.name, decision) for decision in decided_by(policy, own, decided))
        return [decided[candidate.name] for candidate in candidates]

    def _matching(self, candidate: Candidate, module_of: ModuleOf) -> list[Rule]:
        """The rules that mean ``candidate``, in their order."""
        return [rule for rule in self.rules if fits(rule, candidate, module_of(candidate.name))]
