"""The savings report: per layer what is saved, what choosing costs, and why the others were left exact."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fx_approx.candidate import Candidate, Role, RoleFlops
from fx_approx.flops import Kept, executed_flops, kept_bytes, kept_pairs, role_pairs, selection_flops
from fx_approx.modules import Selector
from fx_approx.plan import Plan
from fx_approx.sampling import get_sampler
from fx_approx.tables import COLUMNS, NARROWER, change, checked, human, table
from fx_approx.tracer import Opaque


@dataclasses.dataclass(frozen=True)
class Sample:
    """How one product of a candidate is sampled.

    Attributes:
        role: Which of the three.
        sampler: Name of the sampler.
        scores: What it draws from.
        ratio: Sample ratio asked for.
        k: Pairs kept per group (for a random count: expected); None where shapes are not known.
        pairs: Pairs per group: in-features, out-features or rows; for a convolution channels or examples.
        last_k: Pairs drawn by the last eager forward, for a random count; None if they are drawn in the backward pass.
    """

    role: Role
    sampler: str
    scores: str
    ratio: float
    k: int | None
    pairs: int | None
    last_k: int | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One candidate. Operations and bytes are of one training step; None where shapes are not known yet.

    Attributes:
        name: Unique name of the candidate.
        op: Its kind.
        shape: ``batch x groups x (m, n, k)`` as text.
        samples: How its products are sampled; empty when all are exact.
        straight_through: The gradients do not follow the sampled output.
        pairs: Column-row pairs per group of the output.
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
    samples: tuple[Sample, ...]
    straight_through: bool
    pairs: int | None
    exact: RoleFlops | None
    executed: RoleFlops | None
    selection: int
    kept_exact: int | None
    kept: int | None
    reason: str

    def sample(self, role: Role | str = Role.OUTPUT) -> Sample | None:
        """How the product ``role`` is sampled, None when it is exact; ValueError for another name."""
        role = Role(role)
        return next((sample for sample in self.samples if sample.role is role), None)

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
        shown = checked(columns)
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
            self._table(checked(columns), "github")
            + "\n\n"
            + "\n".join(f"- {line}" for line in self._summary().splitlines())
        )

    def to_html(self, columns: Sequence[str] | None = None) -> str:
        """The same as an HTML table; ``columns`` as in :meth:`to_text`."""
        return self._table(checked(columns), "html")

    def to_dict(self) -> dict[str, Any]:
        """Plain values; operations and bytes as exact integers."""
        rows = [{**dataclasses.asdict(row), "saved": row.saved} for row in self.rows]
        for row in rows:
            row["samples"] = list(row["samples"])
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
        return table([*map(_row_cells, self.rows), _total_cells(self.totals)], columns, form)

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
        return "\n".join([*lines, *self.notes])


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
    selectors: Mapping[tuple[str, Role], Selector] | None = None,
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


def _row(
    candidate: Candidate, plan: Plan, selectors: Mapping[tuple[str, Role], Selector] | None, training: bool
) -> Row:
    decision = plan[candidate.name]
    specs, reason = dict(decision.roles), decision.reason
    last: dict[Role, int | None] = {}
    for role in list(specs) if selectors is not None else ():
        selector = selectors.get((candidate.name, role)) if selectors is not None else None
        if selector is None:
            continue
        specs[role], last[role] = selector.spec, selector.last_count
        if not selector.enabled:
            del specs[role]
            reason = "switched off" if not specs else reason
        elif not selector.owner[0].training and training:
            specs, reason = {}, "in eval()"
            break
    if candidate.blocked:
        specs, reason = {}, candidate.blocked
    samples = []
    for role in Role:
        spec = specs.get(role)
        if spec is None:
            continue
        pairs = role_pairs(candidate, role, spec)
        k = None if pairs is None else spec.count(pairs)
        if k is not None and k == pairs:
            del specs[role]
            reason = reason if specs else f"ratio {spec.ratio:g} keeps all {pairs} pairs"
            continue
        drawn = None if get_sampler(spec.name).fixed_size else last.get(role)
        samples.append(Sample(role, spec.name, spec.scores, spec.ratio, k, pairs, drawn))
    facts = candidate.facts
    kept = kept_pairs(candidate, specs, decision.straight_through)
    return Row(
        name=candidate.name,
        op=candidate.kind,
        shape=_shape(candidate),
        samples=tuple(samples),
        straight_through=decision.straight_through and Role.OUTPUT in specs,
        pairs=candidate.pairs,
        exact=None if facts is None else facts.flops,
        executed=None if facts is None else executed_flops(facts, kept),
        selection=sum(selection_flops(candidate, role, spec) for role, spec in specs.items()),
        kept_exact=None if facts is None else kept_bytes(facts, Kept(), {}),
        kept=None if facts is None else kept_bytes(facts, kept, specs),
        reason=reason,
    )


def _row_cells(row: Row) -> dict[str, list[str]]:
    through = " straight-through" if row.straight_through else ""
    exact, executed = (None if flops is None else flops.total for flops in (row.exact, row.executed))
    return {
        "layer": [row.name],
        "op": [row.op],
        "shape": [row.shape],
        "sampler": [
            _each(row, lambda sample: f"{sample.sampler}/{sample.scores}") + through if row.samples else "exact"
        ],
        "ratio": [_each(row, lambda sample: f"{sample.ratio:g}")],
        "k": [_each(row, _count) if row.samples else "" if row.pairs is None else f"{row.pairs}"],
        "flops": [change(exact, executed)],
        "exact": _roles(row.exact),
        "executed": _roles(row.executed),
        "saved": ["?" if row.saved is None else f"{100 * row.saved:.1f}"],
        "selection": [human(row.selection) if row.samples else ""],
        "kept": [change(row.kept_exact, row.kept)],
        "reason": [row.reason],
    }


def _total_cells(totals: Totals) -> dict[str, list[str]]:
    return {
        **{name: [""] for name in COLUMNS},
        "layer": ["total"],
        "flops": [change(totals.exact.total, totals.executed.total)],
        "exact": _roles(totals.exact),
        "executed": _roles(totals.executed),
        "saved": [f"{100 * totals.saved:.1f}"],
        "selection": [human(totals.selection)],
        "kept": [change(totals.kept_exact, totals.kept)],
    }


def _shape(candidate: Candidate) -> str:
    shape = candidate.facts.shape if candidate.facts is not None else None
    if shape is None:
        return ""
    times = "".join(f"{count} x " for count in (shape.batch, shape.groups) if count > 1)
    return f"{times}({shape.m}, {shape.n}, {shape.k})"


_SHORT = {Role.OUTPUT: "out", Role.GRAD_INPUT: "dX", Role.GRAD_WEIGHT: "dW"}


def _each(row: Row, text: Callable[[Sample], str]) -> str:
    """``text`` of each sample; said of which, unless it is of the output alone."""
    if [sample.role for sample in row.samples] == [Role.OUTPUT]:
        return text(row.samples[0])
    return ", ".join(f"{_SHORT[sample.role]} {text(sample)}" for sample in row.samples)


def _count(sample: Sample) -> str:
    if sample.k is None:
        return "?"
    expected = f"~{sample.k}" if sample.last_k is not None else f"{sample.k}"
    last = "" if sample.last_k is None else f" (last {sample.last_k})"
    return f"{expected} of {sample.pairs}{last}"


def _roles(flops: RoleFlops | None) -> list[str]:
    if flops is None:
        return ["?"] * 3
    return [human(value) for value in (flops.output, flops.grad_input, flops.grad_weight)]


def _flat(row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if field.name in ("exact", "executed"):
            for part in dataclasses.fields(RoleFlops):
                flat[f"{field.name}_{part.name}"] = None if value is None else getattr(value, part.name)
        elif field.name == "samples":
            for role in Role:
                sample = row.sample(role)
                for name in ("sampler", "scores", "ratio", "k", "pairs", "last_k"):
                    flat[f"{role.value}_{name}"] = None if sample is None else getattr(sample, name)
        else:
            flat[field.name] = value
    flat["saved"] = row.saved
    return flat
