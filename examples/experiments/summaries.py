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
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from records import slug

Record = Mapping[str, Any]

_EXACT_FORWARD = ("backward", "weight_gradient")
"""Policies that sample gradients alone: BatchNorm sees what it would see in exact training."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """The runs of one variant.

    Attributes:
        variant: Its name.
        kind: ``exact``; ``epochs``, ``width`` or ``frozen`` for baselines; ``sampled``.
        accuracies: Of each run that did not diverge, by seed.
        diverged: Runs that did.
        as_trained: Accuracies before statistics are re-estimated.
        flops: Share of the exact training's, mean.
        seconds: Of training, mean. Compiling is not in it.
        timed: Whether the seconds may be compared with those of exact training.
        warm: Seconds of compiling, of first steps and of those that were timed before the training, mean.
        speedup: Time of an exact step over that of a sampled one, medians of steps in turn in one run; None if unknown.
        curve: At each epoch: share of FLOPs, seconds, accuracy; means over the runs.
        losses: Of the training, means of the first and of the last steps of all; None where they were not recorded.
        memory: Peak bytes on the device, mean; None if unknown.
        steps: Of each phase, as shares of the steps of exact training.
        to: Whose cost a baseline has.
        equal: In what.
        options: As it is configured.
    """

    variant: str
    kind: str
    accuracies: Mapping[int, float]
    diverged: int
    as_trained: tuple[float, ...]
    flops: float
    seconds: float
    speedup: float | None
    curve: tuple[tuple[float, float, float], ...]
    memory: float | None
    steps: Mapping[str, float] = dataclasses.field(default_factory=dict)
    to: str = ""
    equal: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    timed: bool = True
    warm: float | None = None
    losses: tuple[float, float] | None = None

    @property
    def time(self) -> float | None:
        """Seconds of training, None if they cannot be compared."""
        return self.seconds if self.timed else None

    @property
    def rate(self) -> float:
        """Factor on the learning rate."""
        return float(self.options.get("rate", 1.0))

    @property
    def mean(self) -> float | None:
        """Accuracy, None if every run diverged."""
        return statistics.mean(self.accuracies.values()) if self.accuracies else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the accuracy, None for a single run."""
        return statistics.stdev(self.accuracies.values()) if len(self.accuracies) > 1 else None


def _sampled_forward(options: Mapping[str, Any]) -> bool:
    policy = options["policy"]
    return bool(policy) and policy.get("kind") not in _EXACT_FORWARD


def mended(record: Record) -> bool:
    """Whether the accuracy of a run is that after re-estimating statistics: the last forward passes are sampled."""
    options = record["options"]
    return _sampled_forward(options) and not options["tail"] and record["final"].get("recalibrated") is not None


def accuracy(record: Record) -> float:
    """Of the end of a run, per cent."""
    return float(record["final"]["recalibrated" if mended(record) else "accuracy"])


def processor(record: Record) -> str:
    """What a run was computed on."""
    return str(record["environment"]["accelerator"] or record["environment"]["processor"])


def levelled(records: Sequence[Record]) -> list[Record]:
    """``records`` with the seconds of each machine in those of the first: exact training takes as long on both.

    Each says whether it is ``timed``: runs on a machine without exact ones stay as they are, and are not.
    """
    exact: dict[str, list[float]] = {}
    for record in records:
        if not record["diverged"] and _kind(record["options"]) == "exact":
            exact.setdefault(processor(record), []).append(record["seconds"])
    unit = {place: statistics.mean(seconds) for place, seconds in exact.items()}
    first = next(iter(unit.values()), 1.0)
    made = []
    for record in records:
        factor = first / unit.get(processor(record), first)
        epochs = [{**one, "seconds": factor * one["seconds"]} for one in record["epochs"]]
        timed = not unit or processor(record) in unit
        made.append({**record, "seconds": factor * record["seconds"], "epochs": epochs, "timed": timed})
    return made


