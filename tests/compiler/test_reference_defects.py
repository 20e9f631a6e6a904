"""What the paper's code gets wrong, one test each: none of it happens here.

The reference is adelmanm/approx (2021). Oracles mask the exact product, so they share nothing with the code under test.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fx_approx
from fx_approx import SamplerConfig
from fx_approx.core.candidates import Role
from fx_approx.policies import GradientSampling, Override, Uniform, parse_policy
from fx_approx.sampling import SAMPLERS
from tests.helpers.modes import MODES

TOPK = SamplerConfig("topk", 0.5)
CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "groups": lambda: nn.Conv2d(8, 4, 3, padding=1, groups=2),
    "three groups": lambda: nn.Conv2d(9, 6, 2, dilation=2, groups=3),
}
convolutions = pytest.mark.parametrize("kind", CONVOLUTIONS)


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


@convolutions
@pytest.mark.parametrize(
    "policy",
    [GradientSampling(grad_input=TOPK), GradientSampling(grad_weight=TOPK), GradientSampling.backward(0.5, "topk")],
    ids=["dX", "dW", "both"],
)
def test_backward_sampling_of_a_convolution_runs_and_is_right(kind: str, policy: GradientSampling) -> None:
    """NameError in the reference."""
    layer, x, dy = convolved(kind)
    wanted = masked_convolution(layer, x, dy, set(policy.roles), False)
    torch.testing.assert_close(trained(layer, policy, x, dy), wanted)


@convolutions
def test_a_straight_through_convolution_runs_and_is_right(kind: str) -> None:
    """NameError in the reference, which calls it black box."""
    layer, x, dy = convolved(kind)
    wanted = masked_convolution(layer, x, dy, {Role.OUTPUT}, True)
    torch.testing.assert_close(trained(layer, GradientSampling.straight(0.5), x, dy), wanted)
    exact = products(layer, x, dy)
    torch.testing.assert_close(wanted[1:3], exact[1:])
    assert not torch.allclose(wanted.output, exact[0])


@convolutions
def test_grouped_convolutions_are_sampled_in_the_forward_pass(kind: str) -> None:
    """More than one group crashes in the reference."""
    layer, x, dy = convolved(kind)
    wanted = masked_convolution(layer, x, dy, {Role.OUTPUT}, False)
    torch.testing.assert_close(trained(layer, GradientSampling(output=TOPK), x, dy), wanted)


@pytest.mark.parametrize("mode", MODES)
def test_grouped_convolutions_train_in_every_mode(mode: str) -> None:
    """More than one group crashes in the reference."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Tanh(), nn.Conv2d(8, 6, 3, groups=2), nn.Flatten())
    approx = fx_approx.transform(model, MODES[mode](0.5))
    approx(torch.randn(4, 4, 7, 7)).square().mean().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()


