"""Edge cases with a defined answer, and the invariants of every Selection."""

from __future__ import annotations

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
random_samplers = pytest.mark.parametrize("sampler", [s for s in SAMPLERS.values() if s.random], ids=lambda s: s.name)
both_forms = pytest.mark.parametrize("fixed_shape", [False, True], ids=["eager", "fixed"])


def numbers(sampler: Sampler, scores: Tensor, k: int, step: int = 0) -> Tensor:
    groups, pairs = scores.shape
    key = derive_key(torch.tensor(11), torch.tensor(step))
    return uniforms(key, 2, groups, sampler.uniforms(pairs, k))


def draw(sampler: Sampler, scores: Tensor, k: int, step: int = 0, fixed_shape: bool = False) -> Selection:
    u = numbers(sampler, scores, k, step)
    return sampler.draw(scores, k, u, epsilon=sampler.default_epsilon, fixed_shape=fixed_shape)


def row(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([values], dtype=dtype)


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


@settings(max_examples=300, deadline=None)
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
    again = draw(sampler, scores, k, step, fixed_shape)
    assert torch.equal(selection.indices, again.indices)
    # A non-finite pair is always selected, with a scale that does not hide it.
    for g in range(groups):
        bad = (~scores[g].isfinite()).nonzero().flatten().tolist()
        if len(bad) <= k:
            chosen = selection.indices[g].tolist()
            assert set(bad) <= set(chosen)
            if selection.scale is not None:
                assert all(selection.scale[g, chosen.index(j)] > 0 for j in bad)


@random_samplers
@both_forms
def test_all_zero_scores_are_uniform_scores(sampler: Sampler, fixed_shape: bool) -> None:
    zero, one = torch.zeros(3, 12), torch.full((3, 12), 0.7)
    a, b = draw(sampler, zero, 4, fixed_shape=fixed_shape), draw(sampler, one, 4, fixed_shape=fixed_shape)
    assert torch.equal(a.indices, b.indices) and torch.equal(a.scale, b.scale)
    assert a.scale.max() > 0


@every_sampler
@both_forms
@pytest.mark.parametrize("k", [5, 6, 100])
def test_k_at_least_pairs_is_exact(sampler: Sampler, fixed_shape: bool, k: int) -> None:
    scores = torch.tensor([[1.0, 0.0, 3.0, 2.0, 5.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    selection = sampler.draw(scores, k, None, epsilon=0.0, fixed_shape=fixed_shape)
    assert selection.scale is None
    assert selection.indices.tolist() == [[0, 1, 2, 3, 4]] * 2


@every_sampler
def test_one_pair(sampler: Sampler) -> None:
    for value in (0.0, 2.0, NAN, INF):
        selection = sampler.draw(row(value), 1, None, epsilon=0.0)
        assert selection.indices.tolist() == [[0]] and selection.scale is None


@every_sampler
@both_forms
@pytest.mark.parametrize("bad", [(0,), (7,), (2, 3), (0, 4, 7)])
@pytest.mark.parametrize("k", [3, 5])
def test_non_finite_pairs_are_always_selected(
    sampler: Sampler, fixed_shape: bool, bad: tuple[int, ...], k: int
) -> None:
    for step in range(40):
        scores = torch.full((1, 8), 1e30)
        for i, j in enumerate(bad):
            scores[0, j] = (NAN, INF)[i % 2]
        selection = draw(sampler, scores, k, step, fixed_shape)
        chosen = selection.indices[0].tolist()
        assert set(bad) <= set(chosen)
        assert selection.scale is None or all(selection.scale[0, chosen.index(j)] > 0 for j in bad)


@every_sampler
def test_non_finite_row_leaves_other_rows_alone(sampler: Sampler) -> None:
    clean = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) + 0.1
    spoiled = clean.clone()
    spoiled[1, 3] = NAN
    a, b = draw(sampler, clean, 4, fixed_shape=True), draw(sampler, spoiled, 4, fixed_shape=True)
    assert torch.equal(a.indices[0], b.indices[0])
    assert a.scale is None or torch.equal(a.scale[0], b.scale[0])


def test_empty_bernoulli_draw() -> None:
    scores, u = row(1.0, 2.0, 3.0, 4.0), row(0.9999, 0.9999, 0.9999, 0.9999)
    eager = Bernoulli().draw(scores, 1, u, epsilon=0.1)
    assert eager.indices.tolist() == [[0]] and eager.scale.tolist() == [[0.0]]
    fixed = Bernoulli().draw(scores, 1, u, epsilon=0.1, fixed_shape=True)
    assert fixed.indices.shape[1] == capacity(4, 1) and not fixed.scale.any()


def test_bernoulli_rows_of_different_counts_are_padded() -> None:
    scores = torch.ones(3, 4)
    u = torch.tensor([[0.9, 0.9, 0.1, 0.1], [0.9, 0.9, 0.9, 0.1], [0.9, 0.9, 0.9, 0.9]])
    selection = Bernoulli().draw(scores, 2, u, epsilon=0.0)
    assert selection.indices.tolist() == [[2, 3], [0, 3], [0, 1]]
    assert selection.scale.tolist() == [[2.0, 2.0], [0.0, 2.0], [0.0, 0.0]]


def test_bernoulli_static_and_eager_are_the_same_sample() -> None:
    scores = torch.rand(4, 200, generator=torch.Generator().manual_seed(1))
    eager, fixed = draw(Bernoulli(), scores, 20), draw(Bernoulli(), scores, 20, fixed_shape=True)
    assert fixed.indices.shape[1] == capacity(200, 20) < 200
    dense = [torch.zeros(4, 200).scatter(1, s.indices, s.scale) for s in (eager, fixed)]
    assert torch.equal(*dense)


def test_crs_merges_repeats() -> None:
    # p = 1/4 each; draws 2, 0, 2, 2 -> counts 1 and 3, the third and fourth entry are padding.
    u = row(0.6, 0.1, 0.7, 0.51)
    with_five = Crs().draw(torch.ones(1, 5), 4, row(0.45, 0.1, 0.5, 0.55), epsilon=0.0)
    assert with_five.indices.tolist() == [[0, 1, 2, 3]]
    torch.testing.assert_close(with_five.scale, row(1.25, 0.0, 3.75, 0.0))
    with_four = Crs().draw(torch.ones(1, 4), 3, u[:, :3], epsilon=0.0)
    assert with_four.indices.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(with_four.scale, row(4 / 3, 0.0, 8 / 3))


def test_crs_never_draws_a_zero_score() -> None:
    scores = row(0.0, 1.0, 0.0, 0.0, 2.0, 0.0)
    for step in range(50):
        selection = Crs().draw(scores, 3, numbers(Crs(), scores, 3, step), epsilon=0.0)
        drawn = selection.indices[selection.scale > 0].tolist()
        assert set(drawn) <= {1, 4}


def test_systematic_by_hand() -> None:
    # pi = (1/4, 1/2, 3/4, 1/2); order 3, 1, 0, 2 -> ends 1/2, 1, 5/4, 2; offset 0.3 hits 3 and 2.
    scores, order = row(1.0, 2.0, 3.0, 2.0), (0.6, 0.4, 0.8, 0.2)
    first = Systematic().draw(scores, 2, row(*order, 0.3), epsilon=0.0)
    assert first.indices.tolist() == [[2, 3]]
    torch.testing.assert_close(first.scale, row(4 / 3, 2.0))
    second = Systematic().draw(scores, 2, row(*order, 0.6), epsilon=0.0)
    assert second.indices.tolist() == [[1, 2]]
    third = Systematic().draw(scores, 2, row(*order, 0.1), epsilon=0.0)
    assert third.indices.tolist() == [[0, 3]]


def test_systematic_keeps_certain_pairs() -> None:
    scores = row(0.0, 100.0, 1.0, 0.5, 100.0, 2.0)
    for step in range(50):
        selection = Systematic().draw(scores, 3, numbers(Systematic(), scores, 3, step), epsilon=0.0)
        chosen = selection.indices[0].tolist()
        assert {1, 4} < set(chosen) and 0 not in chosen
        assert selection.scale[0, chosen.index(1)] == 1.0


def test_wta_by_hand() -> None:
    # p = (.1, .5, .2, .1, .1): keeping pair 1 gives .5 / 2, pair 2 as well .3 / 1; two draws from 0, 2, 3, 4.
    scores = row(1.0, 5.0, 2.0, 1.0, 1.0)
    selection = Wta().draw(scores, 3, row(0.1, 0.9, 0.5), epsilon=0.0)
    assert selection.indices.tolist() == [[0, 1, 4]]
    torch.testing.assert_close(selection.scale, row(2.5, 1.0, 2.5))
    twice = Wta().draw(scores, 3, row(0.3, 0.5, 0.1), epsilon=0.0)
    assert twice.indices.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(twice.scale, row(0.0, 1.0, 2.5))
    # epsilon 0.8 leaves p = (.18, .26, .2, .18, .18): nothing is certain.
    mixed = Wta().draw(scores, 3, row(0.1, 0.9, 0.5), epsilon=0.8)
    assert mixed.indices.tolist() == [[0, 2, 4]]
    torch.testing.assert_close(mixed.scale, row(1 / 0.54, 1 / 0.6, 1 / 0.54))


@pytest.mark.parametrize("sampler", [Wta(), WtaUnique()], ids=lambda s: s.name)
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_wta_against_one_draw_after_the_other(sampler: Sampler, epsilon: float) -> None:
    weights = {"wta": oracles.wta_weights, "wta_unique": oracles.wta_unique_weights}[sampler.name]
    generator, kept = torch.Generator().manual_seed(9), set()
    for k in (1, 2, 7, 16):
        # From level to steep: every group keeps another number of pairs, and some scores are equal.
        scores = torch.rand(12, 17, generator=generator, dtype=torch.float64) ** torch.arange(0, 6, 0.5)[:, None]
        scores[:, 1:4] = scores[:, :1]
        u = numbers(sampler, scores, k, step=k)
        selection = sampler.draw(scores, k, u, epsilon=epsilon)
        dense = torch.zeros_like(scores).scatter(1, selection.indices, selection.scale)
        p = torch.stack([oracles.draw_p(one, epsilon) for one in scores])
        expected = [weights(p[g], k, u[g].tolist()) for g in range(12)]
        torch.testing.assert_close(dense, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
        kept |= {len(oracles.wta_kept(one, k)) for one in p}
    assert len(kept) > 6


def test_wta_reads_the_uniforms_of_its_draws_only() -> None:
    scores, u = torch.tensor([[9.0, 6.0, 1.0, 1.0, 1.0], [1.0] * 5]), torch.tensor([[0.4, 0.2, 0.7]] * 2)
    selection = Wta().draw(scores, 3, u, epsilon=0.0)
    for column in range(3):
        other = u.clone()
        other[:, column] = 0.95
        same = (Wta().draw(scores, 3, other, epsilon=0.0).indices == selection.indices).all(1)
        assert same.tolist() == [column > 0, False]  # the first group keeps two pairs and draws once


@pytest.mark.parametrize("sampler", [Wta(), WtaUnique()], ids=lambda s: s.name)
@pytest.mark.parametrize("values", [(3.0, 1.0, 1.0), (0.3, 0.3, 0.3), (1e30, 1e-30, 7.0)])
def test_no_more_non_zero_scores_than_k_are_kept_bitwise(sampler: Sampler, values: tuple[float, ...]) -> None:
    """For k = 3 one pair is behind those that are certain, for the others nothing is."""
    scores = row(values[0], 0.0, *values[1:], 0.0, 0.0, 0.0)
    for k, step in [(k, step) for k in (3, 4, 5) for step in range(20)]:
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


def test_topk_ties_go_to_the_lowest_index() -> None:
    assert TopK().draw(torch.ones(1, 200), 3, None, epsilon=0.0).indices.tolist() == [[0, 1, 2]]
    scores = row(1.0, 5.0, 5.0, 0.0, 5.0, 9.0)
    assert TopK().draw(scores, 3, None, epsilon=0.0).indices.tolist() == [[1, 2, 5]]
    # Beside a non-finite score all others count as equal, as they do for the random samplers.
    assert TopK().draw(row(1.0, 5.0, NAN, 9.0), 2, None, epsilon=0.0).indices.tolist() == [[0, 2]]


@random_samplers
@both_forms
def test_huge_dynamic_range(sampler: Sampler, fixed_shape: bool) -> None:
    scores = torch.logspace(-30, 30, 61).roll(17)[None]
    for step in range(20):
        u = numbers(sampler, scores, 6, step)
        selection = sampler.draw(scores, 6, u, epsilon=0.0, fixed_shape=fixed_shape)
        check_invariants(sampler, scores, 6, fixed_shape, selection)
        largest = int(scores.argmax())
        assert largest in selection.indices[0].tolist()


@every_sampler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(sampler: Sampler, dtype: torch.dtype) -> None:
    """Low precision scores are upcast: the same draw as from the same values in float32."""
    scores = (torch.rand(2, 40, generator=torch.Generator().manual_seed(2)) + 0.01).to(torch.bfloat16)
    reference, other = draw(sampler, scores.float(), 11), draw(sampler, scores.to(dtype), 11)
    assert torch.equal(reference.indices, other.indices)
    if reference.scale is not None:
        assert other.scale.dtype == dtype
        torch.testing.assert_close(other.scale.float(), reference.scale, rtol=1e-2, atol=0)


@every_sampler
def test_groups_are_drawn_separately(sampler: Sampler) -> None:
    scores = torch.rand(4, 30, generator=torch.Generator().manual_seed(3))
    u = numbers(sampler, scores, 8)
    epsilon = sampler.default_epsilon
    together = sampler.draw(scores, 8, u, epsilon=epsilon, fixed_shape=True)
    for g in range(4):
        alone = sampler.draw(scores[g : g + 1], 8, u[g : g + 1], epsilon=epsilon, fixed_shape=True)
        assert torch.equal(together.indices[g], alone.indices[0])
        assert alone.scale is None or torch.equal(together.scale[g], alone.scale[0])
    if sampler.random:
        assert together.scale.unique(dim=0).shape[0] == 4


@every_sampler
def test_no_gradient_to_the_scores(sampler: Sampler) -> None:
    scores = torch.rand(1, 10, requires_grad=True)
    selection = draw(sampler, scores, 4)
    assert selection.scale is None or not selection.scale.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.ones(4)}, "scores"),
        ({"scores": torch.ones(1, 0)}, "scores"),
        ({"scores": torch.ones(1, 4, dtype=torch.int64)}, "scores"),
        ({"k": 0}, "k: "),
        ({"k": -1}, "k: "),
        ({"uniforms": None}, r"uniforms: crs needs shape \(1, 2\), got None"),
        ({"uniforms": torch.rand(1, 3)}, r"uniforms: .*\(1, 3\)"),
        ({"uniforms": torch.rand(2, 2)}, r"uniforms: .*\(2, 2\)"),
        ({"epsilon": 1.0}, "epsilon"),
        ({"epsilon": -0.5}, "epsilon"),
        ({"epsilon": NAN}, "epsilon"),
    ],
)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    arguments = {"scores": torch.ones(1, 4), "k": 2, "uniforms": torch.rand(1, 2), "epsilon": 0.1, **change}
    with pytest.raises(ValueError, match=message):
        Crs().draw(**arguments)


def test_topk_refuses_epsilon() -> None:
    with pytest.raises(ValueError, match="epsilon: topk"):
        TopK().draw(torch.ones(1, 4), 2, None, epsilon=0.1)
