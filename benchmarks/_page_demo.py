"""The table of the demo, over the seeds that are on record."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from _page_parts import ONE, RESULTS, Content, rows_to_table

RECORDS = sorted(path.name for path in RESULTS.glob("demo-*.json"))
"""One for each seed, by ``python -m fx_approx demo --seed N --json docs/results/demo-N.json``."""


def command(*contents: Content) -> str:
    """A line for each seed."""
    seeds = [one["options"]["seed"] for one in contents]
    return "\n".join(f"python -m fx_approx demo --seed {seed} --json docs/results/demo-{seed}.json" for seed in seeds)


def machines(*contents: Content) -> str:
    """Hardware, versions and dates, each once."""

    def told(*names: str) -> str:
        return ", ".join(dict.fromkeys(" ".join(str(one["environment"][name]) for name in names) for one in contents))

    return (
        f"{told('name')}, threads: {told('threads')}; Python {told('python')}, torch {told('torch')}, "
        f"fx_approx {told('fx_approx')}; {told('date')}. Images: {', '.join({one['images']: 0 for one in contents})}."
    )


def body(*contents: Content) -> str:
    """A row for each network: by recipe and exactly, mean ± standard deviation over the seeds."""
    rows = []
    for name in dict.fromkeys(one["name"] for content in contents for one in content["results"]):
        all_of_it = [one for content in contents for one in content["results"] if one["name"] == name]
        sampled = [one for one in all_of_it if not one["left_exact"]]
        shipped = [one for one in sampled if one["accuracies"][2] is not None]
        exact = len(all_of_it) - len(sampled)
        rows.append(
            [
                name + (f", left exact in {exact} of {len(all_of_it)}" if exact else ""),
                _over(sampled, lambda one: 100 * one["saved"], 0),
                _over(sampled, lambda one: one["step_ratio"][0], 2),
                _over(sampled, lambda one: one["training_ratio"], 2),
                _over(all_of_it, lambda one: one["accuracies"][0], 1),
                _over(all_of_it, lambda one: one["accuracies"][1], 1),
                _over(shipped, lambda one: one["accuracies"][2], 1),
                _over(shipped, lambda one: one["parameters"][1] / one["parameters"][0], 2),
                _over(shipped, lambda one: one["latency"][1] / one["latency"][0], 2),
            ]
        )
    heads = ["network", "operations saved, %", "time of a step", "of the training", "accuracy, exact, %"]
    return rows_to_table([*heads, "by the recipe, %", "of what ships, %", "its weights", "its latency"], rows)


def _over(found: Sequence[Content], value: Callable[[Content], float], digits: int) -> str:
    """Mean ± standard deviation; empty where there is nothing."""
    numbers = [value(one) for one in found]
    if len(numbers) < 2:
        return "".join(f"{one:.{digits}f} ({ONE})" for one in numbers)
    return f"{statistics.mean(numbers):.{digits}f} ± {statistics.stdev(numbers):.{digits}f}"
