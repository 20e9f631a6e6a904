"""The savings report: per layer what is saved, what choosing costs, and why the others were left exact."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from fx_approx.candidate import Candidate, RoleFlops
from fx_approx.flops import executed_flops, kept_bytes, selection_flops
from fx_approx.modules import Selector
from fx_approx.plan import Plan
from fx_approx.sampling import get_sampler
from fx_approx.tracer import Opaque


@dataclasses.dataclass(frozen=True)
class Row:
    """One candidate. Operations and bytes are of one training step; None where shapes are not known yet.

    Attributes:
        name: Unique name of the candidate.
        op: Its kind.
        shape: ``batch x groups x (m, n, k)`` as text.
        sampler: Name of the sampler, "" when exact.
        scores: What the sampler draws from.
        ratio: Sample ratio asked for.
        k: Pairs kept per group (for a random count: expected).
        last_k: Pairs drawn by the last eager forward, for a random count.
        pairs: Column-row pairs per group.
        exact: Operations of the exact layer, by role: the dense equivalent.
        executed: Operations that are computed, by role.
        selection: Operations spent on the scores.
        kept_exact: Bytes that the exact product keeps for backward.
        kept: Bytes that the product keeps for backward.
        reason: Why it is exact, or why it is sampled.
    """

    name: str
    op: str
    shape: str
    sampler: str
    scores: str
    ratio: float | None
    k: int | None
    last_k: int | None
    pairs: int | None
    exact: RoleFlops | None
    executed: RoleFlops | None
    selection: int
    kept_exact: int | None
    kept: int | None
    reason: str

    @property
    def saved(self) -> float | None:
        """Share of the layer's operations that are not computed, not counting the selection's; 0 if exact."""
        if self.exact is None or self.executed is None:
            return None
        return 1 - self.executed.total / self.exact.total if self.exact.total else 0.0


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over the rows whose shapes are known."""

    exact: RoleFlops
    executed: RoleFlops
    selection: int
    kept_exact: int
    kept: int

    @property
    def saved(self) -> float:
        """Share of all operations that are not computed, the selection's not counted."""
        return 1 - self.executed.total / self.exact.total if self.exact.total else 0.0

    @property
    def saved_net(self) -> float:
        """Share of all operations that are not computed, after paying for the selections."""
        return 1 - (self.executed.total + self.selection) / self.exact.total if self.exact.total else 0.0


