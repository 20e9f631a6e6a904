"""What a sweep found: accuracy against time, as a table, CSV, JSON and a figure."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import statistics
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from fx_approx.utils.optional_imports import load_matplotlib

EXACT = "exact"
"""Name of the baseline."""

_MARKS = "osD^vP*Xhd<>p"
_FORMAT = "fx_approx.sweep/1"


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One training.

    Attributes:
        policy: Its name, or ``exact``.
        seed: Of the run.
        accuracy: What ``evaluate`` gave; None if it diverged.
        loss: Of the last step; None if it is not finite.
        diverged: The loss became NaN or infinite, and the run ended there; or what ``evaluate`` gave was.
    """

    policy: str
    seed: int
    accuracy: float | None
    loss: float | None
    diverged: bool


@dataclasses.dataclass(frozen=True)
class SweepTime:
    """Training steps of a policy, timed in turn with exact ones.

    Attributes:
        policy: Its name, or ``exact``.
        seconds: Of a step with the optimiser, median.
        speedup: Exact / this by neighbouring steps: lower quartile, median, upper quartile.
        saved: Share of the operations that are not computed, the scores paid for, as the report predicts.
        sampled: Layers that are sampled.
    """

    policy: str
    seconds: float
    speedup: tuple[float, float, float]
    saved: float
    sampled: int


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """All runs and times of a sweep; ``str()`` is a table.

    Attributes:
        runs: One for each policy and seed.
        times: One for each policy, the exact one first.
    """

    runs: tuple[SweepRun, ...]
    times: tuple[SweepTime, ...]

    def accuracy(self, policy: str) -> tuple[float, float] | None:
        """Mean and standard deviation over the seeds that did not diverge; None if all did.

        Raises:
            KeyError: No such policy; the message lists the known ones.
        """
        if policy not in [one.policy for one in self.times]:
            raise KeyError(f"no policy {policy!r}; there are: {', '.join(one.policy for one in self.times)}")
        found = [run.accuracy for run in self.runs if run.policy == policy and run.accuracy is not None]
        if not found:
            return None
        return statistics.mean(found), statistics.stdev(found) if len(found) > 1 else 0.0

    def front(self) -> list[str]:
        """The policies that no other one beats in mean accuracy and median speed-up both, the slowest first.

        Policies of which a run diverged are left out.
        """
        known = {}
        for one in self.times:
            mean = self.accuracy(one.policy)
            if mean is not None and not any(run.diverged for run in self.runs if run.policy == one.policy):
                known[one.policy] = (one.speedup[1], mean[0])
        kept = [
            name
            for name, own in known.items()
            if not any(
                all(a >= b for a, b in zip(other, own, strict=True)) and other != own for other in known.values()
            )
        ]
        return sorted(kept, key=lambda name: known[name])

    def __str__(self) -> str:
        """The table, the front marked."""
        front, lines = self.front(), []
        for one in self.times:
            mean, runs = self.accuracy(one.policy), [run for run in self.runs if run.policy == one.policy]
            diverged, losses = sum(run.diverged for run in runs), [run.loss for run in runs if run.loss is not None]
            accuracy = (
                "diverged" if mean is None else f"{mean[0]:.4g} ± {mean[1]:.2g}" if len(runs) > 1 else f"{mean[0]:.4g}"
            )
            if diverged and mean is not None:
                accuracy += f" ({diverged} of {len(runs)} diverged)"
            low, middle, high = one.speedup
            lines.append(
                [
                    one.policy + (" *" if one.policy in front else ""),
                    accuracy,
                    f"{statistics.mean(losses):.4g}" if losses else "",
                    f"{1000 * one.seconds:.2f}",
                    f"{middle:.2f} [{low:.2f}, {high:.2f}]",
                    f"{100 * one.saved:.1f}",
                    str(one.sampled),
                ]
            )
        titles = ["policy", "accuracy", "loss", "ms a step", "exact / this", "FLOPs saved %", "layers sampled"]
        return f"{tabulate(lines, titles, disable_numparse=True)}\n\n* no other is both more accurate and faster."

    def to_csv(self) -> str:
        """One line for each run, with the times of its policy."""
        times, out = {one.policy: one for one in self.times}, io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        names = ["policy", "seed", "accuracy", "loss", "diverged", "seconds"]
        writer.writerow([*names, "speedup_low", "speedup", "speedup_high", "saved", "sampled"])
        for run in self.runs:
            one = times[run.policy]
            writer.writerow([*dataclasses.astuple(run), one.seconds, *one.speedup, one.saved, one.sampled])
        return out.getvalue()

    def to_json(self) -> str:
        """All of it."""
        return json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> SweepResult:
        """The inverse of :meth:`to_json`; ValueError for another format."""
        data: Mapping[str, Any] = json.loads(text)
        if data.get("format") != _FORMAT:
            raise ValueError(f"format: expected {_FORMAT!r}, got {data.get('format')!r}")
        times = [SweepTime(**{**one, "speedup": tuple(one["speedup"])}) for one in data["times"]]
        return cls(tuple(SweepRun(**run) for run in data["runs"]), tuple(times))

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Accuracy against speed-up: a mark for each policy, bars for quartiles and seeds, a line for the front.

        Args:
            path: Where to save it; the ending says in which format (``.png``, ``.pdf``, ``.svg``).

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            ImportError: matplotlib is not installed; says how to get it.
        """
        figures = load_matplotlib("figure", "SweepResult.plot")
        figure = figures.Figure(figsize=(8, 4.5), layout="constrained")
        axes, places = figure.subplots(), {}
        for number, one in enumerate(self.times):
            mean = self.accuracy(one.policy)
            if mean is None:
                continue
            (low, middle, high), (level, spread) = one.speedup, mean
            places[one.policy] = middle, level
            axes.errorbar(
                [middle],
                [level],
                yerr=[spread],
                xerr=[[middle - low], [high - middle]],
                marker=_MARKS[number % len(_MARKS)],
                color="black" if one.policy == EXACT else f"C{(number - 1) % 10}",
                markersize=8,
                capsize=2,
                elinewidth=1,
                linestyle="",
                label=one.policy,
            )
        front = [places[name] for name in self.front()]
        if front:
            axes.plot(*zip(*front, strict=True), color="#888888", linewidth=1, zorder=1, label="front")
        axes.axvline(1.0, color="#cccccc", linewidth=0.8, zorder=0)
        axes.set_xlabel("speed-up of a training step over exact (median, quartiles)")
        axes.set_ylabel("accuracy (mean, standard deviation)")
        axes.grid(color="#eeeeee")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if places:
            figure.legend(loc="outside right upper", frameon=False)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure
