"""Every sampler with every op: what the sampled product promises, through the whole selector.

The draws are seeded, so the tests do not flicker; the false alarm rates say how likely it was, before the seed was
chosen, that a correct library fails.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics

import pytest
import torch
from torch import Tensor

from tests.families import OP_CASES, SAMPLER_CASES, OpCase, SamplerCase, gradients
from tests.ops.selecting import dense, outcomes, randomness, select, selector_of

ROWS = {name: case for name, case in OP_CASES.items() if not case.vector}
FIRST = {case.kind: case for case in reversed(ROWS.values())}

cases = pytest.mark.parametrize("case", ROWS.values(), ids=ROWS)
kinds = pytest.mark.parametrize("case", FIRST.values(), ids=FIRST)
samplers = pytest.mark.parametrize("sampler", SAMPLER_CASES.values(), ids=SAMPLER_CASES)
unbiased = pytest.mark.parametrize(
    "sampler", [s for s in SAMPLER_CASES.values() if s.unbiased], ids=lambda sampler: sampler.name
)

STEPS = 120
FALSE_ALARM = 1e-4  # of one test, shared among all numbers it looks at (Bonferroni)


def equal(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def worst_z(samples: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest deviation of a mean in standard errors, and how large it may be by chance."""
    samples, expected = samples.flatten(1), expected.flatten()
    error, spread = (samples.mean(0) - expected).abs(), samples.std(0)
    certain = spread < 1e-9
    assert bool((error[certain] < 1e-9).all()), "a number that is always the same is not the exact one"
    if bool(certain.all()):
        return 0.0, 0.0
    limit = statistics.NormalDist().inv_cdf(1 - FALSE_ALARM / 2 / int((~certain).sum()))
    return float((error / (spread / len(samples) ** 0.5))[~certain].max()), limit


@unbiased
@kinds
def test_the_mean_of_many_steps_is_the_exact_product(case: OpCase, sampler: SamplerCase) -> None:
    operands, selector = case.operands(), selector_of(case, sampler)
    assert 1 <= selector.k < case.pairs
    outputs, scales, counts = [], [], []
    for step in range(STEPS):
        selection = select(selector, case, operands, step)
        assert selection is not None
        assert selector.last_count == selection.indices.shape[1]
        outputs.append(case.sampled(operands, selection))
        scales.append(dense(case, selection))
        counts.append((scales[-1] > 0).sum(1).double())
    samples, drawn = torch.stack(outputs), torch.stack(scales)
    # The mean scale of every pair is 1: so the product is unbiased, and so are both its gradients.
    checks = [
        (samples, case.exact(operands)),
        (drawn, torch.ones(case.groups, case.pairs, dtype=torch.float64)),
    ]
    if sampler.sampler not in ("crs", "wta"):  # which draw k pairs, but some of them more than once
        checks.append((torch.stack(counts), torch.full((case.groups,), float(selector.k), dtype=torch.float64)))
    for values, expected in checks:
        z, limit = worst_z(values, expected)
        assert z <= limit
    # The test can fail: it sees unscaled samples.
    z, limit = worst_z((drawn > 0).double(), checks[1][1])
    assert z > limit


@unbiased
@cases
def test_the_mean_of_all_outcomes_is_the_exact_product(case: OpCase, sampler: SamplerCase) -> None:
    """Three pairs, two of them drawn, all outcomes with their probabilities; group by group."""
    case = case.with_pairs(3)
    operands, selector = case.operands(), selector_of(case, sampler)
    assert selector.k == 2
    exact, terms = case.exact(operands), case.pairs_of(operands)
    scores = case.scores(operands, sampler.scores)
    every = [list(outcomes(sampler, row, selector.k)) for row in scores]
    for group, rows in enumerate(every):
        mean, scale = torch.zeros_like(exact), torch.zeros(case.pairs, dtype=torch.float64)
        for numbers, probability in rows:
            given = torch.stack([numbers if g == group else every[g][0][0] for g in range(case.groups)])
            selection = select(selector, case, operands, numbers=given.flatten())
            assert selection is not None
            mean += probability * case.sampled(operands, selection)
            scale += probability * dense(case, selection)[group]
        equal(scale, torch.ones_like(scale), 1e-10)
        own = terms[group].abs().sum(0) > 0  # the outputs of this group
        equal(mean[own], exact[own], 1e-10)


@samplers
@kinds
def test_one_step_draws_the_same_again_and_another_site_draws_apart(case: OpCase, sampler: SamplerCase) -> None:
    operands = case.operands()
    here, there = selector_of(case, sampler), selector_of(case, sampler, site=2)
    draws = []
    for selector in (here, here, there):
        selections = [select(selector, case, operands, step) for step in range(4)]
        draws.append(torch.stack([dense(case, s) for s in selections if s is not None]))
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2]) == (sampler.sampler == "topk")


