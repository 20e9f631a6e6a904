"""What the runs of a variant came to, together: accuracy, operations, time; and what its steps cost.

Accuracy is that of the last epoch. Of a run that ends with sampled steps, in the forward pass of a network with
BatchNorm, it is that after re-estimating the statistics on 20 exact batches, whose FLOPs count. Means are over seeds,
with the standard deviation. What steps cost is what ``run.py --costs`` measured, of each variant beside exact training:
medians, and quartiles; it is the same at each learning rate. Where it did, the time of a training is that of its steps
by these medians, and not the seconds that the run took. A run on a machine that made no exact run has no time else.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from records import accuracy, mended, sampled_forward, slug, told

Record = Mapping[str, Any]

_COSTS = ["quicker", "peak", "traffic", "time"]


@dataclasses.dataclass(frozen=True)
class Results:
    """The runs of a section, those of a variant together. What is not known is NaN.

    Attributes:
        found: A row for each variant, exact ones first, then in the order of the first run:

            - ``kind``: ``exact``; ``epochs``, ``width``, ``frozen`` or ``dropout`` for baselines; ``sampled``.
            - ``runs`` that did not diverge, and those that ``diverged``.
            - ``accuracy`` and its ``deviation``; ``trained`` and ``trained_deviation`` before statistics are
              re-estimated.
            - ``flops``: share of the exact training's.
            - ``seconds`` of training, without compiling; ``timed`` says whether they may be compared.
            - ``warm``: seconds of compiling, of first steps and of those that were timed before the training.
            - ``speedup``: time of an exact step over that of a sampled one, medians of steps in turn in one run.
            - ``memory``: peak bytes on the device.
            - ``wall``: seconds on the wall that the training took.
            - ``shipped``: accuracy of the narrow network where exact steps begin again, or at the end; its deviation,
              its ``share`` of the parameters, and ``latency``: by the examples of a batch, medians of the milliseconds
              of an evaluation of the full network and of it, and quartiles of their ratio, means over the runs.
            - ``first_loss`` and ``last_loss`` of the training, means of its first and of its last steps.
            - ``steps`` of each phase, as shares of the steps of exact training.
            - ``options`` as configured; ``rate``, ``to`` and ``equal`` are among them, ``alike`` leaves out the rate.
            - ``epochs`` in its curve.
            - ``tries`` that it is the best of, 0 where none were made.
            - What its steps cost, if measured: ``quicker``, quartiles of the time of an exact step over that of the
              step beside it, by phase; ``peak``, the most bytes that such a step allocates as a share of an exact
              step's; ``traffic``, bytes of gradients in data-parallel training as a share of exact training's, and
              ``time`` likewise, both over the whole of it.
        accuracies: A row for each seed, a column for each variant.
        curves: By variant and epoch: ``share`` of FLOPs, ``seconds``, ``accuracy``; means over the runs.
        choices: A row for each try: its ``variant``, the values that were ``tried``, ``accuracy`` on ``held`` examples
            that were held out, its ``deviation``, the ``runs``, those that ``diverged``, and whether it was ``taken``.
    """

    found: pd.DataFrame
    accuracies: pd.DataFrame
    curves: pd.DataFrame
    choices: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)


def processor(record: Record) -> str:
    """What a run was computed on."""
    return str(record["environment"]["accelerator"] or record["environment"]["processor"])


def alike(options: Mapping[str, Any]) -> str:
    """The same for all options that differ in the learning rate alone."""
    return json.dumps({**options, "rate": 1.0}, sort_keys=True)


def _kind(options: Mapping[str, Any]) -> str:
    if options["policy"] or options.get("examples"):
        return "sampled"
    if options.get("frozen"):
        return "frozen"
    if options.get("dropout"):
        return "dropout"
    if options["by"] == "width" or options["width"] != 1:
        return "width"
    return "epochs" if options["by"] == "epochs" or options["epochs"] != 1 else "exact"


def _row(record: Record) -> dict[str, Any]:
    """A run as a row; accuracies and losses of one that diverged are not known."""
    ended, options, turns = not record["diverged"], record["options"], record["step_ms"]
    first, last = record["epochs"][0], record["epochs"][-1]
    learnt = ended and "first_loss" in first
    return {
        "record": record,
        "options": options,
        "kind": _kind(options),
        "alike": alike(options),
        **{key: options[key] for key in ("to", "equal")},
        "rate": float(options.get("rate", 1.0)),
        "steps": {phase: count / record["full_steps"] for phase, count in record["phases"].items()},
        "processor": processor(record),
        **{key: record[key] for key in ("variant", "seed", "diverged", "seconds")},
        "accuracy": accuracy(record) if ended else math.nan,
        "trained": record["final"]["accuracy"] if ended else math.nan,
        "flops": (record["flops"] + mended(record) * record["recalibration_flops"]) / record["exact_flops"],
        "speedup": turns["exact"][1] / turns["sampled"][1] if {"exact", "sampled"} <= turns.keys() else math.nan,
        "memory": record["peak_memory"] or math.nan,
        "wall": record.get("wall_seconds", math.nan),
        **_shipped(record),
        "warm": record.get("warm_seconds", math.nan),
        "first_loss": first["first_loss"] if learnt else math.nan,
        "last_loss": last["last_loss"] if learnt else math.nan,
        "tries": record.get("tries", 0),
    }


def _shipped(record: Record) -> dict[str, Any]:
    """Of the narrow network of a run; not known of the others."""
    found = record.get("shipped")
    if found is None:
        return {"shipped": math.nan, "share": math.nan, "latency": None}
    sizes = found["parameters"]
    return {"shipped": found["accuracy"], "share": sizes["sub"] / sizes["full"], "latency": found["latency"]}


def levelled(runs: pd.DataFrame) -> pd.DataFrame:
    """``runs`` with the seconds of each machine in those of the first: exact training takes as long on both.

    ``pace`` is the factor. Runs on a machine without exact ones stay as they are, and are not ``timed``.
    """
    exact = runs[(runs.kind == "exact") & ~runs.diverged]
    unit = exact.groupby("processor", sort=False).seconds.mean()
    pace = unit.iloc[0] / runs.processor.map(unit) if len(unit) else pd.Series(1.0, runs.index)
    timed = pace.notna()
    pace = pace.fillna(1.0)
    return runs.assign(pace=pace, seconds=pace * runs.seconds, timed=timed)


def latest(runs: pd.DataFrame) -> pd.DataFrame:
    """The last run of each seed, of each variant as it was last configured; sorted as :class:`Results` has them."""
    configured = runs.options.map(lambda options: json.dumps(options, sort_keys=True))
    other = configured != configured.groupby(runs.variant).transform("last")
    before = other[::-1].groupby(runs.variant).cummax()
    place = runs.groupby("variant", sort=False).ngroup()
    runs = runs.assign(place=place, later=runs.kind != "exact")[~before.sort_index()]
    return runs.drop_duplicates(["variant", "seed"], keep="last").sort_values(["later", "place", "seed"])


def summarised(records: Sequence[Record]) -> Results:
    """The runs of each variant together, as it was last configured; their costs are not known yet."""
    runs = latest(levelled(pd.DataFrame([_row(record) for record in records])))
    groups = runs.groupby("variant", sort=False)
    averaged = ("accuracy", "trained", "memory", "warm", "wall", "shipped", "share", "first_loss", "last_loss")
    means = {name: (name, "mean") for name in averaged}
    firsts = {name: (name, "first") for name in ("kind", "options", "alike", "rate", "to", "equal", "steps")}
    found = groups.agg(
        **firsts,
        **means,
        runs=("accuracy", "count"),
        diverged=("diverged", "sum"),
        tries=("tries", "max"),
        deviation=("accuracy", "std"),
        trained_deviation=("trained", "std"),
        shipped_deviation=("shipped", "std"),
        latency=("latency", _mean_latency),
        speedup=("speedup", "median"),
    )
    counted = runs[~runs.diverged | groups.diverged.transform("all")]
    clocked = counted[counted.timed | ~counted.groupby("variant").timed.transform("any")]
    found["flops"] = counted.groupby("variant").flops.mean()
    found["timed"] = counted.groupby("variant").timed.any()
    found["seconds"] = clocked.groupby("variant").seconds.mean()
    curves = _curves(runs[~runs.diverged], clocked.index, found.accuracy)
    found["epochs"] = curves.groupby("variant").size()
    return Results(found, runs.pivot(index="seed", columns="variant", values="accuracy"), curves)


def _mean_latency(each: pd.Series) -> Any:
    """By batch, means over runs: the medians of both networks and the quartiles of their ratio; None without any."""
    known = each.dropna().tolist()
    if not known:
        return None

    def mean(batch: str, name: str, place: int) -> float:
        return sum(one[batch][name][place] for one in known) / len(known)

    return {
        batch: {
            **{name: mean(batch, name, 1) for name in ("full", "sub")},
            "speedup": [mean(batch, "speedup", place) for place in range(3)],
        }
        for batch in known[0]
    }


def _curves(ended: pd.DataFrame, clocked: pd.Index, ends: pd.Series) -> pd.DataFrame:
    """Of the epochs that all runs of a variant have; the accuracy of the last one is that in the table, to the bit."""
    shortest = ended.record.map(lambda record: len(record["epochs"])).groupby(ended.variant).min()
    rows = []
    for run in ended.itertuples():
        epochs, mend = run.record["epochs"], sampled_forward(run.options)
        for number, one in enumerate(epochs[: shortest[run.variant]]):
            reached = one.get("accuracy", math.nan)
            reached = one.get("recalibrated", reached) if mend else reached
            seconds = run.pace * one["seconds"] if run.Index in clocked else math.nan
            rows.append([run.variant, number, one["flops"] / run.record["exact_flops"], seconds, reached])
    frame = pd.DataFrame(rows, columns=["variant", "epoch", "share", "seconds", "accuracy"])
    curves = frame.groupby(["variant", "epoch"], sort=False).mean()
    names = curves.index.get_level_values("variant")
    last = ~names.duplicated(keep="last")
    curves.loc[last, "accuracy"] = ends[names[last]].to_numpy()
    return curves


def time_to(results: Results, variant: str, goal: float) -> float:
    """Seconds of training until the mean accuracy at the end of an epoch is ``goal``.

    NaN if never, if untimed, or if the accuracy is known of the last epoch alone.
    """
    if not results.found.timed[variant] or variant not in results.curves.index:
        return math.nan
    curve = results.curves.loc[variant]
    if len(curve) > 1 and curve.accuracy.count() == 1:
        return math.nan
    reached = curve.seconds[curve.accuracy >= goal]
    return math.nan if reached.empty else reached.iloc[0]


def exact_beside(found: pd.DataFrame, rate: float) -> Any:
    """The exact training that others at a learning rate are compared with: at that rate, or else the first.

    None without any.
    """
    exact = found[(found.kind == "exact") & found.accuracy.notna()]
    return min(exact.itertuples(), key=lambda one: one.rate != rate, default=None)


def at_rate(found: pd.DataFrame, alike: str, rate: float) -> Any:
    """The variant that is ``alike`` at a learning rate, None if that was not run."""
    return next(found[(found.rate == rate) & (found.alike == alike)].itertuples(), None)


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names whose ``(cost, accuracy)`` no other beats in one and equals in the other, from the cheapest on."""

    def beaten(own: tuple[float, float]) -> bool:
        return any(cost <= own[0] and reached >= own[1] and (cost, reached) != own for cost, reached in points.values())

    return sorted((name for name, own in points.items() if not beaten(own)), key=lambda name: points[name])


