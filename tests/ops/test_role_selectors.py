"""Selectors of gradients, and of each product of a batch: what they choose, from which scores, and when."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fx_approx import ops
from fx_approx.core.candidates import Role
from fx_approx.ops import BackwardDrawn, ForwardDrawn
from fx_approx.runtime.layers import SampledConv2d, SampledLinear, swap
from fx_approx.runtime.rng import Draw, draw
from fx_approx.runtime.selector import Selector, Site
from fx_approx.sampling import SamplerConfig, Selection, get_score
from tests.families import OpCase, Operands, SamplerCase, gradients, upstream
from tests.op_case import conv_case, linear_case
from tests.ops.role_selecting import choose, role_selector, samplers_of
from tests.ops.roles import EACH_OUTPUT, EVEN, READS, ROLE_CASES, ROWS, RoleCase
from tests.ops.selecting import outcomes, randomness
from tests.ops.test_roles import call, close, gradients_kept

pytestmark = pytest.mark.filterwarnings(EVEN)

EVERY = [one for one in [*ROLE_CASES.values(), *EACH_OUTPUT.values()] if not one.case.vector]
CHOOSING = [one for one in EVERY if one.pairs > 1]
LEARNING = [one for one in CHOOSING if one.role is Role.GRAD_WEIGHT]
KINDS = [(one, kind) for one in EVERY for kind in READS[one.role] if one.role is Role.OUTPUT or get_score(kind).early]
STALE, ONLINE = SamplerCase("ema", "systematic", scores="ema"), SamplerCase("online", "systematic")

cases = pytest.mark.parametrize("case", [c for c in ROWS.values() if not c.vector], ids=lambda case: case.name)
every = pytest.mark.parametrize("one", EVERY, ids=lambda one: one.name)
choosing = pytest.mark.parametrize("one", CHOOSING, ids=lambda one: one.name)
FIRST = {one.case.kind: one.case for one in reversed(CHOOSING)}.values()
# Every sampler for one row of every op, and for all others one of each kind of scores.
SAMPLED = [
    (one, sampler)
    for one in CHOOSING
    for sampler in (
        samplers_of(one.role) if one.case in FIRST else {s.scores: s for s in samplers_of(one.role)}.values()
    )
]
sampled = pytest.mark.parametrize(("one", "sampler"), SAMPLED, ids=lambda value: value.name)


def by_hand(selector: Selector, one: RoleCase, scores: Tensor, step: int = 0) -> Selection:
    """A draw from ``scores`` with the uniforms of that step."""
    k, sampler = selector.spec.count(one.pairs), selector.sampler
    numbers = draw(torch.tensor([7, step]), [selector.site], [one.groups * sampler.uniforms(one.pairs, k)])
    return sampler.draw(scores, k, numbers.view(one.groups, -1), epsilon=selector.epsilon)


def selection_in(choice: Any) -> Selection:
    assert isinstance(choice, ForwardDrawn | Selection)
    return choice.selection if isinstance(choice, ForwardDrawn) else choice


@sampled
def test_the_selection_is_that_of_the_formula(one: RoleCase, sampler: SamplerCase) -> None:
    """Made early, or late, from the gradient, with the uniforms of the forward pass: then the gradient tells."""
    operands, selector = one.case.operands(grad=True), role_selector(one, sampler)
    choice = choose(selector, one, operands)
    source = one.case.exact(operands)
    towards = upstream(source)
    expected = by_hand(selector, one, one.scores(operands, towards, sampler.scores))
    if one.role is not Role.OUTPUT and "gradient" in READS[one.role][sampler.scores]:
        assert isinstance(choice, BackwardDrawn)
        assert choice.rule.k == selector.spec.count(one.pairs)
        assert selector.last_count is None
    else:
        found = selection_in(choice)
        assert torch.equal(found.indices, expected.indices)
        assert (found.scale is None) == (expected.scale is None)
        if found.scale is not None and expected.scale is not None:
            torch.testing.assert_close(found.scale, expected.scale, rtol=1e-5, atol=0, check_dtype=False)
        assert selector.last_count == expected.indices.shape[1]
    name = "selection" if one.role is Role.OUTPUT else one.role.value
    output = call(one.case, operands, {name: choice})
    if one.role is Role.OUTPUT:
        torch.testing.assert_close(output, one.output(operands, expected), rtol=1e-10, atol=1e-12)
        return
    close(output, source)
    wanted = gradients_kept(source, operands)
    wanted[one.operand] = one.oracle(source, operands[one.operand], towards, expected)
    for argument, found_gradient in gradients(output, operands).items():
        torch.testing.assert_close(found_gradient, wanted[argument], rtol=1e-5, atol=1e-12)


@every
def test_pairs_and_groups(one: RoleCase) -> None:
    operands, spec = one.case.operands(), SamplerConfig(positions=one.positions, per_batch=one.per_batch)
    lhs, rhs = operands[one.case.op.lhs], operands[one.case.op.rhs]
    assert one.case.op.roles.count(one.role, lhs, rhs, one.case.plain, spec) == (one.groups, one.pairs)
    shape = one.case.op.geometry(lhs.shape, rhs.shape, one.case.plain)
    assert shape.role_pairs(one.role, one.positions) == one.pairs
    if not one.per_batch:
        # The product counts the same operations whichever way its pairs are cut: all of them together are all of it.
        assert shape.flops() == shape.flops(m=one.pairs * (1 if one.positions else shape.row_block)) or (
            one.role is not Role.GRAD_WEIGHT
        )


@pytest.mark.parametrize(("one", "kind"), KINDS, ids=lambda value: getattr(value, "name", value))
def test_early_scores_equal_the_formula(one: RoleCase, kind: str) -> None:
    spec = SamplerConfig(scores=kind, positions=one.positions, per_batch=one.per_batch)
    for dtype in (torch.float64, torch.bfloat16):
        operands = one.case.operands(dtype=dtype)
        lhs, rhs = operands[one.case.op.lhs], operands[one.case.op.rhs]
        actual = one.case.op.roles.scores(one.role, lhs, rhs, one.case.plain, spec, None)
        expected = one.scores(operands, None, kind)
        if kind == "uniform":  # all alike, whatever they are
            expected = expected * actual[0, 0].double()
        assert actual.dtype == torch.promote_types(dtype, torch.float32)
        if dtype == torch.bfloat16 and one.case.name == "einsum-row-summed":
            continue  # the operand is summed up in its own type first
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=0)


def positions_of(one: RoleCase) -> int:
    """Rows that have a running norm of their own: the last axis of several, or an output position."""
    batch, rows, _ = one.case.parts
    if one.case.kind.startswith("conv"):
        return one.pairs // (one.case.shapes["input"][0] if rows else 1) if one.positions else 1
    return one.sizes[rows[-1]] if len(batch + rows) > 1 else 1


@pytest.mark.parametrize("one", LEARNING, ids=lambda one: one.name)
def test_stale_scores_learn_the_norms_of_the_gradient(one: RoleCase) -> None:
    """Running means of each position, 0.9 of the old; the first step counts as it is, and the input's norms alone."""
    operands, selector, expected = one.case.operands(grad=True), role_selector(one, STALE), None
    positions = positions_of(one)
    for step in range(4):
        choice = choose(selector, one, operands, randomness(selector, step))
        running = None if expected is None else expected.tolist()
        wanted = by_hand(selector, one, one.scores(operands, None, "ema", running), step)
        assert torch.equal(selection_in(choice).indices, wanted.indices)
        assert selector.running is not None
        assert selector.running.shape == (positions,)
        output = call(one.case, operands, {"grad_weight": choice})
        towards = upstream(output, seed=step)
        if step == 2:  # an overflow changes nothing
            towards.fill_(torch.inf)
        torch.autograd.grad(output, list(operands.values()), towards)
        if step != 2:
            now = one.row_norms(towards).view(-1, positions).square().mean(0).sqrt()
            expected = now if expected is None else 0.9 * expected + 0.1 * now
        assert expected is not None
        torch.testing.assert_close(selector.running.double(), expected, rtol=1e-5, atol=0)


