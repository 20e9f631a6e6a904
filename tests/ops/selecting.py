"""The selector of a row of the table, as a transformed model would have it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fx_approx.runtime.rng import Draw, draw
from fx_approx.runtime.selector import Selector
from fx_approx.sampling import Selection
from tests.families import OpCase, Operands, SamplerCase
from tests.sampling import oracles


def selector_of(case: OpCase, sampler: SamplerCase, ratio: float = 0.5, site: int = 1) -> Selector:
    """A row with 0 pairs stands for pairs that are not known before the call."""
    pairs = case.pairs or None
    return Selector(case.kind, case.plain, sampler.spec(ratio), site, pairs, nn.Identity(), case.groups)


def randomness(selector: Selector, step: int) -> Draw:
    """What a forward of that step draws for the selector beforehand; the seed is 7."""
    key = torch.tensor([7, step])
    return Draw(key, draw(key, [selector.site], [selector.count]))


def select(
    selector: Selector, case: OpCase, operands: Operands, step: int = 0, numbers: Tensor | None = None
) -> Selection | None:
    """The selection of one step, or of given uniforms; the left operand is withheld where it may not be read."""
    lhs = None if selector.score.ahead else operands[case.op.lhs]
    given = randomness(selector, step)
    given = given if numbers is None else given._replace(numbers=numbers)
    result: Selection | None = selector(lhs, operands[case.op.rhs], given)
    return result


def dense(case: OpCase, selection: Selection) -> Tensor:
    """What every pair is multiplied with: ``[groups, pairs]``, 0 for those left out."""
    scale = selection.scale
    values = torch.ones_like(selection.indices, dtype=torch.float64) if scale is None else scale.double()
    return torch.zeros(case.groups, case.pairs, dtype=torch.float64).scatter(1, selection.indices, values)


def outcomes(sampler: SamplerCase, scores: Tensor, k: int) -> Iterator[tuple[Tensor, float]]:
    """Every outcome of a draw from ``scores [pairs]``: uniforms and probability."""
    epsilon = sampler.spec().effective_epsilon
    if sampler.sampler == "crs":
        every = oracles.crs_outcomes(oracles.draw_p(scores, epsilon), k)
    elif sampler.sampler == "wta":
        every = oracles.wta_outcomes(oracles.draw_p(scores, epsilon), k)
    elif sampler.sampler == "wta_unique":
        every = oracles.wta_unique_outcomes(oracles.draw_p(scores, epsilon), k)
    elif sampler.sampler == "bernoulli":
        every = oracles.bernoulli_outcomes(oracles.inclusion_p(scores, k, epsilon))
    else:
        every = oracles.systematic_outcomes(oracles.inclusion_p(scores, k, epsilon))
    yield from zip(every.uniforms, every.probability.tolist(), strict=True)
