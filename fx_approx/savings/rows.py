"""The rows of a savings report: what is known of each product, its cells in a table, and the sums."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from fx_approx.core.candidates import Candidate, Role, RoleFlops
from fx_approx.sampling.spec import SamplerConfig
from fx_approx.utils.tables import COLUMNS, change, human


@dataclasses.dataclass(frozen=True)
class SelectorState:
    """How one product of a transformed model is sampled at the moment.

    Attributes:
        spec: Sampler, ratio and scores.
        enabled: It is switched on.
        training: Its layer is in training mode.
        last_count: Pairs drawn by the last eager call, if that is known.
        coverage: Share of the units chosen in the last :data:`fx_approx.sampling.scores.RECENT` steps; None where that
            is not recorded.
    """

    spec: SamplerConfig
    enabled: bool
    training: bool
    last_count: int | None
    coverage: float | None


@dataclasses.dataclass(frozen=True)
class Sample:
    """How one product of a candidate is sampled.

    Attributes:
        role: Which of the three.
        sampler: Name of the sampler.
        scores: What it draws from.
        ratio: Sample ratio asked for.
        k: Units kept per group (for a random count: expected); None where shapes are not known.
        pairs: Units per group: in-features, out-features or rows; for a convolution channels or examples.
        last_k: Pairs drawn by the last eager forward, for a random count; None if they are drawn in the backward pass.
        unit: Pairs that make up one unit: 1, but where a shared selection is of attention heads or of stretches.
    """

    role: Role
    sampler: str
    scores: str
    ratio: float
    k: int | None
    pairs: int | None
    last_k: int | None = None
    unit: int = 1


@dataclasses.dataclass(frozen=True)
class Demanded:
    """Of which of its outputs a product computes a part only.

    Attributes:
        readers: The layers whose shared selection it is; no others read these outputs.
        kept: Units computed, of all groups together.
        units: Units there are.
        unit: Outputs that make up one unit.
    """

    readers: tuple[str, ...]
    kept: int
    units: int
    unit: int = 1

    def __str__(self) -> str:
        """Such as ``conv2 32 of 64``."""
        more = f" +{len(self.readers) - 1}" if len(self.readers) > 1 else ""
        return f"{self.readers[0]}{more} {self.kept} of {self.units}{_of_units(self.unit)}"


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
        demanded: Operations not computed because no one reads their results, beyond what sampling the layer saves.
        demand: Who reads which part of its outputs; empty if all are computed.
        slicing: Bytes that a step moves to slice the weight: read and written forward, the whole gradient backward.
        coverage: Share of the units it reads that were chosen in the last 100 steps, for scores that record it.
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
    demanded: int = 0
    demand: tuple[Demanded, ...] = ()
    slicing: int = 0
    coverage: float | None = None

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
class SelectionTime:
    """What :func:`fx_approx.analysis.selection_time` measured.

    Attributes:
        seconds: All selections of a forward, median.
        step: The whole training step, median.
        quartiles: Of the share.
        compiled: Both were compiled.
        repeats: How often both were timed.
    """

    seconds: float
    step: float
    quartiles: tuple[float, float]
    compiled: bool
    repeats: int

    @property
    def share(self) -> float:
        """The time for selections as a share of the whole step's."""
        return self.seconds / self.step

    def __str__(self) -> str:
        low, high = (100 * share for share in self.quartiles)
        how = "compiled" if self.compiled else "eager"
        return (
            f"Selections take {100 * self.share:.1f} % of a training step ({1000 * self.seconds:.2f} of "
            f"{1000 * self.step:.1f} ms, {how}; quartiles of the share {low:.1f} and {high:.1f} %), measured."
        )


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over the rows whose shapes are known, and what the graph says of the whole training step.

    Attributes:
        exact: Operations of the exact model, by role.
        executed: Operations that are computed.
        selection: Operations spent on the scores.
        kept_exact: Bytes that the exact products keep for backward.
        kept: Bytes that the products keep for backward.
        demanded: Operations not computed because no one reads their results, beyond what sampling the layers saves.
        slicing: Bytes moved to slice weights.
        moved_exact: Bytes that element-wise operations, normalisations, poolings and copies put out in a forward of
            the exact model; None, as for the others below, if the shapes of the graph are not known.
        moved: The same as it is.
        gathered: Bytes of activations that a forward copies to take out selected channels and tokens, and to put those
            back.
        memory_exact: Bytes that the whole step of the exact model keeps for backward, parameters and buffers left out.
        memory: The same as it is; see :func:`fx_approx.savings.memory_model.memory` for what it does not know.
    """

    exact: RoleFlops
    executed: RoleFlops
    selection: int
    kept_exact: int
    kept: int
    demanded: int = 0
    slicing: int = 0
    moved_exact: int | None = None
    moved: int | None = None
    gathered: int | None = None
    memory_exact: int | None = None
    memory: int | None = None

    def __add__(self, other: Totals) -> Totals:
        """Sums; what is not known of one is not known of both."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self)}
        sums: dict[str, Any] = {name: None if None in pair else pair[0] + pair[1] for name, pair in pairs.items()}
        return Totals(**sums)

    @property
    def saved(self) -> float:
        """Share of all operations that are not computed, the selection's not counted."""
        return 1 - self.executed.total / self.exact.total if self.exact.total else 0.0

    @property
    def saved_net(self) -> float:
        """Share of all operations that are not computed, after paying for the selections."""
        return 1 - (self.executed.total + self.selection) / self.exact.total if self.exact.total else 0.0


