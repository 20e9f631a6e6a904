"""A multiple-choice knapsack whose costs depend on each other: a level for each variable, at the least error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

Levels = tuple[int, ...]

_ROUNDS = 6
_BISECTIONS = 40


@dataclasses.dataclass
class Problem:
    """Choose a level for each variable.

    Attributes:
        errors: By variable and level; level 0 is exact and has error 0.
        cost: Of all levels together; a variable's share in it depends on the others.
    """

    errors: Sequence[Sequence[float]]
    cost: Callable[[Levels], float]

    def __post_init__(self) -> None:
        self._known: dict[Levels, float] = {}

    def price(self, levels: Levels) -> float:
        """The cost, computed once."""
        if levels not in self._known:
            self._known[levels] = self.cost(levels)
        return self._known[levels]

    def error(self, levels: Levels) -> float:
        """The sum of the errors."""
        return sum(own[level] for own, level in zip(self.errors, levels, strict=True))

    @property
    def exact(self) -> Levels:
        return (0,) * len(self.errors)

    def with_level(self, levels: Levels, place: int, level: int) -> Levels:
        """``levels`` with another one for the variable ``place``."""
        return (*levels[:place], level, *levels[place + 1 :])


def cheapest(problem: Problem) -> Levels:
    """The levels of least cost, by coordinate descent from the lowest ratios; the most exact ones of equal cost."""
    levels = tuple(len(own) - 1 for own in problem.errors)
    for _ in range(_ROUNDS):
        before = levels
        for place, own in enumerate(problem.errors):
            tried = [problem.with_level(levels, place, level) for level in range(len(own))]
            levels = min(tried, key=problem.price)
        if levels == before:
            break
    return levels


def least_error(problem: Problem, limit: float) -> Levels | None:
    """The levels of least error whose cost is at most ``limit``; None if the cheapest costs more.

    By Lagrange multipliers on costs that are linearised: around the levels found so far, the cost of each level of each
    variable is tabulated with the others held, the multiplier is bisected until the true cost fits, and the tables are
    made anew, until nothing is gained. What is left of the budget is then spent level by level where it buys most. For
    costs that do not depend on each other it is within one level of a single variable of the optimum (Everett 1963).
    """
    best = _search(problem, lambda levels: problem.price(levels) <= limit, problem.error, True)
    return None if best is None else _spend(problem, best, limit)


def least_cost(problem: Problem, limit: float) -> Levels:
    """The levels of least cost whose error is at most ``limit``, by the same method; all exact if nothing else fits."""
    best = _search(problem, lambda levels: problem.error(levels) <= limit, problem.price, False)
    return problem.exact if best is None or problem.price(best) >= problem.price(problem.exact) else best


def _search(
    problem: Problem, fits: Callable[[Levels], bool], worth: Callable[[Levels], float], cheaper_fits: bool
) -> Levels | None:
    """The best levels that fit, over rounds of linearised costs.

    Args:
        problem: Costs and errors.
        fits: Whether levels are allowed.
        worth: What is to be small.
        cheaper_fits: Levels fit if they cost little; otherwise, if they err little.
    """
    candidates = [levels for levels in (problem.exact, cheapest(problem)) if fits(levels)]
    best = min(candidates, key=worth) if candidates else None
    around = tuple(len(own) // 2 for own in problem.errors)
    for _ in range(_ROUNDS):
        found = _bisect(problem, _tables(problem, around), fits, worth, cheaper_fits)
        if found is None or found == around:
            break
        if best is None or worth(found) < worth(best):
            best = found
        around = found
    return best


def _tables(problem: Problem, around: Levels) -> list[list[float]]:
    return [
        [problem.price(problem.with_level(around, place, level)) for level in range(len(own))]
        for place, own in enumerate(problem.errors)
    ]


def _bisect(
    problem: Problem,
    tables: list[list[float]],
    fits: Callable[[Levels], bool],
    worth: Callable[[Levels], float],
    cheaper_fits: bool,
) -> Levels | None:
    """The best levels that fit, over the multipliers of the linearised problem; see :func:`_search`."""

    def solve(multiplier: float) -> Levels:
        return tuple(
            min(range(len(own)), key=lambda level: (own[level] + multiplier * costs[level], level))
            for own, costs in zip(problem.errors, tables, strict=True)
        )

    error = max((max(own) for own in problem.errors), default=0.0) or 1.0
    spread = max((max(costs) - min(costs) for costs in tables), default=0.0) or 1.0
    low, high = 1e-9 * error / spread, 1e9 * error / spread
    found: list[Levels] = []
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        levels = solve(middle)
        if fits(levels):
            found.append(levels)
        if fits(levels) == cheaper_fits:  # a larger multiplier costs less and errs more
            high = middle
        else:
            low = middle
    return min(found, key=worth) if found else None


def _spend(problem: Problem, levels: Levels, limit: float) -> Levels:
    """Raises ratios, each time the one that buys most for its cost, as long as the budget lasts."""
    while True:
        steps = []
        for place, level in enumerate(levels):
            for higher in range(level):
                tried = problem.with_level(levels, place, higher)
                gain, paid = problem.error(levels) - problem.error(tried), problem.price(tried) - problem.price(levels)
                if gain > 0 and problem.price(tried) <= limit:
                    steps.append((gain / max(paid, 1e-12), tried))
        if not steps:
            return levels
        levels = max(steps)[1]
