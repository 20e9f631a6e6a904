"""How the two gradients of a product are computed: exactly, or from a selection made early or late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fx_approx.ops.gather import gather
from fx_approx.sampling.base import Selection, get_sampler


class Rule(NamedTuple):
    """How a selection is drawn once the gradient is there.

    Attributes:
        sampler: A key of ``SAMPLERS``.
        k: Pairs to keep per group.
        epsilon: Share of uniform probability.
        reads_gradient: The scores count the norms of the gradient ...
        reads_operand: ... and those of the other operand.
        positions: The pairs are output positions, not examples, of a convolution.
        per_batch: Each product of a batch draws its own.
    """

    sampler: str
    k: int
    epsilon: float = 0.0
    reads_gradient: bool = True
    reads_operand: bool = True
    positions: bool = False
    per_batch: bool = False


class BackwardDrawn(NamedTuple):
    """A selection that is still to be drawn, in the backward pass, since its scores read the gradient.

    Attributes:
        rule: How.
        numbers: The uniforms ``[groups, n]``, drawn in the forward pass so that a recomputation has the same; None for
            a sampler that is not random.
    """

    rule: Rule
    numbers: Tensor | None


class ForwardDrawn(NamedTuple):
    """A selection for a gradient that was made in the forward pass.

    Attributes:
        selection: Which pairs.
        positions: They are output positions, not examples, of a convolution.
        running: ``[positions]`` running norms of the gradient's rows by position, which the backward pass refreshes;
            None if no score needs them.
    """

    selection: Selection
    positions: bool = False
    running: Tensor | None = None


Choice = Selection | ForwardDrawn | BackwardDrawn | None
"""The selection of a gradient product: made, to be made, or None for the exact product."""


class ProductSampling(NamedTuple):
    """How a product is computed: the selection of each of its three products, see :func:`fx_approx.ops.linear`."""

    selection: Selection | None = None
    grad_input: Choice = None
    grad_weight: Choice = None
    straight_through: bool = False

    @property
    def gradients_apart(self) -> bool:
        """Whether a gradient is more than what autograd makes of the output's own computation."""
        apart = self.grad_input is not None or self.grad_weight is not None
        return apart or (self.straight_through and self.selection is not None)


_Flat = tuple[Tensor | None, Tensor | None, Tensor | None, Rule | None, Tensor | None]


def flat(choice: Choice) -> _Flat:
    """``(indices, scale, numbers, rule, running)``: what an autograd function can take as arguments."""
    if choice is None:
        return None, None, None, None, None
    if isinstance(choice, BackwardDrawn):
        return None, None, choice.numbers, choice.rule, None
    early = choice if isinstance(choice, ForwardDrawn) else ForwardDrawn(choice)
    return early.selection.indices, early.selection.scale, None, None, early.running


def draw_late(rule: Rule, numbers: Tensor | None, scores: Tensor) -> Selection:
    """The selection of ``rule`` from scores ``[groups, pairs]``; no gradient flows to them."""
    return get_sampler(rule.sampler).draw(
        scores.detach(), rule.k, numbers, epsilon=rule.epsilon, fixed_shape=torch.compiler.is_compiling()
    )


def pick(source: Tensor, dim: int, indices: Tensor) -> Tensor:
    """The entries ``indices`` of ``source`` along ``dim``, differentiable.

    Args:
        source: Any shape if ``indices`` has one group, else ``[groups, ...]``.
        dim: The axis, negative; -1 or -2 if there are several groups.
        indices: ``[groups, k]``, unique in each group.
    """
    if indices.shape[0] == 1:
        return gather(source, dim, indices[0])
    if dim == -1:
        return pick(source.mT, -2, indices).mT
    return gather(source, -2, indices)


def spread(scale: Tensor, dim: int) -> Tensor:
    """A scale ``[groups, k]`` in the shape that multiplies along axis ``dim`` (-1 or -2) of a matrix or a batch."""
    column = scale.unsqueeze(-1) if dim == -2 else scale.unsqueeze(-2)
    return column[0] if scale.shape[0] == 1 else column


def amp(*tensors: Any) -> list[Any]:
    """The operands as autocast would hand them to a product; themselves where it is off. None stays None."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]


def for_backward(part: Callable[[], Tensor]) -> Tensor:
    """What is kept of an operand, made outside of the autograd function so that it can be differentiated twice.

    Compiled code has no second derivative, and would pay for the zeros that the first one sends here.
    """
    if torch.compiler.is_compiling():
        with torch.no_grad():
            return part()
    return part()
