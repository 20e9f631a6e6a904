"""Derivatives of sampled gradients: of the map from operands and the gradient of the output to the gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fx_approx.core.candidates import Role
from tests.families import OpCase, upstream
from tests.ops.roles import EACH_OUTPUT, EVEN, ROLE_CASES, ROWS, RoleCase
from tests.ops.test_roles import call, close, pairs_of_gradients

pytestmark = pytest.mark.filterwarnings(EVEN)

roles = pytest.mark.parametrize("one", ROLE_CASES.values(), ids=ROLE_CASES)
cases = pytest.mark.parametrize("case", ROWS.values(), ids=ROWS)


def check(case: OpCase, given: dict[str, Any], fast: bool = True, **more: Any) -> bool:
    """Finite differences of all gradients, for all operands and for the gradient of the output."""
    operands = case.operands(grad=True)
    names, towards = list(operands), upstream(case.exact(operands)).requires_grad_()

    def function(grad: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        output = call(case, dict(zip(names, values, strict=True)), given, **more)
        return torch.autograd.grad(output, values, grad, create_graph=True)

    return torch.autograd.gradcheck(function, (towards, *operands.values()), fast_mode=fast)


@roles
def test_derivatives_of_a_sampled_gradient(one: RoleCase) -> None:
    assert check(one.case, one.given(one.selection(True)))


SLOW = [
    "linear-grad_input",
    "linear-grad_weight",
    "bmm-grad_weight-each",
    "einsum-two-contracted-grad_input",
    "conv1d-same-even-grad_weight",
    "conv2d-depthwise-grad_input",
    "conv1d-unbatched-grouped-grad_weight-positions",
]


@pytest.mark.parametrize("name", SLOW)
def test_derivatives_entry_by_entry(name: str) -> None:
    """The fast check above compares one random projection of the Jacobian."""
    one = ROLE_CASES[name]
    assert check(one.case, one.given(one.selection(True)), fast=False)


@pytest.mark.parametrize("straight_through", [False, True], ids=["forward", "straight-through"])
@cases
def test_derivatives_of_all_three_samples_together(case: OpCase, straight_through: bool) -> None:
    """Unscaled, and scaled with positions or, in batched products, a sample for each."""
    each = [one for one in EACH_OUTPUT.values() if one.case is case]
    ways = pairs_of_gradients(case)
    for scaled, three in ((False, (RoleCase(case, Role.OUTPUT), *ways[0])), (True, (*each, *ways[-1]))):
        given: dict[str, Any] = {}
        for seed, one in enumerate(three):
            given |= one.given(one.selection(scaled, seed=seed))
        assert check(case, given, straight_through=straight_through)


@cases
def test_derivatives_of_straight_through_gradients(case: OpCase) -> None:
    assert check(case, {"selection": case.selection(True)}, straight_through=True)


@pytest.mark.parametrize("one", EACH_OUTPUT.values(), ids=EACH_OUTPUT)
def test_derivatives_where_each_product_of_a_batch_samples_its_output(one: RoleCase) -> None:
    """The gradients of a sampled output are its true ones, so the first derivative is checked too."""
    operands, given = one.case.operands(grad=True), one.given(one.selection(True))
    names = list(operands)

    def function(*values: Tensor) -> Tensor:
        return call(one.case, dict(zip(names, values, strict=True)), given)

    assert torch.autograd.gradcheck(function, tuple(operands.values()))
    assert torch.autograd.gradgradcheck(function, tuple(operands.values()), fast_mode=True)


@roles
def test_a_second_derivative_equals_that_of_the_sum_over_the_chosen_pairs(one: RoleCase) -> None:
    """A penalty on a sampled gradient, as of a Lipschitz bound, moves the operands as the formula says."""
    operands, selection = one.case.operands(grad=True), one.selection(True)
    towards = upstream(one.case.exact(operands)).requires_grad_()
    leaves = [*operands.values(), towards]
    output = call(one.case, operands, one.given(selection))
    (found,) = torch.autograd.grad(output, operands[one.operand], towards, create_graph=True)
    wanted = torch.zeros_like(found)
    exact = one.case.exact(operands)
    for g, i in itertools.product(range(one.groups), range(selection.indices.shape[1])):
        assert selection.scale is not None
        mask = (one.places == g * one.pairs + int(selection.indices[g, i])).double() * selection.scale[g, i]
        (part,) = torch.autograd.grad(exact, operands[one.operand], towards * mask, create_graph=True)
        wanted = wanted + part
    close(found, wanted)
    moved = torch.autograd.grad(found.square().sum(), leaves, allow_unused=True)
    expected = torch.autograd.grad(wanted.square().sum(), leaves, allow_unused=True)
    for one_of, other in zip(moved, expected, strict=True):
        close(*(torch.zeros(()) if value is None else value for value in (one_of, other)))
