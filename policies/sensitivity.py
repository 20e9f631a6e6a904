"""What sampling each layer alone was measured to do to the gradient of the whole step."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

_FORMAT = "fx_approx.sensitivity/1"


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Made by :func:`fx_approx.analysis.sensitivity`, for policies that weigh layers against each other.

    Attributes:
        ratio: At which each was sampled.
        errors: Layer -> squared error of the whole gradient when only it, and those that share its selection, are
            sampled, as a share of the squared size of the exact gradient; one number for all that share.
        sgd_noise: Variance of the exact gradient over batches, as a share of the same; None if it was not measured.
    """

    ratio: float
    errors: Mapping[str, float]
    sgd_noise: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio: expected a number in (0, 1), got {self.ratio!r}")
        wrong = {name: error for name, error in self.errors.items() if not error >= 0}
        if wrong:
            raise ValueError(f"errors: expected numbers of at least 0, got {wrong}")
        if self.sgd_noise is not None and not self.sgd_noise >= 0:
            raise ValueError(f"sgd_noise: expected a number of at least 0, or None, got {self.sgd_noise!r}")

    def error_of(self, names: Sequence[str]) -> float:
        """Of layers that share a selection.

        Raises:
            ValueError: Some were not measured.
        """
        missing = [name for name in names if name not in self.errors]
        if missing:
            raise ValueError(
                f"sensitivity: measured for another model or other options: nothing is known of {', '.join(missing)}; "
                f"there are: {', '.join(self.errors)}"
            )
        return max(self.errors[name] for name in names)

    def to_json(self) -> str:
        return json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        """The inverse of :meth:`to_json`; ValueError for another format."""
        data: dict[str, Any] = json.loads(text)
        if data.pop("format", None) != _FORMAT:
            raise ValueError(f"format: expected {_FORMAT!r}")
        return cls(**data)