LAYERS = {
    "linear": (lambda: nn.Linear(16, 8), lambda: torch.randn(6, 16)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), lambda: torch.randn(6, 4, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 model", "autocast"])
@pytest.mark.parametrize("mode", ["forward", "backward", "weight_gradient", "straight", "combined"])
def test_bfloat16_with_a_bias(kind: str, autocast: bool, mode: str) -> None:
    """The reference adds a float32 product to a bfloat16 bias, and crashes."""
    build, inputs = LAYERS[kind]
    layer, x = build(), inputs()
    specs = MODES[mode](0.5)
    # Uniform scores: rounding cannot change the sample.
    policy = GradientSampling(
        **{role.value: s.replace(scores="uniform") for role, s in specs.roles.items()},
        straight_through=specs.straight_through,
    )
    steps = {}
    for dtype in (torch.float32, torch.bfloat16):
        layer.zero_grad()
        approx = fx_approx.transform(nn.Sequential(layer), policy)
        narrow = dtype is torch.bfloat16
        if narrow and not autocast:
            approx = approx.to(dtype)
        with torch.autocast("cpu", dtype, enabled=narrow and autocast):
            y = approx(x.to(next(approx.parameters()).dtype))
        assert y.dtype == dtype
        y.sum().backward()
        grads = [p.grad for p in approx.parameters()]
        assert [g.dtype for g in grads if g is not None] == [p.dtype for p in approx.parameters()]
        steps[dtype] = [y, *grads]
    for wide, narrow_one in zip(steps[torch.float32], steps[torch.bfloat16], strict=True):
        assert (narrow_one.float() - wide).abs().max() <= 0.03 * wide.abs().max()


@pytest.mark.parametrize("lead", [(2, 5), (2, 1, 5), (10,)], ids=str)
def test_a_linear_layer_on_more_than_two_axes_trains_backward(lead: tuple[int, ...]) -> None:
    """The reference multiplies tensors of three axes where it needs matrices, and crashes."""
    layer = nn.Linear(6, 8).double()
    x, dy = torch.randn(*lead, 6, dtype=torch.float64), torch.randn(*lead, 8, dtype=torch.float64)
    found = trained(layer, GradientSampling.backward(0.5, "topk"), x, dy)
    weight, rows, grads = layer.weight.detach(), x.reshape(10, 6), dy.reshape(10, 8)
    columns = largest((grads.norm(dim=0) * weight.norm(dim=1)).unsqueeze(0))
    chosen = largest((grads.norm(dim=1) * rows.norm(dim=1)).unsqueeze(0)).T
    wanted = Outcome(
        F.linear(x, weight, layer.bias.detach()),
        ((grads * columns) @ weight).view_as(x),
        (grads * chosen).T @ rows,
        grads.sum(0),
    )
    torch.testing.assert_close(found, wanted)


def test_bernoulli_draws_the_expected_number_of_pairs() -> None:
    """The reference draws 29.2 of the 32 pairs meant: its probabilities above 1 are cut off.

    2,000 forwards, at most 16 pairs of variance each: one per cent is 3.5 standard errors.
    """
    layer = nn.Linear(64, 8, bias=False)
    with torch.no_grad():
        layer.weight.mul_(torch.linspace(0.01, 2, 64).square())  # some scores are far above the average
    approx = fx_approx.transform(nn.Sequential(layer), Uniform(0.5, "bernoulli", scores="online"), torch.randn(4, 64))
    x, drawn = torch.randn(4, 64), []
    for _ in range(2000):
        approx(x)
        drawn.append(approx._fx_approx.selectors["0", Role.OUTPUT].last_count)
    sample = fx_approx.report(approx)["0"].sample()
    assert sample is not None and (sample.k, sample.pairs, sample.last_k) == (32, 64, drawn[-1])
    assert sum(drawn) / len(drawn) == pytest.approx(32, rel=0.01)
    assert len(set(drawn)) > 5


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


class Empty(NamedTuple):
    layer: nn.Module
    x: Tensor


EMPTY: Mapping[str, Empty] = {
    "linear": Empty(nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)),
    "conv2d": Empty(nn.Conv2d(3, 2, 2).double(), torch.randn(4, 3, 3, 3, dtype=torch.float64)),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_an_empty_bernoulli_draw_is_zero_and_unbiased(kind: str) -> None:
    """The reference takes the first pairs instead, in the hope that it does not matter.

    All 2³ draws at p = 1/3, each with its probability.
    """
    layer, x = EMPTY[kind]
    sampler, mean, empties = SAMPLERS["bernoulli"], torch.zeros_like(layer(x)), 0
    op = fx_approx.ops.OPS[kind].function
    for outcome in range(8):
        drawn = torch.tensor([[bool(outcome >> j & 1) for j in range(3)]])
        numbers = torch.where(drawn, 0.3, 0.4)
        selection = sampler.draw(torch.ones(1, 3, dtype=torch.float64), 1, numbers, epsilon=0.1)
        weight = layer.weight.detach().clone().requires_grad_()
        output = op(x, weight, layer.bias, selection=selection)
        if outcome == 0:
            empties += 1
            torch.testing.assert_close(output, op(x, torch.zeros_like(weight), layer.bias))
            (grad,) = torch.autograd.grad(output.sum(), weight)
            assert not grad.any()
        mean = mean + (1 / 3) ** drawn.sum() * (2 / 3) ** (~drawn).sum() * output
    torch.testing.assert_close(mean, layer(x))
    assert empties == 1


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


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_sampler_is_an_option(name: str) -> None:
    """In the reference one comments source lines in and out."""
    assert parse_policy(f"{name}:0.25") == Uniform(0.25, name, scores="online")
    report = fx_approx.report(fx_approx.transform(nn.Sequential(nn.Linear(8, 8)), Uniform(0.25, name, scores="online")))
    sample = report["0"].sample()
    assert sample is not None and (sample.sampler, sample.ratio) == (name, 0.25)


def test_layers_and_products_of_one_model_have_samplers_of_their_own() -> None:
    roles = GradientSampling(
        SamplerConfig("topk", 0.5), SamplerConfig("crs", 0.25), SamplerConfig("wta", 0.75, scores="input")
    )
    policy = Override(
        {"0": Uniform(sampler="bernoulli", scores="online"), "1": roles},
        GradientSampling.backward(sampler="wta_unique"),
    )
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    report = fx_approx.report(fx_approx.transform(model, policy))
    assert [[sample.sampler for sample in row.samples] for row in report.rows] == [
        ["bernoulli"],
        ["topk", "crs", "wta"],
        ["wta_unique", "wta_unique"],
    ]
