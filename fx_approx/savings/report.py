"""The savings report: per layer what is saved, what choosing costs, and why the others were left exact."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Sequence
from typing import Any

from fx_approx.core.plan import Plan
from fx_approx.core.step_cost import StepTimeEstimate
from fx_approx.savings.bars import draw_bars
from fx_approx.savings.drawing import DrawnNode
from fx_approx.savings.page import page, rows_table
from fx_approx.savings.rows import Row, Sample, SelectionTime, Totals, flat_row, row_cells, total_cells
from fx_approx.savings.summary import Summary
from fx_approx.savings.token_rows import TokenRow
from fx_approx.utils.tables import NARROWEST, WIDTH, checked, few, folded, table

__all__ = ["Explanation", "Row", "Sample", "SavingsReport", "SelectionTime", "Totals"]

_LONG = 20
"""Rows from which on alike ones are shown as one, unless all are asked for."""

_ROWS = ("all", "folded")


@dataclasses.dataclass(frozen=True)
class SavingsReport:
    """Savings of a model, layer by layer; ``str()`` is a table and the totals.

    Operations are multiply-adds times two of one training step (output, gradient of the input, gradient of
    the weight), as ``torch.utils.flop_counter.FlopCounterMode`` counts the eager step.

    Attributes:
        model: Class name of the model.
        rows: One per candidate, in the order in which the model runs.
        totals: Their sums.
        notes: Parts that could not be traced, and rows without shapes.
        stops: Where demand or sharing stopped, and why: ``value: reason`` in the words of modules, for each value that
            is computed whole although some reader wants a part of it only.
        selection_time: What choosing costs, where :func:`fx_approx.analysis.selection_time` was called before.
        tokens: How many tokens each block of a transformer computes, and why, where the plan samples tokens.
        token_notes: Why there are no more such blocks, and which of them compute all.
        time: What a cost model predicts of the step; see :meth:`with_time`.
        drawing: The graph as the page of :meth:`to_html` draws it.
    """

    model: str
    rows: tuple[Row, ...]
    totals: Totals
    notes: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    selection_time: SelectionTime | None = None
    tokens: tuple[TokenRow, ...] = ()
    token_notes: tuple[str, ...] = ()
    time: StepTimeEstimate | None = None
    drawing: tuple[DrawnNode, ...] = ()

    def __str__(self) -> str:
        """The table for a terminal."""
        return self.to_text()

    def __getitem__(self, name: str) -> Row:
        """The row of the candidate ``name``."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no candidate {name!r}; there are: {', '.join(row.name for row in self.rows)}")

    def with_time(self, estimate: StepTimeEstimate) -> SavingsReport:
        """The same report with the time of a step, as :func:`fx_approx.analysis.estimate_step_time` predicts it.

        Raises:
            TypeError: ``estimate`` is something else.
        """
        if not isinstance(estimate, StepTimeEstimate):
            raise TypeError(f"estimate: expected what analysis.estimate_step_time returns, got {estimate!r}")
        return dataclasses.replace(self, time=estimate)

    def to_text(self, columns: Sequence[str] | None = None, *, rows: str | None = None, width: int = WIDTH) -> str:
        """The table for a terminal, with totals and notes.

        Args:
            columns: Names from :data:`fx_approx.utils.tables.COLUMNS`, in the order to show; by default those of
                :data:`fx_approx.utils.tables.FEW`, without the op below 80 characters.
            rows: ``folded`` shows those that say the same as one, named like ``layer3.1-4.conv1``; ``all`` shows each.
                By default folded where there are many, unless columns are asked for.
            width: Characters of a line, as far as the columns allow: layers and the last column are wrapped.

        Raises:
            ValueError: An unknown column, another word for ``rows``, or a width below 60; says what is known.
        """
        if rows is not None and rows not in _ROWS:
            raise ValueError(f"rows: expected one of {', '.join(_ROWS)}, got {rows!r}")
        if isinstance(width, bool) or not isinstance(width, int) or width < NARROWEST:
            raise ValueError(f"width: expected an integer of at least {NARROWEST}, got {width!r}")
        names = checked(columns, few(width))
        cells = [row_cells(row) for row in self.rows]
        if rows == "folded" or (rows is None and columns is None and len(cells) > _LONG):
            shown = [fold.cells for fold in folded(cells, names)]
        else:
            shown = list(cells)
        total = [] if columns is None else [total_cells(self.totals)]
        summary = "\n".join(self._summary.short(width))
        return f"{table([*shown, *total], names, 'simple', width)}\n\n{summary}"

    def to_markdown(self, columns: Sequence[str] | None = None) -> str:
        """All rows as a Markdown table, and all that the report knows beside; ``columns`` as in :meth:`to_text`."""
        rows = [*map(row_cells, self.rows), total_cells(self.totals)]
        return "\n".join([table(rows, checked(columns), "github"), "", *(f"- {line}" for line in self._summary.full())])

    def to_html(self, columns: Sequence[str] | None = None, *, whole: bool = True) -> str:
        """A page by itself, which needs no network: totals, the rows to be sorted, the graph, and all notes.

        Args:
            columns: As in :meth:`to_text`; by default nearly all.
            whole: False gives the table of the rows alone, for a page of your own.
        """
        if not whole:
            return rows_table(self.rows, self.totals, columns)
        return page(self.model, self.rows, self.totals, self.drawing, self._summary, columns)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws operations of a training step, layer by layer: exact, and as executed.

        Args:
            path: A file whose suffix says the format (``.png``, ``.svg``, ``.pdf``); None draws and writes nothing.

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            ValueError: No shapes are known, so there is nothing to draw.
            ImportError: matplotlib is not installed; says how to get it.
        """
        return draw_bars(self.model, self.rows, path)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; operations and bytes as exact integers."""
        rows = [{**dataclasses.asdict(row), "saved": row.saved} for row in self.rows]
        for row in rows:
            row["samples"] = list(row["samples"])
            row["demand"] = [{**part, "readers": list(part["readers"])} for part in row["demand"]]
        totals = {
            **dataclasses.asdict(self.totals),
            "saved": self.totals.saved,
            "saved_net": self.totals.saved_net,
        }
        times = {
            name: None if value is None else dataclasses.asdict(value)
            for name, value in (("selection_time", self.selection_time), ("time", self.time))
        }
        parts = {"notes": list(self.notes), "stops": list(self.stops), **times}
        tokens = {"tokens": [dataclasses.asdict(row) for row in self.tokens], "token_notes": list(self.token_notes)}
        return {"model": self.model, "rows": rows, "totals": totals, **parts, **tokens}

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def to_csv(self) -> str:
        """One line per row, roles as columns such as ``exact_output``; exact integers."""
        out = io.StringIO()
        flat = [flat_row(row) for row in self.rows]
        writer = csv.DictWriter(out, fieldnames=list(flat[0]) if flat else ["name"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        return out.getvalue()

    @property
    def _summary(self) -> Summary:
        return Summary(
            self.model,
            self.rows,
            self.totals,
            self.notes,
            self.stops,
            self.selection_time,
            self.tokens,
            self.token_notes,
            self.time,
        )


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a transform would do.

    Attributes:
        plan: The decisions; edit it and give it to ``transform``.
        report: What they would save.
    """

    plan: Plan
    report: SavingsReport

    def __str__(self) -> str:
        """The report's table."""
        return str(self.report)
