"""Sampled gradients of every op against exact gradients of a masked upstream gradient.

A sample of out-features or rows is the exact gradient for an upstream gradient that is zero outside the sample and
scaled inside it. That is the oracle, and it calls nothing of the code under test.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from fx_approx.core.candidates import Role
from fx_approx.ops import BackwardDrawn, ForwardDrawn, Rule
from fx_approx.runtime.rng import Draw, draw
from fx_approx.runtime.selector import Selector
from fx_approx.sampling import SAMPLERS, SamplerConfig, Selection, get_sampler
from tests.families import OP_CASES, SAMPLER_CASES, OpCase, Operands, gradients

SPEC, POSITIONS = SamplerConfig(), SamplerConfig(positions=True)
BATCHED = SamplerConfig(per_batch=True)
# Axes of the output that are columns, those that are rows, those of the batch; of einsum rows the labels tell.
EINSUM = {
    "einsum-linear": ((2,), (0, 1), ()),
    "einsum-batch": ((3,), (2,), (0, 1)),
    "einsum-two-contracted": ((1,), (0,), ()),
    "einsum-implicit-turned": ((1,), (0,), ()),
    "einsum-row-summed": ((0,), (1,), ()),
}
CASES = {name: case for name, case in OP_CASES.items() if not case.vector}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
gradient_roles = pytest.mark.parametrize("role", [Role.GRAD_INPUT, Role.GRAD_WEIGHT], ids=str)


def axes(case: OpCase, output: Tensor, positions: bool) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Axes of the output: columns, rows, batch."""
    if case.name in EINSUM:
        return EINSUM[case.name]
    last = output.dim() - 1
    if case.kind.startswith("conv"):
        spatial = int(case.kind[4])
        channel = output.dim() - spatial - 1
        examples = (0,) if channel else ()
        return (channel,), (*examples, *(range(channel + 1, last + 1) if positions else ())), ()
    if case.kind == "linear" or len(case.shapes[case.op.rhs]) == 2:
        return (last,), tuple(range(last)), ()
    return (last,), (last - 1,), tuple(range(last - 1))


def mask(
    case: OpCase, output: Tensor, role: Role, choice: Selection, positions: bool, per_batch: bool = False
) -> Tensor:
    """What multiplies the upstream gradient: the scales of the sample, zero elsewhere."""
    columns, rows, batch = axes(case, output, positions)
    wanted = columns if role is Role.GRAD_INPUT else rows
    wanted = (*batch, *wanted) if per_batch else wanted
    sizes = [output.shape[axis] for axis in wanted]
    values = torch.ones_like(choice.indices, dtype=torch.float64) if choice.scale is None else choice.scale.double()
    groups = choice.indices.shape[0]
    flat = torch.zeros(max(1, torch.Size(sizes).numel()), dtype=torch.float64).view(groups, -1)
    flat.scatter_(1, choice.indices, values)
    shape = [output.shape[axis] if axis in wanted else 1 for axis in range(output.dim())]
    return flat.reshape(shape)


def selection(groups: int, pairs: int, scaled: bool, seed: int = 0) -> Selection:
    generator = torch.Generator().manual_seed(seed)
    k = (pairs + 1) // 2
    rows = torch.stack([torch.randperm(pairs, generator=generator)[:k].sort().values for _ in range(groups)])
    scale = torch.rand(groups, k, generator=generator, dtype=torch.float64) + 0.5
    if k > 1:
        scale[0, -1] = 0.0
    return Selection(rows, scale if scaled else None)


def counts(case: OpCase, operands: Operands, role: Role, spec: SamplerConfig) -> tuple[int, int]:
    return case.op.roles.count(role, operands[case.op.lhs], operands[case.op.rhs], case.plain, spec)


def upstream(output: Tensor) -> Tensor:
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(output.dtype)


def arguments(role: Role, choice: Selection, positions: bool) -> dict[str, object]:
    return {role.value: ForwardDrawn(choice, positions) if positions else choice}


