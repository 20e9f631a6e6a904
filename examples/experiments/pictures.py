"""The figures of an experiment: accuracy against cost with the front, and learning curves."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from summaries import Results, front

_PALE = "#c8c8c8"
_COLOURS = [to_hex(plt.get_cmap("tab20")(place)) for place in range(20) if place not in (14, 15)]  # greys
_MARKERS = {"exact": "*", "epochs": "s", "width": "D", "frozen": "^", "dropout": "P", "sampled": "o"}
_KINDS = {
    "exact": "exact",
    "epochs": "exact, fewer epochs",
    "width": "exact, narrower",
    "frozen": "exact, in part frozen",
    "dropout": "exact, with dropout",
    "sampled": "sampled",
}
_NAMED = 16  # as many variants have a colour and a name each; of more, those on a front


def draw(results: Results, title: str, folder: Path, name: str) -> list[str]:
    """Writes the figures; returns their file names. Of many variants those off the fronts are pale, told by kind.

    Learning curves are drawn where accuracy is known of more than one epoch.
    """
    found, curves = results.found, results.curves
    exact = found[found.kind == "exact"]
    whole, unit = (1.0, "in seconds") if exact.empty else (exact.seconds.iloc[0], "of exact")
    costs = {
        "flops": ("FLOPs of the training, % of exact", 100 * found.flops),
        "time": (f"time of the training, {unit}", (found.seconds / whole)[found.timed]),
    }
    files = []
    for kind, (label, cost) in costs.items():
        plot, axes = _axes(title)
        _points(axes, found, cost)
        axes.set_xlabel(label)
        files.append(_written(plot, axes, folder, f"{name}-{kind}.png"))
    if curves.groupby("variant").accuracy.count().max() <= 1:
        return files  # evaluated at the end alone
    plot, axes = _axes(title)
    colours = _colours(found, costs["time"][1])
    for one in found[found.timed & found.epochs.notna()].itertuples():
        curve = curves.loc[one.Index]
        style = "--" if one.kind in ("epochs", "width") else "-"
        width = 0.8 if one.Index not in colours else 2.2 if one.kind == "exact" else 1.5
        axes.plot(curve.seconds / whole, curve.accuracy, style, linewidth=width, **_look(one, colours))
    if found.accuracy.notna().any():
        # The first epochs would squeeze together what the last ones tell.
        lowest, highest = found.accuracy.min(), found.accuracy.max()
        low = max(curves.accuracy.min(), highest - 3 * max(1.0, highest - lowest))
        axes.set_ylim(low, max(curves.accuracy.max(), highest) + 0.05 * (highest - low))
    axes.set_xlabel(f"time of the training, {unit}")
    files.append(_written(plot, axes, folder, f"{name}-curves.png"))
    return files


def _fronts(found: pd.DataFrame, cost: pd.Series) -> dict[str, list[str]]:
    """The variants that no other beats: of all, and of exact trainings."""
    there = found.accuracy.dropna().index.intersection(cost.index)
    exact = there[found.kind[there] != "sampled"]
    named = {"front": there, "front without sampling": exact}
    return {label: front({one: (cost[one], found.accuracy[one]) for one in names}) for label, names in named.items()}


def _colours(found: pd.DataFrame, cost: pd.Series) -> dict[str, str]:
    """Colours by variant, of those that have one."""
    named = found[found.accuracy.notna()]
    if len(named) > _NAMED:
        first = named.index[named.kind == "exact"][:1]
        named = named[named.index.isin([*first, *(name for names in _fronts(found, cost).values() for name in names)])]
    return {
        name: "black" if kind == "exact" else _COLOURS[place % len(_COLOURS)]
        for place, (name, kind) in enumerate(named.kind.items())
    }


def _look(one: Any, colours: Mapping[str, str]) -> dict[str, str]:
    if one.Index in colours:
        return {"color": colours[one.Index], "label": one.Index}
    return {"color": _PALE, "label": f"others, {_KINDS[one.kind]}"}


def _points(axes: Axes, found: pd.DataFrame, cost: pd.Series) -> None:
    colours = _colours(found, cost)
    for one in found[found.accuracy.notna() & found.index.isin(cost.index)].itertuples():
        there = one.Index in colours
        axes.errorbar(
            cost[one.Index],
            one.accuracy,
            yerr=0.0 if pd.isna(one.deviation) else one.deviation,
            fmt=_MARKERS[one.kind],
            markersize=(13 if one.kind == "exact" else 8) if there else 6,
            capsize=2,
            zorder=2 if there else 1,
            **_look(one, colours),
        )
    for (label, names), style in zip(_fronts(found, cost).items(), "-:", strict=True):
        if names:
            points = cost[names], found.accuracy[names]
            axes.step(*points, style, where="post", color="0.6", linewidth=1, zorder=0, label=label)


def _axes(title: str) -> tuple[Figure, Axes]:
    plot, axes = plt.subplots(figsize=(9.6, 5.0), layout="constrained")
    axes.set_title(textwrap.fill(title, 55))
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.25)
    return plot, axes


def _written(plot: Figure, axes: Axes, folder: Path, name: str) -> str:
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    shown = [textwrap.fill(label, 45) for label in once]
    lines = sum(1.5 + label.count("\n") for label in shown)
    plot.set_size_inches(9.6, max(5.0, 0.155 * lines))
    axes.legend(once.values(), shown, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    plot.savefig(folder / name, dpi=110)
    plt.close(plot)
    return name
