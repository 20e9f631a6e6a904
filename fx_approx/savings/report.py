"""The savings report: per layer what is saved, what choosing costs, and why the others were left exact."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from fx_approx.capture.records import Opaque
from fx_approx.core.candidates import Candidate, Role, RoleFlops
from fx_approx.core.flops import Kept, executed_flops, kept_bytes, role_pairs, selection_flops, slicing_bytes
from fx_approx.core.plan import Decision, Plan
from fx_approx.core.plan_effects import PlanEffects
from fx_approx.sampling.base import get_sampler
from fx_approx.sampling.scores import RECENT
from fx_approx.sampling.spec import SamplerConfig
from fx_approx.savings.memory_model import Counts, Memory, Product, memory
from fx_approx.savings.rows import (
    Row,
    Sample,
    SelectionTime,
    SelectorState,
    Totals,
    flat_row,
    row_cells,
    shape_text,
    total_cells,
)
from fx_approx.savings.token_rows import TokenRow, token_lines, token_rows
from fx_approx.utils.tables import DEMAND, NARROWER, checked, human, table

__all__ = ["Explanation", "Row", "Sample", "SavingsReport", "SelectionTime", "Totals", "build_report", "merged_reports"]

_SHOWN_STOPS = 10


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
        stops: Where demand or sharing stopped, and why: ``name of the graph's node: reason``, for each value that is
            computed whole although some reader wants a part of it only.
        selection_time: What choosing costs, where :func:`fx_approx.analysis.selection_time` was called before.
        tokens: How many tokens each block of a transformer computes, and why, where the plan samples tokens.
        token_notes: Why there are no more such blocks, and which of them compute all.
    """

    model: str
    rows: tuple[Row, ...]
    totals: Totals
    notes: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    selection_time: SelectionTime | None = None
    tokens: tuple[TokenRow, ...] = ()
    token_notes: tuple[str, ...] = ()

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
        shown = self._columns(columns)
        text, summary = self._table(shown, "simple"), self._summary()
        for instead in NARROWER if width is not None else ():
            if width is None or max(map(len, text.splitlines())) <= width:
                break
            shown = [new for name in shown for new in instead.get(name, (name,))]
            text = self._table(shown, "simple")
        if width is not None:
            summary = "\n".join(textwrap.fill(line, max(width, 40)) for line in summary.splitlines())
        return f"{text}\n\n{summary}"

    def to_markdown(self, columns: Sequence[str] | None = None) -> str:
        """The same as a Markdown table; ``columns`` as in :meth:`to_text`."""
        return (
            self._table(self._columns(columns), "github")
            + "\n\n"
            + "\n".join(f"- {line}" for line in self._summary().splitlines())
        )

    def to_html(self, columns: Sequence[str] | None = None) -> str:
        """The same as an HTML table; ``columns`` as in :meth:`to_text`."""
        return self._table(self._columns(columns), "html")

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
        time = None if self.selection_time is None else dataclasses.asdict(self.selection_time)
        parts = {"notes": list(self.notes), "stops": list(self.stops), "selection_time": time}
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

    def _columns(self, columns: Sequence[str] | None) -> list[str]:
        """By default all but those that would be empty."""
        names = checked(columns)
        shown = columns is not None or any(row.demand for row in self.rows)
        return [name for name in names if shown or name not in DEMAND]

    def _table(self, columns: Sequence[str], form: str) -> str:
        return table([*map(row_cells, self.rows), total_cells(self.totals)], columns, form)

    def _summary(self) -> str:
        totals, sampled = self.totals, sum(1 for row in self.rows if row.samples)
        lines = [
            f"{self.model}: {sampled} of {len(self.rows)} multiplies sampled.",
            f"FLOPs of a training step: {human(totals.exact.total)} dense-equivalent, "
            f"{human(totals.executed.total)} executed ({100 * totals.saved:.1f} % fewer), "
            f"{human(totals.selection)} for the selections ({100 * totals.saved_net:.1f} % fewer in all). "
            "FLOPs are not time: see benchmarks/.",
            f"Bytes that the products keep for backward: {human(totals.kept_exact)} exact, {human(totals.kept)} now.",
        ]
        lines[2:2] = self._demand()
        if self.selection_time is not None:
            lines.append(str(self.selection_time))
        tokens = token_lines(self.tokens, self.token_notes)
        return "\n".join([*lines, *self._bytes(), *self._coverage(), *self._stopped(), *tokens, *self.notes])

    def _demand(self) -> list[str]:
        totals, lines = self.totals, []
        if totals.demanded:
            share = 100 * totals.demanded / totals.exact.total
            lines.append(
                f"Demand: {human(totals.demanded)} of them ({share:.1f} % of the exact step) are not done because no "
                "one reads the results, beyond what sampling each layer saves."
            )
        return lines

    def _stopped(self) -> list[str]:
        """Values that are whole though some reader wants a part, those with the same reason together."""
        reasons: dict[str, list[str]] = {}
        for stop in self.stops:
            name, _, reason = stop.partition(": ")
            reasons.setdefault(reason, []).append(name)
        lines = [
            f"  {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
            for reason, names in reasons.items()
        ]
        if len(lines) > _SHOWN_STOPS:
            lines[_SHOWN_STOPS - 1 :] = [f"  and {len(lines) - _SHOWN_STOPS + 1} other reasons, see the field stops"]
        return ["Demand stops, where a reader wants a part but another does not, at:", *lines] if lines else []

    def _bytes(self) -> list[str]:
        totals, lines = self.totals, []
        if totals.memory is not None:
            lines.append(
                f"Bytes that the whole step keeps for backward, predicted: {human(totals.memory_exact)} exact, "
                f"{human(totals.memory)} now."
            )
            lines.append(
                f"Bytes put out by element-wise operations, normalisations and the like in a forward: "
                f"{human(totals.moved_exact)} exact, {human(totals.moved)} now, and {human(totals.gathered)} copied to "
                "take out selected channels and tokens."
            )
        if totals.slicing:
            lines.append(f"Bytes moved in a step to slice weights: {human(totals.slicing)}.")
        return lines

    def _coverage(self) -> list[str]:
        known = {row.name: row.coverage for row in self.rows if row.coverage is not None}
        if not known:
            return []
        least = min(known, key=lambda name: known[name])
        return [
            f"Chosen in the last {RECENT} steps: {100 * sum(known.values()) / len(known):.0f} % of the units on "
            f"average, least in {least}: {100 * known[least]:.0f} %."
        ]


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
    selectors: Mapping[tuple[str, Role], SelectorState] | None = None,
    training: bool = False,
    tried: bool = False,
    effects: PlanEffects | None = None,
    tokens: Sequence[float] | None = None,
    token_notes: Sequence[str] = (),
) -> SavingsReport:
    """The report of a plan; with ``selectors``, of the ratios and switches as they are now.

    With ``training``, of a model in training mode, whose layers in evaluation mode are exact. ``tried`` says that
    shapes were propagated, as far as that goes. ``effects`` are those of sharing and demand. ``tokens`` are the shares
    of the tokens that stretches of blocks keep now, and ``token_notes`` say where tokens are computed whole.
    """
    effects = PlanEffects() if effects is None else effects
    sites = [_site(candidate, plan, selectors, training) for candidate in candidates]
    off = {site.candidate.name: site.reason for site in sites if site.off}
    specs = {site.candidate.name: site.output for site in sites if site.output is not None}
    counts = Counts(effects, candidates, specs, off, tokens)
    covered = {name: one.coverage for (name, _), one in (selectors or {}).items() if one.coverage is not None}
    rows, products = [], {}
    for site in sites:
        row, product = _row(site, counts, covered.get(site.candidate.name))
        rows.append(row)
        products[site.candidate.name] = product
    known = [row for row in rows if row.exact is not None and row.executed is not None]
    found = memory(effects, counts, products) if effects.values is not None and effects.values.whole else None
    totals = Totals(
        exact=sum((row.exact for row in known if row.exact), RoleFlops()),
        executed=sum((row.executed for row in known if row.executed), RoleFlops()),
        selection=sum(row.selection for row in known),
        kept_exact=sum(row.kept_exact or 0 for row in known),
        kept=sum(row.kept or 0 for row in known),
        demanded=sum(row.demanded for row in known),
        slicing=sum(row.slicing for row in known),
        **_known_bytes(found),
    )
    notes = [f"Tokens: {plan.why_tokens}."] if plan.why_tokens else []
    notes += [f"Not traced, served by {part.served}: {part}." for part in opaque]
    if len(known) < len(rows):
        why = "fake tensors do not get there" if tried else "give example_inputs, or run one eager forward"
        notes.append(f"{len(rows) - len(known)} of {len(rows)} rows without shapes, not in the totals: {why}.")
    known_tokens = token_rows(effects, tokens)
    named = {row.block for row in known_tokens}
    return SavingsReport(
        model,
        tuple(rows),
        totals,
        tuple(notes),
        (*effects.stops, *effects.notes),
        tokens=known_tokens,
        token_notes=tuple(note for note in token_notes if note.partition(": ")[0] not in named),
    )


