"""Rules of other systems for a training step, written from their formulas; none is part of the package.

Both leave the forward pass exact. They are module swaps: each layer decides by itself.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fx_approx.ops.sampled_function import amp

Rule = Callable[[Any, Tensor], Tensor]
"""``(layer, x) -> output``."""


class Ruled(nn.Module):
    """A layer that computes its output by a rule."""

    def __init__(self, layer: nn.Module, rule: Rule) -> None:
        super().__init__()
        self.layer, self.rule = layer, rule

    def forward(self, x: Tensor) -> Tensor:
        """As that of the layer."""
        return self.rule(self.layer, x)


def swap(model: nn.Module, rule: Rule, kinds: tuple[type[nn.Module], ...], fewest: int) -> nn.Module:
    """A copy of ``model`` in which layers of exactly these kinds follow ``rule``; those with fewer outputs stay."""
    swapped = copy.deepcopy(model)
    for parent in list(swapped.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in kinds and child.get_parameter("weight").shape[0] >= fewest:
                setattr(parent, name, Ruled(child, rule))
    return swapped


# ---- ssProp: dY keeps the channels of largest mean |dY|, for both products of the backward pass


class _ChannelSparse(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, keep: int, call: tuple[Any, ...] | None) -> Tensor:
        return F.linear(x, weight, bias) if call is None else F.conv2d(x, weight, bias, *call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.keep, ctx.call = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        axis = grad.dim() - 1 if ctx.call is None else 1
        others = [each for each in range(grad.dim()) if each != axis]
        chosen = top_channels(grad, axis, ctx.keep)
        part, rows = grad.index_select(axis, chosen), weight.index_select(0, chosen)
        if ctx.call is None:
            grad_x, grad_rows = part @ rows, part.flatten(0, -2).mT @ x.flatten(0, -2)
        else:
            wanted = [ctx.needs_input_grad[0], True, False]
            grad_x, grad_rows, _ = torch.ops.aten.convolution_backward(
                part, x, rows, None, *ctx.call[:3], False, (0, 0), 1, wanted
            )
        grad_weight = torch.zeros_like(weight).index_copy(0, chosen, grad_rows)
        grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = grad.new_zeros(weight.shape[0]).index_copy(0, chosen, part.sum(others))
        return grad_x, grad_weight, grad_bias, None, None


def top_channels(grad: Tensor, axis: int, keep: int) -> Tensor:
    """Indices of the ``keep`` channels of largest mean |grad|."""
    return grad.abs().mean([each for each in range(grad.dim()) if each != axis]).topk(keep).indices


def ssprop(layer: Any, x: Tensor, ratio: float) -> Tensor:
    """A linear layer or a convolution of one group; ``ratio`` is the share of output channels kept.

    Source: Zhong, Huang, Shi, "ssProp: energy-efficient training for convolutional neural networks with scheduled
    sparse back propagation", 2024; without the schedule, which has exact epochs in between.
    """
    call = None
    if isinstance(layer, nn.Conv2d):
        assert layer.groups == 1 and not isinstance(layer.padding, str)
        call = (layer.stride, layer.padding, layer.dilation)
    keep = max(1, round(ratio * layer.weight.shape[0]))
    result: Tensor = _ChannelSparse.apply(*amp(x, layer.weight, layer.bias), keep, call)  # type: ignore[no-untyped-call]
    return result


# ---- WTA-CRS: the weight gradient of linear layers from a sample of the rows, the largest for certain


class _SampledRows(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, weight, _, *sample = inputs
        ctx.save_for_backward(weight, *sample)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, kept, rows, scale = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        part = (flat.index_select(0, rows) * scale.unsqueeze(1)).to(grad.dtype)
        grad_bias = flat.sum(0) if ctx.needs_input_grad[2] else None
        return grad @ weight, part.mT @ kept, grad_bias, None, None, None


def winners(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``k`` rows and their scales: the c most probable unscaled, the others drawn from the rest with replacement.

    With p = scores / sum and R_c = 1 - (sum of the c largest), c minimises R_c / (k - c); a row of the tail has scale
    R_c / ((k - c) p).
    """
    p, order = (scores / scores.sum()).sort(descending=True)
    mass = p.cumsum(0)
    left = torch.cat([mass.new_ones(1), 1 - mass[: k - 1]]).clamp(min=0)  # R_c of c = 0 .. k - 1
    places = torch.arange(k, device=scores.device)
    c = (left / (k - places)).argmin()
    rest = left[c]
    drawn = torch.searchsorted(mass, 1 - rest * torch.rand(k, device=scores.device)).clamp(max=len(p) - 1)
    certain = places < c
    chosen = torch.where(certain, places, torch.maximum(drawn, c))
    scale = torch.where(certain, 1.0, rest / ((k - c) * p[chosen]).clamp(min=1e-30))
    return order[chosen], scale


