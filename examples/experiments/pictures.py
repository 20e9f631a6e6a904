"""The figures of an experiment: accuracy against cost with the front, and learning curves."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from summaries import Summary, front

_PALE = "#c8c8c8"
_COLOURS = [to_hex(plt.get_cmap("tab20")(place)) for place in range(20) if place not in (14, 15)]  # greys
_MARKERS = {"exact": "*", "epochs": "s", "width": "D", "frozen": "^", "sampled": "o"}
_KINDS = {
    "exact": "exact",
    "epochs": "exact, fewer epochs",
    "width": "exact, narrower",
    "frozen": "exact, in part frozen",
    "sampled": "sampled",
}
_NAMED = 16  # as many variants have a colour and a name each; of more, those on a front


def draw(found: Sequence[Summary], title: str, folder: Path, name: str) -> list[str]:
    """Writes the figures; returns their file names. Of many variants those off the fronts are pale, told by kind."""
    exact = next((one for one in found if one.kind == "exact"), None)
    whole = exact.seconds if exact is not None else 1.0
    unit = "of exact" if exact is not None else "in seconds"
    costs = {
        "flops": ("FLOPs of the training, % of exact", {one.variant: 100 * one.flops for one in found}),
        "time": (
            f"time of the training, {unit}",
            {one.variant: one.time / whole for one in found if one.time is not None},
        ),
    }
    files = []
    for kind, (label, cost) in costs.items():
        plot, axes = _axes(title)
        _points(axes, found, cost)
        axes.set_xlabel(label)
        files.append(_written(plot, axes, folder, f"{name}-{kind}.png"))
    plot, axes = _axes(title)
    colours = _colours(found, costs["time"][1])
    for one in found:
        if one.curve and one.timed:
            _, seconds, reached = zip(*one.curve, strict=True)
            style = "--" if one.kind in ("epochs", "width") else "-"
            width = 0.8 if one.variant not in colours else 2.2 if one.kind == "exact" else 1.5
            axes.plot([s / whole for s in seconds], reached, style, linewidth=width, **_look(one, colours))
    ends = [one.mean for one in found if one.mean is not None]
    curves = [reached for one in found for _, _, reached in one.curve]
    if ends:
        # The first epochs would squeeze together what the last ones tell.
        low = max(min(curves), max(ends) - 3 * max(1.0, max(ends) - min(ends)))
        axes.set_ylim(low, max(max(curves), max(ends)) + 0.05 * (max(ends) - low))
    axes.set_xlabel(f"time of the training, {unit}")
    files.append(_written(plot, axes, folder, f"{name}-curves.png"))
    return files


def _placed(one: Summary, cost: Mapping[str, float]) -> bool:
    return one.mean is not None and one.variant in cost


def _fronts(found: Sequence[Summary], cost: Mapping[str, float]) -> dict[str, list[str]]:
    """The variants that no other beats: of all, and of exact trainings."""
    there = {one.variant: (cost[one.variant], one.mean) for one in found if _placed(one, cost)}
    exact = {one.variant: there[one.variant] for one in found if one.variant in there and one.kind != "sampled"}
    return {"front": front(there), "front without sampling": front(exact)}


def _colours(found: Sequence[Summary], cost: Mapping[str, float]) -> dict[str, str]:
    """Colours by variant, of those that have one."""
    named = [one for one in found if one.mean is not None or one.curve]
    if len(named) > _NAMED:
        first = [one.variant for one in named if one.kind == "exact"][:1]
        best = {*first, *(name for names in _fronts(found, cost).values() for name in names)}
        named = [one for one in named if one.variant in best]
    return {
        one.variant: "black" if one.kind == "exact" else _COLOURS[place % len(_COLOURS)]
        for place, one in enumerate(named)
    }


def _look(one: Summary, colours: Mapping[str, str]) -> dict[str, str]:
    if one.variant in colours:
        return {"color": colours[one.variant], "label": one.variant}
    return {"color": _PALE, "label": f"others, {_KINDS[one.kind]}"}


def _points(axes: Axes, found: Sequence[Summary], cost: Mapping[str, float]) -> None:
    colours = _colours(found, cost)
    means = {one.variant: one.mean for one in found}
    for one in found:
        if _placed(one, cost):
            there = one.variant in colours
            axes.errorbar(
                cost[one.variant],
                one.mean,
                yerr=one.deviation or 0.0,
                fmt=_MARKERS[one.kind],
                markersize=(13 if one.kind == "exact" else 8) if there else 6,
                capsize=2,
                zorder=2 if there else 1,
                **_look(one, colours),
            )
    for (label, names), style in zip(_fronts(found, cost).items(), "-:", strict=True):
        if names:
            points = zip(*((cost[name], means[name]) for name in names), strict=True)
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
