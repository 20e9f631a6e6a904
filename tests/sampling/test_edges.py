"""Edge cases with a defined answer, and the invariants of every Selection."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fx_approx.sampling import (
    SAMPLERS,
    Bernoulli,
    Crs,
    Sampler,
    Selection,
    Systematic,
    TopK,
    Wta,
    WtaUnique,
    capacity,
    derive_key,
    uniforms,
)
from tests.sampling import oracles
from tests.sampling.oracles import magnitudes

NAN, INF = float("nan"), float("inf")
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=list(SAMPLERS))
both_wta = pytest.mark.parametrize("sampler", [Wta(), WtaUnique()], ids=lambda s: s.name)


def numbers(sampler: Sampler, scores: Tensor, k: int, step: int = 0) -> Tensor:
    groups, pairs = scores.shape
    key = derive_key(torch.tensor(11), torch.tensor(step))
    return uniforms(key, 2, groups, sampler.uniforms(pairs, k))


def draw(sampler: Sampler, scores: Tensor, k: int, step: int = 0, fixed_shape: bool = False) -> Selection:
    u = numbers(sampler, scores, k, step)
    return sampler.draw(scores, k, u, epsilon=sampler.default_epsilon, fixed_shape=fixed_shape)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float32)


def reads_scores(sampler: Sampler) -> bool:
    """Whether finite scores make a difference to it; the contract does not ask for that."""
    steep, flat = row(1, 2, 4, 8, 16, 32), row(1, 1, 1, 1, 1, 1)
    drawn = [draw(sampler, steep, 2, step).indices.tolist() for step in range(10)]
    return drawn != [draw(sampler, flat, 2, step).indices.tolist() for step in range(10)]


def check_invariants(sampler: Sampler, scores: Tensor, k: int, fixed_shape: bool, selection: Selection) -> None:
    groups, pairs = scores.shape
    indices, scale = selection
    assert indices.dtype == torch.int64 and indices.dim() == 2 and indices.shape[0] == groups
    assert indices.min() >= 0 and indices.max() < pairs
    assert bool((indices.diff(dim=1) > 0).all()), "ascending and without repeats"
    if sampler.fixed_size or k >= pairs:
        assert indices.shape[1] == min(k, pairs)
    elif fixed_shape:
        assert indices.shape[1] == capacity(pairs, k)
    if scale is None:
        assert not sampler.random or k >= pairs
    else:
        assert scale.shape == indices.shape and scale.dtype == scores.dtype
        assert bool((scale >= 0).all()) and bool(scale.isfinite().all())
    # A non-finite pair is always selected, with a scale that does not hide it.
    for g in range(groups):
        bad = (~scores[g].isfinite()).nonzero().flatten().tolist()
        if len(bad) <= k:
            chosen = indices[g].tolist()
            assert set(bad) <= set(chosen)
            assert scale is None or all(scale[g, chosen.index(j)] > 0 for j in bad)


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(sorted(SAMPLERS)),
    groups=st.integers(1, 3),
    pairs=st.integers(1, 16),
    k=st.integers(1, 18),
    step=st.integers(0, 2**40),
    fixed_shape=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    data=st.data(),
)
def test_invariants(
    name: str,
    groups: int,
    pairs: int,
    k: int,
    step: int,
    fixed_shape: bool,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    values = data.draw(st.lists(magnitudes, min_size=groups * pairs, max_size=groups * pairs))
    scores = torch.tensor(values, dtype=torch.float64).view(groups, pairs).to(dtype)
    sampler = SAMPLERS[name]
    selection = draw(sampler, scores, k, step, fixed_shape)
    check_invariants(sampler, scores, k, fixed_shape, selection)
    assert torch.equal(selection.indices, draw(sampler, scores, k, step, fixed_shape).indices)


@every_sampler
@pytest.mark.parametrize("fixed_shape", [False, True], ids=["eager", "fixed_shape"])
def test_extreme_scores(sampler: Sampler, fixed_shape: bool) -> None:
    """All zero is as all equal; k of all pairs is exact; NaN and Inf are always selected; a range of 1e60 is fine."""
    zero, one = torch.zeros(3, 12), torch.full((3, 12), 0.7)
    a, b = draw(sampler, zero, 4, fixed_shape=fixed_shape), draw(sampler, one, 4, fixed_shape=fixed_shape)
    assert torch.equal(a.indices, b.indices)
    if sampler.random:
        assert torch.equal(a.scale, b.scale) and a.scale.max() > 0
    scores = torch.tensor([[1.0, 0.0, 3.0, 2.0, 5.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    for k in (5, 6, 100):
        selection = sampler.draw(scores, k, None, epsilon=0.0, fixed_shape=fixed_shape)
        assert selection.scale is None
        assert selection.indices.tolist() == [[0, 1, 2, 3, 4]] * 2
    for value in (0.0, 2.0, NAN, INF):
        selection = sampler.draw(row(value), 1, None, epsilon=0.0, fixed_shape=fixed_shape)
        assert selection.indices.tolist() == [[0]] and selection.scale is None
    for bad, k, step in itertools.product(((0,), (7,), (2, 3), (0, 4, 7)), (3, 5), range(10)):
        scores = torch.full((1, 8), 1e30)
        for i, j in enumerate(bad):
            scores[0, j] = (NAN, INF)[i % 2]
        check_invariants(sampler, scores, k, fixed_shape, draw(sampler, scores, k, step, fixed_shape))
    scores = torch.logspace(-30, 30, 61).roll(17)[None]
    for step in range(20):
        selection = sampler.draw(scores, 6, numbers(sampler, scores, 6, step), epsilon=0.0, fixed_shape=fixed_shape)
        check_invariants(sampler, scores, 6, fixed_shape, selection)
        assert int(scores.argmax()) in selection.indices[0].tolist() or not reads_scores(sampler)


@every_sampler
def test_groups_are_drawn_separately_and_no_gradient_flows(sampler: Sampler) -> None:
    """From level to steep, every group keeps another number of pairs; a NaN reaches no other group."""
    scores = (
        torch.rand(4, 30, generator=torch.Generator().manual_seed(3)) ** torch.tensor([0.5, 1.0, 4.0, 16.0])[:, None]
    )
    scores.requires_grad_()
    assert len({len(oracles.wta_kept(oracles.draw_p(one.detach(), 0.1), 8)) for one in scores}) > 2
    u, epsilon = numbers(sampler, scores, 8), sampler.default_epsilon
    together = sampler.draw(scores, 8, u, epsilon=epsilon, fixed_shape=True)
    assert together.scale is None or not together.scale.requires_grad
    spoiled = scores.detach().clone()
    spoiled[1, 3] = NAN
    beside = sampler.draw(spoiled, 8, u, epsilon=epsilon, fixed_shape=True)
    for g in range(4):
        alone = sampler.draw(scores[g : g + 1], 8, u[g : g + 1], epsilon=epsilon, fixed_shape=True)
        for other in [together] + [beside] * (g != 1):
            assert torch.equal(other.indices[g], alone.indices[0])
            assert alone.scale is None or torch.equal(other.scale[g], alone.scale[0])
    if sampler.random and reads_scores(sampler):
        assert together.scale.unique(dim=0).shape[0] == 4


@every_sampler
def test_other_dtypes(sampler: Sampler) -> None:
    """Low precision scores are upcast: the same draw as from the same values in float32."""
    scores = (torch.rand(2, 40, generator=torch.Generator().manual_seed(2)) + 0.01).to(torch.bfloat16)
    reference = draw(sampler, scores.float(), 11)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        other = draw(sampler, scores.to(dtype), 11)
        assert torch.equal(reference.indices, other.indices)
        if reference.scale is not None:
            assert other.scale.dtype == dtype
            torch.testing.assert_close(other.scale.float(), reference.scale, rtol=1e-2, atol=0)


# Sampler, scores, k, uniforms, epsilon; the indices and scales that come of them.
BY_HAND: list[tuple[Sampler, list[float], int, list[float] | None, float, list[int], list[float] | None]] = [
    # Nothing drawn: one pair of scale 0.
    (Bernoulli(), [1.0, 2.0, 3.0, 4.0], 1, [0.9999] * 4, 0.1, [0], [0.0]),
    # p = 1/4 each; draws 2, 0, 2 -> counts 1 and 2; the entry between is padding.
    (Crs(), [1.0] * 4, 3, [0.6, 0.1, 0.7], 0.0, [0, 1, 2], [4 / 3, 0.0, 8 / 3]),
    (Crs(), [1.0] * 5, 4, [0.45, 0.1, 0.5, 0.55], 0.0, [0, 1, 2, 3], [1.25, 0.0, 3.75, 0.0]),
    # pi = (1/4, 1/2, 3/4, 1/2); order 3, 1, 0, 2 -> ends 1/2, 1, 5/4, 2; offset 0.3 hits 3 and 2.
    (Systematic(), [1.0, 2.0, 3.0, 2.0], 2, [0.6, 0.4, 0.8, 0.2, 0.3], 0.0, [2, 3], [4 / 3, 2.0]),
    (Systematic(), [1.0, 2.0, 3.0, 2.0], 2, [0.6, 0.4, 0.8, 0.2, 0.6], 0.0, [1, 2], [2.0, 4 / 3]),
    (Systematic(), [1.0, 2.0, 3.0, 2.0], 2, [0.6, 0.4, 0.8, 0.2, 0.1], 0.0, [0, 3], [4.0, 2.0]),
    # p = (.1, .5, .2, .1, .1): keeping pair 1 gives .5 / 2, pair 2 as well .3 / 1; two draws from 0, 2, 3, 4.
    (Wta(), [1.0, 5.0, 2.0, 1.0, 1.0], 3, [0.1, 0.9, 0.5], 0.0, [0, 1, 4], [2.5, 1.0, 2.5]),
    (Wta(), [1.0, 5.0, 2.0, 1.0, 1.0], 3, [0.3, 0.5, 0.1], 0.0, [0, 1, 2], [0.0, 1.0, 2.5]),
    # epsilon 0.8 leaves p = (.18, .26, .2, .18, .18): nothing is certain.
    (Wta(), [1.0, 5.0, 2.0, 1.0, 1.0], 3, [0.1, 0.9, 0.5], 0.8, [0, 2, 4], [1 / 0.54, 1 / 0.6, 1 / 0.54]),
    # Ties go to the lowest index; beside a non-finite score all others count as equal, as for the random samplers.
    (TopK(), [1.0] * 200, 3, None, 0.0, [0, 1, 2], None),
    (TopK(), [1.0, 5.0, 5.0, 0.0, 5.0, 9.0], 3, None, 0.0, [1, 2, 5], None),
    (TopK(), [1.0, 5.0, NAN, 9.0], 2, None, 0.0, [0, 2], None),
]


def test_draws_by_hand() -> None:
    for sampler, scores, k, u, epsilon, indices, scale in BY_HAND:
        found = sampler.draw(row(*scores), k, None if u is None else row(*u), epsilon=epsilon)
        assert found.indices.tolist() == [indices], (sampler.name, u)
        assert (found.scale is None) == (scale is None)
        if scale is not None:
            torch.testing.assert_close(found.scale, row(*scale))


def test_bernoulli_draws_of_different_sizes_are_padded() -> None:
    u = torch.tensor([[0.9, 0.9, 0.1, 0.1], [0.9, 0.9, 0.9, 0.1], [0.9, 0.9, 0.9, 0.9]])
    selection = Bernoulli().draw(torch.ones(3, 4), 2, u, epsilon=0.0)
    assert selection.indices.tolist() == [[2, 3], [0, 3], [0, 1]]
    assert selection.scale.tolist() == [[2.0, 2.0], [0.0, 2.0], [0.0, 0.0]]
    empty = Bernoulli().draw(row(1.0, 2.0, 3.0, 4.0), 1, torch.full((1, 4), 0.9999), epsilon=0.1, fixed_shape=True)
    assert empty.indices.shape[1] == capacity(4, 1) and not empty.scale.any()
    scores = torch.rand(4, 200, generator=torch.Generator().manual_seed(1))
    eager, fixed_shape = draw(Bernoulli(), scores, 20), draw(Bernoulli(), scores, 20, fixed_shape=True)
    assert fixed_shape.indices.shape[1] == capacity(200, 20) < 200
    dense = [torch.zeros(4, 200).scatter(1, s.indices, s.scale) for s in (eager, fixed_shape)]
    assert torch.equal(*dense)


def test_what_is_impossible_is_never_drawn_and_what_is_certain_always() -> None:
    few, certain = row(0.0, 1.0, 0.0, 0.0, 2.0, 0.0), row(0.0, 100.0, 1.0, 0.5, 100.0, 2.0)
    for step in range(50):
        selection = Crs().draw(few, 3, numbers(Crs(), few, 3, step), epsilon=0.0)
        assert set(selection.indices[selection.scale > 0].tolist()) <= {1, 4}
        selection = Systematic().draw(certain, 3, numbers(Systematic(), certain, 3, step), epsilon=0.0)
        chosen = selection.indices[0].tolist()
        assert {1, 4} < set(chosen) and 0 not in chosen
        assert selection.scale[0, chosen.index(1)] == 1.0


def test_wta_reads_the_uniforms_of_its_draws_only() -> None:
    scores, u = torch.tensor([[9.0, 6.0, 1.0, 1.0, 1.0], [1.0] * 5]), torch.tensor([[0.4, 0.2, 0.7]] * 2)
    selection = Wta().draw(scores, 3, u, epsilon=0.0)
    for column in range(3):
        other = u.clone()
        other[:, column] = 0.95
        same = (Wta().draw(scores, 3, other, epsilon=0.0).indices == selection.indices).all(1)
        assert same.tolist() == [column > 0, False]  # the first group keeps two pairs and draws once


@both_wta
@pytest.mark.parametrize("values", [(3.0, 1.0, 1.0), (0.3, 0.3, 0.3), (1e30, 1e-30, 7.0)])
def test_no_more_non_zero_scores_than_k_are_kept_bitwise(sampler: Sampler, values: tuple[float, ...]) -> None:
    """For k = 3 one pair is behind those that are certain, for the others nothing is."""
    scores = row(values[0], 0.0, *values[1:], 0.0, 0.0, 0.0)
    for k, step in itertools.product((3, 4, 5), range(20)):
        indices, scale = sampler.draw(scores, k, numbers(sampler, scores, k, step), epsilon=0.0)
        drawn = dict(zip(indices[0].tolist(), scale[0].tolist(), strict=True))
        assert [drawn.pop(j) for j in (0, 2, 3)] == [1.0] * 3
        # What is left over: padding, or, without replacement, k - 3 of four pairs that nothing is known about.
        assert list(drawn.values()) == [0.0 if sampler.name == "wta" else 4.0 / max(k - 3, 1)] * (k - 3)


@pytest.mark.parametrize("k", [1, 4, 9])
def test_wta_unique_is_systematic_until_epsilon_is_mixed_in(k: int) -> None:
    scores = torch.rand(6, 12, generator=torch.Generator().manual_seed(5)) ** 4
    u = numbers(WtaUnique(), scores, k)
    ours, theirs = (s.draw(scores, k, u, epsilon=0.0) for s in (WtaUnique(), Systematic()))
    assert torch.equal(ours.indices, theirs.indices)
    torch.testing.assert_close(ours.scale, theirs.scale)
    mixed, other = (s.draw(scores, k, u, epsilon=0.1) for s in (WtaUnique(), Systematic()))
    assert bool((mixed.scale == 1).any()) == (k > 1) and not bool((other.scale == 1).any())


WRONG: list[tuple[Sampler, dict[str, Any], str]] = [
    (Crs(), {"scores": torch.ones(4)}, "scores"),
    (Crs(), {"scores": torch.ones(1, 0)}, "scores"),
    (Crs(), {"scores": torch.ones(1, 4, dtype=torch.int64)}, "scores"),
    (Crs(), {"k": 0}, "k: "),
    (Crs(), {"k": -1}, "k: "),
    (Crs(), {"uniforms": None}, r"uniforms: crs needs shape \(1, 2\), got None"),
    (Crs(), {"uniforms": torch.rand(1, 3)}, r"uniforms: .*\(1, 3\)"),
    (Crs(), {"uniforms": torch.rand(2, 2)}, r"uniforms: .*\(2, 2\)"),
    (Crs(), {"epsilon": 1.0}, "epsilon"),
    (Crs(), {"epsilon": -0.5}, "epsilon"),
    (Crs(), {"epsilon": NAN}, "epsilon"),
    (TopK(), {"uniforms": None}, "epsilon: topk"),
]


def test_wrong_arguments() -> None:
    for sampler, change, message in WRONG:
        arguments = {"scores": torch.ones(1, 4), "k": 2, "uniforms": torch.rand(1, 2), "epsilon": 0.1, **change}
        with pytest.raises(ValueError, match=message):
            sampler.draw(**arguments)
