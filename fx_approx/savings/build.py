"""Builds the savings report of a plan, with the ratios and switches of the moment, and one of several graphs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from fx_approx.capture.records import Opaque
from fx_approx.core.candidates import Candidate, Role, RoleFlops
from fx_approx.core.flops import Kept, executed_flops, kept_bytes, role_pairs, selection_flops, slicing_bytes
from fx_approx.core.plan import Decision, Plan
from fx_approx.core.plan_effects import PlanEffects
from fx_approx.sampling.base import get_sampler
from fx_approx.sampling.spec import SamplerConfig
from fx_approx.savings.drawing import draw_nodes, joined
from fx_approx.savings.memory_model import Counts, Memory, Product, memory
from fx_approx.savings.report import SavingsReport
from fx_approx.savings.rows import Row, Sample, SelectorState, Totals, shape_text
from fx_approx.savings.token_rows import token_rows


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
        why = (
            "fake tensors do not get there"
            if tried
            else "give example_inputs (a shell: --input), or run one eager forward"
        )
        notes.append(f"{len(rows) - len(known)} of {len(rows)} rows without shapes, not in the totals: {why}.")
    known_tokens = token_rows(effects, tokens)
    named = {row.block for row in known_tokens}
    return SavingsReport(
        model,
        tuple(rows),
        totals,
        tuple(notes),
        (*map(str, effects.stops), *effects.notes),
        drawing=draw_nodes(effects, counts, {row.name: row for row in rows}),
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
        drawing=joined([report.drawing for report in reports]),
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
