"""The figures of an experiment: accuracy against cost with the front, and learning curves."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from summaries import Summary, front

_MARKERS = {"exact": "*", "epochs": "s", "width": "D", "frozen": "^", "sampled": "o"}
_KINDS = {
    "exact": "exact",
    "epochs": "exact, fewer epochs",
    "width": "exact, narrower",
    "frozen": "exact, in part frozen",
    "sampled": "sampled",
}


def draw(found: Sequence[Summary], title: str, folder: Path, name: str) -> list[str]:
    """Writes the figures; returns their file names."""
    exact = next((one for one in found if one.kind == "exact"), None)
    whole = exact.seconds if exact is not None else 1.0
    unit = "of exact" if exact is not None else "in seconds"
    costs = {
        "flops": ("FLOPs of the training, % of exact", {one.variant: 100 * one.flops for one in found}),
        "time": (f"time of the training, {unit}", {one.variant: one.seconds / whole for one in found}),
    }
    files = []
    for kind, (label, cost) in costs.items():
        plot, axes = _axes(title)
        _points(axes, found, cost)
        axes.set_xlabel(label)
        files.append(_written(plot, axes, folder, f"{name}-{kind}.png"))
    plot, axes = _axes(title)
    for place, one in enumerate(found):
        if one.curve:
            _, seconds, reached = zip(*one.curve, strict=True)
            line = {"color": "black", "linewidth": 2.2} if one.kind == "exact" else {"color": _colour(place)}
            style = "--" if one.kind in ("epochs", "width") else "-"
            axes.plot([s / whole for s in seconds], reached, style, label=one.variant, **line)
    ends = [one.mean for one in found if one.mean is not None]
    curves = [reached for one in found for _, _, reached in one.curve]
    if ends:
        # The first epochs would squeeze together what the last ones tell.
        low = max(min(curves), max(ends) - 3 * max(1.0, max(ends) - min(ends)))
        axes.set_ylim(low, max(max(curves), max(ends)) + 0.05 * (max(ends) - low))
    axes.set_xlabel(f"time of the training, {unit}")
    files.append(_written(plot, axes, folder, f"{name}-curves.png"))
    return files


def _points(axes: Axes, found: Sequence[Summary], cost: dict[str, float]) -> None:
    there = {one.variant: (cost[one.variant], one.mean) for one in found if one.mean is not None}
    for place, one in enumerate(found):
        if one.mean is not None:
            colour = "black" if one.kind == "exact" else _colour(place)
            axes.errorbar(
                cost[one.variant],
                one.mean,
                yerr=one.deviation or 0.0,
                fmt=_MARKERS[one.kind],
                color=colour,
                markersize=13 if one.kind == "exact" else 8,
                capsize=2,
                label=one.variant,
            )
    best = [there[name] for name in front(there)]
    axes.step(*zip(*best, strict=True), where="post", color="0.6", linewidth=1, zorder=0, label="front")
    baselines = {name: there[name] for name in there if next(o for o in found if o.variant == name).kind != "sampled"}
    if baselines:
        exact = [there[name] for name in front(baselines)]
        axes.step(
            *zip(*exact, strict=True),
            where="post",
            color="0.6",
            linestyle=":",
            zorder=0,
            label="front without sampling",
        )


def _axes(title: str) -> tuple[Figure, Axes]:
    plot, axes = plt.subplots(figsize=(9.6, 5.0), layout="constrained")
    axes.set_title(textwrap.fill(title, 55))
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.25)
    return plot, axes


def _colour(place: int) -> tuple[float, ...]:
    return tuple(plt.get_cmap("tab20")(place % 20))


def _written(plot: Figure, axes: Axes, folder: Path, name: str) -> str:
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    plot.savefig(folder / name, dpi=110)
    plt.close(plot)
    return name
