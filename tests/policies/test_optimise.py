"""The knapsack against enumeration."""

from __future__ import annotations

import itertools
import random

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


def test_the_least_error_is_near_the_best_of_all() -> None:
    """Of one problem within one level of one variable, as the docstring says; on average within 5 %."""
    for seed in range(20):
        generator = random.Random(seed)
        problem = coupled(generator, 5)
        limit = generator.uniform(0.3, 0.9)
        found = least_error(problem, limit)
        assert found is not None and problem.price(found) <= limit
        best = min(problem.error(levels) for levels in every(problem) if problem.price(levels) <= limit)
        assert problem.error(found) <= best + max(max(own) / 2 for own in problem.errors)
        uniform = next(level for level in range(LEVELS) if problem.price((level,) * 5) <= limit)
        assert problem.error(found) <= problem.error((uniform,) * 5) + 1e-9
    excess = []
    for seed in range(40):
        problem = coupled(random.Random(100 + seed), 5)
        found = least_error(problem, 0.5)
        assert found is not None
        best = min(problem.error(levels) for levels in every(problem) if problem.price(levels) <= 0.5)
        excess.append(problem.error(found) / best - 1)
    assert sum(excess) / len(excess) < 0.05


def test_the_least_cost_keeps_within_the_error() -> None:
    for seed in range(10):
        generator = random.Random(seed)
        problem = coupled(generator, 5)
        limit = generator.uniform(0.2, 3)
        found = least_cost(problem, limit)
        assert problem.error(found) <= limit
        best = min(problem.price(levels) for levels in every(problem) if problem.error(levels) <= limit)
        assert problem.price(found) <= best + 0.12
        assert least_cost(problem, 0.0) == problem.exact


def test_budgets_at_the_ends() -> None:
    problem = coupled(random.Random(0), 4)
    assert least_error(problem, 1.0) == problem.exact
    least = problem.price(cheapest(problem))
    assert least == min(problem.price(levels) for levels in every(problem))
    assert least_error(problem, least * 0.99) is None
    assert least_error(problem, least) is not None
    # Slicing a small layer can cost more than it saves.
    worse = Problem([[0.0, 1.0], [0.0, 1.0]], lambda levels: 1 + 0.1 * levels[0] - 0.2 * levels[1])
    assert cheapest(worse) == (0, 1)


def test_costs_are_asked_for_once() -> None:
    asked: list[Levels] = []

    def cost(levels: Levels) -> float:
        asked.append(levels)
        return 1 - sum(levels) / 10

    assert least_error(Problem([[0.0, 1.0, 3.0]] * 3, cost), 0.7) is not None
    assert len(asked) == len(set(asked))