def _known_bytes(found: Memory | None) -> dict[str, int]:
    bytes_of = {} if found is None else dataclasses.asdict(found)
    bytes_of.pop("copies", None)
    return bytes_of


def merged_reports(reports: Sequence[SavingsReport]) -> SavingsReport:
    """One report of several graphs of a model."""
    if len(reports) == 1:
        return reports[0]
    totals = functools.reduce(Totals.__add__, (report.totals for report in reports))
    return SavingsReport(
        " + ".join(dict.fromkeys(report.model for report in reports)),
        tuple(row for report in reports for row in report.rows),
        totals,
        tuple(note for report in reports for note in report.notes),
        tuple(stop for report in reports for stop in report.stops),
        tokens=tuple(row for report in reports for row in report.tokens),
        token_notes=tuple(note for report in reports for note in report.token_notes),
    )


@dataclasses.dataclass(frozen=True)
class _ReportedProduct:
    """A candidate with its samplers as they are now.

    Attributes:
        roles: Those at work.
        output: That of the output, switched on or not.
        off: The output's is not at work.
        reason: Why it is exact, or why it is sampled.
        last: Pairs drawn last, by role.
    """

    candidate: Candidate
    decision: Decision
    roles: dict[Role, SamplerConfig]
    output: SamplerConfig | None
    reason: str
    last: dict[Role, int | None]

    @property
    def off(self) -> bool:
        return self.output is not None and Role.OUTPUT not in self.roles


