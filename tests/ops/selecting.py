"""The selector of a product of a row of the table, as a transformed model would have it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fx_approx.core.candidates import Role
from fx_approx.ops import Choice, ForwardDrawn
from fx_approx.runtime.rng import Draw, draw
from fx_approx.runtime.selector import Selector
from fx_approx.sampling import Selection, get_score
from tests.families import GRADIENT_CASES, SAMPLER_CASES, Operands, SamplerCase
from tests.ops.roles import RoleCase
from tests.sampling import oracles


def selector_of(
    one: RoleCase, sampler: SamplerCase, ratio: float = 0.5, site: int = 1, known: bool = False, **changes: Any
) -> Selector:
    """``known``: the number of pairs is known before the call."""
    case, pairs = one.case, one.pairs if known else None
    spec = sampler.spec(ratio).replace(positions=one.positions, per_batch=one.per_batch, **changes)
    return Selector(case.kind, case.plain, spec, site, pairs, nn.Identity(), one.groups, one.role)


def randomness(selector: Selector, step: int) -> Draw:
    """What a forward of that step draws for the selector beforehand; the seed is 7."""
    key = torch.tensor([7, step])
    return Draw(key, draw(key, [selector.site], [selector.count]))


def choose(
    selector: Selector, one: RoleCase, operands: Operands, step: int = 0, numbers: Tensor | None = None
) -> Choice:
    """The choice of one step, or of given uniforms; the left operand is withheld where it may not be read."""
    lhs = None if selector.ahead else operands[one.case.op.lhs]
    given = randomness(selector, step)
    result: Choice = selector(lhs, operands[one.case.op.rhs], given if numbers is None else Draw(given.key, numbers))
    return result


def selection_in(choice: Choice) -> Selection:
    assert isinstance(choice, ForwardDrawn | Selection)
    return choice.selection if isinstance(choice, ForwardDrawn) else choice


def samplers_of(role: Role) -> list[SamplerCase]:
    """Those whose scores the product has; of the output, without what learns from step to step."""
    every = [*SAMPLER_CASES.values(), *GRADIENT_CASES.values()]
    kinds = {sampler.name: get_score(sampler.scores) for sampler in every}
    return [
        sampler
        for sampler in every
        if role.value in kinds[sampler.name].products and not (role is Role.OUTPUT and kinds[sampler.name].learns)
    ]


def outcomes(sampler: SamplerCase, scores: Tensor, k: int) -> Iterator[tuple[Tensor, float]]:
    """Every outcome of a draw from ``scores [pairs]``: uniforms and probability."""
    every = oracles.outcomes_of(sampler.sampler, scores, k, sampler.spec().effective_epsilon)
    yield from zip(every.uniforms, every.probability.tolist(), strict=True)
