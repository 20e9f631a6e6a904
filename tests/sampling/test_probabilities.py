"""Draw and inclusion probabilities: by hand, against bisection, and their properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fx_approx.sampling import draw_probabilities, inclusion_probabilities
from fx_approx.sampling.probabilities import water_level
from tests.sampling import oracles
from tests.sampling.oracles import magnitudes

NAN, INF = float("nan"), float("inf")


@settings(max_examples=200, deadline=None)
@given(
    pairs=st.integers(1, 12),
    k=st.integers(1, 12),
    epsilon=st.sampled_from([0.0, 0.1, 0.9]),
    data=st.data(),
)
def test_inclusion_probabilities_properties(pairs: int, k: int, epsilon: float, data: st.DataObject) -> None:
    k = min(k, pairs)
    values = data.draw(st.lists(magnitudes, min_size=pairs, max_size=pairs))
    scores = torch.tensor([values], dtype=torch.float64)
    p = inclusion_probabilities(scores, k, epsilon)
    assert p.dtype == torch.float64 and bool(((p >= 0) & (p <= 1)).all())
    assert p.sum().item() == pytest.approx(k, rel=1e-12)
    q = draw_probabilities(scores, epsilon)
    assert bool((q >= 0).all()) and q.sum().item() == pytest.approx(1.0, rel=1e-12)
    if scores.isfinite().all():
        order = scores[0].argsort()
        assert bool((p[0, order].diff() >= -1e-12).all()), "a larger score is never less likely"
        if epsilon == 0:
            assert bool((p[scores == 0] == 0).all()) or int((scores > 0).sum()) < k


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 9) | st.floats(1e-3, 1e3), min_size=1, max_size=12), st.integers(1, 12))
def test_water_level_against_every_prefix(values: list[float], k: int) -> None:
    """Integers make ties, also of the quotient; the largest prefix counts."""
    scores = torch.tensor(values, dtype=torch.float64)
    k = min(k, len(values))
    ranked = scores.sort(descending=True).values
    capped, rest = water_level(ranked[None], k)
    c = len(oracles.wta_kept(scores, k))
    assert capped.tolist() == [[c]]
    assert rest.item() == pytest.approx(float(ranked[c:].sum()))
    # Equal scores are not told apart, save where the last of k non-zero ones is the whole rest.
    if c > 0 and ranked[c - 1] == ranked[c]:
        assert rest == ranked[c]


def test_water_level_of_a_tie_that_rounding_would_break() -> None:
    """Seven times 0.7, added up, is more than 7 * 0.7; of one draw nothing is certain."""
    equal = torch.full((1, 7), 0.7, dtype=torch.float64)
    assert equal.cumsum(-1).max() > 7 * 0.7
    assert water_level(equal, 7)[0].item() == 6
    capped, rest = water_level(torch.tensor([[9.0, 1.0, 1.0, 1.0]], dtype=torch.float64), 1)
    assert not capped.any() and rest.item() == 12


def test_inclusion_probabilities_by_hand() -> None:
    scores = torch.tensor(
        [
            [9.0, 1.0, 1.0, 1.0],  # one capped, the rest share 1
            [0.0, 0.0, 0.0, 0.0],  # nothing known
            [0.0, 5.0, 0.0, 0.0],  # fewer non-zero than k
            [3.0, 3.0, 0.0, 0.0],  # exactly k non-zero
            [1e30, 1e-30, 1e-30, 2e-30],  # the tail survives a score 1e60 times larger
            [1.0, 2.0, 3.0, 2.0],  # nobody capped
            [NAN, 1e30, INF, 7.0],
            [NAN, 1e30, 5.0, 7.0],
        ]
    )
    third = 1 / 3
    expected = [
        [1.0, third, third, third],
        [0.5, 0.5, 0.5, 0.5],
        [third, 1.0, third, third],
        [1.0, 1.0, 0.0, 0.0],
        [1.0, 0.25, 0.25, 0.5],
        [0.25, 0.5, 0.75, 0.5],
        [1.0, 0.0, 1.0, 0.0],
        [1.0, third, third, third],
    ]
    wanted = torch.tensor(expected, dtype=torch.float64)
    close = {"rtol": 1e-6, "atol": 0.0}
    torch.testing.assert_close(inclusion_probabilities(scores, 2, 0.0), wanted, **close)
    # Mixing is per row, and never touches a row with a non-finite score.
    mixed = 0.8 * wanted + 0.2 * 0.5
    mixed[6:] = wanted[6:]
    torch.testing.assert_close(inclusion_probabilities(scores, 2, 0.2), mixed, **close)


def test_draw_probabilities_by_hand() -> None:
    scores = torch.tensor([[3.0, 1.0, 0.0, 0.0], [0.0] * 4, [INF, 1.0, NAN, 5.0], [1e-38, 3e-38, 0.0, 0.0]])
    wanted = torch.tensor([[0.75, 0.25, 0, 0], [0.25] * 4, [0.5, 0, 0.5, 0], [0.25, 0.75, 0, 0]], dtype=torch.float64)
    close = {"rtol": 1e-6, "atol": 0.0}
    torch.testing.assert_close(draw_probabilities(scores, 0.0), wanted, **close)
    mixed = 0.6 * wanted + 0.1
    mixed[2] = wanted[2]
    torch.testing.assert_close(draw_probabilities(scores, 0.4), mixed, **close)
