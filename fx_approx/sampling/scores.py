"""The kinds of scores a sampler can draw from: which operand's norms each one reads.

The norms themselves are computed where the operands are; this file only names the choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["SCORES", "ScoreKind", "get_score"]


@dataclass(frozen=True)
class ScoreKind:
    """One way to score the column-row pairs of a product A·B.

    Attributes:
        name: what a ``SamplerSpec`` calls it.
        reads_lhs: whether the scores depend on A, the activation.
        reads_rhs: whether the scores depend on B, the weight.
        description: the formula, for reports.
    """

    name: str
    reads_lhs: bool
    reads_rhs: bool
    description: str

    @property
    def ahead(self) -> bool:
        """Whether the selection can be made before the activation exists."""
        return not self.reads_lhs


SCORES: Mapping[str, ScoreKind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            ScoreKind("online", True, True, "norm of column j of A times norm of row j of B"),
            ScoreKind("weight", False, True, "norm of row j of B"),
            ScoreKind("uniform", False, False, "one for every pair"),
        )
    }
)


def get_score(name: str) -> ScoreKind:
    """Return the score kind called ``name``.

    Raises:
        ValueError: no such kind; the message lists the known ones.
    """
    try:
        return SCORES[name]
    except (KeyError, TypeError):
        raise ValueError(f"unknown scores {name!r}; known: {', '.join(sorted(SCORES))}") from None
