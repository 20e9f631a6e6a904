"""What the paper's code gets wrong, one test each: none of it happens here.

The reference is adelmanm/approx (2021). Oracles mask the exact product, so they share nothing with the code under test.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fx_approx
from fx_approx import SamplerConfig
from fx_approx.core.candidates import Role
from fx_approx.policies import GradientSampling, Uniform

TOPK = SamplerConfig("topk", 0.5)
CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "groups": lambda: nn.Conv2d(8, 4, 3, padding=1, groups=2),
    "three groups": lambda: nn.Conv2d(9, 6, 2, dilation=2, groups=3),
}


class Outcome(NamedTuple):
    output: Tensor
    input: Tensor
    weight: Tensor
    bias: Tensor


def largest(scores: Tensor, share: float = 0.5) -> Tensor:
    """A mask ``[groups, pairs]`` of that share of the largest scores, halves rounded up."""
    k = int(share * scores.shape[1] + 0.5)
    return torch.zeros_like(scores).scatter(1, scores.argsort(1, descending=True)[:, :k], 1.0)


def norms(x: Tensor, axis: int, groups: int = 1) -> Tensor:
    """``[groups, pairs]`` Euclidean norms of the slices along ``axis``."""
    return x.transpose(0, axis).flatten(1).norm(dim=1).view(groups, -1)


def along(mask: Tensor, axis: int, dims: int) -> Tensor:
    """A mask in the shape that multiplies along ``axis``."""
    return mask.reshape([-1 if i == axis else 1 for i in range(dims)])


def products(layer: nn.Conv2d, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exact output and both gradients, as torch computes them."""
    x, weight = x.detach().clone().requires_grad_(), layer.weight.detach().clone().requires_grad_()
    y = F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return (y.detach(), *torch.autograd.grad(y, (x, weight), dy))


def masked_convolution(layer: nn.Conv2d, x: Tensor, dy: Tensor, roles: set[Role], through: bool) -> Outcome:
    """All three products of ``layer`` with the smaller half of the pairs of each sampled one set to zero."""
    groups, weight = layer.groups, layer.weight.detach()
    y, dx, dw = products(layer, x, dy)
    if Role.OUTPUT in roles:
        grouped = weight.view(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(2).norm(dim=2)
        mask = along(largest(norms(x, 1, groups) * grouped), 1, 4)
        sampled, sampled_dx, sampled_dw = products(layer, x * mask, dy)
        y = sampled
        if not through:
            dx, dw = sampled_dx * mask, sampled_dw
    if Role.GRAD_INPUT in roles:
        mask = along(largest(norms(dy, 1, groups) * norms(weight, 0, groups)), 1, 4)
        dx = products(layer, x, dy * mask)[1]
    if Role.GRAD_WEIGHT in roles:
        mask = along(largest(norms(dy, 0) * norms(x, 0)), 0, 4)
        dw = products(layer, x, dy * mask)[2]
    return Outcome(y, dx, dw, dy.sum((0, 2, 3)))


def trained(layer: nn.Module, policy: GradientSampling, x: Tensor, dy: Tensor) -> Outcome:
    """One step of the layer in a transformed model."""
    approx, x = fx_approx.transform(nn.Sequential(layer), policy), x.clone().requires_grad_()
    y = approx(x)
    y.backward(dy)
    assert x.grad is not None
    weight, bias = (p.grad for p in layer.parameters())
    assert weight is not None and bias is not None
    return Outcome(y.detach(), x.grad, weight, bias)


def convolved(kind: str) -> tuple[nn.Conv2d, Tensor, Tensor]:
    layer = CONVOLUTIONS[kind]().double()
    x = torch.randn(5, layer.in_channels, 7, 6, dtype=torch.float64)
    return layer, x, torch.randn_like(layer(x))


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize(
    ("policy", "through"),
    [
        *((GradientSampling(grad_input=TOPK), False), (GradientSampling(grad_weight=TOPK), False)),
        *((GradientSampling.backward(0.5, "topk"), False), (GradientSampling(output=TOPK), False)),
        (GradientSampling.straight(0.5), True),
    ],
    ids=["dX", "dW", "both", "output", "straight through"],
)
def test_a_sampled_convolution_runs_and_is_right(kind: str, policy: GradientSampling, through: bool) -> None:
    """NameError in the reference, of gradients and straight through; more than one group crashes in its forward."""
    layer, x, dy = convolved(kind)
    wanted = masked_convolution(layer, x, dy, set(policy.roles), through)
    torch.testing.assert_close(trained(layer, policy, x, dy), wanted)
    if through:
        exact = products(layer, x, dy)
        torch.testing.assert_close(wanted[1:3], exact[1:])
        assert not torch.allclose(wanted.output, exact[0])


def multiplied(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(x).square().sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    ("policy", "share"),
    [
        (Uniform(0.25, "systematic", scores="online"), 3 / 4),
        (Uniform(0.25, "crs", scores="online"), 3 / 4),
        (GradientSampling.backward(0.25), 3 / 2),
        (GradientSampling.backward(0.25, "wta"), 3 / 2),
        (GradientSampling.weight_gradient(0.25), 9 / 4),
        (GradientSampling.straight(0.25, "systematic"), 9 / 4),
    ],
    ids=lambda value: "" if isinstance(value, float) else None,
)
def test_scaling_costs_no_further_product(policy: GradientSampling | Uniform, share: float) -> None:
    """The reference multiplies by a diagonal matrix of k rows: r + r² of the operations."""
    x = torch.randn(64, 64, requires_grad=True)
    layer = nn.Linear(64, 64)
    one = 2 * 64**3
    assert multiplied(nn.Sequential(layer), x) == 3 * one
    assert multiplied(fx_approx.transform(nn.Sequential(layer), policy), x) == share * one


def test_an_empty_bernoulli_draw_of_the_gradients_is_zero() -> None:
    layer = nn.Linear(3, 3).double()
    approx = fx_approx.transform(nn.Sequential(layer), GradientSampling.backward(0.25, "bernoulli", scores="uniform"))
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    empty = {"input": 0, "weight": 0}
    for _ in range(60):
        x.grad = None
        layer.zero_grad()
        approx(x).sum().backward()
        assert x.grad is not None and layer.weight.grad is not None and layer.bias.grad is not None
        empty["input"] += not x.grad.any()
        empty["weight"] += not layer.weight.grad.any()
        assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 3.0)), "always exact"
    assert all(5 < count < 35 for count in empty.values()), "(2/3)³ of 60 are 18"
