"""A linear layer on a slice of its weight against the same on a copy of the slice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fx_approx.ops import Slices, slice_weights, sliced_linear
from fx_approx.sampling import Selection

INPUTS = Selection(torch.tensor([[0, 4, 3]]), torch.tensor([[2.0, 1.0, 4.0]]))
PLAIN = Selection(torch.tensor([[0, 4, 3]]), None)
OUTPUTS = Selection(torch.tensor([[6, 1]]), None)
CASES: dict[str, tuple[Selection | None, Selection | None]] = {
    "both": (INPUTS, OUTPUTS),
    "inputs": (PLAIN, None),
    "scaled inputs": (INPUTS, None),
    "outputs": (None, OUTPUTS),
}


def leaves(bias: bool) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(0)
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    return weight, torch.randn(7, dtype=torch.float64, requires_grad=True) if bias else None


def ours(x: Tensor, weight: Tensor, bias: Tensor | None, case: str) -> Tensor:
    return sliced_linear(x, weight, bias, slice_weights(weight, bias, *CASES[case]))


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, case: str) -> Tensor:
    inputs, outputs = CASES[case]
    if outputs is not None:
        weight, bias = weight[outputs.indices[0]], None if bias is None else bias[outputs.indices[0]]
    if inputs is not None:
        weight = weight[:, inputs.indices[0]] * (1.0 if inputs.scale is None else inputs.scale[0].double())
    return F.linear(x, weight, bias)


def width(case: str) -> int:
    return 5 if CASES[case][0] is None else 3


def gradients(function: Any, x: Tensor, bias: bool, case: str) -> list[Tensor]:
    weight, offset = leaves(bias)
    x = x.clone().requires_grad_()
    result = function(x, weight, offset, case)
    result.sin().sum().backward()
    return [result, *(t.grad for t in (x, weight, offset) if t is not None)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
def test_values_and_gradients(case: str, bias: bool, lead: tuple[int, ...]) -> None:
    x = torch.randn(*lead, width(case), dtype=torch.float64)
    torch.testing.assert_close(gradients(ours, x, bias, case), gradients(reference, x, bias, case))


@pytest.mark.parametrize("case", CASES)
def test_compiled_keeps_no_slice_and_gives_the_same(case: str) -> None:
    x = torch.randn(4, width(case), dtype=torch.float64)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = gradients(torch.compile(ours, fullgraph=True), x, True, case)
    torch.testing.assert_close(found, gradients(reference, x, True, case))
    weight = leaves(False)[0]
    sliced = slice_weights(weight, None, *CASES[case])
    assert sliced is not None
    assert kept and not any(t.numel() == sliced.weight.numel() and t.is_floating_point() for t in kept)


@pytest.mark.parametrize("case", CASES)
def test_eager_keeps_the_whole_weight_and_no_slice(case: str) -> None:
    weight, bias = leaves(True)
    slices = slice_weights(weight, bias, *CASES[case])
    x = torch.randn(4, width(case), dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sliced_linear(x, weight, bias, slices)
    assert any(t is weight for t in kept) and all(t is weight or t is x or t.numel() <= 3 for t in kept)


@pytest.mark.parametrize("case", CASES)
def test_derivatives_of_derivatives_and_batched_gradients(case: str) -> None:
    weight, bias = leaves(True)
    x = torch.randn(4, width(case), dtype=torch.float64, requires_grad=True)
    function = lambda x, weight, bias: ours(x, weight, bias, case)  # noqa: E731
    torch.autograd.gradcheck(function, (x, weight, bias), check_batched_grad=True)
    torch.autograd.gradgradcheck(function, (x, weight, bias))


def test_only_the_gradients_that_are_asked_for() -> None:
    weight, bias = leaves(True)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    ours(x, weight.detach(), bias, "both").sum().backward()
    assert x.grad is not None and weight.grad is None and bias is not None and bias.grad is not None
    ours(x.detach(), weight, None, "both").sum().backward()
    assert weight.grad is not None and weight.grad[[6, 1]][:, [0, 4, 3]].any() and weight.grad[0].eq(0).all()


def test_without_slices_it_is_the_layer() -> None:
    weight, bias = leaves(True)
    x = torch.randn(4, 5, dtype=torch.float64)
    assert torch.equal(sliced_linear(x, weight, bias, None), F.linear(x, weight, bias))


def test_under_autocast() -> None:
    weight, x = torch.randn(7, 5, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        slices = slice_weights(weight, None, PLAIN, OUTPUTS)
        assert isinstance(slices, Slices)
        result = sliced_linear(x, weight, None, slices)
    assert result.dtype is torch.bfloat16
    result.sum().backward()
    assert weight.grad is not None and weight.grad.dtype is torch.float32 and x.grad is not None
