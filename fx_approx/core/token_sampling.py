"""Which tokens of a transformer are computed: what a policy asks for, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

MODES = ("auto", "drop", "skip")
SCORES = ("uniform", "norm")


@dataclasses.dataclass(frozen=True)
class TokenSampling:
    """How the tokens are chosen that a stretch of blocks computes.

    Attributes:
        ratio: Share of the tokens to keep, in (0, 1]; of those that are not always kept.
        mode: ``drop``, from a block on the others are gone; ``skip``, they pass a stretch of blocks by unchanged;
            ``auto``, drop where nothing behind needs all positions.
        first: Blocks at the beginning that compute all tokens.
        last: Blocks at the end that do, for ``skip``.
        keep: Tokens at the beginning of the sequence that are always kept, beside those that the model puts there
            itself or reads one by one.
        scores: ``uniform``, every subset is as likely; ``norm``, the tokens whose values are largest.
        per_layer: Each block chooses its own tokens, for ``skip``.
        min_k: Keep at least so many tokens.

    Raises:
        TypeError: A field of the wrong type.
        ValueError: A value out of range, or an unknown name; the message lists the known ones.
    """

    ratio: float = 0.5
    mode: str = "auto"
    first: int = 1
    last: int = 1
    keep: int = 0
    scores: str = "uniform"
    per_layer: bool = False
    min_k: int = 1

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        for name, least in (("first", 0), ("last", 0), ("keep", 0), ("min_k", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an integer, got {value!r}")
            if value < least:
                raise ValueError(f"{name}: expected {least} or more, got {value}")
        for name, known in (("mode", MODES), ("scores", SCORES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not isinstance(self.per_layer, bool):
            raise TypeError(f"per_layer: expected True or False, got {self.per_layer!r}")
        if self.per_layer and self.mode == "drop":
            raise ValueError("per_layer: True needs mode='skip': what was dropped before is gone")

    def count(self, tokens: int, ratio: float | None = None) -> int:
        """Tokens kept of so many."""
        ratio = self.ratio if ratio is None else ratio
        return min(tokens, max(self.min_k, round(ratio * tokens)))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TokenSampling:
        """The inverse of :meth:`to_dict`."""
        return cls(**data)


def check_ratio(ratio: Any) -> None:
    """TypeError or ValueError unless ``ratio`` is a number in (0, 1]."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"ratio: expected a number, got {ratio!r}")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio: expected a number in (0, 1], got {ratio}")
