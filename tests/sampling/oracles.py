"""Slow, independent statements of what the samplers must do; nothing here calls their code.

Every enumeration returns all outcomes of a draw as rows of uniforms with the probability of each, so one
batched call (an outcome per group) runs the real sampler through its whole probability space.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from fx_approx.sampling import Sampler, Selection

#: Scores of every kind a sampler may meet.
magnitudes = st.one_of(
    st.just(0.0),
    st.floats(0.1, 10.0),
    st.floats(1e-30, 1e30),
    st.sampled_from([float("inf"), float("nan")]),
)


class Product(NamedTuple):
    """A product in float64, with its rank-one terms and their norms."""

    lhs: Tensor
    rhs: Tensor
    exact: Tensor
    terms: Tensor
    norms: Tensor


class Outcomes(NamedTuple):
    """Every outcome of a draw: uniforms ``[N, U]`` and probabilities ``[N]``."""

    uniforms: Tensor
    probability: Tensor


def make_product(pairs: int, seed: int = 0, rows: int = 3, columns: int = 2) -> Product:
    generator = torch.Generator().manual_seed(seed)
    lhs = torch.randn(rows, pairs, generator=generator, dtype=torch.float64)
    rhs = torch.randn(pairs, columns, generator=generator, dtype=torch.float64)
    terms = torch.einsum("mk,kn->kmn", lhs, rhs)
    return Product(lhs, rhs, lhs @ rhs, terms, terms.flatten(1).norm(dim=1))


def sampled_products(product: Product, selection: Selection) -> Tensor:
    """A[:, idx] * scale @ B[idx, :] for every row of a Selection: ``[N, m, n]``."""
    scale = selection.scale
    if scale is None:
        scale = torch.ones_like(selection.indices, dtype=torch.float64)
    columns = product.lhs.T[selection.indices] * scale[..., None]
    return torch.einsum("gkm,gkn->gmn", columns, product.rhs[selection.indices])


def moments(
    sampler: Sampler,
    product: Product,
    scores: Tensor,
    k: int,
    epsilon: float,
    outcomes: Outcomes,
    fixed_shape: bool,
) -> tuple[Tensor, float]:
    """Exact mean of the sampled product, and exact expected squared error, over all outcomes."""
    assert abs(float(outcomes.probability.sum()) - 1.0) < 1e-12, "the enumeration is incomplete"
    rows = scores.expand(len(outcomes.probability), -1)
    selection = sampler.draw(rows, k, outcomes.uniforms, epsilon=epsilon, fixed_shape=fixed_shape)
    products = sampled_products(product, selection)
    weight = outcomes.probability[:, None, None]
    error = (products - product.exact).square().flatten(1).sum(1)
    return (products * weight).sum(0), float((error * outcomes.probability).sum())


def draw_p(scores: Tensor, epsilon: float) -> Tensor:
    return (1 - epsilon) * scores / scores.sum() + epsilon / len(scores)


def inclusion_p(scores: Tensor, k: int, epsilon: float) -> Tensor:
    """Water-filling by bisection on c; needs at least k non-zero scores."""
    assert int((scores > 0).sum()) >= k
    low, high = 0.0, 1.0 / float(scores[scores > 0].min())
    for _ in range(200):
        middle = (low + high) / 2
        if float((middle * scores).clamp(max=1.0).sum()) < k:
            low = middle
        else:
            high = middle
    return (1 - epsilon) * (high * scores).clamp(max=1.0) + epsilon * k / len(scores)


def bernoulli_outcomes(p: Tensor) -> Outcomes:
    """All 2**K masks: each uniform just below or just above its probability."""
    uniforms, probability = [], []
    for mask in itertools.product((True, False), repeat=len(p)):
        chance = math.prod(float(q) if z else 1.0 - float(q) for q, z in zip(p, mask, strict=True))
        if chance > 1e-14:
            step = torch.tensor([-1e-9 if z else 1e-9 for z in mask], dtype=torch.float64)
            uniforms.append(p + step)
            probability.append(chance)
    return Outcomes(torch.stack(uniforms), torch.tensor(probability, dtype=torch.float64))


def crs_outcomes(p: Tensor, k: int) -> Outcomes:
    """All K**k draw sequences: uniforms near the lower or the upper end of each pair's interval."""
    ends = p.cumsum(0)
    starts = ends - p
    uniforms, probability = [], []
    for sequence in itertools.product(range(len(p)), repeat=k):
        # Alternate between both ends of the intervals, so that a shifted cdf is seen.
        places = [0.001 if (i + sum(sequence)) % 2 else 0.999 for i in range(k)]
        uniforms.append([float(starts[j] + x * p[j]) for j, x in zip(sequence, places, strict=True)])
        probability.append(math.prod(float(p[j]) for j in sequence))
    return Outcomes(torch.tensor(uniforms, dtype=torch.float64), torch.tensor(probability, dtype=torch.float64))


def systematic_outcomes(p: Tensor) -> Outcomes:
    """All K! orders, each with every offset interval between two breakpoints."""
    pairs = len(p)
    uniforms, probability = [], []
    orders = list(itertools.permutations(range(pairs)))
    for order in orders:
        ends = list(itertools.accumulate(float(p[j]) for j in order))
        breaks = sorted({0.0, 1.0, *(end % 1.0 for end in ends)})
        keys = [0.0] * pairs
        for rank, j in enumerate(order):
            keys[j] = (rank + 0.5) / pairs
        for low, high in itertools.pairwise(breaks):
            # Intervals that exist by rounding only are left out; they carry no probability.
            if high - low > 1e-13:
                uniforms.append([*keys, (low + high) / 2])
                probability.append((high - low) / len(orders))
    return Outcomes(torch.tensor(uniforms, dtype=torch.float64), torch.tensor(probability, dtype=torch.float64))


