"""How long `transform` takes: on ResNet-152 (target: below 5 s on 2 cores), and layer by layer on plain chains.

    python benchmarks/transform_time.py
    python benchmarks/transform_time.py --chains 10 100 --runs 5 --json transform_time.json

The time of a chain must grow linearly, so the time per layer is shown beside it. Processor time is shown, too: on a
machine that does other work it says more than the time on the clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence

import torch
from _header import add_json_option, header, store
from _models import torchvision_models
from tabulate import tabulate
from torch import nn

import fx_approx
from fx_approx.policies import Uniform

CHAINS = (10, 100, 1_000, 10_000)
POLICY = Uniform(0.5, scores="online")


@dataclasses.dataclass(frozen=True)
class Measured:
    """Median times of one transform with example inputs, in seconds.

    Attributes:
        name: Of the model.
        products: Candidates that the transform found.
        runs: How many runs the median is of.
        seconds: Median on the clock.
        slowest: The slowest run on the clock.
        processor_seconds: Median of the process's own time on all cores.
    """

    name: str
    products: int
    runs: int
    seconds: float
    slowest: float
    processor_seconds: float


def chain(layers: int) -> nn.Module:
    """Linear layers of 8 features, one after the other."""
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))


def measure(name: str, model: nn.Module, images: torch.Tensor, runs: int) -> Measured:
    """Times ``runs`` transforms of ``model``."""
    clock, processor = [], []
    for _ in range(runs):
        start, start_processor = time.perf_counter(), time.process_time()
        approx = fx_approx.transform(model, POLICY, images)
        clock.append(time.perf_counter() - start)
        processor.append(time.process_time() - start_processor)
    products = len(fx_approx.report(approx).rows)
    return Measured(name, products, runs, statistics.median(clock), max(clock), statistics.median(processor))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description="Time of fx_approx.transform.")
    parser.add_argument("--chains", type=int, nargs="*", default=CHAINS, help="numbers of layers")
    parser.add_argument("--runs", type=int, default=3, help="per model, the median counts (3)")
    parser.add_argument("--without-resnet", action="store_true", help="the chains only")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    if options.runs < 1 or any(layers < 1 for layers in options.chains):
        parser.error("--runs and --chains: expected positive numbers")

    print(header("Time of fx_approx.transform, with example inputs"), flush=True)
    fx_approx.transform(chain(2), POLICY, torch.zeros(4, 8))  # what only the first transform in a process pays
    measured = [measure(f"chain of {n:,}", chain(n), torch.zeros(4, 8), options.runs) for n in options.chains]
    if not options.without_resnet:
        measured.append(
            measure("ResNet-152", torchvision_models().resnet152(), torch.zeros(8, 3, 224, 224), options.runs)
        )
    rows = [
        [
            each.name,
            each.products,
            f"{each.seconds:.3f}",
            f"{each.slowest:.3f}",
            f"{each.processor_seconds:.3f}",
            f"{1000 * each.seconds / each.products:.2f}",
            f"{1000 * each.processor_seconds / each.products:.2f}",
        ]
        for each in measured
    ]
    headers = ["model", "products", "median s", "slowest s", "cpu s", "ms / product", "cpu ms / product"]
    print(f"\n{tabulate(rows, headers, disable_numparse=True)}\n\nmedian of {options.runs} runs")
    store(options.json, [dataclasses.asdict(each) for each in measured])


if __name__ == "__main__":
    main()