@choosing
def test_the_number_of_pairs_may_be_known_beforehand(one: RoleCase) -> None:
    operands = one.case.operands(grad=True)
    known, unknown = (role_selector(one, ONLINE, known=k, scores="uniform") for k in (True, False))
    assert known.k == known.spec.count(one.pairs)
    assert known.count == one.groups * (one.pairs + 1)
    assert (unknown.k, unknown.count) == (0, 0)
    first, second = (selection_in(choose(selector, one, operands)) for selector in (known, unknown))
    assert torch.equal(first.indices, second.indices)
    assert not torch.equal(first.indices[:, :0], first.indices)


@choosing
def test_the_count_is_aligned(one: RoleCase) -> None:
    for ratio, round_to, minimal in ((0.4, 2, 1), (0.1, 1, 2), (0.7, 3, 1), (0.1, 8, 1)):
        selector = role_selector(one, ONLINE, ratio, round_to=round_to, min_k=minimal, scores="uniform")
        k = selector.spec.count(one.pairs)
        choice = choose(selector, one, one.case.operands(grad=True))
        if k == one.pairs:
            assert choice is None
        else:
            assert selection_in(choice).indices.shape == (one.groups, k)
            assert k % round_to == 0 or k == minimal


@cases
def test_ratio_one_is_bitwise_exact_in_every_role(case: OpCase) -> None:
    operands = case.operands(dtype=torch.float32, grad=True)
    chosen = {}
    for one in [one for one in EVERY if one.case is case]:
        for sampler in samplers_of(one.role):
            selector = role_selector(one, sampler, ratio=1.0)
            assert selector.exact
            chosen["selection" if one.role is Role.OUTPUT else one.role.value] = choice = choose(
                selector, one, operands
            )
            assert choice is None
    output, exact = call(case, operands, chosen, straight_through=True), case.exact(operands)
    assert torch.equal(output, exact)
    found, wanted = gradients(output, operands), gradients(exact, operands)
    assert all(torch.equal(found[name], wanted[name]) for name in operands)