@samplers
@kinds
def test_pairs_that_are_not_known_beforehand_make_the_same_selection(case: OpCase, sampler: SamplerCase) -> None:
    """The uniforms are then drawn at the call: the same ones, of the same site."""
    operands, known = case.operands(), selector_of(case, sampler, site=3)
    late = selector_of(dataclasses.replace(case, pairs=0), sampler, site=3)
    assert (late.k, late.count) == (0, 0)
    for step in range(3):
        expected, actual = select(known, case, operands, step), select(late, case, operands, step)
        assert expected is not None
        assert actual is not None
        assert torch.equal(dense(case, actual), dense(case, expected))


@samplers
@kinds
def test_the_selection_is_one(case: OpCase, sampler: SamplerCase) -> None:
    """Ascending, unique, in range; the gradients of the scores' operands are not followed."""
    operands, selector = case.operands(grad=True), selector_of(case, sampler)
    for step in range(3):
        selection = select(selector, case, operands, step)
        assert selection is not None
        assert selection.indices.dtype == torch.int64
        assert selection.indices.shape[0] == case.groups
        assert bool((selection.indices.diff(dim=1) > 0).all())
        assert 0 <= int(selection.indices.min()) <= int(selection.indices.max()) < case.pairs
        if selection.scale is not None:
            assert selection.scale.shape == selection.indices.shape
            assert not selection.scale.requires_grad


@samplers
@kinds
def test_ratio_one_is_bitwise_exact(case: OpCase, sampler: SamplerCase) -> None:
    operands, selector = case.operands(grad=True), selector_of(case, sampler, ratio=1.0)
    selection = select(selector, case, operands)
    assert selector.exact
    assert selection is None
    output, exact = case.sampled(operands, selection), case.exact(operands)
    assert torch.equal(output, exact)
    found, wanted = gradients(output, operands), gradients(exact, operands)
    assert all(torch.equal(found[name], wanted[name]) for name in operands)


@samplers
def test_a_product_with_a_vector_stays_exact(sampler: SamplerCase) -> None:
    case = OP_CASES["linear-1d"]
    operands, selector = case.operands(), selector_of(case, sampler)
    assert selector(operands["input"], operands["weight"], randomness(selector, 0)) is None
    # Scores that do not read the input cannot see its shape; the product takes the selection all the same.
    if selector.score.ahead:
        selection = select(selector, case, operands)
        assert selection is not None
        equal(case.sampled(operands, selection), case.oracle(operands, selection))


@samplers
@pytest.mark.parametrize("case", [c for c in ROWS.values() if c.batch], ids=lambda case: case.name)
def test_an_empty_batch(case: OpCase, sampler: SamplerCase) -> None:
    operands = case.empty()
    output = case.sampled(operands, select(selector_of(case, sampler), case, operands))
    assert output.shape == case.exact(operands).shape
    assert not any(gradient.any() for gradient in gradients(output, operands).values())


@samplers
@cases
def test_a_number_that_is_not_finite_is_never_hidden(case: OpCase, sampler: SamplerCase) -> None:
    """Where the exact product is not finite, the sampled one is not either, if the scores read the operand."""
    read = {"online": (0, 1), "weight": (1,), "input": (0,), "uniform": ()}[sampler.scores]
    selector = selector_of(case, sampler, ratio=0.2)
    for side, step in itertools.product(read, range(3)):
        operands, pair = case.operands(), (step % case.groups, (2 * step + 1) % case.pairs)
        case.factors(operands, *pair)[side].fill_([math.nan, math.inf, -math.inf][step])
        exact = case.exact(operands)
        sampled = case.sampled(operands, select(selector, case, operands, step))
        assert not torch.isfinite(exact).all()
        assert not (~torch.isfinite(exact) & torch.isfinite(sampled)).any()


@samplers
@cases
def test_a_weight_of_zeros_gives_zero_and_still_learns(case: OpCase, sampler: SamplerCase) -> None:
    operands = case.operands(grad=True)
    weight = operands[case.op.rhs] = torch.zeros_like(operands[case.op.rhs]).requires_grad_()
    output = case.sampled(operands, select(selector_of(case, sampler), case, operands))
    assert torch.equal(output, case.exact(operands))
    (gradient,) = torch.autograd.grad(output.sum(), weight)
    assert bool(gradient.any())
    assert bool(torch.isfinite(gradient).all())


@samplers
@kinds
def test_pairs_of_score_zero_change_nothing(case: OpCase, sampler: SamplerCase) -> None:
    """One pair alone is not zero: it is certain to be drawn, and the product is exact."""
    operands = case.operands()
    rhs = torch.zeros_like(operands[case.op.rhs])
    rhs.select(case.axes[1], 1).copy_(operands[case.op.rhs].select(case.axes[1], 1))
    operands[case.op.rhs] = rhs
    selector = selector_of(case, sampler)
    selector.epsilon = 0.0
    selection = select(selector, case, operands)
    assert selection is not None
    equal(case.sampled(operands, selection), case.oracle(operands, selection))
    if sampler.scores in ("online", "weight"):
        assert bool((selection.indices == 1).any(1).all())
        # Certain to be drawn, so not scaled.
        equal(dense(case, selection)[:, 1], torch.ones(case.groups, dtype=torch.float64))
        equal(case.sampled(operands, selection), case.exact(operands))
