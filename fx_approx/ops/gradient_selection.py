"""How a sampled product is described: one selection for each of its three products, and when each is drawn."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple, TypedDict, TypeVar, get_type_hints

from torch import Tensor

from fx_approx.sampling.base import Selection


class Rule(NamedTuple):
    """How a selection is drawn in the backward pass.

    Attributes:
        sampler: A key of ``SAMPLERS``.
        k: Pairs to keep per group.
        epsilon: Share of uniform probability.
        reads_gradient: Whether the scores read the norms of the gradient.
        reads_operand: Whether the scores read the norms of the other operand.
        positions: The pairs are output positions of a convolution, not examples.
        per_batch: Each product of a batch draws its own selection.
    """

    sampler: str
    k: int
    epsilon: float = 0.0
    reads_gradient: bool = True
    reads_operand: bool = True
    positions: bool = False
    per_batch: bool = False


class BackwardDrawn(NamedTuple):
    """A selection that the backward pass will draw, since its scores read the gradient.

    Attributes:
        rule: The sampler and what its scores read.
        numbers: The uniforms ``[groups, n]`` of the sampler, drawn in the forward pass so that a recomputation has the
            same ones. None for a sampler that is not random.
    """

    rule: Rule
    numbers: Tensor | None


class ForwardDrawn(NamedTuple):
    """A selection for a gradient that was drawn in the forward pass.

    Attributes:
        selection: The chosen pairs.
        positions: The pairs are output positions of a convolution, not examples.
        running: ``[positions]`` running norms of the gradient's rows by position, which the backward pass refreshes.
            None if no score needs them.
    """

    selection: Selection
    positions: bool = False
    running: Tensor | None = None


Choice = Selection | ForwardDrawn | BackwardDrawn | None
"""The selection for a gradient: already drawn, to be drawn in the backward pass, or None for the exact gradient."""


class ProductSampling(NamedTuple):
    """How the three products of an op are computed. Without arguments all three are exact.

    Attributes:
        selection: For the output; None for the exact output.
        grad_input: For the gradient of the left operand.
        grad_weight: For the gradient of the right operand.
        straight_through: The gradients do not follow ``selection``, as if the output were exact.
    """

    selection: Selection | None = None
    grad_input: Choice = None
    grad_weight: Choice = None
    straight_through: bool = False

    @property
    def gradients_apart(self) -> bool:
        """Whether a gradient is more than what autograd makes of the output's own computation."""
        apart = self.grad_input is not None or self.grad_weight is not None
        return apart or (self.straight_through and self.selection is not None)

    @property
    def per_batch(self) -> bool:
        """Whether each product of a batch has its own selection for the output."""
        return self.selection is not None and self.selection.indices.shape[0] > 1


class SamplingKeywords(TypedDict, total=False):
    """The fields of :class:`ProductSampling` as the keyword arguments of an op."""

    selection: Selection | None
    grad_input: Choice
    grad_weight: Choice
    straight_through: bool


_Op = TypeVar("_Op", bound=Callable[..., Tensor])


def sampled_op(function: _Op) -> _Op:
    """Marks a function that takes :class:`SamplingKeywords`: its signature lists them, with their defaults."""
    signature, types = inspect.signature(function), get_type_hints(ProductSampling)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    keywords = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[name])
        for name, default in ProductSampling()._asdict().items()
    ]
    function.__dict__["__signature__"] = signature.replace(parameters=[*own, *keywords])
    return function