def summarised(records: Sequence[Record]) -> list[Summary]:
    """One summary for each variant as it was last configured, exact first, then in the order of the first run."""
    latest: dict[str, dict[int, Record]] = {}
    for record in levelled(records):
        runs = latest.setdefault(record["variant"], {})
        if any(other["options"] != record["options"] for other in runs.values()):
            runs.clear()
        runs[record["seed"]] = record
    found = [_summary(name, [runs[seed] for seed in sorted(runs)]) for name, runs in latest.items()]
    return sorted(found, key=lambda one: one.kind != "exact")


def _summary(name: str, runs: Sequence[Record]) -> Summary:
    ended = [run for run in runs if not run["diverged"]]
    options = runs[0]["options"]
    shares = [(run["flops"] + mended(run) * run["recalibration_flops"]) / run["exact_flops"] for run in ended or runs]
    speedups = [
        run["step_ms"]["exact"][1] / run["step_ms"]["sampled"][1]
        for run in runs
        if {"exact", "sampled"} <= run["step_ms"].keys()
    ]
    memory = [run["peak_memory"] for run in runs if run["peak_memory"]]
    warm = [run["warm_seconds"] for run in runs if "warm_seconds" in run]
    ends = [(run["epochs"][0], run["epochs"][-1]) for run in ended]
    losses = [(first["first_loss"], last["last_loss"]) for first, last in ends if "first_loss" in first]
    return Summary(
        variant=name,
        kind=_kind(options),
        accuracies={run["seed"]: accuracy(run) for run in ended},
        diverged=len(runs) - len(ended),
        as_trained=tuple(run["final"]["accuracy"] for run in ended),
        flops=statistics.mean(shares),
        seconds=_clock(ended or runs, ended or runs),
        speedup=statistics.median(speedups) if speedups else None,
        curve=tuple(_curve(ended)),
        memory=statistics.mean(memory) if memory else None,
        steps={phase: count / runs[0]["full_steps"] for phase, count in runs[0]["phases"].items()},
        to=options["to"],
        equal=options["equal"],
        options=options,
        timed=any(run["timed"] for run in ended or runs),
        warm=statistics.mean(warm) if warm else None,
        losses=(statistics.mean(a for a, _ in losses), statistics.mean(b for _, b in losses)) if losses else None,
    )


def _clock(parts: Sequence[Record], runs: Sequence[Record]) -> float:
    """Mean seconds of ``parts`` of ``runs``, of those that are timed if there are any."""
    timed = [part["seconds"] for part, run in zip(parts, runs, strict=True) if run["timed"]]
    return statistics.mean(timed or [part["seconds"] for part in parts])


def _kind(options: Mapping[str, Any]) -> str:
    if options["policy"]:
        return "sampled"
    if options.get("frozen"):
        return "frozen"
    if options["by"] == "width" or options["width"] != 1:
        return "width"
    return "epochs" if options["by"] == "epochs" or options["epochs"] != 1 else "exact"


def _curve(runs: Sequence[Record]) -> Iterable[tuple[float, float, float]]:
    mend = bool(runs) and _sampled_forward(runs[0]["options"])
    for entries in zip(*(run["epochs"] for run in runs), strict=False):
        own = [one.get("recalibrated", one["accuracy"]) if mend else one["accuracy"] for one in entries]
        shares = [one["flops"] / run["exact_flops"] for one, run in zip(entries, runs, strict=True)]
        last = entries[0] is runs[0]["epochs"][-1]
        # The curve ends where the table says.
        mean = statistics.mean(map(accuracy, runs) if last else own)
        yield statistics.mean(shares), _clock(entries, runs), mean


def time_to(summary: Summary, goal: float) -> float | None:
    """Seconds of training until the mean accuracy at the end of an epoch is ``goal``; None if never, or untimed."""
    if not summary.timed:
        return None
    return next((seconds for _, seconds, reached in summary.curve if reached >= goal), None)


def exact_beside(found: Sequence[Summary], one: Summary) -> Summary | None:
    """The exact training that ``one`` is compared with: at its learning rate, or else the first; None without any."""
    exact = [other for other in found if other.kind == "exact" and other.mean is not None]
    return next((other for other in exact if other.rate == one.rate), exact[0] if exact else None)


