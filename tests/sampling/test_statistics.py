"""One seeded large-sample test per sampler, with the library's own uniforms.

The seeds are fixed, so the tests do not flicker; the false alarm rates say how likely it was, before
the seed was chosen, that a correct sampler fails.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fx_approx.sampling import (
    SAMPLERS,
    Selection,
    capacity,
    derive_key,
    draw_probabilities,
    inclusion_probabilities,
    uniforms,
)
from tests.sampling import oracles

DRAWS, PAIRS, K = 20_000, 48, 12
EPSILON = 0.1
# Two-sided false alarm rate per statistic 5.7e-7; the largest test looks at 48 of them: 2.8e-5.
Z = 5.0
RANDOM = ["bernoulli", "crs", "systematic", "wta", "wta_unique"]


def draw_many(name: str, scores: Tensor, step: int = 0) -> Selection:
    sampler = SAMPLERS[name]
    key = derive_key(torch.tensor(2024), torch.tensor(step))
    numbers = uniforms(key, 1, DRAWS, sampler.uniforms(PAIRS, K))
    return sampler.draw(scores.expand(DRAWS, -1), K, numbers, epsilon=EPSILON)


def dense(selection: Selection) -> Tensor:
    """Scales in place of the pairs, 0 where a pair was not drawn: ``[draws, K]``."""
    assert selection.scale is not None
    return torch.zeros(DRAWS, PAIRS, dtype=torch.float64).scatter(1, selection.indices, selection.scale)


def z_scores(samples: Tensor, expected: Tensor) -> Tensor:
    return (samples.mean(0) - expected) / (samples.std(0) / DRAWS**0.5)


@pytest.mark.parametrize("name", RANDOM)
def test_unbiased(name: str) -> None:
    product = oracles.make_product(PAIRS, seed=5)
    selection = draw_many(name, product.norms)
    estimates = torch.einsum("gk,kmn->gmn", dense(selection), product.terms)
    assert z_scores(estimates, product.exact).abs().max() < Z
    # The same test sees the bias when the scale is dropped, and when it is 5 % off.
    assert z_scores(estimates * 1.05, product.exact).abs().max() > Z
    plain = torch.einsum("gk,kmn->gmn", (dense(selection) > 0).double(), product.terms)
    assert z_scores(plain, product.exact).abs().max() > Z


@pytest.mark.parametrize("name", ["bernoulli", "systematic"])
def test_inclusion_frequencies(name: str) -> None:
    scores = oracles.make_product(PAIRS, seed=6).norms
    pi = inclusion_probabilities(scores[None], K, EPSILON)[0]
    drawn = (dense(draw_many(name, scores)) > 0).double()
    deviation = (drawn.mean(0) - pi) / (pi * (1 - pi) / DRAWS).sqrt()
    assert deviation.abs().max() < Z


def test_crs_draw_frequencies() -> None:
    scores = oracles.make_product(PAIRS, seed=6).norms
    p = draw_probabilities(scores[None], EPSILON)[0]
    counts = dense(draw_many("crs", scores)) * K * p
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-9)
    assert bool((counts.sum(1).round() == K).all())
    assert ((counts.mean(0) - K * p) / (K * p * (1 - p) / DRAWS).sqrt()).abs().max() < Z


def test_wta_draw_frequencies() -> None:
    scores = oracles.make_product(PAIRS, seed=6).norms ** 3
    p = oracles.draw_p(scores, EPSILON)
    kept, scales = oracles.wta_kept(p, K), dense(draw_many("wta", scores))
    assert 0 < len(kept) < K - 1
    assert bool((scales[:, kept] == 1).all())
    tail = [j for j in range(PAIRS) if j not in kept]
    draws, q = K - len(kept), p[tail] / p[tail].sum()
    counts = scales[:, tail] * draws * q
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-9)
    assert bool((counts.sum(1).round() == draws).all())
    assert counts.max() > 1, "repeats"
    assert ((counts.mean(0) - draws * q) / (draws * q * (1 - q) / DRAWS).sqrt()).abs().max() < Z


def test_wta_unique_inclusion_frequencies() -> None:
    scores = oracles.make_product(PAIRS, seed=6).norms ** 3
    p = oracles.draw_p(scores, EPSILON)
    kept, pi, scales = oracles.wta_kept(p, K), oracles.wta_unique_pi(p, K), dense(draw_many("wta_unique", scores))
    assert 0 < len(kept) < K - 1
    assert bool((scales[:, kept] == 1).all())
    tail = [j for j in range(PAIRS) if j not in kept]
    deviation = ((scales > 0).double().mean(0) - pi) / (pi * (1 - pi) / DRAWS).sqrt()
    assert deviation[tail].abs().max() < Z


def test_expected_count() -> None:
    """Bernoulli: k within 1 %, which is 8 standard deviations of the mean; without replacement: k each time."""
    scores = oracles.make_product(PAIRS, seed=7).norms
    counts = (dense(draw_many("bernoulli", scores)) > 0).sum(1)
    assert counts.double().mean().item() == pytest.approx(K, rel=0.01)
    assert counts.min() < K < counts.max()
    for name in ("systematic", "wta_unique"):
        assert bool(((dense(draw_many(name, scores)) > 0).sum(1) == K).all())
    for name in ("crs", "wta"):
        assert draw_many(name, scores).indices.shape == (DRAWS, K)


def test_steps_draw_independently() -> None:
    """Two steps share as many pairs as independent draws do: sum of pi_j**2."""
    scores = oracles.make_product(PAIRS, seed=8).norms
    pi = inclusion_probabilities(scores[None], K, EPSILON)[0]
    for name in ("bernoulli", "systematic"):
        first, second = ((dense(draw_many(name, scores, step)) > 0).double() for step in (1, 2))
        shared = (first * second).sum(1)
        assert abs(z_scores(shared, pi.square().sum()).item()) < Z


def test_capacity_is_never_exceeded_and_not_wasteful() -> None:
    """The exact tail of the Binomial, the widest count for given k, at the capacity: below 1e-9."""
    for pairs, k in [(64, 8), (256, 128), (1024, 512), (4096, 64), (4096, 4000)]:
        room = capacity(pairs, k)
        assert k < room <= pairs
        if room < pairs:
            n, p = float(pairs), k / pairs
            j = torch.arange(room + 1, pairs + 1, dtype=torch.float64)
            log = torch.lgamma(torch.tensor(n + 1).double()) - torch.lgamma(j + 1) - torch.lgamma(n - j + 1)
            tail = (log + j * torch.tensor(p).log() + (n - j) * torch.tensor(1 - p).log()).exp().sum()
            assert 1e-20 < tail < 1e-9
    assert capacity(10, 10) == 10
    assert capacity(4, 9) == 4
