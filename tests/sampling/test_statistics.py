"""One seeded large-sample test per sampler, with the library's own uniforms.

The seeds are fixed, so the tests do not flicker; the false alarm rates say how likely it was, before
the seed was chosen, that a correct sampler fails.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from fx_approx.sampling import SAMPLERS, capacity, derive_key, inclusion_probabilities, uniforms
from tests.sampling import oracles

DRAWS, PAIRS, K = 20_000, 48, 12
EPSILON = 0.1
# Two-sided false alarm rate per statistic 5.7e-7; the largest test looks at 48 of them: 2.8e-5.
Z = 5.0
RANDOM = [name for name, sampler in SAMPLERS.items() if sampler.random]


@functools.cache
def product_of() -> oracles.Product:
    return oracles.make_product(PAIRS, seed=5)


@functools.cache
def dense(name: str, step: int = 0) -> Tensor:
    """Draws by the norms: scales in place of the pairs, 0 where a pair was not drawn, ``[draws, K]``."""
    sampler = SAMPLERS[name]
    key = derive_key(torch.tensor(2024), torch.tensor(step))
    numbers = uniforms(key, 1, DRAWS, sampler.uniforms(PAIRS, K))
    scores = product_of().norms.expand(DRAWS, -1)
    selection = sampler.draw(scores, K, numbers, epsilon=EPSILON)
    assert selection.scale is not None
    if sampler.fixed_size:
        assert selection.indices.shape == (DRAWS, K)
    return torch.zeros(DRAWS, PAIRS, dtype=torch.float64).scatter(1, selection.indices, selection.scale)


def z_scores(samples: Tensor, expected: Tensor) -> Tensor:
    return (samples.mean(0) - expected) / (samples.std(0) / DRAWS**0.5)


@pytest.mark.parametrize("name", RANDOM)
def test_unbiased(name: str) -> None:
    product = product_of()
    estimates = torch.einsum("gk,kmn->gmn", dense(name), product.terms)
    assert z_scores(estimates, product.exact).abs().max() < Z
    # The same test sees the bias when the scale is dropped, and when it is 5 % off.
    assert z_scores(estimates * 1.05, product.exact).abs().max() > Z
    plain = torch.einsum("gk,kmn->gmn", (dense(name) > 0).double(), product.terms)
    assert z_scores(plain, product.exact).abs().max() > Z


def test_expected_count() -> None:
    """Bernoulli: k within 1 %, which is 8 standard deviations of the mean; without replacement: k each time."""
    counts = (dense("bernoulli") > 0).sum(1)
    assert counts.double().mean().item() == pytest.approx(K, rel=0.01)
    assert counts.min() < K < counts.max()
    for name in ("systematic", "wta_unique"):
        assert bool(((dense(name) > 0).sum(1) == K).all())


def test_steps_draw_independently() -> None:
    """Two steps share as many pairs as independent draws do: sum of pi_j**2."""
    pi = inclusion_probabilities(product_of().norms[None], K, EPSILON)[0]
    for name in ("bernoulli", "systematic"):
        shared = ((dense(name, 1) > 0) & (dense(name, 2) > 0)).double().sum(1)
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