def alike(options: Mapping[str, Any]) -> str:
    """The same for all options that differ in the learning rate alone."""
    return json.dumps({**options, "rate": 1.0}, sort_keys=True)


def at_rate(found: Sequence[Summary], one: Summary, rate: float) -> Summary | None:
    """What ``one`` is at another learning rate, None if that was not run."""
    return next((other for other in found if other.rate == rate and alike(other.options) == alike(one.options)), None)


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names whose ``(cost, accuracy)`` no other beats in one and equals in the other, from the cheapest on."""

    def beaten(own: tuple[float, float]) -> bool:
        return any(cost <= own[0] and reached >= own[1] and (cost, reached) != own for cost, reached in points.values())

    return sorted((name for name, own in points.items() if not beaten(own)), key=lambda name: points[name])


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the steps of a variant cost.

    Attributes:
        speedup: Time of an exact step over that of the step beside it, quartiles, of each phase that is not exact.
        memory: Most bytes that such a step allocates, as a share of an exact step's.
        traffic: Bytes of gradients in data-parallel training, as a share of exact training's, over the whole of it.
        time: Of the whole training, likewise: steps of each phase by the median of their speed.
    """

    speedup: Mapping[str, Sequence[float]]
    memory: float
    traffic: float
    time: float


def costs_of(records: Iterable[Record], found: Sequence[Summary]) -> dict[str, Cost]:
    """By variant, from the last measurement of each as it was configured in its runs, at whatever learning rate."""
    made = {}
    for record in records:
        exact = record["costs"]["exact training"]["exact"]
        names = {alike(options): name for name, options in record["options"].items()}
        for one in found:
            name = one.variant if one.variant in record["options"] else names.get(alike(one.options))
            if name not in record["costs"] or alike(record["options"][name]) != alike(one.options):
                continue
            phases = record["costs"][name]
            each = {"exact": exact, **phases}
            if not one.steps.keys() <= each.keys():
                continue
            sent = sum(share * each[phase]["gradient_bytes"] for phase, share in one.steps.items())
            made[one.variant] = Cost(
                {phase: own["speedup"] for phase, own in phases.items()},
                max(own["peak_bytes"] for own in phases.values()) / exact["peak_bytes"],
                sent / exact["gradient_bytes"],
                sum(share / each[phase]["speedup"][1] for phase, share in one.steps.items()),
            )
    return made


def evaluated(records: Sequence[Record]) -> tuple[list[Summary], dict[str, Cost]]:
    """Summaries of the runs of a section, and costs of their steps."""
    found = summarised(trained(records))
    measured = costs_of((one for one in records if "costs" in one), found)
    return retimed(found, measured), measured


def retimed(found: Sequence[Summary], measured: Mapping[str, Cost]) -> list[Summary]:
    """With the times that the costs of steps give, where they are known: runs beside others slow one another down.

    Exact training takes as long at each learning rate.
    """
    exact = next((one for one in found if one.kind == "exact"), None)
    if exact is None:
        return list(found)
    made = []
    for one in found:
        cost = measured.get(one.variant)
        share = 1.0 if one.kind == "exact" else None if cost is None else cost.time
        factor = 1.0 if share is None else share * exact.seconds / one.seconds
        curve = tuple((part, factor * seconds, reached) for part, seconds, reached in one.curve)
        timed = one.timed or share is not None
        made.append(dataclasses.replace(one, seconds=factor * one.seconds, curve=curve, timed=timed))
    return made


def sections(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records that may be compared: of one configuration, computed alike, runs among them; by a name for files."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        found.setdefault((record["config"], record["setting"]), []).append(record)
    ran = {key: own for key, own in found.items() if trained(own)}
    names = [name for name, _ in ran]
    return {slug(name + (f"-{key}" if names.count(name) > 1 else "")): own for (name, key), own in ran.items()}


def trained(records: Iterable[Record]) -> list[Record]:
    """Those of runs, not of measurements."""
    return [one for one in records if "costs" not in one]
