"""Mean and variance of every sampler, exactly: all outcomes are enumerated, no luck is needed."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fx_approx.sampling import SAMPLERS, Crs, TopK, Wta
from fx_approx.sampling.probabilities import water_level
from tests.helpers.quick import quick
from tests.sampling import oracles

TOLERANCE = 1e-10

# Kinds of scores and epsilon: the optimum, the optimum mixed with uniform, no information, a poor proxy; and steep
# scores, so that pairs are certain: of every number from 0 to k - 1 in the sizes below.
MIXES = [("norms", 0.0), ("norms", 0.1), ("norms", 0.6), ("uniform", 0.0), ("uniform", 0.3), ("proxy", 0.1)]
STEEP = [*MIXES, ("steep", 0.0), ("steep", 0.1)]
SIZES = {
    "crs": [(2, 1), (4, 3), (5, 3), (5, 4), (8, 2)],
    "bernoulli": [(2, 1), (5, 3), (8, 1), (8, 5), (8, 7)],
    "systematic": [(2, 1), (4, 2), (5, 2), (5, 4), (6, 3)],
    "wta": [(2, 1), (3, 2), (5, 3), (6, 5), (8, 2), (8, 4)],
    "wta_unique": [(2, 1), (3, 2), (5, 2), (5, 4), (6, 3)],
}
LONG = [("systematic", 6, 3), ("systematic", 5, 4), ("wta", 6, 5), ("wta", 8, 4), ("wta_unique", 6, 3)]


def scores_of(kind: str, product: oracles.Product) -> Tensor:
    if kind == "norms":
        return product.norms
    if kind == "uniform":
        return torch.full_like(product.norms, 3.0)
    places = torch.arange(1, len(product.norms) + 1, dtype=torch.float64)
    return 2.0**places if kind == "steep" else places**2


def check(mean: Tensor, error: float, product: oracles.Product, formula: float) -> None:
    torch.testing.assert_close(mean, product.exact, rtol=0, atol=TOLERANCE)
    assert error == pytest.approx(formula, rel=TOLERANCE)


def mixes_of(name: str, pairs: int) -> list[tuple[str, float]]:
    """Of the 720 orders of six pairs only some."""
    every = STEEP if name.startswith("wta") else MIXES
    return every[1::2] if pairs == 6 and name in ("systematic", "wta_unique") else every


@pytest.mark.parametrize(
    ("name", "pairs", "k"),
    quick(
        [(name, *size) for name, sizes in SIZES.items() for size in sizes],
        lambda name, pairs, k: (name, pairs, k) not in LONG,
    ),
)
def test_mean_and_error_are_those_of_the_formulas(name: str, pairs: int, k: int) -> None:
    product = oracles.make_product(pairs, seed=5 * pairs + k)
    for (kind, epsilon), fixed_shape in itertools.product(mixes_of(name, pairs), (False, True)):
        if fixed_shape and name != "bernoulli":
            continue  # the only one whose size is not fixed
        scores = scores_of(kind, product)
        outcomes = oracles.outcomes_of(name, scores, k, epsilon)
        mean, error = oracles.moments(SAMPLERS[name], product, scores, k, epsilon, outcomes, fixed_shape)
        check(mean, error, product, oracles.error_of(name, product, scores, k, epsilon))
        if name == "wta":
            assert error <= oracles.crs_error(product, oracles.draw_p(scores, epsilon), k) * (1 + 1e-12)
        if name == "systematic":
            # A sample of fixed size k: the joint probabilities of a row add up to k pi_j. This checks the oracle.
            p = oracles.inclusion_p(scores, k, epsilon)
            torch.testing.assert_close(oracles.systematic_joint(p).sum(1), k * p, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("pairs", "k"), [(5, 3), (8, 2)])
def test_crs_formulas_of_the_paper(pairs: int, k: int) -> None:
    product = oracles.make_product(pairs, seed=1)
    s, exact = product.norms, float(product.exact.square().sum())
    for scores, formula in (
        (s, (float(s.sum()) ** 2 - exact) / k),
        (torch.ones_like(s), (pairs * float(s.square().sum()) - exact) / k),
    ):
        outcomes = oracles.outcomes_of("crs", scores, k, 0.0)
        mean, error = oracles.moments(Crs(), product, scores, k, 0.0, outcomes, fixed_shape=False)
        check(mean, error, product, formula)


def test_the_enumerations_keep_every_number_of_pairs() -> None:
    kept = set()
    for (pairs, k), (kind, epsilon) in itertools.product(SIZES["wta"], STEEP):
        p = oracles.draw_p(scores_of(kind, oracles.make_product(pairs, seed=5 * pairs + k)), epsilon)
        kept.add((k, len(oracles.wta_kept(p, k))))
    assert kept >= {(k, c) for k in (1, 2, 3, 4) for c in range(k)}


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_keeping_pairs_up_to_the_criterion_never_raises_the_error(epsilon: float) -> None:
    """Pair by pair, whatever the terms and however poor the scores; beyond the criterion it may do either."""
    beyond = set()
    generator = torch.Generator().manual_seed(8)
    for seed in range(300):
        pairs, k = 9, 2 + seed % 7
        product = oracles.make_product(pairs, seed, rows=1 + seed % 2, columns=1)
        scores = torch.rand(pairs, generator=generator, dtype=torch.float64) ** (1 + seed % 5)
        p = oracles.draw_p(product.norms if seed % 3 == 0 else scores, epsilon)
        errors = [oracles.wta_error(product, p, k, c) for c in range(k)]
        kept = int(water_level(p[None].sort(descending=True).values, k)[0])
        for c in range(kept):
            assert errors[c + 1] <= errors[c] * (1 + 1e-9) + 1e-12
        beyond.update((error > errors[0], error < min(errors[: kept + 1])) for error in errors[kept + 1 :])
    assert {above for above, _ in beyond} == {below for _, below in beyond} == {True, False}


def test_the_criterion_does_not_find_the_least_error() -> None:
    """Three orthogonal terms of norm 1, two to draw: error 3 as the criterion says, 2 with one of them kept."""
    unit = torch.eye(3, dtype=torch.float64)
    product = oracles.Product(unit, unit, unit, torch.einsum("mk,kn->kmn", unit, unit), torch.ones(3).double())
    p = oracles.draw_p(product.norms, 0.0)
    assert oracles.wta_kept(p, 2) == []
    mean, error = oracles.moments(Wta(), product, product.norms, 2, 0.0, oracles.wta_outcomes(p, 2), fixed_shape=False)
    check(mean, error, product, 3.0)
    rest = oracles.part(product, [1, 2])
    outcomes = oracles.crs_outcomes(oracles.draw_p(rest.norms, 0.0), 1)
    mean, error = oracles.moments(Crs(), rest, rest.norms, 1, 0.0, outcomes, fixed_shape=False)
    check(mean, error, rest, 2.0)
    assert oracles.wta_error(product, p, 2, 1) == pytest.approx(2.0)


def test_water_filling_is_the_best_bernoulli() -> None:
    """No other inclusion probabilities with the same sum have a lower expected error (small grid)."""
    product = oracles.make_product(4, seed=7)
    k, best = 2, oracles.bernoulli_error(product, oracles.inclusion_p(product.norms, 2, 0.0))
    three = torch.cartesian_prod(*[torch.linspace(0.02, 1.0, 50, dtype=torch.float64)] * 3)
    p = torch.cat([three, k - three.sum(1, keepdim=True)], 1)
    p = p[(p[:, 3] > 0) & (p[:, 3] <= 1)]
    assert len(p) > 10_000
    assert bool((((1 - p) / p * product.norms**2).sum(1) >= best - 1e-12).all())


@pytest.mark.parametrize("name", SIZES)
def test_without_the_scale_there_is_bias(name: str) -> None:
    """The mean test can fail: the same enumeration with the scale dropped misses by far."""
    product = oracles.make_product(5, seed=2)
    outcomes = oracles.outcomes_of(name, product.norms, 2, 0.0)
    rows = product.norms.expand(len(outcomes.probability), -1)
    drawn = SAMPLERS[name].draw(rows, 2, outcomes.uniforms, epsilon=0.0)
    unscaled = oracles.sampled_products(product, drawn._replace(scale=(drawn.scale > 0).double()))
    mean = (unscaled * outcomes.probability[:, None, None]).sum(0)
    assert (mean - product.exact).norm() > 0.1 * product.exact.norm()


def top(scores: list[float], k: int) -> tuple[int, ...]:
    row = torch.tensor([scores], dtype=torch.float64)
    selection = TopK().draw(row, k, None, epsilon=0.0)
    assert selection.scale is None
    return tuple(selection.indices[0].tolist())


def sums_left_out(values: tuple[float, ...], kept: tuple[int, ...]) -> float:
    return sum(value for j, value in enumerate(values) if j not in kept)


def test_topk_is_the_best_fixed_subset() -> None:
    """Independent pairs of zero mean: MSE is the sum of E t_j**2 left out, for every subset of k."""
    # Per pair two values with probabilities that make the mean 0: (value, probability), (value, probability).
    laws = [((-a, b / (a + b)), (b, a / (a + b))) for a, b in [(1, 2), (3, 1), (0.5, 0.5), (2, 2), (1, 0.1)]]
    second = [sum(value**2 * chance for value, chance in law) for law in laws]
    for k in (1, 2, 3, 4):
        mse = {}
        for kept in itertools.combinations(range(5), k):
            mse[kept] = 0.0
            for outcome in itertools.product(*laws):
                chance = torch.tensor([q for _, q in outcome]).prod().item()
                mse[kept] += chance * sums_left_out(tuple(value for value, _ in outcome), kept) ** 2
            assert mse[kept] == pytest.approx(sums_left_out(tuple(second), kept), rel=1e-5)
        assert min(mse, key=lambda kept: mse[kept]) == top(second, k)


def realised_mse(*law: tuple[float, float]) -> tuple[float, float]:
    """Of TopK on realised scores, K = 4, k = 2: the true MSE, and the sum of E t_j**2 left out."""
    mse = formula = 0.0
    for outcome in itertools.product(law, repeat=4):
        values = tuple(value for value, _ in outcome)
        chance = 1.0
        for _, q in outcome:
            chance *= q
        kept = top([abs(value) for value in values], 2)
        mse += chance * sums_left_out(values, kept) ** 2
        formula += chance * sums_left_out(tuple(value**2 for value in values), kept)
    return mse, formula


def test_topk_on_realised_scores() -> None:
    """The formula holds for sign-symmetric pairs and, in general, does not."""
    mse, formula = realised_mse((-1.0, 2 / 3), (2.0, 1 / 3))
    assert (round(mse, 2), round(formula, 2)) == (3.85, 2.37)
    mse, formula = realised_mse((-3.0, 0.1), (-1.0, 0.4), (1.0, 0.4), (3.0, 0.1))
    assert mse == pytest.approx(formula, rel=1e-12)
