"""The selectors of gradients, and of outputs of which each product of a batch has its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from fx_approx.core.candidates import Role
from fx_approx.ops import Choice
from fx_approx.runtime.rng import Draw
from fx_approx.runtime.selector import Selector
from fx_approx.sampling import get_score
from tests.families import GRADIENT_CASES, SAMPLER_CASES, Operands, SamplerCase
from tests.ops.roles import RoleCase
from tests.ops.selecting import randomness


def role_selector(
    one: RoleCase, sampler: SamplerCase, ratio: float = 0.5, site: int = 1, known: bool = False, **changes: Any
) -> Selector:
    """The selector of one product; ``known``: its pairs are known before the call."""
    case, pairs = one.case, one.pairs if known else None
    spec = sampler.spec(ratio).replace(positions=one.positions, per_batch=one.per_batch, **changes)
    return Selector(case.kind, case.plain, spec, site, pairs, nn.Identity(), one.groups, one.role)


def choose(selector: Selector, one: RoleCase, operands: Operands, given: Draw | None = None) -> Choice:
    """What a selector of :func:`role_selector` says of these operands, in step 0."""
    given = randomness(selector, 0) if given is None else given
    result: Choice = selector(operands[one.case.op.lhs], operands[one.case.op.rhs], given)
    return result


def samplers_of(role: Role) -> list[SamplerCase]:
    """Those whose scores the product has; of the output, without what learns from step to step."""
    every = [*SAMPLER_CASES.values(), *GRADIENT_CASES.values()]
    kinds = {sampler.name: get_score(sampler.scores) for sampler in every}
    return [
        sampler
        for sampler in every
        if role.value in kinds[sampler.name].products and not (role is Role.OUTPUT and kinds[sampler.name].learns)
    ]