def costs_of(records: Iterable[Record], found: pd.DataFrame) -> pd.DataFrame:
    """By variant, from the last measurement of each as it was configured in its runs, at whatever learning rate."""
    made: dict[str, list[Any]] = {}
    for record in records:
        exact = record["costs"]["exact training"]["exact"]
        names = {alike(options): name for name, options in record["options"].items()}
        for one in found.itertuples():
            name = one.Index if one.Index in record["options"] else names.get(one.alike)
            if name not in record["costs"] or alike(record["options"][name]) != one.alike:
                continue
            phases = record["costs"][name]
            each = {"exact": exact, **phases}
            if not one.steps.keys() <= each.keys():
                continue
            sent = sum(share * each[phase]["gradient_bytes"] for phase, share in one.steps.items())
            made[one.Index] = [
                {phase: own["speedup"] for phase, own in phases.items()},
                max(own["peak_bytes"] for own in phases.values()) / exact["peak_bytes"],
                sent / exact["gradient_bytes"],
                sum(share / each[phase]["speedup"][1] for phase, share in one.steps.items()),
            ]
    return pd.DataFrame.from_dict(made, orient="index", columns=_COSTS)


def _choices(records: Iterable[Record], found: pd.DataFrame) -> pd.DataFrame:
    """The tries that are on record, as :class:`Results` has them; the last run of each seed counts."""
    rows = [
        {
            "variant": one["variant"],
            "tried": told(one["tried"]),
            "options": json.dumps(one["options"], sort_keys=True),
            "seed": one["seed"],
            "held": one["validation"],
            "accuracy": math.nan if one["diverged"] else accuracy(one),
            "diverged": one["diverged"],
        }
        for one in records
        if "validation" in one
    ]
    if not rows:
        return pd.DataFrame()
    runs = pd.DataFrame(rows).drop_duplicates(["variant", "options", "seed"], keep="last")
    made = runs.groupby(["variant", "options"], sort=False).agg(
        tried=("tried", "last"),
        held=("held", "last"),
        accuracy=("accuracy", "mean"),
        deviation=("accuracy", "std"),
        runs=("accuracy", "count"),
        diverged=("diverged", "sum"),
    )
    taken = found.options.map(lambda options: json.dumps(options, sort_keys=True))
    made = made.reset_index()
    return made.assign(taken=made.options == made.variant.map(taken))


