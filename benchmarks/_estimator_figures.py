"""Figures of benchmarks/estimators.py. Colours after Okabe and Ito, told apart by colour-blind readers, and markers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from PIL import Image  # which matplotlib needs, too

# Colour, marker and line of each method; variants of one method share colour and marker.
STYLES: dict[str, tuple[str, str, str]] = {
    "topk": ("#000000", "o", "-"),
    "topk, norms of B": ("#000000", "o", "--"),
    "crs, uniform": ("#7f7f7f", "v", "-"),
    "crs, ε = 0": ("#D55E00", "s", "-"),
    "crs, ε = 0.1": ("#D55E00", "s", ":"),
    "wta, ε = 0": ("#CC79A7", "D", "-"),
    "wta, ε = 0.1": ("#CC79A7", "D", ":"),
    "bernoulli, ε = 0": ("#56B4E9", "P", "-"),
    "bernoulli, ε = 0.1": ("#56B4E9", "P", ":"),
    "systematic, ε = 0": ("#0072B2", "^", "-"),
    "systematic, ε = 0.1": ("#0072B2", "^", ":"),
    "systematic, norms of B": ("#0072B2", "^", "--"),
    "wta_unique, ε = 0.1": ("#009E73", "X", ":"),
    "Gaussian projection": ("#E69F00", "s", "-"),
    "sign projection": ("#E69F00", "s", ":"),
    "sparse projection": ("#CC79A7", "D", "-"),
    "count sketch": ("#D55E00", "P", "-"),
    "compressed (FFT)": ("#7f7f7f", "v", "-"),
    "element-wise": ("#56B4E9", "X", "-"),
    "random walks": ("#7f7f7f", "<", ":"),
    "truncated SVD, of A": ("#009E73", "d", "-"),
    "truncated SVD, of B": ("#009E73", "d", ":"),
}
OF_THE_PACKAGE = [name for name in STYLES if name.partition(",")[0] in {"topk", "crs", "wta", "bernoulli"}]
OF_THE_PACKAGE += [name for name in STYLES if name.partition(",")[0] in {"systematic", "wta_unique"}]
# Without sign projection, whose line would lie on that of the Gaussian one.
AGAINST_RIVALS = ["topk", "systematic, ε = 0"]
AGAINST_RIVALS += [name for name in STYLES if name not in OF_THE_PACKAGE and name != "sign projection"]
# Those that take tens to hundreds of times as long as the exact product would squeeze the others into a corner.
SLOW = {"sparse projection", "compressed (FFT)", "element-wise", "random walks"}
IN_TIME = [name for name in AGAINST_RIVALS if name not in SLOW]
CAPTURED = tuple(f"cnn block3 {role}" for role in ("OUTPUT", "GRAD_INPUT", "GRAD_WEIGHT"))
SAMPLER_PANELS = (
    *("heavy-tailed columns", "non-negative", "cnn block3 OUTPUT"),
    *("cnn block3 OUTPUT, channels", *CAPTURED[1:]),
)
PANELS = ("heavy-tailed columns", "non-negative", "heavy-tailed entries", *CAPTURED)
TIME_PANELS = ("large, heavy-tailed", *CAPTURED)
BUDGETS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)


def draw(folder: Path, results: dict[str, Any]) -> list[Path]:
    """Three figures of ``results`` in ``folder``: the package's samplers, the rivals, and both against time."""
    measured = results["measured"]
    drawn = [
        ("estimators_samplers", OF_THE_PACKAGE, SAMPLER_PANELS, 3, "flops"),
        ("estimators_rivals", AGAINST_RIVALS, PANELS, 3, "flops"),
        ("estimators_time", IN_TIME, TIME_PANELS, 2, "time"),
    ]
    paths = []
    for name, methods, panels, columns, axis in drawn:
        shown = [panel for panel in panels if panel in results["products"]]
        paths.append(folder / f"{name}.png")
        _figure(paths[-1], measured, methods, shown, columns, axis)
    return paths


def _figure(
    path: Path,
    measured: Sequence[dict[str, Any]],
    methods: Sequence[str],
    panels: Sequence[str],
    columns: int,
    axis: str,
) -> None:
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns + 0.4, 3.1 * rows + 1.1))
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for place, panel in zip(axes.flat, panels, strict=False):
        for method in methods:
            mine = [each for each in measured if (each["product"], each["method"]) == (panel, method)]
            if mine:
                _line(place, mine, method, axis)
        place.set_title(panel, fontsize=10)
        place.set_xscale("log")
        place.set_yscale("log")
        _plain_ticks(place.yaxis)
        place.axhline(1.0, color="#999999", linewidth=1, zorder=0)
        place.grid(True, which="major", color="#eeeeee", zorder=0)
        place.tick_params(labelsize=8)
        if axis == "flops":
            place.set_xlabel("FLOPs / exact", fontsize=9)
            place.set_xlim(right=1.2 * BUDGETS[-1])
            place.xaxis.set_major_locator(FixedLocator(BUDGETS))
            place.xaxis.set_minor_locator(NullLocator())
            place.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"1/{1 / value:.0f}"))
        else:
            place.axvline(1.0, color="#999999", linewidth=1, zorder=0)
            place.set_xlabel("time / exact (median, quartiles)", fontsize=9)
            _plain_ticks(place.xaxis)
        place.set_ylabel("‖AB − Ĉ‖ / ‖AB‖", fontsize=9)
    for place in axes.flat[len(panels) :]:
        place.set_visible(False)
    handles = {label: h for place in axes.flat for h, label in zip(*place.get_legend_handles_labels(), strict=True)}
    lines = -(-len(handles) // (columns + 1))
    height = figure.get_size_inches()[1]
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=columns + 1, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, (0.2 * lines + 0.1) / height, 1, 1))
    figure.savefig(path, dpi=100)
    with Image.open(path) as image:  # a palette makes the file half
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def _plain_ticks(axis: Any) -> None:
    """0.5 and 20 instead of powers; only powers of ten where the axis is long."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _line(place: Any, mine: Sequence[dict[str, Any]], method: str, axis: str) -> None:
    color, marker, line = STYLES[method]
    y = [each["error"] for each in mine]
    look = {"color": color, "marker": marker, "linestyle": line, "markersize": 5, "linewidth": 1.3, "label": method}
    if axis == "flops":
        place.errorbar([e["flops"] for e in mine], y, yerr=[e["error_spread"] for e in mine], elinewidth=0.8, **look)
        return
    x = [each["over_exact"][1] for each in mine]
    spread = [
        [e["over_exact"][1] - e["over_exact"][0] for e in mine],
        [e["over_exact"][2] - e["over_exact"][1] for e in mine],
    ]
    place.errorbar(x, y, xerr=spread, elinewidth=0.8, **look)