@dataclasses.dataclass(frozen=True)
class SavingsReport:
    """Savings of a model, layer by layer; ``str()`` is a table.

    Operations are multiply-adds times two of one training step (output, gradient of the input, gradient of
    the weight), as ``torch.utils.flop_counter.FlopCounterMode`` counts the eager step.

    Attributes:
        model: Class name of the model.
        rows: One per candidate, in the order in which the model runs.
        totals: Their sums.
        notes: Parts that could not be traced, and rows without shapes.
    """

    model: str
    rows: tuple[Row, ...]
    totals: Totals
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The table for a terminal."""
        return self.to_text()

    def __getitem__(self, name: str) -> Row:
        """The row of the candidate ``name``."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no candidate {name!r}; there are: {', '.join(row.name for row in self.rows)}")

    def to_text(self, columns: Sequence[str] | None = None, *, width: int | None = None) -> str:
        """The table for a terminal, with totals and notes.

        Args:
            columns: Names from :data:`COLUMNS`, in the order to show; by default all but ``flops``, which
                says in one column what ``exact`` and ``executed`` say by role in six.
            width: Leave out the less important columns until no line has more characters than this. Names of
                layers, samples, FLOPs and savings stay, however long.

        Raises:
            ValueError: An unknown column; the message lists the known ones.
        """
        shown = _checked(columns)
        table, summary = self._table(shown, "simple"), self._summary()
        for instead in _NARROWER if width is not None else ():
            if width is None or max(map(len, table.splitlines())) <= width:
                break
            shown = [new for name in shown for new in instead.get(name, (name,))]
            table = self._table(shown, "simple")
        if width is not None:
            summary = "\n".join(textwrap.fill(line, max(width, 40)) for line in summary.splitlines())
        return f"{table}\n\n{summary}"

    def to_markdown(self, columns: Sequence[str] | None = None) -> str:
        """The same as a Markdown table; ``columns`` as in :meth:`to_text`."""
        table = self._table(_checked(columns), "github")
        return table + "\n\n" + "\n".join(f"- {line}" for line in self._summary().splitlines())

    def to_html(self, columns: Sequence[str] | None = None) -> str:
        """The same as an HTML table; ``columns`` as in :meth:`to_text`."""
        return self._table(_checked(columns), "html")

    def to_dict(self) -> dict[str, Any]:
        """Plain values; operations and bytes as exact integers."""
        rows = [{**dataclasses.asdict(row), "saved": row.saved} for row in self.rows]
        totals = {
            **dataclasses.asdict(self.totals),
            "saved": self.totals.saved,
            "saved_net": self.totals.saved_net,
        }
        return {"model": self.model, "rows": rows, "totals": totals, "notes": list(self.notes)}

    def to_json(self, indent: int | None = 2) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_csv(self) -> str:
        """One line per row, roles as columns such as ``exact_output``; exact integers."""
        out = io.StringIO()
        flat = [_flat(row) for row in self.rows]
        writer = csv.DictWriter(out, fieldnames=list(flat[0]) if flat else ["name"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        return out.getvalue()

    def _table(self, columns: Sequence[str], form: str) -> str:
        rows = [*map(_row_cells, self.rows), _total_cells(self.totals)]
        cells = [[cell for name in columns for cell in row[name]] for row in rows]
        headers = [header for name in columns for header in COLUMNS[name]]
        return tabulate(cells, headers=headers, tablefmt=form, disable_numparse=True)

    def _summary(self) -> str:
        totals, sampled = self.totals, sum(1 for row in self.rows if row.sampler)
        lines = [
            f"{self.model}: {sampled} of {len(self.rows)} multiplies sampled.",
            f"FLOPs of a training step: {_human(totals.exact.total)} dense-equivalent, "
            f"{_human(totals.executed.total)} executed ({100 * totals.saved:.1f} % fewer), "
            f"{_human(totals.selection)} for the selections ({100 * totals.saved_net:.1f} % fewer in all). "
            "FLOPs are not time: see benchmarks/.",
            f"Bytes that the products keep for backward: {_human(totals.kept_exact)} exact, {_human(totals.kept)} now.",
        ]
        return "\n".join([*lines, *self.notes])


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
    "selection": ("select",),
    "kept": ("bytes kept",),
    "reason": ("reason",),
}
"""Columns of the table by name, with their headers."""

_NARROWER: tuple[Mapping[str, tuple[str, ...]], ...] = (
    {"exact": ("flops",), "executed": ()},
    {"ratio": ()},
    {"selection": ()},
    {"op": ()},
    {"kept": ()},
    {"shape": ()},
    {"reason": ()},
)
"""What stands for which column in a narrower table, step by step."""


def _checked(columns: Sequence[str] | None) -> list[str]:
    if columns is None:
        return [name for name in COLUMNS if name != "flops"]
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown or not columns or isinstance(columns, str):
        raise ValueError(f"columns: expected a list of names from {', '.join(COLUMNS)}, got {columns!r}")
    return list(columns)


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


def build_report(
    model: str,
    candidates: tuple[Candidate, ...],
    plan: Plan,
    opaque: tuple[Opaque, ...],
    selectors: Mapping[str, Selector] | None = None,
    training: bool = False,
    tried: bool = False,
) -> SavingsReport:
    """The report of a plan; with ``selectors``, of the ratios and switches as they are now.

    With ``training``, of a model in training mode, whose layers in evaluation mode are exact. ``tried`` says that
    shapes were propagated, as far as that goes.
    """
    rows = tuple(_row(candidate, plan, selectors, training) for candidate in candidates)
    known = [row for row in rows if row.exact is not None and row.executed is not None]
    totals = Totals(
        exact=sum((row.exact for row in known if row.exact), RoleFlops()),
        executed=sum((row.executed for row in known if row.executed), RoleFlops()),
        selection=sum(row.selection for row in known),
        kept_exact=sum(row.kept_exact or 0 for row in known),
        kept=sum(row.kept or 0 for row in known),
    )
    notes = [f"Not traced, served by module swap: {part}." for part in opaque]
    if len(known) < len(rows):
        why = "fake tensors do not get there" if tried else "give example_inputs, or run one eager forward"
        notes.append(f"{len(rows) - len(known)} of {len(rows)} rows without shapes, not in the totals: {why}.")
    return SavingsReport(model, rows, totals, tuple(notes))


def _row(candidate: Candidate, plan: Plan, selectors: Mapping[str, Selector] | None, training: bool) -> Row:
    decision = plan[candidate.name]
    spec, reason, last = decision.spec, decision.reason, None
    if selectors is not None and candidate.name in selectors:
        selector = selectors[candidate.name]
        spec, last = selector.spec, selector.last_count
        if not selector.enabled:
            spec, reason = None, "switched off"
        elif not selector.owner[0].training and training:
            spec, reason = None, "in eval()"
    if candidate.blocked:
        spec, reason = None, candidate.blocked
    facts, pairs = candidate.facts, candidate.pairs
    k = None if spec is None or pairs is None else spec.count(pairs)
    if spec is not None and k is not None and k == pairs:
        reason = f"ratio {spec.ratio:g} keeps all {pairs} pairs"
        spec, k = None, None
    random_count = spec is not None and not get_sampler(spec.name).fixed_size
    return Row(
        name=candidate.name,
        op=candidate.kind,
        shape=_shape(candidate),
        sampler="" if spec is None else spec.name,
        scores="" if spec is None else spec.scores,
        ratio=None if spec is None else spec.ratio,
        k=k,
        last_k=last if random_count else None,
        pairs=pairs,
        exact=None if facts is None else facts.flops,
        executed=None if facts is None else executed_flops(facts, k),
        selection=0 if spec is None else selection_flops(candidate, spec.scores),
        kept_exact=None if facts is None else kept_bytes(facts, None, False),
        kept=None if facts is None else kept_bytes(facts, k, spec is not None and spec.name != "topk"),
        reason=reason,
    )


def _row_cells(row: Row) -> dict[str, list[str]]:
    exact, executed = (None if flops is None else flops.total for flops in (row.exact, row.executed))
    return {
        "layer": [row.name],
        "op": [row.op],
        "shape": [row.shape],
        "sampler": [f"{row.sampler}/{row.scores}" if row.sampler else "exact"],
        "ratio": ["" if row.ratio is None else f"{row.ratio:g}"],
        "k": [_count(row)],
        "flops": [_change(exact, executed)],
        "exact": _roles(row.exact),
        "executed": _roles(row.executed),
        "saved": ["?" if row.saved is None else f"{100 * row.saved:.1f}"],
        "selection": [_human(row.selection) if row.sampler else ""],
        "kept": [_change(row.kept_exact, row.kept)],
        "reason": [row.reason],
    }


def _total_cells(totals: Totals) -> dict[str, list[str]]:
    return {
        **{name: [""] for name in COLUMNS},
        "layer": ["total"],
        "flops": [_change(totals.exact.total, totals.executed.total)],
        "exact": _roles(totals.exact),
        "executed": _roles(totals.executed),
        "saved": [f"{100 * totals.saved:.1f}"],
        "selection": [_human(totals.selection)],
        "kept": [_change(totals.kept_exact, totals.kept)],
    }


def _change(before: int | None, now: int | None) -> str:
    return "?" if now is None else f"{_human(before)} → {_human(now)}"


def _shape(candidate: Candidate) -> str:
    shape = candidate.facts.shape if candidate.facts is not None else None
    if shape is None:
        return ""
    times = "".join(f"{count} x " for count in (shape.batch, shape.groups) if count > 1)
    return f"{times}({shape.m}, {shape.n}, {shape.k})"


def _count(row: Row) -> str:
    if row.k is None:
        return "" if row.pairs is None else f"{row.pairs}"
    expected = f"~{row.k}" if row.last_k is not None else f"{row.k}"
    last = "" if row.last_k is None else f" (last {row.last_k})"
    return f"{expected} of {row.pairs}{last}"


def _roles(flops: RoleFlops | None) -> list[str]:
    if flops is None:
        return ["?"] * 3
    return [_human(value) for value in (flops.output, flops.grad_input, flops.grad_weight)]


def _human(value: int | None) -> str:
    if value is None:
        return "?"
    number = float(value)
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 1000 or unit == "T":
            break
        number /= 1000
    return f"{number:.3g}{unit}" if unit else f"{int(number)}"


def _flat(row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if field.name in ("exact", "executed"):
            for role in dataclasses.fields(RoleFlops):
                flat[f"{field.name}_{role.name}"] = None if value is None else getattr(value, role.name)
        else:
            flat[field.name] = value
    flat["saved"] = row.saved
    return flat