def _site(
    candidate: Candidate, plan: Plan, selectors: Mapping[tuple[str, Role], SelectorState] | None, training: bool
) -> _ReportedProduct:
    decision = plan[candidate.name]
    specs, reason = dict(decision.roles), decision.reason
    last: dict[Role, int | None] = {}
    for role in list(specs) if selectors is not None else ():
        selector = selectors.get((candidate.name, role)) if selectors is not None else None
        if selector is not None:
            specs[role], last[role] = selector.spec, selector.last_count
    output = specs.get(Role.OUTPUT)
    for role in list(specs):
        selector = None if selectors is None else selectors.get((candidate.name, role))
        if selector is None:
            continue
        if not selector.enabled:
            del specs[role]
            reason = "switched off" if not specs else reason
        elif not selector.training and training:
            specs, reason = {}, "in eval()"
            break
    if candidate.blocked:
        specs, reason = {}, candidate.blocked
    return _ReportedProduct(candidate, decision, specs, output, reason, last)


def _row(site: _ReportedProduct, counts: Counts, coverage: float | None) -> tuple[Row, Product]:
    candidate, decision, reason = site.candidate, site.decision, site.reason
    specs = dict(site.roles)
    samples = []
    for role in Role:
        spec = specs.get(role)
        if spec is None:
            continue
        pairs, unit = role_pairs(candidate, role, spec), 1
        k = None if pairs is None else spec.count(pairs)
        units = counts.units(candidate) if role is Role.OUTPUT else None
        if units is not None:
            k, pairs, unit = units
        if k is not None and k == pairs:
            del specs[role]
            shared = counts.why_whole(candidate.name) if role is Role.OUTPUT else None
            reason = reason if specs else shared or f"ratio {spec.ratio:g} keeps all {pairs} pairs"
            continue
        drawn = None if get_sampler(spec.name).fixed_size else site.last.get(role)
        samples.append(Sample(role, spec.name, spec.scores, spec.ratio, k, pairs, drawn, unit))
    facts = candidate.facts
    kept = counts.of(candidate, specs, decision.straight_through)
    executed = None if facts is None else executed_flops(facts, kept)
    some, of = kept.tokens
    if some < of:
        told = f"{some} of {of} tokens"
        reason = f"{told}; {reason}" if samples and reason else told
    row = Row(
        name=candidate.name,
        op=candidate.kind,
        shape=shape_text(candidate),
        samples=tuple(samples),
        straight_through=decision.straight_through and Role.OUTPUT in specs,
        pairs=candidate.pairs,
        exact=None if facts is None else facts.flops,
        executed=executed,
        selection=sum(selection_flops(candidate, role, spec) for role, spec in specs.items()),
        kept_exact=None if facts is None else kept_bytes(facts, Kept(), {}),
        kept=None if facts is None else kept_bytes(facts, kept, specs),
        reason=reason,
        demanded=0
        if facts is None or executed is None
        else executed_flops(facts, kept.undemanded).total - executed.total,
        demand=counts.demand(candidate),
        slicing=0 if facts is None else slicing_bytes(facts, kept),
        coverage=coverage,
    )
    return row, Product(candidate, kept, specs)
