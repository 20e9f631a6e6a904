"""What a measurement of sampling's noise found: statistics, records, a table, a figure."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from fx_approx.core.candidates import Role
from fx_approx.sampling.spec import SamplerConfig
from fx_approx.utils.optional_imports import load_matplotlib

_BEYOND_CHANCE = 3.0
_CANCELLED = 100.0
"""So many rounding units of the whole gradient may remain where large terms cancel; an order of magnitude."""
_SHORT = {Role.OUTPUT: "out", Role.GRAD_INPUT: "dX", Role.GRAD_WEIGHT: "dW"}

# Colours of Okabe and Ito, which colour-blind readers can tell apart; the shapes differ as well.
_MARKS = {
    Role.OUTPUT: ("output", "#0072B2", "o"),
    Role.GRAD_INPUT: ("gradient of the input (dX)", "#E69F00", "s"),
    Role.GRAD_WEIGHT: ("gradient of the weight (dW)", "#009E73", "^"),
}


@dataclasses.dataclass(frozen=True)
class Noise:
    """How far the estimates Ĉ of a tensor C are from it, over several draws of all random samples.

    Norms are Euclidean over all entries. All numbers are relative to ‖C‖; where that is 0 they are 0 for estimates that
    are 0 too, else infinite.

    Attributes:
        draws: Estimates that were made. 0 if C is not sampled, 1 if nothing is random: all draws would be the same.
        norm: ‖C‖.
        error: √(mean ‖Ĉ − C‖²) / ‖C‖.
        bias: ‖mean Ĉ − C‖ / ‖C‖.
        floor: What ``bias`` would be on average (root mean square) if the estimate were unbiased: its standard
            deviation divided by √draws, but at least the rounding of the data type. None for a single draw of a random
            sampler.
        cosine: Mean cosine of the angle between Ĉ and C; 1 is the same direction, 0 a right angle.
        cosine_spread: Its standard deviation over the draws.
    """

    draws: int
    norm: float
    error: float
    bias: float
    floor: float | None
    cosine: float
    cosine_spread: float

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio ‖C‖² / mean ‖Ĉ − C‖² = 1 / error²; infinite without an error."""
        return 1 / self.error**2 if self.error else math.inf

    @property
    def snr_db(self) -> float:
        """The same in decibels, 10 log₁₀: 0 where the noise is as large as the signal, 20 at an error of 10 %."""
        return -20 * math.log10(self.error) if self.error else math.inf

    @property
    def biased(self) -> bool | None:
        """Whether the bias is larger than chance explains: more than 3 times its floor. None where that is not known.

        At 16 draws an unbiased estimate is called biased in less than 1 % of cases if its errors are about normal. A
        small bias stays unseen below the floor: more draws lower that.
        """
        return None if self.floor is None else self.bias > _BEYOND_CHANCE * self.floor

    def to_dict(self) -> dict[str, Any]:
        """All numbers, None in place of those that are not finite."""
        values = {**dataclasses.asdict(self), "snr": self.snr, "snr_db": self.snr_db, "biased": self.biased}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


class Tally:
    """Adds up the errors of estimates of one tensor."""

    def __init__(self, exact: Tensor) -> None:
        self.exact = _wide(exact)
        self.rounding = torch.finfo(exact.dtype).eps
        self.norm = _norm(self.exact)
        self.total: Tensor | None = None
        self.norms: list[tuple[Tensor, Tensor]] = []

    def add(self, estimate: Tensor | None) -> None:
        """Counts one estimate; None stands for zeros."""
        wide = torch.zeros_like(self.exact) if estimate is None else _wide(estimate)
        error = wide - self.exact
        self.norms.append((_norm(error), _norm(wide)))
        self.total = error if self.total is None else self.total.add_(error)

    def squares(self) -> tuple[float, float, list[tuple[float, float]]]:
        """The squared norms of the exact tensor and of the mean error, and of each draw's error and estimate."""
        mean = 0.0 if self.total is None else float(_norm(self.total)) / len(self.norms)
        return float(self.norm) ** 2, mean**2, [(float(error) ** 2, float(size) ** 2) for error, size in self.norms]


def _wide(tensor: Tensor) -> Tensor:
    dense = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
    return dense.to(torch.promote_types(dense.dtype, torch.float32))


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return norm


