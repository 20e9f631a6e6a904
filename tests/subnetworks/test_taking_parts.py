"""A part of a wide value in a subnetwork: index_select's numbers, in the value's layout, and plain where exported."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx.ops.gather import channels_last_order
from fx_approx.policies import Uniform
from fx_approx.subnetworks import extract, record_of
from fx_approx.subnetworks.parts import put_part, take_part
from tests.helpers.quick import thinned

INDEX = torch.tensor([0, 2, 5])


def values() -> list[tuple[Tensor, int]]:
    images = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    return [
        (images, 1),
        (images.contiguous(memory_format=torch.channels_last), 1),
        (torch.randn(2, 3, 6, dtype=torch.float64), 2),
        (torch.randn(3, 6, dtype=torch.float64), -1),
        (torch.randn(3, 2, 6, dtype=torch.float64).transpose(0, 1), 2),
    ]


@pytest.mark.parametrize("case", range(5))
def test_a_part_and_its_gradient_are_those_of_index_select(case: int) -> None:
    value, dim = values()[case]
    one, other = value.clone().requires_grad_(), value.clone().requires_grad_()
    part, expected = take_part(one, dim, INDEX), torch.index_select(other, dim, INDEX)
    assert torch.equal(part, expected) and torch.equal(take_part(value, dim, INDEX), expected)
    part.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    assert one.grad is not None and other.grad is not None
    assert torch.equal(one.grad, other.grad)


def test_a_part_keeps_channels_last() -> None:
    value = torch.randn(2, 6, 4, 4).contiguous(memory_format=torch.channels_last)
    part = take_part(value, 1, INDEX)
    assert part.is_contiguous(memory_format=torch.channels_last) and not part.is_contiguous()


@pytest.mark.parametrize("case", range(5))
def test_a_part_is_put_among_zeros_in_its_layout(case: int) -> None:
    value, dim = values()[case]
    part, index = value.clone(memory_format=torch.preserve_format).requires_grad_(), torch.tensor([0, 2, 3, 5, 6, 8])
    index = index[: part.shape[dim]]
    whole = put_part(part, dim, index, 9)
    assert whole.shape[dim] == 9 and torch.equal(torch.index_select(whole, dim, index), part)
    assert whole.count_nonzero() == part.count_nonzero()
    assert channels_last_order(whole) == channels_last_order(part)
    whole.pow(3).sum().backward()
    assert part.grad is not None and torch.allclose(part.grad, 3 * value**2)


@pytest.mark.parametrize("case", range(5))
def test_what_follows_may_change_a_part_or_a_whole_in_place(case: int) -> None:
    value, dim = values()[case]
    one, other = value.clone().requires_grad_(), value.clone().requires_grad_()
    part = take_part(one, dim, INDEX)
    whole = put_part(part, dim, INDEX, 6)
    if dim == 1 or value.is_contiguous():
        assert not part._is_view() and not whole._is_view()
    whole += value
    whole.relu_().pow(2).sum().backward()
    expected = torch.zeros_like(other).index_copy(dim, INDEX, other.index_select(dim, INDEX)) + value
    expected.relu().pow(2).sum().backward()
    assert torch.equal(whole, expected.relu())
    assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)


def through_both(value: Tensor) -> Tensor:
    part = take_part(value, 1, INDEX).pow(3)
    return put_part(part, 1, INDEX.flip(0), 7)


@pytest.mark.parametrize("case", thinned([0, 1]))
def test_derivatives_of_every_kind(case: int) -> None:
    value = values()[case][0]
    assert torch.autograd.gradcheck(
        through_both, value.requires_grad_(), check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(through_both, value)
    one = torch.func.vmap(torch.func.grad(lambda v: through_both(v[None]).sum()))(value.detach())
    assert torch.allclose(one, torch.autograd.grad(through_both(value).sum(), value)[0])


class Residual(nn.Module):
    """A stream that is read in part and added to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.last(x + self.inner(x))


def test_an_exported_subnetwork_consists_of_torch_operations() -> None:
    torch.manual_seed(0)
    model, images = Residual(), torch.randn(2, 3, 8, 8)
    sub = extract(fx_approx.transform(copy.deepcopy(model), Uniform(0.5, min_k=4), images))
    assert not record_of(sub).own_forward
    exported = torch.export.export(sub, (images,))
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert torch.ops.aten.index_select.default in targets
    assert not [target for target in targets if "fx_approx" in str(target)]
    torch.testing.assert_close(exported.module()(images), sub(images))
