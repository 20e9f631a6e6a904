"""Examples drawn by their losses: the estimate is unbiased, the epochs are what they say, and nothing gets lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fx_approx.data import ImportanceSampler, Indexed
from fx_approx.sampling.probabilities import inclusion_probabilities
from tests.sampling import oracles

SIZE = 40
LOSSES = torch.linspace(0.1, 4.0, SIZE, dtype=torch.float64)


class Stream(IterableDataset[int]):
    """A data set that is read in its own order, though it says how long it is."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def known(**options: Any) -> ImportanceSampler:
    sampler = ImportanceSampler(SIZE, **{"ratio": 0.5, **options})
    sampler.update(torch.arange(SIZE), LOSSES)
    return sampler


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of a linear model that has begun to learn 300 of scikit-learn's digits, and its gradients by example."""
    found = load_digits()
    x, y = torch.tensor(found.data[:300] / 16.0), torch.tensor(found.target[:300])
    weight = torch.zeros(64, 10, dtype=torch.float64, requires_grad=True)
    for _ in range(30):
        (gradient,) = torch.autograd.grad(F.cross_entropy(x @ weight, y), weight)
        weight = (weight - gradient).detach().requires_grad_()
    scores = (x @ weight).detach()
    errors = scores.softmax(1) - F.one_hot(y, 10)
    return F.cross_entropy(scores, y, reduction="none"), torch.einsum("ni,nj->nij", x, errors).flatten(1)


@pytest.mark.parametrize("name", ["systematic", "bernoulli", "infobatch"])
def test_the_gradient_of_an_epoch_is_unbiased_on_real_losses(
    name: str, digits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """A z-test over 400 epochs, in every direction in which the gradients differ."""
    losses, gradients = digits
    if name == "infobatch":
        sampler = ImportanceSampler.infobatch(300, epochs=10_000)
    else:
        sampler = ImportanceSampler(300, 0.5, sampler=name)
    sampler.update(torch.arange(300), losses)
    assert losses.max() > 20 * losses.min()
    rows = []
    for epoch in range(1, 401):
        sampler.set_epoch(epoch)
        index = torch.tensor(list(sampler))
        share = 1.0 if name == "infobatch" else 0.5
        rows.append(sampler.weights(index, torch.float64) @ gradients[index] / (share * 300))
    estimates, exact = torch.stack(rows), gradients.mean(0)
    error = estimates.std(0) / len(rows) ** 0.5
    moving = error > 1e-12
    assert int(moving.sum()) > 500
    off = ((estimates.mean(0) - exact).abs() / error)[moving]
    assert off.max() < 4.8 and 0.4 < off.square().mean() < 2  # directions go together, so few are independent


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
    for epoch in range(1, 401):
        sampler.set_epoch(epoch)
        counts[list(sampler)] += 1
    error = (expected * (1 - expected) / 400).sqrt().clamp(min=1e-9)
    assert ((counts / 400 - expected).abs() < 4.5 * error).all()
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


def test_a_state_of_the_middle_of_an_epoch_keeps_what_was_drawn() -> None:
    """Losses that have come since the draw count from the next epoch on, and whoever sets the epoch changes nothing."""
    one = known()
    one.set_epoch(2)
    read = list(one)
    one.update(torch.tensor(read[:8]), torch.full((8,), 50.0))
    other = ImportanceSampler(SIZE)
    other.load_state_dict(one.state_dict())
    for _ in range(2):
        other.set_epoch(2)
        assert list(other) == read
    one.set_epoch(3)
    other.set_epoch(3)
    assert list(other) == list(one) != read
    drawn, again = torch.tensor(list(one)), torch.tensor([place for place in one if place in read[:8]])
    assert len(again) >= 6 and (one.weights(again) == one.weights(drawn).min()).all(), "read the most often"
    other.set_epoch(2)
    assert list(other) != read, "drawn anew"


def test_even_epochs_are_of_one_length_and_read_everything_first() -> None:
    sampler = ImportanceSampler(SIZE, 0.3, epochs=20, even=True)
    counts, order = torch.zeros(SIZE), []
    for epoch in range(20):
        sampler.set_epoch(epoch)
        index = torch.tensor(list(sampler))
        assert len(index) == len(sampler) == 12
        assert sampler.exact == (epoch < 4 or epoch >= 18)  # four times 12 are the first to reach 40
        if sampler.exact:
            assert (sampler.weights(index) == 1).all()
        else:
            assert sampler.weights(index).max() > 1
        if epoch < 4:
            counts += index.bincount(minlength=SIZE)
            order.append(index)
        sampler.update(index, LOSSES[index])
    assert counts.min() == 1 and counts.max() == 2 and counts.sum() == 48
    assert len(torch.cat(order[:3]).unique()) == 36, "nothing twice before everything was read"
    resumed = ImportanceSampler(SIZE, 0.3, epochs=20, even=True, seed=9)
    resumed.load_state_dict(sampler.state_dict())
    assert list(resumed) == list(sampler)


@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_that_do_not_come_out_even(drop_last: bool) -> None:
    """What is left over of an epoch is another part of it in each, so that nothing is never read."""
    data = Indexed(TensorDataset(torch.arange(SIZE)))
    sampler = known(min_probability=0.3)
    loader, seen = DataLoader(data, batch_size=7, sampler=sampler, drop_last=drop_last), set()
    for epoch in range(1, 40):
        sampler.set_epoch(epoch)
        sizes = [len(index) for _, index in loader]
        assert sizes == ([7, 7] if drop_last else [7, 7, 6]) and len(loader) == len(sizes)
        seen |= {int(one) for _, index in loader for one in index}
    assert seen == set(range(SIZE))


def test_workers_that_stay_read_what_each_epoch_has_drawn() -> None:
    data = Indexed(TensorDataset(torch.arange(SIZE)))
    sampler = known()
    loader = DataLoader(data, batch_size=8, sampler=sampler, num_workers=1, persistent_workers=True)
    for epoch in (1, 2):
        sampler.set_epoch(epoch)
        read = [int(one) for _, index in loader for one in index]
        assert read == list(sampler)
        sampler.update(torch.tensor(read), LOSSES[read].flip(0))


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
        (lambda: Indexed(Stream()), TypeError, "numbered examples, got Stream"),
        (lambda: ImportanceSampler(Stream()), TypeError, "size: expected a data set .* got the IterableDataset Stream"),
        (lambda: ImportanceSampler(TensorDataset(torch.ones(0))), ValueError, "size: expected 1 or more, got 0"),
        (lambda: ImportanceSampler(5, even=1), TypeError, "even: expected True or False, got 1"),
        (lambda: ImportanceSampler(5, even=True, sampler="bernoulli"), ValueError, "even: expected False with the"),
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