def evaluated(records: Sequence[Record]) -> Results:
    """The runs of a section together, with the costs of their steps.

    Where these are known they say the time of a training, since runs beside others slow one another down. Exact
    training takes as long at each learning rate.
    """
    results = summarised(trained(records))
    results = dataclasses.replace(results, choices=_choices(records, results.found))
    found = results.found.join(costs_of((one for one in records if "costs" in one), results.found))
    exact = found[found.kind == "exact"]
    if exact.empty:
        return dataclasses.replace(results, found=found)
    share = found.time.astype(float).where(found.kind != "exact", 1.0)
    factor = (share * exact.seconds.iloc[0] / found.seconds).fillna(1.0)
    found = found.assign(seconds=factor * found.seconds, timed=found.timed | share.notna())
    seconds = results.curves.seconds.mul(factor, level="variant")
    return dataclasses.replace(results, found=found, curves=results.curves.assign(seconds=seconds))


def sections(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records that may be compared: of one configuration, computed alike, runs among them; by a name for files."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        found.setdefault((record["config"], record["setting"]), []).append(record)
    ran = {key: own for key, own in found.items() if trained(own)}
    names = [name for name, _ in ran]
    return {slug(name + (f"-{key}" if names.count(name) > 1 else "")): own for (name, key), own in ran.items()}


def trained(records: Iterable[Record]) -> list[Record]:
    """Those of runs that were tested on the test examples, not of measurements or choices."""
    return [one for one in records if not {"costs", "validation"} & one.keys()]