def _arcs(start: float, length: float) -> list[tuple[float, float]]:
    """The offsets in [0, 1) that hit the interval (start, start + length], as one or two pieces."""
    start %= 1.0
    if start + length <= 1.0:
        return [(start, start + length)]
    return [(start, 1.0), (0.0, start + length - 1.0)]


def systematic_joint(p: Tensor) -> Tensor:
    """Joint inclusion probabilities, as overlaps of arcs on a circle averaged over all orders."""
    pairs = len(p)
    joint = torch.zeros(pairs, pairs, dtype=torch.float64)
    orders = list(itertools.permutations(range(pairs)))
    for order in orders:
        arcs, start = {}, 0.0
        for j in order:
            arcs[j] = _arcs(start, float(p[j]))
            start += float(p[j])
        for i, j in itertools.product(range(pairs), repeat=2):
            joint[i, j] += sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in arcs[i] for b in arcs[j])
    return joint / len(orders)


def wta_order(p: Tensor) -> list[int]:
    return sorted(range(len(p)), key=lambda j: (-float(p[j]), j))


def wta_kept(p: Tensor, k: int) -> list[int]:
    """The pairs that are certain: every c is tried; of several with the least value, up to rounding, the largest."""
    order = wta_order(p)
    values = [sum(float(p[j]) for j in reversed(order[c:])) / (k - c) for c in range(k)]
    return order[: max(c for c, value in enumerate(values) if value <= min(values) * (1 + 1e-10))]


def _wta_tail(p: Tensor, kept: list[int]) -> list[int]:
    return [j for j in range(len(p)) if j not in kept]


def wta_unique_pi(p: Tensor, k: int) -> Tensor:
    """Two steps: 1 for the kept pairs, then water-filling of the tail alone."""
    kept = wta_kept(p, k)
    tail, pi = _wta_tail(p, kept), torch.ones_like(p)
    pi[tail] = inclusion_p(p[tail], k - len(kept), 0.0)
    return pi


def wta_outcomes(p: Tensor, k: int) -> Outcomes:
    """All sequences of draws from the tail; the uniforms that no draw needs lie low and high in turn."""
    kept = wta_kept(p, k)
    tail = p[_wta_tail(p, kept)]
    drawn = crs_outcomes(tail / tail.sum(), k - len(kept))
    spare = torch.tensor([0.001, 0.999], dtype=torch.float64).repeat(len(drawn.probability))
    spare = spare[: len(drawn.probability), None].expand(-1, len(kept))
    return drawn._replace(uniforms=torch.cat([drawn.uniforms, spare], 1))


def wta_unique_outcomes(p: Tensor, k: int) -> Outcomes:
    return systematic_outcomes(wta_unique_pi(p, k))


def outcomes_of(name: str, scores: Tensor, k: int, epsilon: float) -> Outcomes:
    """Every outcome of a draw of the sampler ``name`` from ``scores [pairs]``."""
    if name in ("bernoulli", "systematic"):
        p = inclusion_p(scores, k, epsilon)
        return bernoulli_outcomes(p) if name == "bernoulli" else systematic_outcomes(p)
    by_draws = {"crs": crs_outcomes, "wta": wta_outcomes, "wta_unique": wta_unique_outcomes}
    assert name in by_draws, f"the outcomes of the sampler {name!r} are missing here"
    return by_draws[name](draw_p(scores, epsilon), k)


def crs_error(product: Product, p: Tensor, k: int) -> float:
    """(sum s_j**2 / p_j - ||AB||**2) / k: both CRS rows of ESTIMATORS.md are special cases."""
    return float(((product.norms**2 / p).sum() - product.exact.square().sum()) / k)


def bernoulli_error(product: Product, p: Tensor) -> float:
    return float(((1 - p) / p * product.norms**2).sum())


def systematic_error(product: Product, p: Tensor) -> float:
    flat = product.terms.flatten(1)
    return float(((systematic_joint(p) / (p[:, None] * p[None, :]) - 1) * (flat @ flat.T)).sum())


def part(product: Product, pairs: list[int]) -> Product:
    terms = product.terms[pairs]
    return Product(product.lhs[:, pairs], product.rhs[pairs], terms.sum(0), terms, product.norms[pairs])


def wta_error(product: Product, p: Tensor, k: int, c: int) -> float:
    """The c most probable pairs are exact, and the others are a product of their own for CRS."""
    tail = wta_order(p)[c:]
    return crs_error(part(product, tail), p[tail] / p[tail].sum(), k - c)


def wta_unique_error(product: Product, p: Tensor, k: int) -> float:
    tail = _wta_tail(p, wta_kept(p, k))
    return systematic_error(part(product, tail), wta_unique_pi(p, k)[tail])


def error_of(name: str, product: Product, scores: Tensor, k: int, epsilon: float) -> float:
    """The expected squared error of the sampler ``name`` by its formula."""
    p = draw_p(scores, epsilon)
    if name in ("bernoulli", "systematic"):
        formula = bernoulli_error if name == "bernoulli" else systematic_error
        return formula(product, inclusion_p(scores, k, epsilon))
    if name == "wta":
        return wta_error(product, p, k, len(wta_kept(p, k)))
    return {"crs": crs_error, "wta_unique": wta_unique_error}[name](product, p, k)
