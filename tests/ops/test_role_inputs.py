"""Sampled gradients for what may come in: dtypes, autocast, memory layouts, empty batches, zeros, NaN and Inf."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fx_approx.core.candidates import Role
from fx_approx.ops import linear
from fx_approx.sampling import Selection
from tests.families import DTYPES, LAYOUTS, OpCase, Operands, SamplerCase, gradients, upstream
from tests.ops.role_selecting import choose, role_selector
from tests.ops.roles import EACH_OUTPUT, EVEN, READS, ROLE_CASES, ROWS, RoleCase
from tests.ops.test_inputs import formats, near, rounded, wide
from tests.ops.test_roles import call, close, gradients_kept, pairs_of_gradients

pytestmark = pytest.mark.filterwarnings(EVEN)

CHOOSING = [one for one in [*ROLE_CASES.values(), *EACH_OUTPUT.values()] if one.pairs > 1 and not one.case.vector]
GRADIENTS = [one for one in CHOOSING if one.role is not Role.OUTPUT]

cases = pytest.mark.parametrize("case", ROWS.values(), ids=ROWS)
choosing_gradients = pytest.mark.parametrize("one", GRADIENTS, ids=lambda one: one.name)


def sampled(case: OpCase, way: tuple[RoleCase, ...], dtype: torch.dtype) -> dict[str, tuple[RoleCase, Selection]]:
    """A selection of each product, by the operand of its gradient; scales in the dtype that samplers give."""
    return {
        one.operand: (one, rounded(one.selection(True, seed=seed), dtype) if one.pairs > 1 else one.selection(False))
        for seed, one in enumerate(way)
    }


def arguments(chosen: dict[str, tuple[RoleCase, Selection]]) -> dict[str, Any]:
    return {name: value for one, selection in chosen.values() for name, value in one.given(selection).items()}


def oracles(
    case: OpCase, operands: Operands, towards: Tensor, chosen: dict[str, tuple[RoleCase, Selection]]
) -> Operands:
    """All gradients, some of them sampled."""
    exact = case.exact(operands)
    found = torch.autograd.grad(exact, list(operands.values()), towards, retain_graph=True)
    wanted = dict(zip(operands, found, strict=True))
    for name, (one, selection) in chosen.items():
        wanted[name] = one.oracle(exact, operands[name], towards, selection)
    return wanted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
def test_dtypes(case: OpCase, dtype: torch.dtype) -> None:
    for way in pairs_of_gradients(case):
        operands, chosen = case.operands(dtype=dtype, grad=True), sampled(case, way, dtype)
        output = call(case, operands, arguments(chosen))
        assert output.dtype == dtype
        reference = wide(operands)
        near(output, case.exact(reference), dtype)
        found, wanted = gradients(output, operands), oracles(case, reference, upstream(output).double(), chosen)
        for name in operands:
            assert found[name].dtype == dtype
            near(found[name], wanted[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=["float32", "bfloat16", "mixed"])
@cases
def test_autocast(case: OpCase, dtype: torch.dtype | None) -> None:
    """Mixed: a bfloat16 activation meets float32 parameters, as behind another autocast layer."""
    for way in pairs_of_gradients(case):
        operands, chosen = case.operands(dtype=dtype or torch.float32, grad=True), sampled(case, way, torch.float32)
        if dtype is None:
            operands[case.op.lhs] = operands[case.op.lhs].detach().bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output, exact = call(case, operands, arguments(chosen)), case.exact(operands)
        assert output.dtype == exact.dtype
        reference = wide(operands)
        near(output, case.exact(reference), torch.bfloat16)
        found, wanted = gradients(output, operands), oracles(case, reference, upstream(output).double(), chosen)
        for name, value in operands.items():
            assert found[name].dtype == value.dtype
            near(found[name], wanted[name], torch.bfloat16)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "plain"])
@cases
def test_layouts(case: OpCase, layout: str) -> None:
    """Of the operands, and of the gradient of the output."""
    for way in pairs_of_gradients(case):
        plain, laid, chosen = case.operands(), case.operands(layout=layout), sampled(case, way, torch.float64)
        plain, laid = ({name: value.requires_grad_() for name, value in side.items()} for side in (plain, laid))
        output = call(case, laid, arguments(chosen))
        close(output, case.exact(plain))
        towards = upstream(output)
        wanted = oracles(case, plain, towards, chosen)
        for grad in (towards, LAYOUTS[layout](towards)):
            found = torch.autograd.grad(output, list(laid.values()), grad, retain_graph=True)
            for name, value in zip(laid, found, strict=True):
                close(value, wanted[name])


@cases
def test_operands_and_gradients_of_stride_zero(case: OpCase) -> None:
    """As ``sum().backward()`` sends one, and ``expand`` makes one."""
    for way in pairs_of_gradients(case):
        operands, chosen = case.operands(), sampled(case, way, torch.float64)
        for name, value in operands.items():
            operands[name] = value.narrow(0, 0, 1).expand_as(value).requires_grad_()
        output = call(case, operands, arguments(chosen))
        wanted = oracles(case, operands, torch.ones_like(output), chosen)
        found = torch.autograd.grad(output.sum(), list(operands.values()))
        for name, value in zip(operands, found, strict=True):
            close(value, wanted[name])


@pytest.mark.parametrize(
    "case", [c for c in ROWS.values() if c.kind in ("conv2d", "conv3d") and c.batch], ids=lambda case: case.name
)
def test_gradients_of_convolutions_keep_the_memory_format_of_the_exact_ones(case: OpCase) -> None:
    for way in pairs_of_gradients(case):
        for layout in ("plain", "channels_last"):
            operands = case.operands(dtype=torch.float32, layout=layout, grad=True)
            output = call(case, operands, arguments(sampled(case, way, torch.float32)))
            exact = case.exact(operands)
            assert formats(output) == formats(exact)
            # The gradient of a layer behind has the format of the output.
            towards = LAYOUTS[layout](upstream(output))
            found, wanted = (torch.autograd.grad(of, operands["input"], towards)[0] for of in (output, exact))
            assert formats(found) == formats(wanted)


def some_samplers(one: RoleCase) -> list[SamplerCase]:
    """One for all scores: random or not, of any size or always the same."""
    names = itertools.cycle(("bernoulli", "topk", "systematic"))
    return [SamplerCase(f"{name}-{kind}", name, kind) for kind, name in zip(READS[one.role], names, strict=False)]


@pytest.mark.parametrize("one", [one for one in CHOOSING if one.case.batch], ids=lambda one: one.name)
def test_an_empty_batch(one: RoleCase) -> None:
    for sampler in some_samplers(one):
        operands = one.case.empty()
        name = "selection" if one.role is Role.OUTPUT else one.role.value
        output = call(one.case, operands, {name: choose(role_selector(one, sampler), one, operands)})
        assert output.shape == one.case.exact(operands).shape
        assert output.numel() == 0
        for name, gradient in gradients(output, operands).items():
            assert gradient.shape == operands[name].shape
            assert not gradient.any()


@choosing_gradients
def test_zeros_give_zeros(one: RoleCase) -> None:
    """A gradient or an operand of zeros, all of whose pairs score zero: no NaN, and the other gradients as they are."""
    for zero, operands in (("gradient", one.case.operands(grad=True)), (one.other, one.case.operands(grad=True))):
        if zero != "gradient":
            operands[zero] = torch.zeros_like(operands[zero]).requires_grad_()
        exact = one.case.exact(operands)
        towards = upstream(exact) * (zero != "gradient")
        wanted = torch.autograd.grad(exact, list(operands.values()), towards)
        for sampler in some_samplers(one):
            output = call(one.case, operands, {one.role.value: choose(role_selector(one, sampler), one, operands)})
            found = torch.autograd.grad(output, list(operands.values()), towards)
            for name, value, expected in zip(operands, found, wanted, strict=True):
                assert torch.equal(value, torch.zeros_like(value)) if name == one.operand else True
                close(value, expected)


@choosing_gradients
def test_one_pair_that_is_not_zero_is_always_drawn(one: RoleCase) -> None:
    """Without uniform probability the sampled gradient is then the exact one."""
    for name, scores in (("bernoulli", "online"), ("systematic", "gradient"), ("crs", "online"), ("wta", "gradient")):
        for group in {0, one.groups - 1}:
            sampler = SamplerCase("", name, scores)
            operands, selector = one.case.operands(grad=True), role_selector(one, sampler)
            selector.epsilon = 0.0
            output = call(one.case, operands, {one.role.value: choose(selector, one, operands)})
            towards = torch.where(one.places == group * one.pairs + 1, upstream(output), 0.0)
            (found,) = torch.autograd.grad(output, operands[one.operand], towards)
            (wanted,) = torch.autograd.grad(one.case.exact(operands), operands[one.operand], towards)
            assert bool(wanted.any())
            close(found, wanted)


@choosing_gradients
def test_a_number_that_is_not_finite_is_never_hidden(one: RoleCase) -> None:
    """Where the exact gradient is not finite, the sampled one is not either, if the scores read the factor."""
    for sampler in some_samplers(one):
        reads = READS[one.role][sampler.scores].split()
        sides = ["gradient"] * ("gradient" in reads) + [one.other] * (len(reads) > ("gradient" in reads))
        for side, number in zip(sides, (math.nan, math.inf), strict=False):
            operands, selector = one.case.operands(), role_selector(one, sampler, ratio=0.3)
            exact = one.case.exact(operands)
            towards = upstream(exact)
            target = towards if side == "gradient" else operands[side]
            target.view(-1)[target.numel() // 2] = number
            scores = one.scores(operands, towards, sampler.scores)
            if int((~torch.isfinite(scores)).sum(1).max()) > selector.spec.count(one.pairs):
                continue  # more than can be drawn: a number of the input may be read by many positions
            operands = {name: value.requires_grad_() for name, value in operands.items()}
            wanted = torch.autograd.grad(one.case.exact(operands), operands[one.operand], towards)[0]
            output = call(one.case, operands, {one.role.value: choose(selector, one, operands)})
            (found,) = torch.autograd.grad(output, operands[one.operand], towards)
            assert not (~torch.isfinite(wanted) & torch.isfinite(found)).any(), (sampler.name, side, number)


@pytest.mark.parametrize("rows", [1, 3], ids=["few-rows", "more-rows"])
@pytest.mark.parametrize("role", [Role.GRAD_INPUT, Role.GRAD_WEIGHT])
def test_a_large_scale_does_not_overflow_before_the_product(rows: int, role: Role) -> None:
    """The product of scale and factor is taken in float32 and rounded once: 1e5 itself is no float16."""
    x, w = torch.full((rows, 2), 1e-3).half(), torch.full((3, 2), 1e-3).half()
    how = {role.value: Selection(torch.tensor([[0]]), torch.tensor([[1e5]]))}
    output = linear(x.requires_grad_(), w.requires_grad_(), **how)
    towards = torch.full_like(output, 1e-3)
    (found,) = torch.autograd.grad(output, x if role is Role.GRAD_INPUT else w, towards)
    torch.testing.assert_close(found, torch.full_like(found, 0.1), rtol=1e-2, atol=0)


def test_several_backward_passes_of_one_forward_draw_the_same() -> None:
    """Late selections take the numbers of the forward pass."""
    one = ROLE_CASES["conv2d-grad_weight-positions"]
    operands = one.case.operands(grad=True)
    choice = choose(role_selector(one, SamplerCase("", "bernoulli")), one, operands)
    output = call(one.case, operands, {one.role.value: choice})
    first, second = (gradients_kept(output, operands) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
