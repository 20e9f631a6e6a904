"""Numbers of a training for TensorBoard, or whatever takes scalars."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from fx_approx.analysis.noise_report import NoiseReport
from fx_approx.savings.report import SavingsReport


@dataclasses.dataclass(frozen=True)
class ScalarLogger:
    """Writes ratios, savings and errors as scalars.

    Attributes:
        writer: ``torch.utils.tensorboard.SummaryWriter`` or anything with ``add_scalar(tag, value, step)``.
        prefix: In front of every tag.

    Raises:
        TypeError: ``writer`` has no such method.
    """

    writer: Any
    prefix: str = "fx_approx"

    def __post_init__(self) -> None:
        if not callable(getattr(self.writer, "add_scalar", None)):
            raise TypeError(
                f"writer: expected add_scalar(tag, value, step), as SummaryWriter has it, got {self.writer!r}"
            )
        if not isinstance(self.prefix, str):
            raise TypeError(f"prefix: expected text, got {self.prefix!r}")

    def scalars(self, values: Mapping[str, float | None], step: int) -> None:
        """Writes ``values`` by tag; those that are None or no numbers are left out."""
        for tag, value in values.items():
            if value is not None and not math.isnan(value):
                self.writer.add_scalar(f"{self.prefix}/{tag}", float(value), step)

    def ratios(self, ratios: Mapping[str, float], step: int) -> None:
        """Sample ratios by layer, ``ratio/<layer>``, and their mean."""
        self.scalars({f"ratio/{name}": ratio for name, ratio in ratios.items()}, step)
        if ratios:
            self.scalars({"mean_ratio": sum(ratios.values()) / len(ratios)}, step)

    def savings(self, report: SavingsReport, step: int) -> None:
        """What :func:`fx_approx.report` says: shares saved, of operations and of memory, and the cost of selections."""
        totals, time = report.totals, report.selection_time
        memory = None
        if totals.memory is not None and totals.memory_exact:
            memory = 1 - totals.memory / totals.memory_exact
        layers = {f"saved/{row.name}": row.saved for row in report.rows if row.samples}
        coverage = {f"coverage/{row.name}": row.coverage for row in report.rows}
        whole = {
            "saved_flops": totals.saved_net,
            "saved_memory": memory,
            "selection": None if time is None else time.share,
        }
        self.scalars({**whole, **layers, **coverage}, step)

    def noise(self, report: NoiseReport, step: int) -> None:
        """The relative error of the gradient, and of the output of each product."""
        self.scalars({"error/gradient": report.step.error}, step)
        self.scalars({f"error/{row.label}": row.output.error for row in report.rows}, step)
