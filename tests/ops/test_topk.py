"""TopK-CRS is the paper's reference: the k largest ‖A_j‖·‖B_j‖ pairs, unscaled.

The reference is a few lines written from the paper (Adelman, Levy, Hakimi, Silberstein, NeurIPS 2021, section 2), for
the outputs and, through autograd, for all gradients.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fx_approx import ops
from fx_approx.core.candidates import Role
from fx_approx.runtime.layers import SampledConv2d, SampledLinear, swap
from fx_approx.runtime.selector import Selector, Site
from fx_approx.sampling import SamplerConfig


def best(input: Tensor, weight: Tensor, channel: int, k: int) -> list[int]:
    pairs = weight.shape[1]
    norms = [(input.select(channel, j).norm() * weight[:, j].norm()).item() for j in range(pairs)]
    return sorted(range(pairs), key=lambda j: -norms[j])[:k]


def reference(input: Tensor, layer: Any, k: int) -> Tensor:
    if isinstance(layer, nn.Linear):
        chosen = best(input, layer.weight, -1, k)
        return F.linear(input[..., chosen], layer.weight[:, chosen], layer.bias)
    # The scores are those of the input as it comes in, before it is padded.
    chosen, padding = best(input, layer.weight, 1, k), layer.padding
    if layer.padding_mode != "zeros":
        input, padding = F.pad(input, (1, 1, 1, 1), mode=layer.padding_mode), 0
    return F.conv2d(input[:, chosen], layer.weight[:, chosen], layer.bias, layer.stride, padding, layer.dilation)


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


LAYERS: list[tuple[type[nn.Module], dict[str, Any], tuple[int, ...], float]] = [
    (nn.Linear, {}, (16, 40), 0.1),
    (nn.Linear, {}, (16, 40), 0.9),
    (nn.Linear, {}, (4, 5, 40), 0.5),
    (nn.Conv2d, {}, (3, 20, 8, 7), 0.1),
    (nn.Conv2d, {"stride": 2, "padding": 1}, (3, 20, 8, 7), 0.25),
    (nn.Conv2d, {"dilation": 2, "padding": 2}, (3, 20, 8, 7), 0.9),
    *(
        (nn.Conv2d, {"padding": 1, "padding_mode": mode}, (3, 20, 8, 7), 0.5)
        for mode in ("circular", "reflect", "replicate")
    ),
]


@pytest.mark.parametrize("kind, options, shape, ratio", LAYERS, ids=str)
def test_topk_equals_the_papers_reference(kind: Any, options: dict[str, Any], shape: Any, ratio: float) -> None:
    """The selector's selection in the op, and the sampled layer."""
    input = torch.randn(shape, requires_grad=True)
    layer = nn.Linear(40, 24) if kind is nn.Linear else nn.Conv2d(20, 8, 3, **options)
    plain = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **options} if kind is nn.Conv2d else {}
    mode = plain.pop("padding_mode", None)
    leaves, pairs = [input, layer.weight, layer.bias], layer.weight.shape[1]
    name = "linear" if kind is nn.Linear else "conv2d"
    selector = Selector(name, plain, SamplerConfig("topk", ratio), 0, pairs, layer)
    assert selector.k == round(ratio * pairs)
    expected = reference(input, layer, selector.k)
    if mode is None:
        selection = selector(input, layer.weight, None)
        found = getattr(ops, name)(input, layer.weight, layer.bias, **plain, selection=selection)
        compare(found, reference(input, layer, selector.k), leaves)
    swap(layer, Site({Role.OUTPUT: selector}, False, NoDraws()))
    assert isinstance(layer, SampledLinear | SampledConv2d)
    compare(layer(input), expected, leaves)


def test_ties_go_to_the_lower_index() -> None:
    input, weight = torch.ones(2, 6), torch.ones(3, 6)
    selector = Selector("linear", {}, SamplerConfig("topk", 0.5), 0, 6, nn.Identity())
    assert selector(input, weight, None).indices.tolist() == [[0, 1, 2]]
    weight[:, 4] = 2
    assert selector(input, weight, None).indices.tolist() == [[0, 1, 4]]
