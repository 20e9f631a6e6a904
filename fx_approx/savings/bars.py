"""A picture of the savings: for each layer its operations, exact and as executed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from fx_approx.savings.rows import Row
from fx_approx.utils.optional_imports import load_matplotlib

_EXACT, _EXECUTED = "#cbd5e1", "#2563eb"
_LINE = 0.17
"""Inches that a layer takes."""


def draw_bars(model: str, rows: Sequence[Row], path: str | os.PathLike[str] | None = None) -> Any:
    """Draws a bar for each layer, the first above: pale what the exact layer computes, dark what is executed.

    Args:
        model: Name for the title.
        rows: Those without shapes are left out.
        path: A file whose suffix says the format; None writes none.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ValueError: No row has shapes.
        ImportError: Without matplotlib.
    """
    known = [(row.name, row.exact.total, row.executed.total) for row in rows if row.exact and row.executed]
    if not known:
        raise ValueError(
            f"no layer of {model} has operations that could be drawn: shapes are not known; str() says why"
        )
    figures, tickers = (load_matplotlib(module, "SavingsReport.plot") for module in ("figure", "ticker"))
    names, exact, executed = zip(*known, strict=True)
    figure = figures.Figure(figsize=(8, _LINE * len(known) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(known))
    axes.barh(places, exact, height=0.8, color=_EXACT, label="exact")
    axes.barh(places, executed, height=0.8, color=_EXECUTED, label="executed")
    axes.set_yticks(places, names, fontsize=6)
    axes.set(ylim=(len(known) - 0.4, -0.6))
    axes.xaxis.set_major_formatter(tickers.EngFormatter())
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel("operations of a training step", fontsize=8)
    saved = 1 - sum(executed) / sum(exact) if sum(exact) else 0.0
    axes.set_title(f"{model}: {100 * saved:.1f} % fewer operations", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
