"""What the autograd functions of sampled products have in common.

Such a function is applied to ``(x, w, bias, rows, *selections, *own)``: the operands, the part of ``x`` that is kept
for the backward pass, the flat forms of the three selections, and plain arguments of its own. They are flat because
autograd sees only tensors that are arguments themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fx_approx.ops.base import norm
from fx_approx.ops.grad_norm_ema import refresh
from fx_approx.ops.gradient_selection import BackwardDrawn, Choice, ForwardDrawn, ProductSampling, Rule
from fx_approx.sampling.base import Selection, get_sampler


class FlatChoice(NamedTuple):
    """A :data:`Choice` whose tensors stand side by side. All None for the exact product.

    Attributes:
        indices: ``[groups, k]`` of a selection that has been drawn.
        scale: ``[groups, k]`` of that selection, if it has one.
        numbers: ``[groups, n]`` uniforms for a selection that the backward pass draws, if its sampler is random.
        rule: How the backward pass draws it.
        running: ``[positions]`` norms that the backward pass refreshes.
        positions: The pairs are output positions of a convolution.
    """

    indices: Tensor | None = None
    scale: Tensor | None = None
    numbers: Tensor | None = None
    rule: Rule | None = None
    running: Tensor | None = None
    positions: bool = False

    @property
    def drawn(self) -> Selection | None:
        """The selection that has been drawn."""
        return None if self.indices is None else Selection(self.indices, self.scale)


def flat(choice: Choice) -> tuple[Any, ...]:
    """The fields of the :class:`FlatChoice` of a choice."""
    if choice is None:
        return FlatChoice()
    if isinstance(choice, BackwardDrawn):
        return None, None, choice.numbers, choice.rule, None, choice.rule.positions
    selection, positions, running = _forward_drawn(choice)
    return selection.indices, selection.scale, None, None, running, positions


def _forward_drawn(choice: Selection | ForwardDrawn) -> ForwardDrawn:
    return choice if isinstance(choice, ForwardDrawn) else ForwardDrawn(choice)


class Inputs(NamedTuple):
    """The arguments of the autograd function; see the top of this file."""

    x: Tensor
    w: Tensor
    bias: Tensor | None
    rows: Tensor | None
    output: FlatChoice
    grad_input: FlatChoice
    grad_weight: FlatChoice
    own: tuple[Any, ...]


def pack(
    x: Tensor, w: Tensor, bias: Tensor | None, rows: Tensor | None, sampling: ProductSampling, *own: Any
) -> tuple[Any, ...]:
    """The arguments that the autograd function is applied to."""
    selection, grad_input, grad_weight, _ = sampling
    return x, w, bias, rows, *flat(selection), *flat(grad_input), *flat(grad_weight), *own


def unpack(inputs: tuple[Any, ...]) -> Inputs:
    """The inverse of :func:`pack`."""
    n = len(FlatChoice._fields)
    output, grad_input, grad_weight = (FlatChoice(*inputs[first : first + n]) for first in (4, 4 + n, 4 + 2 * n))
    x, w, bias, rows = inputs[:4]
    return Inputs(x, w, bias, rows, output, grad_input, grad_weight, inputs[4 + 3 * n :])


def rows_for_backward(w: Tensor, grad_weight: Choice, part: Callable[[ForwardDrawn], Tensor | None]) -> Tensor | None:
    """What is kept of ``x`` for the gradient of ``w``; None if it is all of ``x``, or if there is no such gradient.

    It is taken outside of the autograd function, so that it can be differentiated twice.

    Args:
        w: The operand whose gradient reads ``x``.
        grad_weight: The selection for that gradient.
        part: Gives the part of ``x`` that a selection reads, or None for all of it.
    """
    if grad_weight is None or isinstance(grad_weight, BackwardDrawn):
        return None
    if not (torch.is_grad_enabled() and w.requires_grad):
        return None
    if torch.compiler.is_compiling():
        # Compiled code has no second derivative, and would pay for the zeros that the first one sends here.
        with torch.no_grad():
            return part(_forward_drawn(grad_weight))
    return part(_forward_drawn(grad_weight))


class Saved(NamedTuple):
    """What the backward pass of a sampled product reads.

    Attributes:
        x: The left operand, or ``rows`` of it. None if ``w`` needs no gradient.
        w: The right operand. None if it was not kept.
        kept: Whether ``x`` is ``rows``.
        grad_input: The selection for the gradient of ``x``.
        grad_weight: The selection for the gradient of ``w``.
    """

    x: Any
    w: Any
    kept: bool
    grad_input: FlatChoice
    grad_weight: FlatChoice


def save(ctx: Any, inputs: Inputs, keep_w: bool = False) -> None:
    """Keeps what the needed gradients read; ``w`` in any case if ``keep_w``."""
    x, w, _, rows, _, grad_input, grad_weight, _ = inputs
    needs_x, needs_w = ctx.needs_input_grad[:2]
    ctx.set_materialize_grads(False)
    ctx.kept = rows is not None
    ctx.in_rule, ctx.w_rule, ctx.positions = grad_input.rule, grad_weight.rule, grad_weight.positions
    # Not among the saved tensors: a second backward pass may find it refreshed.
    ctx.w_running = grad_weight.running
    ctx.save_for_backward(
        w if needs_x or keep_w else None,
        *(grad_input[:3] if needs_x else (None, None, None)),
        (x if rows is None else rows) if needs_w else None,
        *(grad_weight[:3] if needs_w else (None, None, None)),
    )


def restore(ctx: Any) -> Saved:
    """What :func:`save` has kept."""
    w, in_indices, in_scale, in_numbers, x, w_indices, w_scale, w_numbers = ctx.saved_tensors
    grad_input = FlatChoice(in_indices, in_scale, in_numbers, ctx.in_rule)
    grad_weight = FlatChoice(w_indices, w_scale, w_numbers, ctx.w_rule, ctx.w_running, ctx.positions)
    return Saved(x, w, ctx.kept, grad_input, grad_weight)


def draw(choice: FlatChoice, grad: Tensor, scores: Callable[[Tensor | None, Rule], Tensor]) -> Selection | None:
    """The selection for a gradient, drawn now if it has not been; None for the exact one.

    Args:
        choice: As it was saved.
        grad: The gradient of the output.
        scores: Gives the scores ``[groups, pairs]`` from the gradient, None where they do not read it. They have no
            gradient.
    """
    rule = choice.rule
    if rule is None:
        return choice.drawn
    with torch.no_grad():
        found = scores(grad if rule.reads_gradient else None, rule).detach()
        fixed_shape = torch.compiler.is_compiling()
        sampler = get_sampler(rule.sampler)
        return sampler.draw(found, rule.k, choice.numbers, epsilon=rule.epsilon, fixed_shape=fixed_shape)


def refresh_running(choice: FlatChoice, grad: Tensor, axis: int) -> None:
    """Refreshes the running norms of the gradient's rows, if any are kept; a row lies along ``axis``."""
    if choice.running is not None:
        refresh(choice.running, norm(grad.detach(), (axis,)).flatten())


def gradients(ctx: Any, *made: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients ``made`` of the first arguments, and None for each of the others."""
    return *made, *(None,) * (len(ctx.needs_input_grad) - len(made))


def amp(*tensors: Any) -> list[Any]:
    """The operands as autocast would hand them to a product; themselves where it is off. None stays None."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]
