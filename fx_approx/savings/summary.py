"""What a savings report says below its table: totals, and what is worth knowing beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from fx_approx.core.step_cost import StepTimeEstimate
from fx_approx.sampling.scores import RECENT
from fx_approx.savings.rows import Row, SelectionTime, Totals
from fx_approx.savings.token_rows import TokenRow, token_lines
from fx_approx.utils.tables import human, wrapped


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a report knows beside its rows; attributes as of :class:`fx_approx.savings.report.SavingsReport`."""

    model: str
    rows: Sequence[Row]
    totals: Totals
    notes: Sequence[str]
    stops: Sequence[str]
    selection_time: SelectionTime | None
    tokens: Sequence[TokenRow]
    token_notes: Sequence[str]
    time: StepTimeEstimate | None

    def short(self, width: int) -> list[str]:
        """Lines for a terminal, of at most ``width`` characters."""
        lines = [self.head(), *self.totals_lines(), *self._measured(), *self._stopped()]
        lines += token_lines(self.tokens, self.token_notes)
        return [wrapped(line, width, _indent(line)) for line in [*lines, *self.notes]]

    def full(self) -> list[str]:
        """All there is to say, a line each."""
        stops = ["Computed whole although a reader wants a part:", *self.stops] if self.stops else []
        return [self.head(), *self.totals_lines(), *self.details(), *self.token_texts(), *stops, *self.notes]

    def head(self) -> str:
        """How many products are sampled, and how many blocks compute some tokens only."""
        said = []
        fewer = sum(1 for row in self.tokens if row.computed < row.tokens)
        if fewer:
            said.append(f"{fewer} of {len(self.tokens)} blocks compute some of the tokens")
        sampled = sum(1 for row in self.rows if row.samples)
        if sampled or not fewer:
            said.append(f"{sampled} of {len(self.rows)} multiplies sampled")
        return f"{self.model}: {', '.join(said)}."

    def totals_lines(self) -> list[str]:
        """Operations, predicted time where it is known, memory."""
        return [self._operations(), *self._time(), *self._memory()]

    def token_texts(self) -> list[str]:
        """How many tokens each block computes, and why."""
        return [line.strip() for line in token_lines(self.tokens, self.token_notes)]

    def details(self) -> list[str]:
        """What the totals are made of, and what was measured or learnt."""
        return [*self._demand(), *self._bytes(), *self._measured()]

    def _operations(self) -> str:
        totals = self.totals
        if self.rows and all(row.exact is None for row in self.rows):
            return "Operations and memory: not known without shapes; see below what is missing."
        choosing = ""
        if totals.selection:
            choosing = f", and {human(totals.selection)} to choose: {_fewer(totals.saved_net)} in all"
        return (
            f"Operations: {human(totals.exact.total)} exact, {human(totals.executed.total)} now "
            f"({_fewer(totals.saved)}){choosing}."
        )

    def _time(self) -> Iterator[str]:
        time = self.time
        if time is None or time.exact.seconds is None or time.now.seconds is None:
            return
        measured = "" if time.measured is None else f"; measured {time.measured}"
        yield (
            f"Time, predicted: {1000 * time.exact.seconds:.3g} ms exact, "
            f"{1000 * time.now.seconds:.3g} ms now ({time.speedup:.2f} times as fast{measured})."
        )

    def _memory(self) -> Iterator[str]:
        totals = self.totals
        if totals.memory_exact is not None and totals.memory is not None:
            yield _bytes_line("Memory kept for backward, predicted", totals.memory_exact, totals.memory)
        elif totals.exact.total:
            yield _bytes_line("Memory that the multiplies keep for backward", totals.kept_exact, totals.kept)

    def _demand(self) -> Iterator[str]:
        totals = self.totals
        if totals.demanded:
            share = 100 * totals.demanded / totals.exact.total
            yield (
                f"{human(totals.demanded)} of the operations ({share:.1f} % of the exact step) are not done because no "
                "one reads the results, beyond what sampling each layer saves."
            )

    def _bytes(self) -> Iterator[str]:
        totals = self.totals
        if totals.memory is not None:
            yield _bytes_line("Of this the operands of the multiplies", totals.kept_exact, totals.kept)
            yield (
                f"Put out by element-wise operations, normalisations and the like in a forward: "
                f"{human(totals.moved_exact)}B exact, {human(totals.moved)}B now, and {human(totals.gathered)}B copied "
                "to take out selected channels and tokens."
            )
        if totals.slicing:
            yield f"Moved in a step to slice weights: {human(totals.slicing)}B."

    def _measured(self) -> Iterator[str]:
        """What is there only where it was asked for: the time to choose, and which channels learnt scores chose."""
        if self.selection_time is not None:
            yield str(self.selection_time)
        known = {row.name: row.coverage for row in self.rows if row.coverage is not None}
        if known:
            least = min(known, key=lambda name: known[name])
            yield (
                f"Chosen in the last {RECENT} steps: {100 * sum(known.values()) / len(known):.0f} % of the units on "
                f"average, least in {least}: {100 * known[least]:.0f} %."
            )

    def _stopped(self) -> Iterator[str]:
        if self.stops:
            value, _, reason = self.stops[0].partition(": ")
            more = f" and {len(self.stops) - 1} others" if len(self.stops) > 1 else ""
            yield f"Computed whole although a reader wants a part: {value} ({reason}){more}; see the field stops."


def _fewer(share: float) -> str:
    return f"{100 * share:.1f} % fewer" if share >= 0 else f"{-100 * share:.1f} % more"


def _bytes_line(what: str, exact: int, now: int) -> str:
    share = 1 - now / exact if exact else 0.0
    return f"{what}: {human(exact)}B exact, {human(now)}B now ({_fewer(share).replace('fewer', 'less')})."


def _indent(line: str) -> str:
    """Of the lines that follow: deeper where the line itself is indented."""
    return " " * (len(line) - len(line.lstrip()) + 2)