def wta_crs(layer: Any, x: Tensor, ratio: float) -> Tensor:
    """A linear layer; only the sampled rows of its input are kept for the backward pass.

    Source: Liu et al., NeurIPS 2023. Theirs multiplies the norms of the input's rows by those of the gradient that the
    same example had an epoch ago; here, as in its first epoch, the norms of the input decide alone. Both are unbiased.
    """
    x, weight, bias = amp(x, layer.weight, layer.bias)
    with torch.no_grad():
        flat = x.detach().flatten(0, -2)
        rows, scale = winners(flat.float().norm(dim=1), max(1, math.ceil(ratio * flat.shape[0])))
        kept = flat.index_select(0, rows)
    result: Tensor = _SampledRows.apply(x, weight, bias, kept, rows, scale)  # type: ignore[no-untyped-call]
    return result


# ---- checks, before anything is timed


def check_rules(ratio: float, draws: int = 400) -> None:
    """Gradients of ssProp are those of a masked dY, those of WTA-CRS are right on the average.

    Raises:
        AssertionError: They are not.
    """
    generator = torch.Generator().manual_seed(0)
    for layer, shape in ((nn.Linear(12, 20), (4, 6, 12)), (nn.Conv2d(5, 20, 3, 2, 1), (4, 5, 8, 8))):
        x = torch.randn(shape, generator=generator).double().requires_grad_()
        layer = layer.double()
        towards = torch.randn(layer(x).shape, generator=generator).double()
        axis = -1 if isinstance(layer, nn.Linear) else 1
        mask = torch.zeros(20, dtype=torch.float64)
        mask[top_channels(towards, axis % towards.dim(), max(1, round(ratio * 20)))] = 1
        masked = towards * (mask if axis == -1 else mask.view(-1, 1, 1))
        wanted = torch.autograd.grad(layer(x), [x, *layer.parameters()], masked)
        found = torch.autograd.grad(ssprop(layer, x, ratio), [x, *layer.parameters()], towards)
        if not all(torch.allclose(one, other) for one, other in zip(found, wanted, strict=True)):
            raise AssertionError(f"ssProp: wrong gradients of {layer}")
    layer = nn.Linear(6, 5).double()
    x = torch.randn(24, 6, generator=generator).double() * torch.linspace(0.1, 3, 24).unsqueeze(1)
    towards = torch.randn(24, 5, generator=generator).double()
    (exact,) = torch.autograd.grad(layer(x), [layer.weight], towards)
    sample = functools.partial(wta_crs, layer, x, ratio)
    found = torch.stack([torch.autograd.grad(sample(), [layer.weight], towards)[0] for _ in range(draws)])
    apart = (found.mean(0) - exact).abs() / (found.std(0) / math.sqrt(draws) + 1e-9)
    if not float(apart.max()) < 5:
        raise AssertionError(f"WTA-CRS: its mean is {float(apart.max()):.1f} standard errors from the weight gradient")
