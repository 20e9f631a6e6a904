"""The figure of benchmarks/ops.py: operations a byte against operations a second, under the measured roof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

EXACT = "#7f7f7f"
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""After Okabe and Ito, for the ratios in rising order."""
FLOAT8 = "#000000"
TITLES = {"hoisted": "hoisted OUTPUT (both sides sliced)"}


def draw(path: Path, content: dict[str, Any]) -> None:
    """A PNG with one panel for each role, from the content of the JSON file; compiled products where there are some.

    Sampled products that were faster than exact ones (the lower quartile of the speed-up is above 1) are filled.
    """
    results, environment = content["results"], content["environment"]
    compiled = any(one["compiled"] for one in results["ops"])
    ops = [one for one in results["ops"] if one["compiled"] == compiled]
    if not ops:
        raise ValueError("ops: expected at least one product, got none")
    roles = list(dict.fromkeys(one["role"] for one in ops))
    ratios = sorted({one["ratio"] for one in ops if one["ratio"] is not None})
    colours = {ratio: COLOURS[place % len(COLOURS)] for place, ratio in enumerate(ratios)}
    columns = min(2, len(roles))
    lines = -(-len(roles) // columns)
    figure = Figure(figsize=(5.6 * columns, 4.2 * lines + 1.3), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for role, panel in zip(roles, panels, strict=False):
        _panel(panel, [one for one in ops if one["role"] == role], results["peaks"], colours)
        panel.set_title(TITLES.get(role, role), fontsize=11)
    for panel in panels[len(roles) :]:
        panel.set_visible(False)
    device = environment["accelerator"] if results["device"] == "cuda" else environment["processor"]
    if results["device"] == "cpu":
        device = f"{device}, threads: {environment['threads']}"
    kind = "compiled" if compiled else "eager"
    figure.suptitle(f"{device}\n{results['dtype']}, {kind}, torch {environment['torch']}", fontsize=12)
    for panel in panels[max(0, len(roles) - columns) : len(roles)]:
        panel.set_xlabel("executed operations for each byte of operands and result")
        panel.tick_params(labelbottom=True)
    for panel in panels[::columns]:
        panel.set_ylabel("executed TFLOP/s")
    figure.legend(handles=_legend(ops, colours), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _panel(panel: Axes, ops: list[dict[str, Any]], peaks: dict[str, float], colours: dict[float, str]) -> None:
    for one in sorted(ops, key=lambda one: one["variant"] != "exact"):
        colour = {"exact": EXACT, "float8": FLOAT8}.get(one["variant"], colours.get(one["ratio"], EXACT))
        pays = one["variant"] == "exact" or one["speedup"][0] > 1
        panel.plot(
            *(one["intensity"], one["tflops"]),
            marker=_marker(one),
            markersize=6,
            color=colour,
            markerfacecolor=colour if pays else "none",
            alpha=0.45 if one["variant"] == "exact" else 0.85,
            linestyle="none",
        )
    reach = [one["intensity"] for one in ops]
    ridge = peaks["flops"] / peaks["bytes"]
    ends = [min(reach) / 1.5, ridge, max(*reach, ridge) * 1.5]
    ends = [x for x in ends if ends[0] <= x <= ends[2]]
    roof = [min(peaks["flops"], x * peaks["bytes"]) / 1e12 for x in ends]
    panel.plot(ends, roof, color="black", linewidth=1.2, zorder=1)
    panel.set(xscale="log", yscale="log")
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.grid(which="major", color="#dddddd", linewidth=0.6)
    sampled = [one for one in ops if one["variant"] == "sampled"]
    paying = sum(one["speedup"][0] > 1 for one in sampled)
    panel.annotate(f"pays in {paying} of {len(sampled)}", (0.03, 0.93), xycoords="axes fraction", fontsize=10)


def _marker(one: dict[str, Any]) -> str:
    return "D" if one["variant"] == "float8" else "s" if one["layer"].startswith("conv") else "o"


def _legend(ops: list[dict[str, Any]], colours: dict[float, str]) -> list[Line2D]:
    def point(label: str, colour: str, marker: str = "o", filled: bool = True) -> Line2D:
        face = colour if filled else "none"
        return Line2D([], [], linestyle="none", marker=marker, color=colour, markerfacecolor=face, label=label)

    entries = [point("exact", EXACT), *(point(f"ratio {ratio:g}", colour) for ratio, colour in colours.items())]
    if any(one["variant"] == "float8" for one in ops):
        entries.append(point("float8 (torchao)", FLOAT8, "D"))
    entries += [point("circle: linear layer", "#333333"), point("square: convolution", "#333333", "s")]
    entries += [point("filled: faster than exact", "#333333"), point("hollow: not faster", "#333333", filled=False)]
    return [*entries, Line2D([], [], color="black", linewidth=1.2, label="measured roof (products, copies)")]