def noise_of(tallies: Sequence[Tally], random: bool, scale: float = 0.0) -> Noise:
    """The noise of several tensors seen as one.

    ``scale`` is the norm of the whole gradient: what is far below it may be what rounding left of terms that cancel,
    such as the gradient of a bias in front of a BatchNorm.
    """
    parts = [tally.squares() for tally in tallies]
    exact, bias = sum(part[0] for part in parts), sum(part[1] for part in parts)
    draws = [[sum(column) for column in zip(*one, strict=True)] for one in zip(*(p[2] for p in parts), strict=True)]
    count = len(draws)
    error = sum(one[0] for one in draws) / count if count else 0.0
    rounding = max(tally.rounding for tally in tallies)
    rounding = max(rounding, _CANCELLED * torch.finfo(tallies[0].exact.dtype).eps * _ratio(scale**2, exact))
    floor: float | None = rounding
    if random and count:
        # The variance around the mean, not around the exact value: a bias must not raise its own floor.
        variance = max(error - bias, 0.0) * count / (count - 1) if count > 1 else 0.0
        floor = None if count == 1 else max(_ratio(variance / count, exact), rounding)
    cosines = [_angle(exact, *one) for one in draws] or [1.0]
    mean = sum(cosines) / len(cosines)
    spread = math.sqrt(sum((c - mean) ** 2 for c in cosines) / max(len(cosines) - 1, 1))
    return Noise(count, math.sqrt(exact), _ratio(error, exact), _ratio(bias, exact), floor, mean, spread)


def _ratio(square: float, exact: float) -> float:
    return 0.0 if square == 0 else math.sqrt(square / exact) if exact else math.inf


def _angle(exact: float, error: float, estimate: float) -> float:
    """From squared norms: ‖Ĉ − C‖² = ‖Ĉ‖² + ‖C‖² − 2 Ĉ·C."""
    if not error:
        return 1.0
    if not exact or not estimate:
        return 0.0
    return (estimate + exact - error) / (2 * math.sqrt(exact) * math.sqrt(estimate))


@dataclasses.dataclass(frozen=True)
class ProductNoise:
    """The noise of one call of a candidate, by itself: operands and incoming gradient are those of the exact step.

    Attributes:
        name: Name of the candidate, as in ``report``.
        call: 1 for the first call. Further calls are candidates of their own where the graph shows them.
        op: Its kind.
        sampled: Sampler, scores and ratio of each sampled product, as text; ``"exact"`` if there is none at present.
        output: Noise of its output (without the bias, which is always exact).
        grad_input: Of the gradient of its input; None where autograd does not run it.
        grad_weight: Of the gradient of its weight or right operand; None likewise.
    """

    name: str
    call: int
    op: str
    sampled: str
    output: Noise
    grad_input: Noise | None
    grad_weight: Noise | None

    @property
    def label(self) -> str:
        """The name, with the number of the call from the second on."""
        return self.name if self.call == 1 else f"{self.name} (call {self.call})"

    def of(self, role: Role | str) -> Noise | None:
        """The noise of the product ``role``; ValueError for another name."""
        return {Role.OUTPUT: self.output, Role.GRAD_INPUT: self.grad_input, Role.GRAD_WEIGHT: self.grad_weight}[
            Role(role)
        ]

    def to_dict(self) -> dict[str, Any]:
        noise = {role.value: None if (one := self.of(role)) is None else one.to_dict() for role in Role}
        return {"name": self.name, "call": self.call, "op": self.op, "sampled": self.sampled, **noise}


