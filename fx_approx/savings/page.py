"""The savings report as a page by itself, which loads nothing: totals, rows to be sorted, the graph, and all notes."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator, Sequence

from fx_approx.savings.drawing import DrawnNode
from fx_approx.savings.graph_svg import STYLE, graph_svg
from fx_approx.savings.rows import Row, Totals, row_cells, sort_values, total_cells
from fx_approx.savings.summary import Summary
from fx_approx.utils.tables import COLUMNS, checked

_SHOWN = ("layer", "op", "k", "saved", "why", "flops", "sampler", "shape", "demanded", "demand", "selection", "kept")

_PAGE_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1e293b; --faint: #64748b; --line: #94a3b8; --none: #cbd5e1;
  --whole: #5b7a9d; --stop: #dc2626; --stripe: #f1f5f9; }
@media (prefers-color-scheme: dark) { :root { --paper: #0f172a; --ink: #e2e8f0; --faint: #94a3b8; --line: #64748b;
  --none: #334155; --whole: #7aa2cf; --stop: #f87171; --stripe: #1e293b; } }
body { background: var(--paper); color: var(--ink); font: 14px system-ui, sans-serif; margin: 2em; }
h1 { font-size: 1.3em; } h2 { font-size: 1.1em; margin-top: 2em; }
ul { padding-left: 1.2em; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 12px; }
th, td { padding: 3px 9px; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--none); }
td.why { white-space: normal; min-width: 20em; }
th { cursor: pointer; user-select: none; background: var(--stripe); }
th[aria-sort=ascending]::after { content: " ▲"; } th[aria-sort=descending]::after { content: " ▼"; }
tbody tr:hover { background: var(--stripe); } tfoot td { font-weight: 600; }
"""

_SCRIPT = """
for (const head of document.querySelectorAll("th")) {
  head.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], place = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending";
    const key = row => row.cells[place].dataset.sort ?? row.cells[place].textContent;
    const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b, undefined, { numeric: true }) : a - b;
    const rows = [...body.rows].sort((a, b) => (down ? -1 : 1) * compare(key(a), key(b)));
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows);
  });
}
"""

_LEGEND = (
    "Above what runs first; lines are values, and those beside skip some layers. The bars "
    "say how many channels each layer reads and computes: coloured what is there, grey what is left out. One colour is "
    "one selection, shared by all that have it; blue-grey is computed whole. A red square marks where a value is whole "
    "although a reader wants a part."
)


def page(
    model: str,
    rows: Sequence[Row],
    totals: Totals,
    drawing: Sequence[DrawnNode],
    summary: Summary,
    columns: Sequence[str] | None = None,
) -> str:
    """HTML of a report.

    Args:
        model: Its name.
        rows: All of them.
        totals: Their sums.
        drawing: The graph; rows that it lacks are drawn behind it.
        summary: What is said in words.
        columns: Names from :data:`fx_approx.utils.tables.COLUMNS`; by default nearly all.

    Raises:
        ValueError: An unknown column; the message lists the known ones.
    """
    names = checked(columns, _SHOWN)
    drawn = {node.name for node in drawing}
    nodes = [*drawing, *(DrawnNode(row.name, True) for row in rows if row.name not in drawn)]
    title = html.escape(f"Savings of {model}")
    notes = [*summary.details(), *summary.token_texts(), *summary.notes]
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">',
        f"<style>{_PAGE_STYLE}{STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        *_list([summary.head(), *summary.totals_lines()]),
        "<h2>Layers</h2>",
        "<p>A click on a head sorts.</p>",
        f'<div class="wide">{rows_table(rows, totals, names)}</div>',
        "<h2>Graph</h2>",
        f"<p>{_LEGEND}</p>",
        f'<div class="wide">{graph_svg(nodes)}</div>',
        *(["<h2>More</h2>", *_list(notes)] if notes else []),
        *(["<h2>Computed whole although a reader wants a part</h2>", *_list(summary.stops)] if summary.stops else []),
        f"<script>{_SCRIPT}</script></body></html>",
    ]
    return "\n".join(parts)


def _list(lines: Sequence[str]) -> list[str]:
    return ["<ul>", *(f"<li>{html.escape(line)}</li>" for line in lines), "</ul>"]


def rows_table(rows: Sequence[Row], totals: Totals, columns: Sequence[str] | None = None) -> str:
    """The table of the rows with their sums, for any page; ``columns`` as in :func:`page`."""
    names = checked(columns, _SHOWN)
    heads = "".join(f'<th scope="col">{html.escape(head)}</th>' for name in names for head in COLUMNS[name])
    lines = [f"<table><thead><tr>{heads}</tr></thead><tbody>"]
    lines += [f"<tr>{''.join(_cells(row, names))}</tr>" for row in rows]
    total = total_cells(totals)
    ends = "".join(f"<td>{html.escape(cell)}</td>" for name in names for cell in total[name])
    return "\n".join([*lines, f"</tbody><tfoot><tr>{ends}</tr></tfoot></table>"])


def _cells(row: Row, names: Sequence[str]) -> Iterator[str]:
    cells, values = row_cells(row), sort_values(row)
    for name in names:
        for cell, value in itertools.zip_longest(cells[name], values.get(name, ())):
            mark = "" if value is None else f' data-sort="{html.escape(str(value))}"'
            look = ' class="why"' if name == "why" else ""
            yield f"<td{look}{mark}>{html.escape(cell)}</td>"
