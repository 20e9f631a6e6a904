"""How a report is laid out: columns, what stands for them in a narrower table, numbers for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tabulate import tabulate

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "layer": ("layer",),
    "op": ("op",),
    "shape": ("batch x groups x (m, n, k)",),
    "sampler": ("sampler",),
    "ratio": ("ratio",),
    "k": ("k of K",),
    "flops": ("FLOPs",),
    "exact": ("out", "dX", "dW"),
    "executed": ("→ out", "dX", "dW"),
    "saved": ("saved %",),
    "demanded": ("not done",),
    "demand": ("outputs read by",),
    "selection": ("select",),
    "kept": ("bytes kept",),
    "reason": ("reason",),
}
"""Columns of the table by name, with their headers."""

NARROWER: tuple[Mapping[str, tuple[str, ...]], ...] = (
    {"exact": ("flops",), "executed": ()},
    {"ratio": ()},
    {"selection": ()},
    {"op": ()},
    {"kept": ()},
    {"demanded": ()},
    {"shape": ()},
    {"demand": ()},
    {"reason": ()},
)
"""What stands for which column in a narrower table, step by step."""


DEMAND = ("demanded", "demand")
"""Columns of what demand does: operations not done, and who reads which part of the outputs."""


def checked(columns: Sequence[str] | None) -> list[str]:
    """Column names, by default all but ``flops``; ValueError for unknown ones."""
    if columns is None:
        return [name for name in COLUMNS if name != "flops"]
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown or not columns or isinstance(columns, str):
        raise ValueError(f"columns: expected a list of names from {', '.join(COLUMNS)}, got {columns!r}")
    return list(columns)


def table(rows: Sequence[Mapping[str, Sequence[str]]], columns: Sequence[str], form: str) -> str:
    """The cells of ``columns`` as a table in one of tabulate's forms.

    Args:
        rows: For each row the cells of every column by name, as many as the column has headers.
        columns: Names from :data:`COLUMNS`.
        form: Such as ``"simple"``, ``"github"`` or ``"html"``.
    """
    cells = [[cell for name in columns for cell in row[name]] for row in rows]
    headers = [header for name in columns for header in COLUMNS[name]]
    return tabulate(cells, headers=headers, tablefmt=form, disable_numparse=True)


def human(value: int | None) -> str:
    """Three digits and a unit; ``?`` for None."""
    if value is None:
        return "?"
    number = float(value)
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 1000 or unit == "T":
            break
        number /= 1000
    return f"{number:.3g}{unit}" if unit else f"{int(number)}"


def change(before: int | None, now: int | None) -> str:
    """``before → now``, or ``?`` if it is not known."""
    return "?" if now is None else f"{human(before)} → {human(now)}"
