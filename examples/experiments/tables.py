"""Tables and figures from the JSON lines that ``run.py`` wrote.

    python examples/experiments/tables.py FOLDER --to docs/results/experiments

writes ``tables.md`` and, with matplotlib (the extra ``figures``), three pictures of each experiment: accuracy against
FLOPs and accuracy against time, each with the front of what no other beats in both, and learning curves where they are
known.

What they say is told in ``summaries.py``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from records import read
from summaries import Record, Results, at_rate, evaluated, exact_beside, processor, sections, time_to, trained
from tabulate import tabulate

_NOTES = """*To exact*, and times to exact's accuracy, are of exact training at the same learning rate where it was run,
else of the first one. *Time* is of the training alone: *compiling*, with the first steps and those that were timed,
comes before it, unless the section says that it is in. Networks are evaluated eagerly, full and narrow in turn:
medians and quartiles of 20 passes, means over the runs."""


def quicker(quartiles: Any, fallback: float) -> str:
    """How much faster a step is, with quartiles; of each ratio that a training goes through."""
    if not isinstance(quartiles, Mapping):
        return figure(fallback)
    return "; ".join(f"{q[1]:.2f} [{q[0]:.2f}, {q[2]:.2f}]" for q in quartiles.values())


def figure(value: float, form: str = ".2f") -> str:
    """``value`` as text, a dash for what is not known."""
    return "–" if pd.isna(value) else format(value, form)


def spread(mean: float, deviation: float) -> str:
    """Mean and standard deviation, which a single run has none of."""
    if pd.isna(mean):
        return "diverged"
    return f"{mean:.2f}" if pd.isna(deviation) else f"{mean:.2f} ± {deviation:.2f}"


def told(mean: float, deviation: float) -> str:
    """The same, and of a single run that it is one."""
    return spread(mean, deviation) + ("" if pd.isna(mean) or not pd.isna(deviation) else " (one seed)")


def told_runs(one: Any) -> str:
    """How many runs have an accuracy, and how many others diverged."""
    return str(one.runs) + (f" ({one.diverged} diverged)" if one.diverged else "")


def table(results: Results, within: float) -> str:
    """All variants as a table in markdown, each beside the exact training at its learning rate, if there is one."""
    rows = []
    for one in results.found.itertuples():
        exact = exact_beside(results.found, one.rate)
        goal, whole = (float("nan"),) * 2 if exact is None else (exact.accuracy, exact.seconds)
        brief = one.epochs == 1 and not pd.isna(one.first_loss)  # too short to be about accuracy
        times = [time_to(results, one.Index, float("inf") if brief else goal - less) for less in (0.0, within)]
        rows.append(
            [
                one.Index,
                told_runs(one),
                str(max(1, one.tries)) if results.found.tries.any() else "–",
                told(one.accuracy, one.deviation),
                figure(one.accuracy - goal, "+.2f"),
                spread(one.trained, one.trained_deviation),
                figure(100 * one.flops, ".1f"),
                figure(one.seconds / whole if one.timed else None),
                figure(one.warm, ".0f"),
                figure(one.seconds if one.wall > 0 else one.wall, ".0f"),
                figure(one.wall, ".0f"),
                quicker(one.quicker, one.speedup),
                *(figure(time / whole) for time in times),
                figure(one.memory / 2**20, ".0f"),
                figure(100 * one.peak, ".0f"),
                figure(100 * one.traffic, ".0f"),
                f"{one.first_loss:.2f} to {one.last_loss:.2f}" if brief else "–",
            ]
        )
    heads = [
        "variant",
        "runs",
        "tries",
        "accuracy %",
        "to exact, pp",
        "as trained %",
        "FLOPs % of exact",
        "time / exact",
        "compiling, s",
        "training, s",
        "its wall clock, s",
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


def rivals(results: Results) -> str:
    """What exact baselines of equal cost reach beside the variants whose cost they have; empty if there are none.

    A baseline at another learning rate stands beside its variant at that rate. One whose rate was chosen from tries
    stands beside its variant with what was chosen for that.
    """
    found, rows = results.found, []
    for one in found[(found.equal != "") & found.to.isin(found.index)].itertuples():
        other = next(found.loc[[one.to]].itertuples()) if one.tries else at_rate(found, found.alike[one.to], one.rate)
        if other is None:
            continue
        gains = (results.accuracies[other.Index] - results.accuracies[one.Index]).dropna()
        rows.append(
            [
                other.Index,
                told(other.accuracy, other.deviation),
                f"exact, {'fewer epochs' if one.kind == 'epochs' else 'narrower'}",
                one.equal.replace("flops", "FLOPs"),
                told(one.accuracy, one.deviation),
                "–" if gains.empty else told(gains.mean(), gains.std()),
            ]
        )
    heads = ["variant", "accuracy %", "rival", "of equal", "accuracy %", "variant − rival, pp (by seed)"]
    return tabulate(rows, heads, tablefmt="pipe", disable_numparse=True) if rows else ""


def shipped(results: Results) -> str:
    """The narrow networks as they might be shipped, beside the full ones; empty if there are none."""
    found, rows = results.found, []
    for one in found[found.shipped.notna()].itertuples():
        times = [
            f"{own['full']:.1f} / {own['sub']:.1f} = {quicker({batch: own['speedup']}, float('nan'))}"
            for batch, own in one.latency.items()
        ]
        ends = told(one.shipped, one.shipped_deviation), told(one.accuracy, one.deviation)
        rows.append([one.Index, str(one.runs), *ends, figure(100 * one.share, ".1f"), *times])
    if not rows:
        return ""
    batches = list(found.latency.dropna().iloc[0])
    heads = ["narrow network of", "runs", "its accuracy %", "of the full one at the end %", "parameters %"]
    heads += [f"evaluation of a batch of {batch}, ms full / narrow" for batch in batches]
    return tabulate(rows, heads, tablefmt="pipe", disable_numparse=True)


def choices(results: Results) -> str:
    """What the tries of variants reached on examples that were held out, and which were taken; empty without any."""
    rows = [
        [
            one.variant,
            one.tried,
            f"{one.held:,}",
            told_runs(one),
            told(one.accuracy, one.deviation),
            "taken" if one.taken else "",
        ]
        for one in results.choices.itertuples()
    ]
    heads = ["variant", "try", "examples held out", "runs", "accuracy % on these", "the test is of"]
    return tabulate(rows, heads, tablefmt="pipe", disable_numparse=True) if rows else ""


def rates(results: Results) -> str:
    """Accuracies by learning rate, seeds in brackets; empty where no variant had a second one but in its tries."""
    found = results.found[results.found.tries == 0]
    if found.empty:
        return ""
    columns = sorted(found.rate.unique())
    cells = found.apply(lambda one: f"{spread(one.accuracy, one.deviation)} ({one.runs})", axis=1)
    rows = []
    for _, own in found.groupby("alike", sort=False):
        if set(own.rate) != {1.0}:
            own = own.drop_duplicates("rate", keep="last")
            first = own.loc[own.rate.idxmin()]
            by_rate = dict(zip(own.rate, cells[own.index], strict=True))
            rows.append([first.name, figure(100 * first.flops, ".1f"), *(by_rate.get(rate, "–") for rate in columns)])
    heads = ["variant", "FLOPs % of exact", *(f"{rate:g} times the rate" for rate in columns)]
    return tabulate(rows, heads, tablefmt="pipe", disable_numparse=True) if rows else ""


def described(runs: Sequence[Record]) -> str:
    """How and where the runs of a section were computed."""
    common, training = runs[0]["common"], runs[0]["common"]["training"]
    places = sorted(set(map(processor, runs)))
    how = ["compiled" if common["compile"] else "eager"]
    how += [f"autocast {common['autocast']}"] * bool(common["autocast"])
    clocks = sorted({"processor time" if one["clock"] == "cpu" else "wall clock" for one in runs})
    cold = ", with all that compiles and cuts networks out" if common.get("cold") else ""
    threads = sorted({one["environment"]["threads"] for one in runs})
    versions = sorted({one["environment"]["torch"] for one in runs})
    length = f"{runs[0]['full_steps']} steps" + (f" ({training['epochs']:g} epochs)" if training["epochs"] else "")
    return (
        f"{runs[0]['examples']:,} training examples, batch {training['batch']}, {length}, {', '.join(how)}; "
        f"{', '.join(places)}, threads: {', '.join(map(str, threads))}, torch {', '.join(versions)}, "
        f"time: {', '.join(clocks)}{cold}; {min(r['environment']['date'] for r in runs)[:10]} to "
        f"{max(r['environment']['date'] for r in runs)[:10]}."
    )


def page(
    parts: Mapping[str, Sequence[Record]],
    results: Mapping[str, Results],
    within: float,
    command: str,
    figures: Mapping[str, Sequence[str]],
) -> str:
    """All experiments in markdown, each with its ``results``."""
    lines = ["# Experiments", "", f"Made by `{command}` from the JSON lines that `run.py` wrote.", "", _NOTES, ""]
    for name, own in parts.items():
        runs = trained(own)
        lines += [f"## {runs[0]['title']}", "", described(runs), "", table(results[name], within), ""]
        more = (made(results[name]) for made in (rivals, rates, choices, shipped))
        lines += [line for text in more if text for line in (text, "")]
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
            if max(len(run["epochs"]) for run in trained(own)) <= 1:
                continue  # nothing was learnt yet
            figures[name] = pictures.draw(results[name], own[0]["title"], options.to, name)
    command = f"python examples/experiments/tables.py {options.folder} --to {options.to}"
    text = page(parts, results, options.within, command, figures)
    (options.to / "tables.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
