"""Tables of whole trainings, from the lines that examples/experiments/run.py wrote."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from _page_parts import ONE, REPOSITORY, RESULTS, Content, rows_to_table, signed

EXPERIMENTS = REPOSITORY / "examples" / "experiments"
RUN = "python examples/experiments/run.py examples/experiments/configs"


@functools.cache
def scripts() -> tuple[ModuleType, ModuleType]:
    """The modules of the experiments that make tables, as when one of them is run."""
    if str(EXPERIMENTS) not in sys.path:
        sys.path.insert(0, str(EXPERIMENTS))
    import summaries
    import tables

    return tables, summaries


@functools.cache
def found() -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """All records by section, and what they came to."""
    _, summaries = scripts()
    from records import read

    records = [one for path in sorted((RESULTS / "experiments").rglob("*.jsonl")) for one in read(path)]
    parts = summaries.sections(records)
    return parts, {name: summaries.evaluated(own) for name, own in parts.items()}


def files(config: str) -> tuple[str, ...]:
    """The records of a configuration, relative to docs/results."""
    own = [RESULTS / "experiments" / f"{config}{end}.jsonl" for end in ("", "-choice", "-costs")]
    own += [RESULTS / "experiments" / "imagenet-path" / f"{config}.jsonl"]
    return tuple(path.relative_to(RESULTS).as_posix() for path in own if path.exists())


def command(name: str) -> Callable[..., str]:
    """Makes the commands of a section, as far as its records know them."""

    def of(*_: Content) -> str:
        parts, _results = found()
        _tables, summaries = scripts()
        own = parts[name]
        runs, costs = summaries.trained(own), [one for one in own if "costs" in one]
        common = runs[0]["common"]
        options = ["--data FOLDER"]
        options += ["--compile"] * common["compile"]
        options += [f"--autocast {common['autocast']}"] * bool(common["autocast"])
        options += [f"--clock {runs[0]['clock']}"] * (runs[0]["clock"] != "wall")
        options += ["--cold"] * bool(common.get("cold"))
        options += ["--no-curve"] * all("accuracy" not in one["epochs"][0] for one in runs if len(one["epochs"]) > 1)
        command = f"OMP_NUM_THREADS=1 {RUN}/{runs[0]['config']}.toml {' '.join(options)}"
        line = f"{command} --only VARIANT ..."
        chosen = [f"{command} --choose"] * any("validation" in one for one in own)
        timed = [f"{line} --costs {count}" for count in dict.fromkeys(one["repeats"] for one in costs)]
        return "\n".join([*chosen, line, *timed])

    return of


def machines(name: str) -> Callable[..., str]:
    """Says where the runs of a section were computed, and where their steps were timed."""

    def of(*_: Content) -> str:
        tables, summaries = scripts()
        own = found()[0][name]
        runs = summaries.trained(own)
        versions = {(one["environment"]["python"], one["environment"]["fx_approx"]) for one in runs}
        told = tables.described(runs) + " " + ", ".join(f"Python {p}, fx_approx {v}" for p, v in sorted(versions)) + "."
        cores = sorted({one["environment"]["cores"] for one in runs})
        told += f" Cores: {', '.join(map(str, cores))}."
        start = {f"{one['config'].removesuffix('.toml')}, {one['variant']}, seed {_seed(one)}" for one in _starts(runs)}
        told += f" Begins with the network of {'; '.join(sorted(start))}." if start else ""
        timed = [
            f"{summaries.processor(one)}, {one['repeats']} steps, {one['environment']['date']}"
            for one in own
            if "costs" in one
        ]
        return told + (f" Steps timed in turn: {'; '.join(timed)}." if timed else "")

    return of


def _starts(runs: Sequence[Any]) -> list[Any]:
    return [one["common"]["start"] for one in runs if one["common"]["start"]]


def _seed(start: Any) -> str:
    return "of the run" if start["seed"] < 0 else str(start["seed"])


def body(name: str) -> Callable[..., str]:
    """Makes the tables of a section: its variants, its rivals, what they were chosen by, and what might be shipped."""

    def of(*_: Content) -> str:
        tables, _summaries = scripts()
        results = found()[1][name]
        parts = [variants(results)]
        rivals, choices, shipped = (narrow(made(results)) for made in (tables.rivals, tables.choices, tables.shipped))
        if rivals:
            parts += ["Beside exact training of equal cost:", rivals]
        if choices:
            parts += ["Tries, on training examples that were held out:", choices]
        if shipped:
            parts += ["What might be shipped, before the exact tail, beside the full network:", shipped]
        return "\n\n".join(parts)

    return of


def variants(results: Any) -> str:
    """All variants of a section, one to a row."""
    tables, summaries = scripts()
    rows = []
    for one in results.found.itertuples():
        exact = summaries.exact_beside(results.found, one.rate)
        goal, whole = (float("nan"),) * 2 if exact is None else (exact.accuracy, exact.seconds)
        brief = one.epochs == 1 and one.first_loss == one.first_loss
        less = one.accuracy - goal
        rows.append(
            [
                one.Index,
                tables.told_runs(one),
                str(max(1, one.tries)) if results.found.tries.any() else "",
                "" if brief else tables.told(one.accuracy, one.deviation),
                "" if brief or less != less or one.Index == getattr(exact, "Index", None) else signed(less),
                _known(one.trained if round(one.trained - one.accuracy, 2) and not brief else float("nan")),
                f"{100 * one.flops:.1f} %",
                _known(one.seconds / whole if one.timed else float("nan")),
                f"{one.seconds:.0f}" if one.seconds == one.seconds and one.timed else "",
                tables.quicker(one.quicker, one.speedup).replace("–", ""),
                "" if one.peak != one.peak else f"{100 * one.peak:.0f} %",
                "" if one.traffic != one.traffic else f"{100 * one.traffic:.0f} %",
                f"{one.first_loss:.2f} to {one.last_loss:.2f}" + f" ({ONE})" * (one.runs == 1) if brief else "",
            ]
        )
    heads = [
        "variant",
        "seeds",
        "tries",
        "accuracy %",
        "to exact",
        "as trained %",
        "operations",
        "time of the training",
        "its seconds",
    ]
    heads += ["exact step / this step", "memory of a step", "gradient bytes", "loss, first to last steps"]
    kept = [place for place in range(len(heads)) if any(row[place] for row in rows)]
    return rows_to_table([heads[place] for place in kept], [[row[place] for place in kept] for row in rows])


def _known(value: float) -> str:
    return "" if value != value else f"{value:.2f}"


def rates(*_: Content) -> str:
    """Accuracies by learning rate, of all sections where a second one was tried."""
    tables, _summaries = scripts()
    parts, results = found()
    lines = []
    for name, own in results.items():
        table = narrow(tables.rates(own))
        if table:
            lines += [f"{parts[name][0]['title']} (`{parts[name][0]['config']}`):", table]
    return "\n\n".join(lines)


def narrow(table: str) -> str:
    """A table without the spaces that line its columns up, and with a minus of its width."""
    lines = [re.sub(r":?-{3,}:?", "---", re.sub(r" {2,}", " ", line)) for line in table.splitlines()]
    return re.sub(r"(?<=[ \[])-(?=\d)", "−", "\n".join(lines)).replace(" – ", "  ")