def row_cells(row: Row) -> dict[str, list[str]]:
    """The cells of a row, by column."""
    through = " straight-through" if row.straight_through else ""
    exact, executed = (None if flops is None else flops.total for flops in (row.exact, row.executed))
    return {
        "layer": [row.name],
        "op": [_OPS.get(row.op, row.op)],
        "shape": [row.shape],
        "sampler": [
            _each(row, lambda sample: f"{sample.sampler}/{sample.scores}") + through if row.samples else "exact"
        ],
        "ratio": [_each(row, lambda sample: f"{sample.ratio:g}")],
        "k": [_each(row, _count) if row.samples else "" if row.pairs is None else f"all {row.pairs}"],
        "flops": [change(exact, executed)],
        "exact": _roles(row.exact),
        "executed": _roles(row.executed),
        "saved": ["?" if row.saved is None else f"{100 * row.saved:.1f}"],
        "selection": [human(row.selection) if row.samples else ""],
        "demanded": [human(row.demanded) if row.demand else ""],
        "demand": [", ".join(map(str, row.demand))],
        "kept": [change(row.kept_exact, row.kept)],
        "why": [_why(row)],
    }


def sort_values(row: Row) -> dict[str, list[str | float]]:
    """What the cells of a row are sorted by, where that is not their text; what is not known comes last."""

    def number(value: float | None) -> float:
        return -1.0 if value is None else float(value)

    def roles(flops: RoleFlops | None) -> list[str | float]:
        return [number(None if flops is None else getattr(flops, role.value)) for role in Role]

    sample = next(iter(row.samples), None)
    share = 1.0 if sample is None else sample.k / sample.pairs if sample.k is not None and sample.pairs else -1.0
    return {
        "ratio": [1.0 if sample is None else sample.ratio],
        "k": [share],
        "flops": [number(None if row.executed is None else row.executed.total)],
        "exact": roles(row.exact),
        "executed": roles(row.executed),
        "saved": [number(row.saved)],
        "demanded": [number(row.demanded)],
        "selection": [number(row.selection)],
        "kept": [number(row.kept)],
    }


def _why(row: Row) -> str:
    """The reason, and how much of its outputs is computed."""
    some, of = (sum(one.unit * getattr(one, name) for one in row.demand) for name in ("kept", "units"))
    what = "heads" if row.op == "scaled_dot_product_attention" else "outputs"
    return "; ".join(part for part in (row.reason, f"{some} of {of} {what}" if of else "") if part)


def total_cells(totals: Totals) -> dict[str, list[str]]:
    """The cells of the last row, by column."""
    return {
        **{name: [""] for name in COLUMNS},
        "layer": ["total"],
        "flops": [change(totals.exact.total, totals.executed.total)],
        "exact": _roles(totals.exact),
        "executed": _roles(totals.executed),
        "saved": [f"{100 * totals.saved:.1f}"],
        "demanded": [human(totals.demanded)],
        "selection": [human(totals.selection)],
        "kept": [change(totals.kept_exact, totals.kept)],
    }


def shape_text(candidate: Candidate) -> str:
    """``batch x groups x (m, n, k)``, empty if it is not known."""
    shape = candidate.facts.shape if candidate.facts is not None else None
    if shape is None:
        return ""
    times = "".join(f"{count} x " for count in (shape.batch, shape.groups) if count > 1)
    return f"{times}({shape.m}, {shape.n}, {shape.k})"


_OPS = {"scaled_dot_product_attention": "attention", "multi_head_attention_forward": "attention"}
"""Words for ops whose names are long."""

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
    return f"{expected} of {sample.pairs}{_of_units(sample.unit)}{last}"


def _of_units(unit: int) -> str:
    return f" units of {unit}" if unit > 1 else ""


def _roles(flops: RoleFlops | None) -> list[str]:
    if flops is None:
        return ["?"] * 3
    return [human(value) for value in (flops.output, flops.grad_input, flops.grad_weight)]


def flat_row(row: Row) -> dict[str, Any]:
    """A row of a CSV file."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if field.name in ("exact", "executed"):
            for part in dataclasses.fields(RoleFlops):
                flat[f"{field.name}_{part.name}"] = None if value is None else getattr(value, part.name)
        elif field.name == "samples":
            for role in Role:
                sample = row.sample(role)
                for name in ("sampler", "scores", "ratio", "k", "pairs", "last_k", "unit"):
                    flat[f"{role.value}_{name}"] = None if sample is None else getattr(sample, name)
        elif field.name == "demand":
            flat["demand"] = ", ".join(map(str, row.demand))
        else:
            flat[field.name] = value
    flat["saved"] = row.saved
    return flat