@dataclasses.dataclass(frozen=True)
class NoiseReport:
    """The noise of sampling in one training step, layer by layer and of the whole; ``str()`` is a table.

    Attributes:
        model: Class name of the model.
        draws: Draws that were asked for.
        step: Noise of the whole gradient, all parameters together, all layers sampled.
        parameters: The same for each parameter that the loss depends on, by its name.
        rows: One for each call of a candidate that the plan samples, in the order in which the model runs.
        notes: What a reader should know.
    """

    model: str
    draws: int
    step: Noise
    parameters: Mapping[str, Noise]
    rows: tuple[ProductNoise, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The tables for a terminal."""
        return self.to_text()

    def __getitem__(self, label: str) -> ProductNoise:
        """The row of a candidate by its name, of a later call as ``"name (call 2)"``."""
        for row in self.rows:
            if row.label == label:
                return row
        raise KeyError(f"no sampled product {label!r}; there are: {', '.join(row.label for row in self.rows)}")

    def to_text(self, *, parameters: bool = True) -> str:
        """The tables for a terminal; without the one of the parameters if ``parameters`` is False."""
        layers = tabulate(
            [[row.label, row.sampled, *_cells([row.of(role) for role in Role])] for row in self.rows],
            headers=["layer", "sampled", *_by_role("error"), *_by_role("SNR dB"), *_by_role("bias/floor")],
            disable_numparse=True,
        )
        each = tabulate(
            [
                [name, f"{noise.norm:.3g}", *_cells([noise]), _cosine(noise)]
                for name, noise in (*self.parameters.items(), ("all", self.step))
            ],
            headers=["gradient of", "norm", "error", "SNR dB", "bias/floor", "cosine"],
            disable_numparse=True,
        )
        parts = [layers if self.rows else "", each if parameters else "", "\n".join((self._summary(), *self.notes))]
        return "\n\n".join(part for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; None in place of numbers that are not finite."""
        return {
            "model": self.model,
            "draws": self.draws,
            "step": self.step.to_dict(),
            "parameters": {name: noise.to_dict() for name, noise in self.parameters.items()},
            "rows": [row.to_dict() for row in self.rows],
            "notes": list(self.notes),
        }

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def _summary(self) -> str:
        step = self.step
        text = (
            f"{self.model}, whole step ({step.draws} draw{'s' * (step.draws != 1)}): "
            f"error {step.error:.3g} (SNR {step.snr_db:.3g} dB), bias {step.bias:.3g}"
        )
        if step.floor is not None:
            text += f" (noise floor {step.floor:.2g}{', beyond chance' * bool(step.biased)})"
        text = f"{text}, cosine {_cosine(step)}."
        noises = [row.of(role) for row in self.rows for role in Role] + list(self.parameters.values())
        if any(noise is not None and noise.biased for noise in noises):
            text += f"\n* bias above {_BEYOND_CHANCE:g} times its noise floor: more than chance explains."
        return text

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A figure of the relative error of each layer's products, with the whole step's cosine in the title.

        Open marks are biased beyond chance. Products without a mark are exact, or autograd does not run them.

        Args:
            path: Where to save it; the ending says in which format (``.png``, ``.pdf``, ``.svg``).

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            ImportError: matplotlib is not installed; says how to get it.
        """
        figures, lines = (load_matplotlib(module, "NoiseReport.plot") for module in ("figure", "lines"))
        count = len(self.rows)
        figure = figures.Figure(figsize=(8, 2.1 + (0.34 if count <= 60 else 0.2) * max(count, 1)), layout="constrained")
        axes = figure.subplots()
        shown = [self._draw(axes, role, place) for place, role in enumerate(Role)]
        if any(shown):
            axes.set_xscale("log")
        axes.set_xlabel("relative error  √(mean ‖Ĉ − C‖²) / ‖C‖")
        axes.set_yticks(range(count), [row.label for row in self.rows], fontsize=9 if count <= 60 else 6)
        axes.set_ylim(max(count, 1) - 0.5, -0.5)
        for row in range(count):
            axes.axhspan(row - 0.5, row + 0.5, color="#f3f3f3" if row % 2 else "white", zorder=0)
        axes.grid(axis="x", color="#cccccc", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        title = f"{self.model}: gradient of a whole step, cosine {_cosine(self.step)}, error {self.step.error:.2g}"
        figure.suptitle(title, fontsize=11)
        marks = [
            lines.Line2D([], [], color=colour, marker=marker, linestyle="", label=name)
            for (name, colour, marker), drawn in zip(_MARKS.values(), shown, strict=True)
            if drawn
        ]
        if any((noise := row.of(role)) is not None and noise.biased for row in self.rows for role in Role):
            open_mark = {"markerfacecolor": "white", "markeredgecolor": "#555555"}
            marks.append(
                lines.Line2D([], [], marker="o", linestyle="", label="open: biased beyond chance", **open_mark)
            )
        if marks:
            figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False, fontsize=8)
        if path is not None:
            figure.savefig(path)
        return figure

    def _draw(self, axes: Any, role: Role, place: int) -> bool:
        """Draws the marks of one role; whether there are any."""
        _, colour, marker = _MARKS[role]
        drawn = False
        for number, row in enumerate(self.rows):
            noise = row.of(role)
            if noise is None or not 0 < noise.error < math.inf:
                continue
            axes.plot(
                noise.error,
                number + 0.22 * (place - 1),
                marker=marker,
                color=colour,
                markersize=6,
                markerfacecolor="white" if noise.biased else colour,
            )
            drawn = True
        return drawn


def sampled_text(specs: Mapping[Role, SamplerConfig]) -> str:
    """Sampler, scores and ratio of each sampled product; of which is not said of the output alone."""
    each: dict[str, list[str]] = {}
    for role, spec in specs.items():
        each.setdefault(f"{spec.name}/{spec.scores} {spec.ratio:g}", []).append(_SHORT[role])
    if list(specs) == [Role.OUTPUT]:
        return next(iter(each))
    return ", ".join(f"{' '.join(roles)} {text}" for text, roles in each.items()) or "exact"


def _by_role(quantity: str) -> tuple[str, ...]:
    """Headers of three columns."""
    output, *others = _SHORT.values()
    return f"{quantity} {output}", *others


def _cells(noises: Sequence[Noise | None]) -> list[str]:
    """Error, signal-to-noise ratio, and bias as a multiple of its floor, of all ``noises`` one after the other."""
    error = ["" if n is None else f"{n.error:.3g}" if n.error else "exact" for n in noises]
    ratio = ["" if n is None or not n.error else f"{n.snr_db:.1f}" for n in noises]
    return [*error, *ratio, *map(_bias, noises)]


def _bias(noise: Noise | None) -> str:
    if noise is None or not noise.error:
        return ""
    if noise.floor is None:
        return "?"
    if noise.draws == 1:  # nothing is random, and so the floor is rounding only
        return "bias only*" if noise.biased else "0"
    return f"{noise.bias / noise.floor:.1f}{'*' * bool(noise.biased)}"


def _cosine(noise: Noise) -> str:
    return f"{noise.cosine:.3f} ± {noise.cosine_spread:.3f}" if noise.draws > 1 else f"{noise.cosine:.3f}"
