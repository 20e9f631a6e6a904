"""Sampled gradients for fixed selections: every op and product against an explicit sum over the chosen pairs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fx_approx.core.candidates import Role
from fx_approx.ops import ForwardDrawn, linear
from fx_approx.sampling import Selection
from tests.families import OpCase, Operands, gradients, upstream
from tests.ops.roles import EACH_OUTPUT, EVEN, ROLE_CASES, ROWS, RoleCase

pytestmark = pytest.mark.filterwarnings(EVEN)
roles = pytest.mark.parametrize("one", ROLE_CASES.values(), ids=ROLE_CASES)
outputs = pytest.mark.parametrize("one", EACH_OUTPUT.values(), ids=EACH_OUTPUT)
cases = pytest.mark.parametrize("case", ROWS.values(), ids=ROWS)
both = pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def all_close(actual: Operands, expected: Operands) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        close(actual[name], value)


def call(case: OpCase, operands: Operands, *chosen: dict[str, Any], **more: Any) -> Tensor:
    together = {name: value for given in chosen for name, value in given.items()}
    return case.call(case.op.function, operands, **together, **more)


def gradients_kept(output: Tensor, operands: Operands) -> Operands:
    """As :func:`gradients`, of an output that is differentiated again later."""
    found = torch.autograd.grad(output, list(operands.values()), upstream(output), retain_graph=True)
    return dict(zip(operands, found, strict=True))


def pairs_of_gradients(case: OpCase) -> list[tuple[RoleCase, RoleCase]]:
    """The gradients of a row that can be sampled at the same time."""
    of = {role: [one for one in ROLE_CASES.values() if one.case is case and one.role is role] for role in Role}
    return list(itertools.product(of[Role.GRAD_INPUT], of[Role.GRAD_WEIGHT]))


@both
@roles
def test_a_sampled_gradient_is_the_sum_over_the_chosen_pairs(one: RoleCase, scaled: bool) -> None:
    """The output, the other gradient and those of biases are exact."""
    operands = one.case.operands(grad=True)
    exact = one.case.exact(operands)
    for k in sorted({1, (one.pairs + 1) // 2, one.pairs}):
        selection = one.selection(scaled, k, seed=k)
        output = call(one.case, operands, one.given(selection))
        close(output, exact)
        wanted = gradients_kept(exact, operands)
        wanted[one.operand] = one.oracle(exact, operands[one.operand], upstream(exact), selection)
        all_close(gradients(output, operands), wanted)


@cases
def test_both_gradients_are_sampled_each_in_its_own_way(case: OpCase) -> None:
    for way in pairs_of_gradients(case):
        operands = case.operands(grad=True)
        exact, selections = case.exact(operands), [one.selection(True, seed=seed) for seed, one in enumerate(way)]
        given = [one.given(selection) for one, selection in zip(way, selections, strict=True)]
        output = call(case, operands, *given)
        close(output, exact)
        wanted = gradients_kept(exact, operands)
        for one, selection in zip(way, selections, strict=True):
            wanted[one.operand] = one.oracle(exact, operands[one.operand], upstream(exact), selection)
        all_close(gradients(output, operands), wanted)


@roles
def test_all_pairs_unscaled_give_the_exact_gradient(one: RoleCase) -> None:
    operands = one.case.operands(grad=True)
    output = call(one.case, operands, one.given(one.selection(False, one.pairs)))
    all_close(gradients(output, operands), gradients(one.case.exact(operands), operands))


@both
@cases
def test_straight_through_samples_the_output_and_keeps_the_exact_gradients(case: OpCase, scaled: bool) -> None:
    for k in (1, None, case.pairs):
        operands, selection = case.operands(grad=True), case.selection(scaled, k)
        output = call(case, operands, selection=selection, straight_through=True)
        close(output, case.oracle(operands, selection))
        all_close(gradients(output, operands), gradients(case.exact(operands), operands))


@cases
def test_straight_through_without_a_sample_is_bitwise_exact(case: OpCase) -> None:
    operands = case.operands(grad=True)
    output, exact = call(case, operands, straight_through=True), case.exact(operands)
    assert torch.equal(output, exact)
    found, wanted = gradients(output, operands), gradients(exact, operands)
    assert all(torch.equal(found[name], wanted[name]) for name in operands)


@pytest.mark.parametrize("straight_through", [False, True], ids=["forward", "straight-through"])
@cases
def test_a_sampled_output_and_sampled_gradients(case: OpCase, straight_through: bool) -> None:
    """In forward mode the gradients are those of the gathered product, sampled once more; else of the exact one."""
    of_output = [RoleCase(case, Role.OUTPUT)] + [one for one in EACH_OUTPUT.values() if one.case is case]
    for three in itertools.product(of_output, pairs_of_gradients(case)):
        first, (second, third) = three
        operands = case.operands(grad=True)
        chosen = {one.role: one.selection(True, seed=seed) for seed, one in enumerate((first, second, third))}
        sampled = first.output(operands, chosen[Role.OUTPUT])
        source = case.exact(operands) if straight_through else sampled
        exact = gradients_kept(source, operands)
        ways: list[tuple[RoleCase, ...]] = [(second,), (third,), (second, third)]
        for way in ways:
            given = [one.given(chosen[one.role]) for one in (first, *way)]
            output = call(case, operands, *given, straight_through=straight_through)
            close(output, sampled)
            wanted = dict(exact)
            for one in way:
                wanted[one.operand] = one.oracle(source, operands[one.operand], upstream(output), chosen[one.role])
            all_close(gradients(output, operands), wanted)


@both
@outputs
def test_each_product_of_a_batch_samples_its_own_output(one: RoleCase, scaled: bool) -> None:
    for k in (1, None, one.pairs):
        operands, selection = one.case.operands(grad=True), one.selection(scaled, k)
        assert selection.indices.shape[0] == one.groups > 1
        output, expected = call(one.case, operands, one.given(selection)), one.output(operands, selection)
        close(output, expected)
        all_close(gradients(output, operands), gradients(expected, operands))
        through = call(one.case, operands, one.given(selection), straight_through=True)
        close(through, expected)
        all_close(gradients(through, operands), gradients(one.case.exact(operands), operands))


@cases
def test_any_part_of_the_operands_may_need_a_gradient(case: OpCase) -> None:
    for first, second in pairs_of_gradients(case):
        given = first.given(first.selection(True, seed=1)) | second.given(second.selection(True, seed=2))
        whole = case.operands(grad=True)
        everything = gradients(call(case, whole, given), whole)
        for count in range(len(whole)):
            for wanted in itertools.combinations(case.shapes, count):
                operands = case.operands()
                for name in wanted:
                    operands[name].requires_grad_()
                output = call(case, operands, given)
                assert output.requires_grad == bool(wanted)
                if wanted:
                    all_close(gradients(output, operands), {name: everything[name] for name in wanted})


@roles
def test_nothing_is_recorded_without_grad(one: RoleCase) -> None:
    operands = one.case.operands(grad=True)
    with torch.no_grad():
        output = call(one.case, operands, one.given(one.selection(True)))
    assert not output.requires_grad
    close(output, one.case.exact(operands))


class _Recorder(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("one", [*ROLE_CASES.values(), *EACH_OUTPUT.values()], ids=[*ROLE_CASES, *EACH_OUTPUT])
def test_gradients_need_no_atomics(one: RoleCase) -> None:
    selection = one.selection(True)
    with _Recorder() as recorder:
        operands = one.case.operands(grad=True)
        gradients(call(one.case, operands, one.given(selection)), operands)
    atomics = {"index_add", "index_add_", "scatter_add", "scatter_add_", "index_put", "index_put_", "_index_put_impl_"}
    assert recorder.names & {"index_select", "index", "gather"}
    assert not recorder.names & atomics


def test_a_weight_that_is_read_twice_collects_both_gradients() -> None:
    """Two calls with different selections, as two heads with tied weights."""
    one = ROLE_CASES["linear-grad_weight"]
    operands = one.case.operands(grad=True)
    selections = one.selection(True, 2, seed=1), one.selection(False, 1, seed=2)
    calls = [call(one.case, operands, one.given(selection)) for selection in selections]
    found = gradients(calls[0] + calls[1], operands)
    exact = one.case.exact(operands)
    towards = upstream(exact)
    wanted = [one.oracle(exact, operands["weight"], towards, selection) for selection in selections]
    close(found["weight"], wanted[0] + wanted[1])


def test_sampled_gradients_of_a_linear_layer_by_hand() -> None:
    """G is the gradient of the output: G[:, o]·s @ W[o, :] for features o, and G[r, :]ᵀ @ (s·X[r, :]) for rows r."""
    generator = torch.Generator().manual_seed(0)
    x, w, b, g = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, 5), (4, 5), (4,), (2, 3, 4))
    )
    leaves = [x.requires_grad_(), w.requires_grad_(), b.requires_grad_()]
    features = Selection(torch.tensor([[0, 3]]), torch.tensor([[2.0, 0.5]]))
    rows = Selection(torch.tensor([[1, 2, 5]]), torch.tensor([[1.0, 3.0, 0.0]]))
    output = linear(x, w, b, grad_input=features, grad_weight=ForwardDrawn(rows))
    grad_x, grad_w, grad_b = torch.autograd.grad(output, leaves, g)
    close(grad_x, 2.0 * g[..., 0, None] * w[0] + 0.5 * g[..., 3, None] * w[3])
    # Rows 1 and 2 are [0, 1] and [0, 2]; row 5 has scale 0.
    close(grad_w, g[0, 1][:, None] * x[0, 1] + 3.0 * g[0, 2][:, None] * x[0, 2])
    close(grad_b, g.sum((0, 1)))
