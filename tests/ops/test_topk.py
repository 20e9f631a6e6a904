"""TopK-CRS is the paper's reference: the k largest ‖A_j‖·‖B_j‖ pairs, unscaled.

The reference is a few lines written from the paper (Adelman, Levy, Hakimi, Silberstein, NeurIPS 2021, section 2), for
the outputs and, through autograd, for all gradients.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fx_approx import ops
from fx_approx.core.candidates import Role
from fx_approx.runtime.layers import SampledConv2d, SampledLinear, swap
from fx_approx.runtime.selector import Selector, Site
from fx_approx.sampling import SamplerConfig

RATIOS = [0.1, 0.25, 0.5, 0.9]
ratios = pytest.mark.parametrize("ratio", RATIOS)


def reference_linear(input: Tensor, weight: Tensor, bias: Tensor, k: int) -> Tensor:
    rows = input.reshape(-1, input.shape[-1])
    norms = [(rows[:, j].norm() * weight[:, j].norm()).item() for j in range(weight.shape[1])]
    best = sorted(range(len(norms)), key=lambda j: -norms[j])[:k]
    return F.linear(input[..., best], weight[:, best], bias)


def reference_conv2d(input: Tensor, weight: Tensor, bias: Tensor, k: int, **op_kwargs: int) -> Tensor:
    norms = [(input[:, j].norm() * weight[:, j].norm()).item() for j in range(weight.shape[1])]
    best = sorted(range(len(norms)), key=lambda j: -norms[j])[:k]
    return F.conv2d(input[:, best], weight[:, best], bias, **op_kwargs)


class NoDraws:
    """TopK needs no randomness."""

    def draw_for(self, selector: Selector, inputs: list[Tensor]) -> None:
        return None


def compare(actual: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    towards = torch.randn(expected.shape)
    found = torch.autograd.grad(actual, leaves, towards)
    wanted = torch.autograd.grad(expected, leaves, towards)
    for one, other in zip((actual, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * float(other.detach().abs().max()))
        # Not the same by being zero, and zero in the same places.
        assert bool(other.any())
        assert torch.equal(one == 0, other == 0)


@ratios
@pytest.mark.parametrize("shape", [(16, 40), (4, 5, 40)], ids=str)
def test_topk_linear_equals_the_papers_reference(ratio: float, shape: tuple[int, ...]) -> None:
    layer, input = nn.Linear(40, 24), torch.randn(shape, requires_grad=True)
    leaves = [input, layer.weight, layer.bias]
    selector = Selector("linear", {}, SamplerConfig("topk", ratio), 0, 40, layer)
    assert selector.k == round(ratio * 40)
    expected = reference_linear(input, layer.weight, layer.bias, selector.k)
    selection = selector(input, layer.weight, None)
    compare(ops.linear(input, layer.weight, layer.bias, selection=selection), expected, leaves)
    swap(layer, Site({Role.OUTPUT: selector}, False, NoDraws()))
    assert isinstance(layer, SampledLinear)
    expected = reference_linear(input, layer.weight, layer.bias, selector.k)
    compare(layer(input), expected, leaves)


@ratios
@pytest.mark.parametrize("op_kwargs", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}], ids=str)
def test_topk_conv2d_equals_the_papers_reference(ratio: float, op_kwargs: dict[str, int]) -> None:
    layer, input = nn.Conv2d(20, 8, 3, **op_kwargs), torch.randn(3, 20, 8, 7, requires_grad=True)
    leaves = [input, layer.weight, layer.bias]
    plain = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **op_kwargs}
    selector = Selector("conv2d", plain, SamplerConfig("topk", ratio), 0, 20, layer)
    expected = reference_conv2d(input, layer.weight, layer.bias, selector.k, **op_kwargs)
    selection = selector(input, layer.weight, None)
    compare(ops.conv2d(input, layer.weight, layer.bias, **op_kwargs, selection=selection), expected, leaves)
    swap(layer, Site({Role.OUTPUT: selector}, False, NoDraws()))
    assert isinstance(layer, SampledConv2d)
    expected = reference_conv2d(input, layer.weight, layer.bias, selector.k, **op_kwargs)
    compare(layer(input), expected, leaves)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_a_convolution_keeps_its_padding_mode(mode: str) -> None:
    layer, input = (
        nn.Conv2d(6, 3, 3, padding=1, padding_mode=mode),
        torch.randn(2, 6, 5, 5, requires_grad=True),
    )
    plain = {"stride": 1, "padding": 1, "dilation": 1, "groups": 1}
    selector = Selector("conv2d", plain, SamplerConfig("topk", 0.5), 0, 6, layer)
    swap(layer, Site({Role.OUTPUT: selector}, False, NoDraws()))
    padded = F.pad(input, (1, 1, 1, 1), mode=mode)
    # The scores are those of the input as it comes in, before it is padded.
    norms = [(input[:, j].norm() * layer.weight[:, j].norm()).item() for j in range(6)]
    best = sorted(range(6), key=lambda j: -norms[j])[:3]
    expected = F.conv2d(padded[:, best], layer.weight[:, best], layer.bias)
    compare(layer(input), expected, [input, layer.weight, layer.bias])


def test_ties_go_to_the_lower_index() -> None:
    input, weight = torch.ones(2, 6), torch.ones(3, 6)
    selector = Selector("linear", {}, SamplerConfig("topk", 0.5), 0, 6, nn.Identity())
    assert selector(input, weight, None).indices.tolist() == [[0, 1, 2]]
    weight[:, 4] = 2
    assert selector(input, weight, None).indices.tolist() == [[0, 1, 4]]
