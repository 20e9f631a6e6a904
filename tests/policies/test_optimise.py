"""The knapsack against enumeration."""

from __future__ import annotations

import itertools
import random

import pytest

from fx_approx.policies.budget_solver import Levels, Problem, cheapest, least_cost, least_error

LEVELS = 4


def convex(generator: random.Random) -> list[float]:
    """Errors of one variable: 0 if exact, and growing faster and faster."""
    steps = sorted(generator.uniform(0.1, 1) for _ in range(LEVELS - 1))
    return [0.0, *itertools.accumulate(steps)]


def coupled(generator: random.Random, count: int) -> Problem:
    """A chain of layers that pay the product of their own share and their neighbour's, as under demand."""
    sizes = [generator.uniform(0.5, 2) for _ in range(count)]
    shares = [1.0, 0.75, 0.5, 0.25]

    def cost(levels: Levels) -> float:
        own = [shares[level] for level in levels]
        after = [*own[1:], 1.0]
        return sum(size * one * two for size, one, two in zip(sizes, own, after, strict=True)) / sum(sizes)

    return Problem([convex(generator) for _ in range(count)], cost)


def every(problem: Problem) -> list[Levels]:
    return list(itertools.product(*(range(len(own)) for own in problem.errors)))


@pytest.mark.parametrize("seed", range(20))
def test_least_error_is_near_the_best_of_all(seed: int) -> None:
    generator = random.Random(seed)
    problem = coupled(generator, 5)
    limit = generator.uniform(0.3, 0.9)
    found = least_error(problem, limit)
    assert found is not None and problem.price(found) <= limit
    best = min(problem.error(levels) for levels in every(problem) if problem.price(levels) <= limit)
    # Within one level of one variable, as the docstring says of costs that do not depend on each other.
    assert problem.error(found) <= best + max(max(own) / 2 for own in problem.errors)
    greedy = max(problem.error((level,) * 5) for level in range(LEVELS) if problem.price((level,) * 5) > limit)
    uniform = [level for level in range(LEVELS) if problem.price((level,) * 5) <= limit]
    assert problem.error(found) <= problem.error((uniform[0],) * 5) + 1e-9 or greedy < 0


def test_on_average_it_is_within_five_per_cent_of_the_best() -> None:
    excess = []
    for seed in range(40):
        generator = random.Random(100 + seed)
        problem = coupled(generator, 5)
        found = least_error(problem, 0.5)
        assert found is not None
        best = min(problem.error(levels) for levels in every(problem) if problem.price(levels) <= 0.5)
        excess.append(problem.error(found) / best - 1)
    assert sum(excess) / len(excess) < 0.05


def test_a_budget_that_exact_meets_is_exact() -> None:
    problem = coupled(random.Random(0), 4)
    assert least_error(problem, 1.0) == problem.exact


def test_a_budget_that_nothing_meets_is_none() -> None:
    problem = coupled(random.Random(0), 4)
    least = problem.price(cheapest(problem))
    assert least == min(problem.price(levels) for levels in every(problem))
    assert least_error(problem, least * 0.99) is None
    assert least_error(problem, least) is not None


def test_the_cheapest_does_not_sample_what_costs_more_sampled() -> None:
    """Slicing a small layer can cost more than it saves."""
    problem = Problem([[0.0, 1.0], [0.0, 1.0]], lambda levels: 1 + 0.1 * levels[0] - 0.2 * levels[1])
    assert cheapest(problem) == (0, 1)


@pytest.mark.parametrize("seed", range(10))
def test_least_cost_keeps_within_the_error(seed: int) -> None:
    generator = random.Random(seed)
    problem = coupled(generator, 5)
    limit = generator.uniform(0.2, 3)
    found = least_cost(problem, limit)
    assert problem.error(found) <= limit
    best = min(problem.price(levels) for levels in every(problem) if problem.error(levels) <= limit)
    assert problem.price(found) <= best + 0.12


def test_no_error_allowed_is_exact() -> None:
    problem = coupled(random.Random(1), 3)
    assert least_cost(problem, 0.0) == problem.exact


def test_costs_are_asked_for_once() -> None:
    asked: list[Levels] = []

    def cost(levels: Levels) -> float:
        asked.append(levels)
        return 1 - sum(levels) / 10

    assert least_error(Problem([[0.0, 1.0, 3.0]] * 3, cost), 0.7) is not None
    assert len(asked) == len(set(asked))
