"""Which tokens of a transformer are computed: what a policy asks for, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fx_approx.sampling.spec import SamplerConfig

MODES = ("auto", "drop", "skip")
SCORES = ("uniform", "norm", "gradient", "loss")
SAMPLERS = ("systematic", "topk")
"""Those of ``fx_approx.sampling`` that always choose as many tokens, and none twice."""
PADDING = ("first", "ignore")
LEARNT = ("gradient", "loss")
"""Scores that are kept from one step to the next."""


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
        scores: ``uniform``, all tokens count the same; ``norm``, by the norm of a token's values; ``gradient``, by a
            running norm of the gradient at its position; ``loss``, by a running loss at its position, of which
            :func:`fx_approx.schedules.note_token_losses` is to be told.
        sampler: ``systematic``, a token is kept with a probability in proportion to its score, and to a tenth alike;
            ``topk``, those of the largest scores.
        per_layer: Each block chooses its own tokens, for ``skip``.
        per_example: Each example of a batch keeps tokens of its own, all as many. None: only where a mask of attention
            tells padding.
        padding: ``first``, tokens that no query of their example may attend to are left out before any other, where
            examples keep tokens of their own; ``ignore``, they are tokens like any other.
        min_k: Keep at least so many tokens.
        round_to: Keep a multiple of so many, so that sequences of many lengths have few numbers of tokens.

    Raises:
        TypeError: A field of the wrong type.
        ValueError: A value out of range, an unknown name, or fields that do not go together; the message says what
            would.
    """

    ratio: float = 0.5
    mode: str = "auto"
    first: int = 1
    last: int = 1
    keep: int = 0
    scores: str = "uniform"
    sampler: str = "systematic"
    per_layer: bool = False
    per_example: bool | None = None
    padding: str = "first"
    min_k: int = 1
    round_to: int = 1

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        for name, least in (("first", 0), ("last", 0), ("keep", 0), ("min_k", 1), ("round_to", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an integer, got {value!r}")
            if value < least:
                raise ValueError(f"{name}: expected {least} or more, got {value}")
        for name, known in (("mode", MODES), ("scores", SCORES), ("sampler", SAMPLERS), ("padding", PADDING)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not isinstance(self.per_layer, bool):
            raise TypeError(f"per_layer: expected True or False, got {self.per_layer!r}")
        if self.per_example is not None and not isinstance(self.per_example, bool):
            raise TypeError(f"per_example: expected True, False or None, got {self.per_example!r}")
        if self.per_layer and self.mode == "drop":
            raise ValueError("per_layer: True needs mode='skip': what was dropped before is gone")
        if self.sampler == "topk" and self.scores == "uniform":
            raise ValueError("sampler: 'topk' of uniform scores keeps the first tokens always; expected 'systematic'")

    def counting(self, ratio: float | None = None) -> SamplerConfig:
        """Sampler and count, at a ratio."""
        ratio = self.ratio if ratio is None else ratio
        return SamplerConfig(self.sampler, ratio, self.min_k, "uniform", self.round_to)

    def count(self, tokens: int, ratio: float | None = None) -> int:
        """Tokens kept of so many."""
        return self.counting(ratio).count(tokens)

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
