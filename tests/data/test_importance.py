"""Examples drawn by their losses: the estimate is unbiased, the epochs are what they say, and nothing gets lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fx_approx.data import ImportanceSampler, Indexed
from fx_approx.sampling.probabilities import inclusion_probabilities
from tests.sampling import oracles

SIZE = 40
LOSSES = torch.linspace(0.1, 4.0, SIZE, dtype=torch.float64)


def known(**options: Any) -> ImportanceSampler:
    sampler = ImportanceSampler(SIZE, **{"ratio": 0.5, **options})
    sampler.update(torch.arange(SIZE), LOSSES)
    return sampler


@pytest.mark.parametrize("name", ["systematic", "bernoulli", "infobatch"])
def test_the_weighted_mean_of_a_draw_is_unbiased(name: str) -> None:
    """Over many epochs the sum of weight times anything estimates its sum over all examples."""
    if name == "infobatch":
        sampler = ImportanceSampler.infobatch(SIZE, epochs=10_000)
        sampler.update(torch.arange(SIZE), LOSSES)
    else:
        sampler = known(sampler=name)
    anything = torch.randn(SIZE, generator=torch.Generator().manual_seed(0)).double() + 1
    factor = 1.0 if name == "infobatch" else SIZE / (0.5 * SIZE)
    found = []
    for epoch in range(1, 3001):
        sampler.set_epoch(epoch)
        index = torch.tensor(list(sampler))
        found.append(factor * float((sampler.weights(index).double() * anything[index]).sum()))
    estimates = torch.tensor(found, dtype=torch.float64)
    error = estimates.std() / len(found) ** 0.5
    assert (estimates.mean() - anything.sum()).abs() < 4.5 * error
    assert estimates.std() > 0


def few(name: str) -> ImportanceSampler:
    """Five examples whose losses are known, in an epoch that is drawn; one counts so much that it is always read."""
    if name == "infobatch":
        sampler = ImportanceSampler.infobatch(5, 0.3, epochs=3)
    else:
        sampler = ImportanceSampler(5, 0.6, exact_first=0, min_probability=0.15, sampler=name)
    sampler.update(torch.arange(5), torch.tensor([0.2, 0.0, 9.0, 0.7, 1.1], dtype=torch.float64))
    return sampler


def outcomes_of(name: str) -> oracles.Outcomes:
    """All that the uniforms of a draw of :func:`few` may come to; by the oracle's own formulas."""
    if name == "infobatch":
        # Left out where the uniform is below 0.3; all but the largest are below the mean, that one is always read.
        return oracles.bernoulli_outcomes(torch.tensor([0.3, 0.3, 1.0, 0.3, 0.3], dtype=torch.float64))
    losses = torch.tensor([0.2, 0.0, 9.0, 0.7, 1.1], dtype=torch.float64)
    p = oracles.inclusion_p(losses, 3, 0.15 * 5 / 3)
    return oracles.systematic_outcomes(p) if name == "systematic" else oracles.bernoulli_outcomes(p)