@choosing
def test_a_gradient_that_autograd_does_not_run_is_not_sampled(one: RoleCase) -> None:
    selector, operands = role_selector(one, ONLINE), one.case.operands(grad=True)
    assert choose(selector, one, operands) is not None
    with torch.no_grad():
        assert (choose(selector, one, operands) is None) == (one.role is not Role.OUTPUT)
    if one.role is not Role.OUTPUT:
        operands[one.operand].requires_grad_(False)
        assert choose(selector, one, operands) is None
        operands[one.operand].requires_grad_()
        operands[one.other].requires_grad_(False)
        assert choose(selector, one, operands) is not None
    selector.enabled = False
    assert choose(selector, one, operands) is None
    selector.enabled = True
    selector.owner[0].eval()
    assert choose(selector, one, operands) is None
    selector.owner[0].train()
    integers = {name: value.detach().long() for name, value in operands.items()}
    assert choose(selector, one, integers) is None


TINY = [
    RoleCase(linear_case("linear", (3, 2), (3, 2), bias=True), Role.GRAD_INPUT),
    RoleCase(linear_case("linear", (3, 2), (3, 2), bias=True), Role.GRAD_WEIGHT),
    RoleCase(conv_case("conv1d", (3, 2, 4), (3, 2, 2), padding=1, stride=2), Role.GRAD_INPUT),
    RoleCase(conv_case("conv1d", (3, 2, 4), (3, 2, 2), padding=1, stride=2), Role.GRAD_WEIGHT),
    RoleCase(conv_case("conv1d-unbatched", (2, 4), (3, 2, 2)), Role.GRAD_WEIGHT, positions=True),
]


@pytest.mark.parametrize("sampler", sorted({s.sampler for s in samplers_of(Role.GRAD_INPUT) if s.unbiased}))
@pytest.mark.parametrize("one", TINY, ids=lambda one: one.name)
def test_the_mean_of_all_outcomes_is_the_exact_gradient(one: RoleCase, sampler: str) -> None:
    """Three pairs, two of them drawn, late and early, all outcomes with their probabilities."""
    assert one.pairs == 3
    operands = one.case.operands(grad=True)
    exact = gradients(one.case.exact(operands), operands)[one.operand]
    towards = upstream(one.case.exact(operands))
    for scores in ("online", "gradient", "input" if one.role is Role.GRAD_WEIGHT else "weight"):
        row = SamplerCase("", sampler, scores)
        selector = role_selector(one, row, known=True)
        assert selector.k == 2
        mean = torch.zeros_like(exact)
        for numbers, probability in outcomes(row, one.scores(operands, towards, scores)[0], 2):
            choice = choose(selector, one, operands, Draw(torch.tensor([7, 0]), numbers))
            output = call(one.case, operands, {one.role.value: choice})
            mean += probability * gradients(output, operands)[one.operand]
        torch.testing.assert_close(mean, exact, rtol=0, atol=1e-10)