def expected(case: OpCase, operands: Operands, role: Role, factor: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Exact gradients, but that of one operand for the masked upstream gradient."""
    names = list(operands)
    exact = dict(zip(names, torch.autograd.grad(case.exact(operands), operands.values(), grad), strict=True))
    target = case.op.lhs if role is Role.GRAD_INPUT else case.op.rhs
    (exact[target],) = torch.autograd.grad(case.exact(operands), operands[target], grad * factor)
    return exact


@every_case
@gradient_roles
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("spec", [SPEC, POSITIONS, BATCHED], ids=["shared", "positions", "per-batch"])
def test_a_sampled_gradient_is_the_exact_one_of_a_masked_upstream(
    case: OpCase, role: Role, scaled: bool, spec: SamplerConfig
) -> None:
    operands = case.operands(grad=True)
    positions = spec.positions and role is Role.GRAD_WEIGHT and case.kind.startswith("conv")
    choice = selection(*counts(case, operands, role, spec), scaled)
    output = case.call(case.op.function, operands, **arguments(role, choice, positions))
    torch.testing.assert_close(output, case.exact(operands), rtol=1e-12, atol=1e-12)
    grad = upstream(output)
    found = dict(zip(operands, torch.autograd.grad(output, operands.values(), grad), strict=True))
    factor = mask(case, output, role, choice, positions, spec.per_batch and choice.indices.shape[0] > case.groups)
    for name, value in expected(case, operands, role, factor, grad).items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@every_case
@gradient_roles
@pytest.mark.parametrize("mode", ["alone", "forward", "straight_through"])
def test_gradcheck_of_the_sampled_gradients(case: OpCase, role: Role, mode: str) -> None:
    """The sampled gradients as functions of operands and upstream gradient: the second derivative."""
    operands = case.operands(grad=True)
    choice = selection(*counts(case, operands, role, SPEC), True)
    how = arguments(role, choice, False)
    if mode != "alone":
        how |= {"selection": case.selection(True), "straight_through": mode == "straight_through"}
    names = list(operands)

    def function(grad: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        output = case.call(case.op.function, dict(zip(names, values, strict=True)), **how)
        return torch.autograd.grad(output, values, grad, create_graph=True)

    grad = upstream(case.exact(operands)).requires_grad_()
    assert torch.autograd.gradcheck(function, (grad, *operands.values()), fast_mode=True)


@every_case
def test_straight_through_has_the_gradients_of_the_exact_product(case: OpCase) -> None:
    operands, choice = case.operands(grad=True), case.selection(True)
    output = case.call(case.op.function, operands, selection=choice, straight_through=True)
    torch.testing.assert_close(output, case.oracle(operands, choice), rtol=1e-11, atol=1e-11)
    grad = upstream(output)
    wanted = torch.autograd.grad(case.exact(operands), operands.values(), grad)
    for found, value in zip(torch.autograd.grad(output, operands.values(), grad), wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-11, atol=1e-11)


@every_case
@gradient_roles
def test_a_gradient_of_a_sampled_output_is_sampled_once_more(case: OpCase, role: Role) -> None:
    """Forward mode and a gradient role: the masked upstream gradient through the sum over the chosen pairs."""
    operands, out = case.operands(grad=True), case.selection(True)
    choice = selection(*counts(case, operands, role, SPEC), True)
    output = case.call(case.op.function, operands, selection=out, **arguments(role, choice, False))
    grad = upstream(output)
    factor = mask(case, output, role, choice, False)
    target = case.op.lhs if role is Role.GRAD_INPUT else case.op.rhs
    (wanted,) = torch.autograd.grad(case.oracle(operands, out), operands[target], grad * factor)
    (found,) = torch.autograd.grad(output, operands[target], grad)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@every_case
@gradient_roles
@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("reads", [(True, True), (True, False)], ids=["online", "gradient"])
def test_a_late_selection_is_that_of_the_formula(
    case: OpCase, role: Role, sampler: str, reads: tuple[bool, bool]
) -> None:
    """Scores by hand: norms of slices of the upstream gradient times those of the other operand."""
    if case.kind == "einsum" and case.name != "einsum-linear":
        pytest.skip("the slices are spelled out for one einsum only")
    operands = case.operands(grad=True)
    groups, pairs = counts(case, operands, role, SPEC)
    k, drawer = max(1, pairs // 2), get_sampler(sampler)
    if k >= pairs:
        pytest.skip("one pair")
    numbers = torch.rand(groups, drawer.uniforms(pairs, k), generator=torch.Generator().manual_seed(3))
    output = case.exact(operands)
    grad = upstream(output)
    scores = hand_scores(case, operands, role, grad, groups, pairs, reads)
    choice = drawer.draw(scores, k, numbers, epsilon=drawer.default_epsilon)
    late = BackwardDrawn(Rule(sampler, k, drawer.default_epsilon, *reads), numbers)
    target = case.op.lhs if role is Role.GRAD_INPUT else case.op.rhs
    found = torch.autograd.grad(case.call(case.op.function, operands, **{role.value: late}), operands[target], grad)
    wanted = expected(case, operands, role, mask(case, output, role, choice, False), grad)[target]
    torch.testing.assert_close(found[0], wanted, rtol=1e-10, atol=1e-10)


def hand_scores(
    case: OpCase, operands: Operands, role: Role, grad: Tensor, groups: int, pairs: int, reads: tuple[bool, bool]
) -> Tensor:
    columns, rows, batch = axes(case, grad, False)
    own = columns if role is Role.GRAD_INPUT else rows
    lhs, rhs = operands[case.op.lhs].detach(), operands[case.op.rhs].detach()
    other = rhs if role is Role.GRAD_INPUT else lhs
    squares = grad.square().sum([a for a in range(grad.dim()) if a not in (*own, *batch)]).reshape(-1, groups * pairs)
    if not reads[1]:
        factors = torch.ones_like(squares)
    elif case.kind == "linear" or case.name == "einsum-linear":
        factors = other.square().sum(-1).reshape(1, -1)
    elif case.kind.startswith("conv"):
        examples = other if role is Role.GRAD_INPUT or lhs.dim() == rhs.dim() else other.unsqueeze(0)
        factors = examples.flatten(1).square().sum(1).reshape(1, -1)
    else:
        side = rhs.square().sum(-2) if role is Role.GRAD_INPUT else lhs.square().sum(-1)
        lead = torch.broadcast_shapes(lhs.shape[:-2], rhs.shape[:-2]) if rhs.dim() > 2 else ()
        factors = side.expand(*lead, side.shape[-1]).reshape(-1, pairs) if lead else side.reshape(1, -1)
    return (squares * factors).sum(0).sqrt().view(groups, pairs)


@every_case
@pytest.mark.parametrize("sampler", SAMPLER_CASES)
def test_a_ratio_of_one_is_bitwise_exact_in_every_role(case: OpCase, sampler: str) -> None:
    operands = case.operands(dtype=torch.float32, grad=True)
    lhs, rhs = operands[case.op.lhs], operands[case.op.rhs]
    given = Draw(torch.tensor([0, 0]), draw(torch.tensor([0, 0]), [], []))
    how = {}
    for role in (Role.GRAD_INPUT, Role.GRAD_WEIGHT):
        spec = SamplerConfig(SAMPLER_CASES[sampler].sampler, 1.0)
        selector = Selector(case.kind, case.plain, spec, 0, None, nn.Identity(), case.groups, role)
        how[role.value] = selector(lhs, rhs, given)
    for straight_through in (False, True):
        output = case.call(case.op.function, operands, **how, straight_through=straight_through)
        assert torch.equal(output, case.exact(operands))
        for found, value in zip(
            gradients(output, operands).values(), gradients(case.exact(operands), operands).values(), strict=True
        ):
            assert torch.equal(found, value)


@gradient_roles
@pytest.mark.parametrize("name", ["linear", "conv2d", "bmm"])
def test_the_mean_over_all_samples_is_the_exact_gradient(name: str, role: Role) -> None:
    """Every subset of Bernoulli sampling with its probability, probabilities 1/4, 1/2, ... by pair."""
    case = CASES[name]
    operands = case.operands(grad=True)
    groups, pairs = counts(case, operands, role, SPEC)
    assert groups == 1 and pairs <= 4
    chance = torch.tensor([0.25, 0.5, 0.75, 0.6][:pairs], dtype=torch.float64)
    target = operands[case.op.lhs if role is Role.GRAD_INPUT else case.op.rhs]
    grad = upstream(case.exact(operands))
    mean = torch.zeros_like(target)
    for kept in itertools.product([False, True], repeat=pairs):
        chosen = torch.tensor(kept)
        weight = torch.where(chosen, chance, 1 - chance).prod()
        scale = torch.where(chosen, 1 / chance, 0.0).unsqueeze(0)
        choice = Selection(torch.arange(pairs).unsqueeze(0), scale)
        output = case.call(case.op.function, operands, **{role.value: choice})
        mean += weight * torch.autograd.grad(output, target, grad)[0]
    (exact,) = torch.autograd.grad(case.exact(operands), target, grad)
    torch.testing.assert_close(mean, exact, rtol=1e-10, atol=1e-10)


@gradient_roles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["linear", "conv2d-grouped", "bmm", "matmul-folded"])
def test_other_dtypes(name: str, role: Role, dtype: torch.dtype) -> None:
    case = CASES[name]
    operands = case.operands(dtype=dtype, grad=True)
    choice = selection(*counts(case, operands, role, SPEC), True)
    output = case.call(case.op.function, operands, **{role.value: choice})
    found = gradients(output, operands)
    wide = {key: value.detach().double().requires_grad_() for key, value in operands.items()}
    wanted = gradients(case.call(case.op.function, wide, **{role.value: choice}), wide)
    for value, exact in zip(found.values(), wanted.values(), strict=True):
        assert value.dtype == dtype
        assert (value.double() - exact).abs().max() <= 0.06 * exact.abs().max()
