"""Every sampled op for a fixed Selection: values, derivatives, and what is exact."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fx_approx.sampling import Selection
from tests.families import OP_CASES, OpCase, Operands, gradients

cases = pytest.mark.parametrize("case", OP_CASES.values(), ids=OP_CASES)
both = pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@both
@cases
def test_output_equals_the_sum_over_the_chosen_pairs(case: OpCase, scaled: bool) -> None:
    operands = case.operands()
    for k in (1, None, case.pairs - 1, case.pairs):
        selection = case.selection(scaled, k, seed=k or 0)
        close(case.sampled(operands, selection), case.oracle(operands, selection))


@both
@cases
def test_gradients_equal_the_oracles_and_are_zero_outside_the_selection(case: OpCase, scaled: bool) -> None:
    operands, selection = case.operands(grad=True), case.selection(scaled)
    actual = gradients(case.sampled(operands, selection), operands)
    expected = gradients(case.oracle(operands, selection), operands)
    for name in operands:
        close(actual[name], expected[name])
        untouched = expected[name] == 0
        assert bool((actual[name][untouched] == 0).all()), "a gradient outside the selection"
    for name in (case.op.lhs, case.op.rhs):
        # The oracle reads no pair outside the selection: their share of each operand is at least this.
        left_out = 1 - selection.indices.shape[1] / case.pairs
        assert (expected[name] == 0).double().mean() >= left_out - 1e-9 > 0


@both
@cases
def test_derivatives_are_those_of_finite_differences(case: OpCase, scaled: bool) -> None:
    operands, selection = case.operands(grad=True), case.selection(scaled)
    names = list(operands)

    def function(*values: Tensor) -> Tensor:
        return case.sampled(dict(zip(names, values, strict=True)), selection)

    assert torch.autograd.gradcheck(function, tuple(operands.values()), fast_mode=not scaled)
    assert torch.autograd.gradgradcheck(function, tuple(operands.values()), fast_mode=True)


@cases
def test_all_pairs_unscaled_are_the_exact_product(case: OpCase) -> None:
    operands, everything = case.operands(grad=True), case.selection(False, case.pairs)
    close(case.sampled(operands, everything), case.exact(operands))
    actual = gradients(case.sampled(operands, everything), operands)
    expected = gradients(case.exact(operands), operands)
    for name in operands:
        close(actual[name], expected[name])


def exact_calls(case: OpCase) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    for target in case.op.targets:
        if target is operator.matmul:
            yield "@", lambda lhs, rhs: lhs @ rhs
        else:
            yield str(target), target
    for method in case.op.methods:
        yield method, lambda self, *args, method=method, **kwargs: getattr(self, method)(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@cases
def test_no_selection_is_bitwise_every_exact_call(case: OpCase, dtype: torch.dtype) -> None:
    operands = case.operands(dtype=dtype, grad=True)
    actual = case.sampled(operands, None)
    found = gradients(actual, operands)
    for name, call in exact_calls(case):
        expected = case.call(call, operands)
        assert torch.equal(actual, expected), name
        for argument, gradient in gradients(expected, operands).items():
            assert torch.equal(found[argument], gradient), (name, argument)


@cases
def test_any_part_of_the_operands_may_need_a_gradient(case: OpCase) -> None:
    selection, whole = case.selection(True), case.operands(grad=True)
    everything = gradients(case.oracle(whole, selection), whole)
    for count in range(1, len(whole) + 1):
        for wanted in itertools.combinations(case.shapes, count):
            operands = case.operands()
            for name in wanted:
                operands[name].requires_grad_()
            found = gradients(case.sampled(operands, selection), operands)
            assert tuple(found) == wanted
            for name in wanted:
                close(found[name], everything[name])


@cases
def test_nothing_needs_a_gradient(case: OpCase) -> None:
    operands = case.operands()
    assert not case.sampled(operands, case.selection(True)).requires_grad


class _Recorder(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _run(case: OpCase, selection: Selection) -> tuple[Tensor, Operands]:
    operands = case.operands(dtype=torch.float32, grad=True)
    output = case.sampled(operands, selection)
    return output, gradients(output, operands)


@cases
def test_gradients_are_deterministic_and_need_no_atomics(case: OpCase) -> None:
    selection = case.selection(True)
    output, first = _run(case, selection)
    with deterministic_algorithms():
        again, second = _run(case, selection)
    assert torch.equal(output, again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with _Recorder() as recorder:
        _run(case, selection)
    atomics = {"index_add", "index_add_", "scatter_add", "scatter_add_", "index_put", "index_put_"}
    assert recorder.names & {"index_copy", "index_copy_"}
    assert not recorder.names & atomics
