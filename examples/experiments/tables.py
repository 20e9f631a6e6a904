"""Tables and figures from the JSON lines that ``run.py`` wrote.

    python examples/experiments/tables.py FOLDER --to docs/results/experiments

writes ``tables.md`` and, with matplotlib (the extra ``figures``), three pictures of each experiment: accuracy against
FLOPs and accuracy against time, each with the front of what no other beats in both, and learning curves.

What they say is told in ``summaries.py``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from records import read
from summaries import (
    Cost,
    Record,
    Summary,
    alike,
    at_rate,
    evaluated,
    exact_beside,
    processor,
    sections,
    time_to,
    trained,
)
from tabulate import tabulate

_NOTES = """*To exact*, and times to exact's accuracy, are of exact training at the same learning rate where it was run,
else of the first one. *Time* is of the training alone: *compiling*, with the first steps and those that were timed,
comes before it."""


def quicker(cost: Cost | None, fallback: float | None) -> str:
    """How much faster a step is, with quartiles; of each ratio that a training goes through."""
    if cost is None:
        return figure(fallback)
    return "; ".join(f"{q[1]:.2f} [{q[0]:.2f}, {q[2]:.2f}]" for q in cost.speedup.values())


def figure(value: float | None, form: str = ".2f") -> str:
    """``value`` as text, a dash for None."""
    return "–" if value is None else format(value, form)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return "diverged"
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def table(found: Sequence[Summary], within: float, measured: Mapping[str, Cost]) -> str:
    """All variants as a table in markdown, each beside the exact training at its learning rate, if there is one."""
    rows = []
    for one in found:
        exact = exact_beside(found, one)
        goal = None if exact is None else exact.mean
        share = None if exact is None or one.time is None else one.time / exact.seconds
        cost = measured.get(one.variant)
        brief = one.losses is not None and len(one.curve) == 1  # too short to be about accuracy
        times = [None if goal is None or brief else time_to(one, goal - less) for less in (0.0, within)]
        rows.append(
            [
                one.variant,
                str(len(one.accuracies)) + (f" ({one.diverged} diverged)" if one.diverged else ""),
                spread(list(one.accuracies.values())),
                figure(None if goal is None or one.mean is None else one.mean - goal, "+.2f"),
                spread(one.as_trained),
                figure(100 * one.flops, ".1f"),
                figure(share),
                figure(one.warm, ".0f"),
                quicker(cost, one.speedup),
                *(figure(None if t is None or exact is None else t / exact.seconds) for t in times),
                figure(None if one.memory is None else one.memory / 2**20, ".0f"),
                figure(None if cost is None else 100 * cost.memory, ".0f"),
                figure(None if cost is None else 100 * cost.traffic, ".0f"),
                "{:.2f} to {:.2f}".format(*one.losses) if brief else figure(None),
            ]
        )
    heads = [
        "variant",
        "runs",
        "accuracy %",
        "to exact, pp",
        "as trained %",
        "FLOPs % of exact",
        "time / exact",
        "compiling, s",
        "exact step / this step",
        "time to exact's accuracy",
        f"to {within:g} pp less",
        "peak MiB",
        "peak memory of this step, %",
        "gradient bytes, %",
        "loss, first to last steps",
    ]
    kept = [place for place in range(len(heads)) if any(row[place] != "–" for row in rows)]
    cells = [[row[place] for place in kept] for row in rows]
    return tabulate(cells, [heads[place] for place in kept], tablefmt="pipe", disable_numparse=True)


def rivals(found: Sequence[Summary]) -> str:
    """What exact baselines of equal cost reach beside the variants whose cost they have; empty if there are none.

    A baseline at another learning rate stands beside its variant at that rate.
    """
    named = {one.variant: one for one in found}
    rows = []
    for one in found:
        target = named.get(one.to) if one.equal else None
        other = None if target is None else at_rate(found, target, one.rate)
        if other is None:
            continue
        seeds = sorted(one.accuracies.keys() & other.accuracies.keys())
        gains = [other.accuracies[seed] - one.accuracies[seed] for seed in seeds]
        rows.append(
            [
                other.variant,
                spread(list(other.accuracies.values())),
                f"exact, {'fewer epochs' if one.kind == 'epochs' else 'narrower'}",
                one.equal.replace("flops", "FLOPs"),
                spread(list(one.accuracies.values())),
                spread(gains) if gains else "–",
            ]
        )
    heads = ["variant", "accuracy %", "rival", "of equal", "accuracy %", "variant − rival, pp (by seed)"]
    return tabulate(rows, heads, tablefmt="pipe", disable_numparse=True) if rows else ""


def rates(found: Sequence[Summary]) -> str:
    """Accuracies by learning rate, seeds in brackets; empty where no variant had a second one."""
    columns = sorted({one.rate for one in found})
    groups: dict[str, dict[float, Summary]] = {}
    for one in found:
        groups.setdefault(alike(one.options), {})[one.rate] = one
    rows = []
    for own in groups.values():
        if own.keys() != {1.0}:
            first = own[min(own)]
            cells = [
                f"{spread(list(own[r].accuracies.values()))} ({len(own[r].accuracies)})" if r in own else "–"
                for r in columns
            ]
            rows.append([first.variant, figure(100 * first.flops, ".1f"), *cells])
    heads = ["variant", "FLOPs % of exact", *(f"{rate:g} times the rate" for rate in columns)]
    return tabulate(rows, heads, tablefmt="pipe", disable_numparse=True) if rows else ""


def described(runs: Sequence[Record]) -> str:
    """How and where the runs of a section were computed."""
    common, training = runs[0]["common"], runs[0]["common"]["training"]
    places = sorted(set(map(processor, runs)))
    how = ["compiled" if common["compile"] else "eager"]
    how += [f"autocast {common['autocast']}"] * bool(common["autocast"])
    clocks = sorted({"processor time" if one["clock"] == "cpu" else "wall clock" for one in runs})
    threads = sorted({one["environment"]["threads"] for one in runs})
    versions = sorted({one["environment"]["torch"] for one in runs})
    length = f"{runs[0]['full_steps']} steps" + (f" ({training['epochs']:g} epochs)" if training["epochs"] else "")
    return (
        f"{runs[0]['examples']:,} training examples, batch {training['batch']}, {length}, {', '.join(how)}; "
        f"{', '.join(places)}, threads: {', '.join(map(str, threads))}, torch {', '.join(versions)}, "
        f"time: {', '.join(clocks)}; {min(r['environment']['date'] for r in runs)[:10]} to "
        f"{max(r['environment']['date'] for r in runs)[:10]}."
    )


def page(
    parts: Mapping[str, Sequence[Record]],
    results: Mapping[str, tuple[list[Summary], dict[str, Cost]]],
    within: float,
    command: str,
    figures: Mapping[str, Sequence[str]],
) -> str:
    """All experiments in markdown, each with its ``results``."""
    lines = ["# Experiments", "", f"Made by `{command}` from the JSON lines that `run.py` wrote.", "", _NOTES, ""]
    for name, own in parts.items():
        runs = trained(own)
        found, measured = results[name]
        lines += [f"## {runs[0]['title']}", "", described(runs), "", table(found, within, measured), ""]
        lines += [line for text in (rivals(found), rates(found)) if text for line in (text, "")]
        lines += [f"![{runs[0]['title']}]({picture})" for picture in figures.get(name, ())] + [""]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the JSON lines")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where tables and figures go")
    parser.add_argument("--within", type=float, default=0.5, metavar="PP", help="also time to so much less (0.5)")
    parser.add_argument("--no-figures", action="store_true", help="tables only")
    options = parser.parse_args(arguments)
    records = [record for path in sorted(options.folder.rglob("*.jsonl")) for record in read(path)]
    if not records:
        parser.exit(2, f"{options.folder}: expected files of JSON lines that run.py wrote, found none\n")
    options.to.mkdir(parents=True, exist_ok=True)
    parts = sections(records)
    results = {name: evaluated(own) for name, own in parts.items()}
    figures: dict[str, list[str]] = {}
    if not options.no_figures:
        try:
            import pictures
        except ModuleNotFoundError as error:
            parser.exit(2, f"figures need matplotlib: pip install matplotlib, or --no-figures ({error})\n")

        for name, own in parts.items():
            if max(len(run["epochs"]) for run in trained(own)) == 1:
                continue  # nothing was learnt yet
            figures[name] = pictures.draw(results[name][0], own[0]["title"], options.to, name)
    command = f"python examples/experiments/tables.py {options.folder} --to {options.to}"
    text = page(parts, results, options.within, command, figures)
    (options.to / "tables.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