class Draws:
    """The randomness of step 3."""

    def draw_for(self, selector: Selector, inputs: list[Tensor]) -> Draw:
        return randomness(selector, 3)


def layer_with(layer: Any, kind: str, op_kwargs: dict[str, Any], groups: int, through: bool) -> dict[Role, Selector]:
    """Samples all three products of a layer in place."""
    specs = {
        Role.OUTPUT: SamplerConfig("systematic", 0.5),
        Role.GRAD_INPUT: SamplerConfig("bernoulli", 0.5, scores="gradient"),
        Role.GRAD_WEIGHT: SamplerConfig("wta", 0.5, scores="input"),
    }
    selectors = {
        role: Selector(kind, op_kwargs, spec, site, None, layer, groups, role)
        for site, (role, spec) in enumerate(specs.items())
    }
    swap(layer, Site(selectors, through, Draws()))
    return selectors


@pytest.mark.parametrize("through", [False, True], ids=["forward", "straight-through"])
def test_a_layer_samples_all_its_products(through: bool) -> None:
    linear, conv = nn.Linear(6, 4).double(), nn.Conv2d(4, 6, 3, padding=1, groups=2).double()
    op_kwargs = {"stride": 1, "padding": 1, "dilation": 1, "groups": 2}
    todo: list[tuple[Any, str, dict[str, Any], Tensor]] = [
        (linear, "linear", {}, torch.randn(5, 6, dtype=torch.float64, requires_grad=True)),
        (conv, "conv2d", op_kwargs, torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True)),
    ]
    for layer, kind, plain, x in todo:
        selectors = layer_with(layer, kind, plain, plain.get("groups", 1), through)
        assert isinstance(layer, SampledLinear | SampledConv2d)
        given = {role: selector(x, layer.weight, randomness(selector, 3)) for role, selector in selectors.items()}
        function: Any = getattr(ops, kind)
        how = {"selection": given[Role.OUTPUT], "straight_through": through}
        how |= {role.value: given[role] for role in (Role.GRAD_INPUT, Role.GRAD_WEIGHT)}
        expected, output = function(x, layer.weight, layer.bias, **plain, **how), layer(x)
        assert torch.equal(output, expected)
        # What a graph hands in is taken instead: four fields of ProductSampling, or the selection alone.
        assert torch.equal(
            layer(x, given[Role.OUTPUT]), function(x, layer.weight, layer.bias, **plain, selection=given[Role.OUTPUT])
        )
        handed = layer(x, *(given[role] for role in Role), through)
        leaves, towards = [x, layer.weight, layer.bias], torch.randn_like(output)
        wanted = torch.autograd.grad(expected, leaves, towards)
        for result in (output, handed):
            found = torch.autograd.grad(result, leaves, towards)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("positions", [False, True], ids=["examples", "positions"])
def test_sampled_gradients_of_a_convolution_keep_its_padding_mode(mode: str, positions: bool) -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode).double()  # type: ignore[arg-type]
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    exact = layer(x)
    towards = torch.randn_like(exact)
    case = conv_case("", (4, 3, 5, 5), (4, 3, 3, 3), padding=1)
    rows, columns = RoleCase(case, Role.GRAD_WEIGHT, positions=positions), RoleCase(case, Role.GRAD_INPUT)
    chosen = rows.selection(True), columns.selection(True)
    wanted = [columns.oracle(exact, x, towards, chosen[1]), rows.oracle(exact, layer.weight, towards, chosen[0])]
    given = (None, columns.given(chosen[1])["grad_input"], rows.given(chosen[0])["grad_weight"], False)
    swap(layer, Site({}, False, Draws()))
    output = layer(x, *given)
    close(output, exact)
    for found, value in zip(torch.autograd.grad(output, [x, layer.weight], towards), wanted, strict=True):
        close(found, value)


def test_selectors_of_one_step_draw_apart() -> None:
    """Two sites with the same scores, and the same site in two steps."""
    one = RoleCase(linear_case("linear", (40, 6), (40, 6), bias=True), Role.GRAD_INPUT)
    operands: Operands = one.case.operands(grad=True)
    rows = []
    for site, step in itertools.product((1, 2), (0, 1)):
        selector = role_selector(one, ONLINE, site=site, scores="uniform")
        rows.append(selection_in(choose(selector, one, operands, randomness(selector, step))).indices)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(rows, 2))
