"""The kinds of scores a sampler can draw from: which operands' norms each one reads.

The norms themselves are computed where the operands are; this file only names the choices.

A candidate has three operands, of which each of its three products in training reads two:

=============  ===================  =======================
product        operands             pairs
=============  ===================  =======================
OUTPUT         input, weight        in-features or channels
GRAD_INPUT     gradient, weight     out-features or channels
GRAD_WEIGHT    gradient, input      rows or examples
=============  ===================  =======================

``gradient`` is that of the output. It exists in the backward pass only, so a selection from it is made there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["SCORES", "ScoreKind", "get_score"]


RECENT = 100
"""Steps within which a channel counts as covered by scores that follow the activations."""


@dataclass(frozen=True)
class ScoreKind:
    """One way to score the column-row pairs of a product.

    Attributes:
        name: what a ``SamplerConfig`` calls it.
        reads: the operands whose norms it multiplies, of ``input``, ``weight``, ``gradient``; those that a product
            does not have do not count.
        description: the formula, for reports.
        products: the products (roles, by name) that can be scored so.
        learns: whether it keeps running norms of the input (for the output) or the gradient from earlier steps.
    """

    name: str
    reads: frozenset[str]
    description: str
    products: frozenset[str]
    learns: bool = False

    @property
    def ahead(self) -> bool:
        """Whether a selection for OUTPUT can be made before the activation exists."""
        return self.learns or not {"input", "gradient"} & self.reads

    @property
    def early(self) -> bool:
        """Whether a selection for a gradient can be made in the forward pass."""
        return "gradient" not in self.reads


_ALL = frozenset({"output", "grad_input", "grad_weight"})

SCORES: Mapping[str, ScoreKind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            ScoreKind(
                "online",
                frozenset({"input", "weight", "gradient"}),
                "norm of column j of A times norm of row j of B",
                _ALL,
            ),
            ScoreKind("weight", frozenset({"weight"}), "norm of row j of the weight", _ALL - {"grad_weight"}),
            ScoreKind("input", frozenset({"input"}), "norm of column or row j of the input", _ALL - {"grad_input"}),
            ScoreKind(
                "gradient", frozenset({"gradient"}), "norm of column or row j of the gradient", _ALL - {"output"}
            ),
            ScoreKind(
                "ema",
                frozenset({"input"}),
                "output: norm of row j of the weight times the running norm of column j of the input; weight gradient: "
                "norm of row j of the input times the running norm of the gradient at its position",
                frozenset({"output", "grad_weight"}),
                learns=True,
            ),
            ScoreKind("uniform", frozenset(), "one for every pair", _ALL),
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