@pytest.mark.parametrize("name", ["systematic", "bernoulli", "infobatch"])
def test_the_weighted_sum_is_unbiased_over_all_outcomes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly: each outcome of a draw once, by its probability."""
    outcomes, sampler = outcomes_of(name), few(name)
    anything = torch.tensor([1.0, -2.0, 0.5, 3.0, 10.0], dtype=torch.float64)
    factor = 1.0 if name == "infobatch" else 1 / 0.6  # weights are 1 on average
    mean, sizes = torch.zeros((), dtype=torch.float64), set()
    assert abs(float(outcomes.probability.sum()) - 1) < 1e-12
    for uniforms, chance in zip(outcomes.uniforms, outcomes.probability, strict=True):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *shape, _given=uniforms, **_: _given.view(*shape))
            sampler.set_epoch(1)
        index = torch.tensor(list(sampler), dtype=torch.int64)
        assert len(index.unique()) == len(index)
        sizes.add(len(index))
        mean += chance * factor * (sampler.weights(index, torch.float64) * anything[index]).sum()
    assert (len(sizes) == 1) == (name == "systematic")
    assert abs(float(mean - anything.sum())) < 1e-12


def test_probabilities_are_those_of_the_losses_with_a_least_one() -> None:
    sampler = known(min_probability=0.2)
    expected = inclusion_probabilities(LOSSES.unsqueeze(0), SIZE // 2, 0.4)[0]
    counts = torch.zeros(SIZE, dtype=torch.float64)
    for epoch in range(1, 2001):
        sampler.set_epoch(epoch)
        counts[list(sampler)] += 1
    error = (expected * (1 - expected) / 2000).sqrt().clamp(min=1e-9)
    assert ((counts / 2000 - expected).abs() < 4.5 * error).all()
    assert expected.min() >= 0.2


def test_infobatch_leaves_out_half_of_what_is_below_the_mean() -> None:
    sampler = ImportanceSampler.infobatch(SIZE, 0.5, epochs=8)
    sampler.update(torch.arange(SIZE), LOSSES)
    sampler.set_epoch(1)
    chosen = torch.tensor(list(sampler))
    high = torch.where(LOSSES.mean() <= LOSSES)[0]
    assert set(high.tolist()) <= set(chosen.tolist()) and len(high) < len(chosen) < SIZE
    assert (sampler.weights(high) == 1).all()
    low = chosen[LOSSES[chosen] < LOSSES.mean()]
    assert (sampler.weights(low) == 2).all()
    sampler.set_epoch(7)  # 0.875 of 8
    assert sampler.exact and len(sampler) == SIZE


def test_the_first_and_the_last_epochs_read_everything() -> None:
    sampler = ImportanceSampler(SIZE, 0.25, epochs=20, exact_last=0.1)
    lengths = []
    for epoch in range(20):
        sampler.set_epoch(epoch)
        lengths.append(len(sampler))
        index = torch.tensor(list(sampler))
        assert len(index.unique()) == len(index)
        if epoch in (0, 18, 19):
            assert (sampler.weights(index) == 1).all()
        sampler.update(index, LOSSES[index])
    assert lengths == [SIZE] + [SIZE // 4] * 17 + [SIZE] * 2
    unknown = ImportanceSampler(SIZE, 0.25)
    unknown.set_epoch(5)
    assert len(unknown) == SIZE, "nothing is known of any example"


def test_ranks_share_one_draw_in_parts_of_equal_length() -> None:
    parts = []
    for rank in range(3):
        sampler = known(num_replicas=3, rank=rank)
        sampler.set_epoch(1)
        parts.append(list(sampler))
    whole = known()
    whole.set_epoch(1)
    assert {len(part) for part in parts} == {7}
    assert set().union(*parts) == set(whole)


def test_a_run_that_resumes_reads_the_same() -> None:
    one = known(momentum=0.5)
    one.set_epoch(3)
    one.update(torch.tensor([0, 1]), torch.tensor([9.0, 9.0]))
    assert one.state_dict()["losses"][0] == 0.5 * 0.1 + 0.5 * 9.0
    other = ImportanceSampler(SIZE, momentum=0.5, seed=5)
    other.load_state_dict(one.state_dict())
    assert list(other) == list(one)
    assert torch.equal(other.weights(torch.arange(SIZE)), one.weights(torch.arange(SIZE)))
    one.set_epoch(4)
    other.set_epoch(4)
    assert list(other) == list(one)
    with pytest.raises(ValueError, match="state: of 40 examples, this sampler has 7"):
        ImportanceSampler(7).load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="state: expected the keys"):
        other.load_state_dict({})


def test_with_a_data_loader() -> None:
    data = Indexed(TensorDataset(torch.randn(SIZE, 3), torch.arange(SIZE)))
    sampler = ImportanceSampler(data, 0.5)
    seen = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for _, label, index in DataLoader(data, batch_size=8, sampler=sampler):
            assert torch.equal(label, index)
            sampler.update(index, LOSSES[index].requires_grad_())
            seen.append(len(index))
    assert sum(seen) == SIZE + SIZE // 2
    named = Indexed([{"x": 1.0}, {"x": 2.0}])
    assert named[1] == {"x": 2.0, "index": 1} and Indexed([5.0])[0] == (5.0, 0)
    with pytest.raises(ValueError, match="have a 'x' of their own"):
        Indexed([{"x": 1.0}], key="x")[0]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ImportanceSampler(0), ValueError, "size: expected 1 or more, got 0"),
        (lambda: ImportanceSampler(5, 0.0), ValueError, r"ratio: expected in \(0, 1\], got 0"),
        (lambda: ImportanceSampler(5, "half"), TypeError, "ratio: expected a number"),
        (lambda: ImportanceSampler(5, 0.5, min_probability=0.6), ValueError, "which is 0.5, got 0.6"),
        (lambda: ImportanceSampler(5, 0.5, momentum=1.0), ValueError, "momentum: expected in"),
        (lambda: ImportanceSampler(5, 0.5, sampler="topk"), ValueError, "expected one of systematic, bernoulli"),
        (lambda: ImportanceSampler(5, 0.5, rank=1, num_replicas=1), ValueError, "rank: expected below num_replicas"),
        (lambda: ImportanceSampler.infobatch(5, 1.0, epochs=3), ValueError, "prune: expected in"),
        (lambda: ImportanceSampler(5).update(torch.tensor([5]), torch.ones(1)), ValueError, "from 0 to 4, got 5"),
        (lambda: ImportanceSampler(5).update(torch.tensor([1]), torch.ones(2)), ValueError, "expected 1, one for each"),
        (lambda: ImportanceSampler(5).update(torch.tensor([1]), -torch.ones(1)), ValueError, "none below 0, got -1"),
        (lambda: ImportanceSampler(5).synchronize(), RuntimeError, "not initialised"),
        (lambda: Indexed(iter([1])), TypeError, "expected one with a length"),
    ],
)
def test_bad_arguments(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_loss_that_overflows_counts_as_unknown() -> None:
    sampler = ImportanceSampler(4, 0.5, exact_first=0, min_probability=0.1)
    sampler.update(torch.arange(4), torch.tensor([1.0, math.inf, 2.0, math.nan]))
    sampler.set_epoch(1)
    assert len(sampler) == 2 and sampler.weights(torch.arange(4)).isfinite().all()
    with pytest.raises(ValueError, match="index: expected numbers from 0 to 3, got -1"):
        sampler.weights(torch.tensor([-1, 2]))
