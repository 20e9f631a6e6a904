"""A linear layer on a slice of its weight against the same on a copy of the slice."""

from __future__ import annotations

from collections.abc import Callable
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
every_case = pytest.mark.parametrize("case", CASES)


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


def input_of(case: str, *lead: int) -> Tensor:
    width = 5 if CASES[case][0] is None else 3
    return torch.randn(*lead, width, dtype=torch.float64, requires_grad=True)


def gradients(function: Callable[..., Any], xs: list[Tensor], bias: bool, cases: list[str]) -> list[Tensor]:
    weight, offset = leaves(bias)
    xs = [x.detach().clone().requires_grad_() for x in xs]
    results = function(xs, weight, offset, cases)
    torch.stack([result.sin().sum() for result in results]).sum().backward()
    return [*results, *(t.grad for t in (*xs, weight, offset) if t is not None)]


def each(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    return lambda xs, weight, bias, cases: [function(x, weight, bias, case) for x, case in zip(xs, cases, strict=True)]


@every_case
@pytest.mark.parametrize("bias", [True, False])
def test_values_gradients_and_their_derivatives(case: str, bias: bool) -> None:
    for lead in ((), (4,), (2, 3)):
        x = input_of(case, *lead)
        found, wanted = (gradients(each(function), [x], bias, [case]) for function in (ours, reference))
        torch.testing.assert_close(found, wanted)
    weight, offset = leaves(bias)
    x, rest = input_of(case, 4), (offset,) * bias
    function = lambda x, weight, *bias: ours(x, weight, bias[0] if bias else None, case)  # noqa: E731
    torch.autograd.gradcheck(function, (x, weight, *rest), check_batched_grad=True)
    torch.autograd.gradgradcheck(function, (x, weight, *rest))


@every_case
def test_eager_keeps_the_whole_weight_and_no_slice(case: str) -> None:
    weight, bias = leaves(True)
    slices, x = slice_weights(weight, bias, *CASES[case]), input_of(case, 4)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sliced_linear(x, weight, bias, slices)
    assert any(t is weight for t in kept) and all(t is weight or t is x or t.numel() <= 3 for t in kept)


@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_keeps_no_slice_and_gives_the_same(backend: str) -> None:
    """All cases in one graph; both backends divide it into forward and backward alike."""
    cases, xs = list(CASES), [input_of(case, 4) for case in CASES]
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = gradients(torch.compile(each(ours), backend=backend, fullgraph=True), xs, True, cases)
    torch.testing.assert_close(found, gradients(each(reference), xs, True, cases))
    slices = [slice_weights(leaves(False)[0], None, *CASES[case]) for case in cases]
    sizes = {one.weight.numel() for one in slices if one is not None}
    assert kept and not any(t.numel() in sizes and t.is_floating_point() for t in kept)


def test_only_the_gradients_that_are_asked_for() -> None:
    weight, bias = leaves(True)
    x = input_of("both", 4)
    ours(x, weight.detach(), bias, "both").sum().backward()
    assert x.grad is not None and weight.grad is None and bias is not None and bias.grad is not None
    ours(x.detach(), weight, None, "both").sum().backward()
    assert weight.grad is not None and weight.grad[[6, 1]][:, [0, 4, 3]].any() and weight.grad[0].eq(0).all()
    # Without slices it is the layer.
    whole = input_of("outputs", 4)
    assert torch.equal(sliced_linear(whole, weight, bias, None), F.linear(whole, weight, bias))


def test_under_autocast() -> None:
    weight, x = torch.randn(7, 5, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        slices = slice_weights(weight, None, PLAIN, OUTPUTS)
        assert isinstance(slices, Slices)
        result = sliced_linear(x, weight, None, slices)
    assert result.dtype is torch.bfloat16
    result.sum().backward()
    assert weight.grad is not None and weight.grad.dtype is torch.float32 and x.grad is not None
