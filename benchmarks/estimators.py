"""Error against operations and against time: the package's samplers and other ways to approximate a product A @ B.

    python benchmarks/estimators.py --quick
    python benchmarks/estimators.py --out docs/figures --json docs/results/estimators.json

Every method gets the same budgets, shares of the operations 2 m K n of the exact product; what it spends on norms,
sketches, decompositions and searches comes out of them. Before anything is measured every method must show that it is
right: exact at its largest size, and A @ B on average where it is unbiased. Methods take turns, draw by draw, in an
order that changes, beside ``torch.matmul``, all in one thread, since scipy's sparse product has no more. ``--out``
draws figures, which need matplotlib. It needs the extra ``demo``; five minutes, half a minute with ``--quick``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _header import add_json_option, environment, header
from _products import Product, captured_products, random_products
from _rivals import RIVALS, Method
from tabulate import tabulate
from torch import Tensor

from fx_approx.ops import mm
from fx_approx.ops.base import norm
from fx_approx.sampling import Selection, derive_key, get_sampler, uniforms

BUDGETS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
DRAWS = 20
CHECK_DRAWS = 200
CHECK_LIMIT = 4.0
"""The mean error of an unbiased method over its standard error is about 1, as a norm; above this a check fails."""


def sampled(name: str, epsilon: float, scores: str = "online") -> Method:
    """The sampler ``name``, as the package multiplies with it.

    Its uniforms are made outside the clock, since the package makes those of all layers at once, once a step.

    Args:
        name: Of the sampler.
        epsilon: Share of uniform probability.
        scores: ``online``; ``B``, the norms of the rows of B alone, which are the package's ``weight`` scores where B
            is a weight and its ``input`` scores where B is an input; or ``uniform``.
    """
    sampler = get_sampler(name)

    def prepare(product: Product, k: int, seed: int) -> Tensor | None:
        if not sampler.random:
            return None
        key = derive_key(torch.tensor(seed), torch.tensor(0))
        return uniforms(key, 0, 1, sampler.uniforms(product.pairs, k))

    def estimate(product: Product, k: int, drawn: Tensor | None) -> Tensor:
        lhs, rhs, found = product.lhs, product.rhs, torch.ones(product.pairs)
        if scores != "uniform":
            found = block_norms(rhs, 0, product.block)
        if scores == "online":
            found = block_norms(lhs, 1, product.block) * found
        return mm(lhs, rhs, selection=columns(sampler.draw(found[None], k, drawn, epsilon=epsilon), product.block))

    online = f"ε = {epsilon:g}" if sampler.random else ""
    variant = {"online": online, "B": "norms of B", "uniform": "uniform"}[scores]
    return Method(
        name,
        unbiased=sampler.unbiased,
        limit=lambda product: product.pairs,
        flops=lambda product, k: sampled_flops(product, k, scores, scaled=sampler.random),
        estimate=estimate,
        exact_at_limit=True,
        package=True,
        variant=variant,
        prepare=prepare,
    )


def block_norms(matrix: Tensor, axis: int, block: int) -> Tensor:
    """Norms of the columns (axis 1) or rows (axis 0) of ``matrix``, ``block`` of them taken together."""
    if block == 1:
        return norm(matrix, (1 - axis,))
    return norm(matrix.unflatten(axis, (-1, block)), (1, 2) if axis == 0 else (0, 2))


def columns(chosen: Selection, block: int) -> Selection:
    """The columns of the chosen blocks."""
    if block == 1:
        return chosen
    inside = chosen.indices.unsqueeze(-1) * block + torch.arange(block)
    return Selection(inside.flatten(1), None if chosen.scale is None else chosen.scale.repeat_interleave(block, 1))


def sampled_flops(product: Product, k: int, scores: str, scaled: bool) -> float:
    """The product of k pairs, the norms that are read, a sort of the pairs, and the scale on k rows of B."""
    (m, inner, n), pairs, kept = product.sizes, product.pairs, k * product.block
    norms = {"online": 2.0 * (m * inner + inner * n) + pairs, "B": 2.0 * inner * n, "uniform": 0.0}[scores]
    return 2.0 * m * kept * n + norms + pairs * math.ceil(math.log2(max(2, pairs))) + kept * n * scaled


def package_methods() -> list[Method]:
    """All samplers; the unbiased ones without mixing and with their default share of uniform probability.

    ``wta_unique`` without mixing is ``systematic``, draw by draw, so it stands here with its default only.
    """
    methods = [sampled("topk", 0.0), sampled("topk", 0.0, "B"), sampled("crs", 0.0, "uniform")]
    for name in ("crs", "bernoulli", "systematic", "wta"):
        methods += [sampled(name, 0.0), sampled(name, get_sampler(name).default_epsilon)]
    systematic = sampled("systematic", get_sampler("systematic").default_epsilon, "B")
    return [*methods, systematic, sampled("wta_unique", get_sampler("wta_unique").default_epsilon)]


# ---- correctness before anything else


def check(method: Method) -> None:
    """Raises RuntimeError unless ``method`` is exact at its limit and, if unbiased, right on average."""
    generator = torch.Generator().manual_seed(1)
    # Terms that mostly add up: errors are small beside the product, so a bias shows after few draws.
    a, b = 1 + torch.randn(12, 16, generator=generator), 1 + torch.randn(16, 10, generator=generator)
    product = Product("check", a * torch.linspace(0.2, 2.0, 16), b)
    exact = product.exact
    if method.exact_at_limit:
        estimate, _ = method.draw(product, method.limit(product), 0)
        error = (estimate - exact).norm() / exact.norm()
        if not error < 1e-5:
            raise RuntimeError(f"{method.label}: relative error {float(error):.2g} at full size, where it is exact")
    if method.unbiased:
        size = max(2, min(method.limit(product), 1000) // 2)
        tally = Tally(exact)
        for seed in range(CHECK_DRAWS):
            tally.add(method.draw(product, size, seed)[0])
        if not tally.bias_over_error < CHECK_LIMIT:
            raise RuntimeError(
                f"{method.label}: the mean of {CHECK_DRAWS} draws is {tally.bias_over_error:.1f} standard errors "
                "from A @ B, and it should be unbiased"
            )


class Tally:
    """Errors of many estimates of one product."""

    def __init__(self, exact: Tensor) -> None:
        self.exact, self.norm = exact, float(exact.norm())
        self.total = torch.zeros_like(exact)
        self.errors: list[float] = []

    def add(self, estimate: Tensor) -> None:
        """Counts one estimate."""
        difference = estimate - self.exact
        self.total += difference
        self.errors.append(float(difference.norm()) / self.norm)

    @property
    def bias(self) -> float:
        """Norm of the mean error over that of the product."""
        return float(self.total.norm()) / len(self.errors) / self.norm

    @property
    def standard_error(self) -> float:
        """What ``bias`` comes to by chance: the square root of the summed variances over the number of draws."""
        count = len(self.errors)
        spread = sum(error**2 for error in self.errors) - count * self.bias**2
        return math.sqrt(max(0.0, spread) / (count - 1) / count)

    @property
    def bias_over_error(self) -> float:
        """About 1 if unbiased; infinite if every draw is off by the same."""
        return self.bias / self.standard_error if self.standard_error > 1e-6 * self.bias else math.inf


# ---- measuring


@dataclasses.dataclass(frozen=True)
class Measured:
    """One method on one product at one budget. Errors are relative to the norm of the product.

    Attributes:
        product: Name.
        method: Label.
        package: Whether it is one of the package's samplers.
        budget: Share of the exact product's operations that it may take.
        size: Pairs, rank, buckets, walks a row, or entries kept per thousand.
        flops: Share that it takes, in expectation.
        draws: How many the following are of.
        error: Mean.
        error_spread: Standard deviation between draws.
        bias: Norm of the mean error.
        standard_error: What the bias of an unbiased method comes to by chance.
        milliseconds: Quartiles.
        over_exact: Quartiles of its time over that of ``torch.matmul`` in the same round.
    """

    product: str
    method: str
    package: bool
    budget: float
    size: int
    flops: float
    draws: int
    error: float
    error_spread: float
    bias: float
    standard_error: float
    milliseconds: list[float]
    over_exact: list[float]


def measure(product: Product, methods: Sequence[Method], budget: float, draws: int) -> list[Measured]:
    """Draws from each method that has a size within the budget, in turns with the exact product."""
    sizes = {method: method.size_for(product, budget * product.flops) for method in methods}
    chosen = [(method, size) for method, size in sizes.items() if size]
    tallies = {method: Tally(product.exact) for method, _ in chosen}
    times: dict[Method, list[float]] = {method: [] for method, _ in chosen}
    exact_times = []
    for method, size in chosen:
        method.draw(product, size, draws)  # what only the first call pays
    for draw in range(draws):
        order: list[tuple[Method, int] | None] = [*chosen, None]
        random.Random(draw).shuffle(order)
        for each in order:
            if each is None:
                start = time.perf_counter()
                torch.matmul(product.lhs, product.rhs)
                exact_times.append(time.perf_counter() - start)
            else:
                method, size = each
                estimate, seconds = method.draw(product, size, draw)
                times[method].append(seconds)
                tallies[method].add(estimate)
    return [_measured(product, m, k, budget, tallies[m], times[m], exact_times) for m, k in chosen]


def _measured(
    product: Product, method: Method, size: int, budget: float, tally: Tally, times: list[float], exact: list[float]
) -> Measured:
    return Measured(
        product=product.name,
        method=method.label,
        package=method.package,
        budget=budget,
        size=size,
        flops=_short(method.flops(product, size) / product.flops),
        draws=len(tally.errors),
        error=_short(statistics.fmean(tally.errors)),
        error_spread=_short(statistics.stdev(tally.errors)),
        bias=_short(tally.bias),
        standard_error=_short(tally.standard_error),
        milliseconds=_quartiles([1000 * t for t in times]),
        over_exact=_quartiles([t / e for t, e in zip(times, exact, strict=True)]),
    )


def _quartiles(values: Sequence[float]) -> list[float]:
    return [_short(value) for value in statistics.quantiles(values, n=4, method="inclusive")]


def _short(value: float) -> float:
    return float(f"{value:.5g}")


# ---- tables


def facts_table(products: Sequence[Product]) -> str:
    """Sizes, and what decides which method is good at each product."""
    rows = []
    for product in products:
        facts = product.facts()
        size = " x ".join(map(str, product.sizes))
        rows.append([product.name, size, *(f"{facts[key]:.3g}" for key in facts)])
    headers = ["product", "m x K x n", "effective pairs / K", "‖AB‖ / Σ s", "stable rank of AB"]
    return tabulate(rows, headers, disable_numparse=True)


def error_table(found: Sequence[Measured], product: str) -> str:
    """Errors of every method at every budget on one product."""
    mine = [each for each in found if each.product == product]
    budgets = sorted({each.budget for each in mine})
    rows = []
    for method in dict.fromkeys(each.method for each in mine):
        row = [method]
        for budget in budgets:
            hit = next((each for each in mine if (each.method, each.budget) == (method, budget)), None)
            row.append(f"{hit.error:.3f} ± {hit.error_spread:.3f}" if hit else "")
        rows.append(row)
    return tabulate(rows, [product, *(f"{budget:.4g} of the FLOPs" for budget in budgets)], disable_numparse=True)


def detail_table(found: Sequence[Measured], product: str, budget: float) -> str:
    """Size, bias and time of every method on one product at one budget."""
    rows = []
    for each in found:
        if (each.product, each.budget) != (product, budget):
            continue
        low, middle, high = each.over_exact
        rows.append(
            [
                each.method,
                each.size,
                f"{each.flops:.3f}",
                f"{each.error:.3f} ± {each.error_spread:.3f}",
                f"{each.bias:.3f} / {each.standard_error:.3f}",
                f"{each.milliseconds[1]:.2f}",
                f"{middle:.2f} [{low:.2f}, {high:.2f}]",
            ]
        )
    headers = [f"{product}, {budget:.4g}", "size", "FLOPs", "error", "bias / chance", "ms", "time / exact"]
    return tabulate(rows, headers, disable_numparse=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks, measures, prints tables, writes files."""
    parser = argparse.ArgumentParser(description="Error, operations and time of ways to approximate A @ B.")
    parser.add_argument("--quick", action="store_true", help="small products, one budget")
    parser.add_argument("--out", type=Path, metavar="DIR", help="draw figures there")
    parser.add_argument("--seed", type=int, default=0, help="of the products (0)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1, which is fair to the rivals)")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    print(header("Approximate products: error against operations and time"), flush=True)
    methods = [*package_methods(), *RIVALS]
    with torch.no_grad():
        for method in methods:
            check(method)
    print(
        f"\nAll {len(methods)} methods are exact at full size or unbiased over {CHECK_DRAWS} draws, as each promises."
    )

    products = [*random_products(options.quick, options.seed), *captured_products(options.quick, options.seed)]
    print(f"\n{facts_table(products)}", flush=True)
    found: list[Measured] = []
    budgets = BUDGETS[2:3] if options.quick else BUDGETS
    with torch.no_grad():
        for product in products:
            compared = [method for method in methods if method.package or product.block == 1]
            for budget in budgets:
                found += measure(product, compared, budget, DRAWS)
            print(f"\n{error_table(found, product.name)}", flush=True)
            print(f"\n{detail_table(found, product.name, 1 / 4)}", flush=True)
    facts = {product.name: {"sizes": product.sizes, **product.facts()} for product in products}
    results = {"products": facts, "measured": [dataclasses.asdict(each) for each in found]}
    if options.json is not None:
        store(options.json, results)
    if options.out is not None:
        draw_figures(options.out, results)


def store(path: Path, results: dict[str, Any]) -> None:
    """Writes ``results`` with the environment to ``path``, each measurement on a line."""
    rows = ",\n".join(json.dumps(each, ensure_ascii=False) for each in results["measured"])
    others = {name: value for name, value in results.items() if name != "measured"}
    head = f'{{"environment": {json.dumps(environment())},\n"results": {json.dumps(others, ensure_ascii=False)[:-1]},\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head}"measured": [\n{rows}\n]}}}}\n', encoding="utf-8")


def draw_figures(folder: Path, results: dict[str, Any]) -> None:
    """Draws the figures of ``results``, as ``--json`` stores them, in ``folder``."""
    try:
        from _estimator_figures import draw  # matplotlib, which nothing else needs
    except ImportError as error:
        print(f"no figures: {error}", file=sys.stderr)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in draw(folder, results):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
