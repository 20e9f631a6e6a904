"""Selectors of outputs and gradients: what they choose, from which scores, and what the products then promise.

Every sampler on one row of each op, each op with every way to form pairs.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fx_approx import ops
from fx_approx.core.candidates import Role
from fx_approx.ops import BackwardDrawn
from fx_approx.runtime.layers import SampledConv2d, SampledLinear, swap
from fx_approx.runtime.rng import Draw, draw
from fx_approx.runtime.selector import Selector, Site
from fx_approx.sampling import SamplerConfig, Selection
from tests.families import (
    OP_CASES,
    SAMPLER_CASES,
    OpCase,
    Operands,
    SamplerCase,
    conv_case,
    dense,
    gradients,
    linear_case,
    product_case,
    upstream,
)
from tests.helpers.quick import quick, thinned
from tests.ops.roles import CHOOSING, EVEN, PRODUCTS, READS, ROWS, TYPES, RoleCase
from tests.ops.selecting import choose, outcomes, randomness, samplers_of, selection_in, selector_of
from tests.ops.test_products import close

pytestmark = pytest.mark.filterwarnings(EVEN)

EVERY = [one for one in PRODUCTS.values() if not one.case.vector]
FIRST = {case.kind: case for case in reversed(OP_CASES.values()) if not case.vector}
UNBIASED = [sampler for sampler in SAMPLER_CASES.values() if sampler.unbiased]
STALE, ONLINE = SamplerCase("ema", "systematic", scores="ema"), SamplerCase("online", "systematic")

choosing = pytest.mark.parametrize(
    "one", quick([(one,) for one in CHOOSING], lambda one: one in TYPES), ids=lambda one: one.name
)
types = pytest.mark.parametrize("one", TYPES, ids=lambda one: one.name)


def some_samplers(one: RoleCase) -> list[SamplerCase]:
    """One for all scores: random or not, of any size or always the same."""
    names = itertools.cycle(("bernoulli", "topk", "systematic"))
    return [SamplerCase(f"{name}-{kind}", name, kind) for kind, name in zip(READS[one.role], names, strict=False)]


def by_hand(selector: Selector, one: RoleCase, scores: Tensor, step: int = 0) -> Selection:
    """A draw from ``scores`` with the uniforms of that step."""
    k, sampler = selector.spec.count(one.pairs), selector.sampler
    numbers = draw(torch.tensor([7, step]), [selector.site], [one.groups * sampler.uniforms(one.pairs, k)])
    return sampler.draw(scores, k, numbers.view(one.groups, -1), epsilon=selector.epsilon)


def late(one: RoleCase, sampler: SamplerCase) -> bool:
    """The scores read the gradient, so the selection is made in the backward pass."""
    return one.role is not Role.OUTPUT and "gradient" in READS[one.role][sampler.scores]


def sampled() -> list[tuple[RoleCase, SamplerCase]]:
    """Every sampler on one product of each type; on the others one of them, and of gradients one that is drawn late."""
    found = []
    for place, one in enumerate(CHOOSING):
        every = samplers_of(one.role)
        found += [
            (one, sampler)
            for i, sampler in enumerate(every)
            if one in TYPES or i == place % len(every) or (sampler.name == "bernoulli" and one.role is not Role.OUTPUT)
        ]
    return found


def applied(one: RoleCase, operands: Operands, choice: Any) -> Tensor:
    return one.case.call(one.case.op.function, operands, **{one.argument: choice})


@pytest.mark.parametrize(("one", "sampler"), thinned(sampled()), ids=lambda value: value.name)
def test_the_selection_and_what_comes_of_it_are_those_of_the_formula(one: RoleCase, sampler: SamplerCase) -> None:
    """Made early, or late, from the gradient, with the uniforms of the forward pass: then the gradient tells.

    The numbers of the pairs may be known before the call or not; another site and another step draw apart.
    """
    operands, exact = one.case.operands(grad=True), one.case.exact(one.case.operands())
    here, known = selector_of(one, sampler), selector_of(one, sampler, known=True)
    k = here.spec.count(one.pairs)
    assert (here.k, here.count, known.k) == (0, 0, k)
    assert known.count == one.groups * known.sampler.uniforms(one.pairs, k)
    towards = upstream(exact)
    expected = by_hand(here, one, one.scores(operands, towards, sampler.scores))
    choice, other = (choose(selector, one, operands) for selector in (here, known))
    if late(one, sampler):
        assert isinstance(choice, BackwardDrawn) and isinstance(other, BackwardDrawn)
        assert choice.rule == other.rule and choice.rule.k == k
        assert (choice.numbers is None and other.numbers is None) or torch.equal(choice.numbers, other.numbers)
        assert here.last_count is None
    else:
        found = selection_in(choice)
        assert found.indices.dtype == torch.int64 and found.indices.shape[0] == one.groups
        assert bool((found.indices.diff(dim=1) > 0).all())
        assert torch.equal(found.indices, expected.indices)
        assert (found.scale is None) == (expected.scale is None)
        if found.scale is not None and expected.scale is not None:
            assert found.scale.shape == found.indices.shape and not found.scale.requires_grad
            torch.testing.assert_close(found.scale, expected.scale, rtol=1e-5, atol=0, check_dtype=False)
        assert here.last_count == found.indices.shape[1]
        again, sites = choose(here, one, operands), [selector_of(one, sampler, site=site) for site in range(2, 8)]
        drawn = [dense(selection_in(c), one.pairs) for c in (choice, other, again)]
        assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
        apart = [choose(s, one, operands, step) for s in sites for step in (0, 1)]
        same = [torch.equal(drawn[0], dense(selection_in(c), one.pairs)) for c in apart]
        assert all(same) if sampler.sampler == "topk" else not all(same)
    output = applied(one, operands, choice)
    if one.role is Role.OUTPUT:
        torch.testing.assert_close(output, one.output(operands, expected), rtol=1e-10, atol=1e-12)
        return
    close(output, exact)
    source = one.case.exact(operands)
    wanted = gradients(source, operands, retain_graph=True)
    wanted[one.operand] = one.oracle(source, operands[one.operand], towards, expected)
    # Several backward passes of one forward draw the same: with the numbers of the forward pass.
    first, second = (gradients(output, operands, retain_graph=True) for _ in range(2))
    for argument, gradient in first.items():
        torch.testing.assert_close(gradient, wanted[argument], rtol=1e-5, atol=1e-12)
        assert torch.equal(gradient, second[argument])


def outcomes_of_the_output() -> list[dict[str, Any]]:
    rows = [case for case in OP_CASES.values() if not case.vector]
    every = [{"case": case, "sampler": sampler} for case in FIRST.values() for sampler in UNBIASED]
    others = [case for case in rows if case not in FIRST.values()]
    return every + [{"case": c, "sampler": UNBIASED[i % len(UNBIASED)]} for i, c in enumerate(others)]


@pytest.mark.parametrize("row", outcomes_of_the_output(), ids=lambda row: f"{row['case'].name}-{row['sampler'].name}")
def test_the_mean_of_all_outcomes_is_the_exact_product(row: dict[str, Any]) -> None:
    """Three pairs, two of them drawn, all outcomes with their probabilities; group by group."""
    one, sampler = RoleCase(row["case"].with_pairs(3), Role.OUTPUT), row["sampler"]
    case, operands = one.case, one.case.operands()
    selector = selector_of(one, sampler, known=True)
    assert selector.k == 2
    exact, terms = case.exact(operands), case.pairs_of(operands)
    each = [list(outcomes(sampler, scores, selector.k)) for scores in case.scores(operands, sampler.scores)]
    for group, possible in enumerate(each):
        mean, scale = torch.zeros_like(exact), torch.zeros(case.pairs, dtype=torch.float64)
        for numbers, probability in possible:
            given = torch.stack([numbers if g == group else each[g][0][0] for g in range(case.groups)])
            selection = selection_in(choose(selector, one, operands, numbers=given.flatten()))
            mean += probability * case.sampled(operands, selection)
            scale += probability * dense(selection, case.pairs)[group]
        torch.testing.assert_close(scale, torch.ones_like(scale), rtol=0, atol=1e-10)
        own = terms[group].abs().sum(0) > 0  # the outputs of this group
        torch.testing.assert_close(mean[own], exact[own], rtol=0, atol=1e-10)


TINY = [
    RoleCase(linear_case("linear", (3, 2), (3, 2)), Role.GRAD_INPUT),
    RoleCase(linear_case("linear", (3, 2), (3, 2)), Role.GRAD_WEIGHT),
    RoleCase(conv_case("conv1d", (3, 2, 4), (3, 2, 2), padding=1, stride=2), Role.GRAD_INPUT),
    RoleCase(conv_case("conv1d", (3, 2, 4), (3, 2, 2), padding=1, stride=2), Role.GRAD_WEIGHT),
    RoleCase(conv_case("conv1d-unbatched", (2, 4), (3, 2, 2)), Role.GRAD_WEIGHT, positions=True),
    RoleCase(product_case("bmm", (2, 3, 2), (2, 2, 3), batch="01"), Role.GRAD_INPUT),
    RoleCase(product_case("bmm", (2, 3, 2), (2, 2, 3), batch="01"), Role.GRAD_WEIGHT),
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
        selector = selector_of(one, row, known=True)
        assert selector.k == 2
        mean = torch.zeros_like(exact)
        for numbers, probability in outcomes(row, one.scores(operands, towards, scores)[0], 2):
            output = applied(one, operands, choose(selector, one, operands, numbers=numbers))
            mean += probability * gradients(output, operands)[one.operand]
        torch.testing.assert_close(mean, exact, rtol=0, atol=1e-10)


def positions_of(one: RoleCase) -> int:
    """Rows that have a running norm of their own: the last axis of several, or an output position."""
    batch, rows, _ = one.case.parts
    if one.case.kind.startswith("conv"):
        return one.pairs // (one.case.shapes["input"][0] if rows else 1) if one.positions else 1
    return one.sizes[rows[-1]] if len(batch + rows) > 1 else 1


@pytest.mark.parametrize("one", [o for o in CHOOSING if o.role is Role.GRAD_WEIGHT], ids=lambda one: one.name)
def test_stale_scores_learn_the_norms_of_the_gradient(one: RoleCase) -> None:
    """Running means of each position, 0.9 of the old; the first step counts as it is, and the input's norms alone."""
    operands, selector, expected = one.case.operands(grad=True), selector_of(one, STALE), None
    positions = positions_of(one)
    for step in range(4):
        choice = choose(selector, one, operands, step)
        running = None if expected is None else expected.tolist()
        wanted = by_hand(selector, one, one.scores(operands, None, "ema", running), step)
        assert torch.equal(selection_in(choice).indices, wanted.indices)
        assert selector.running is not None
        assert selector.running.shape == (positions,)
        output = applied(one, operands, choice)
        towards = upstream(output, seed=step)
        if step == 2:  # an overflow changes nothing
            towards.fill_(torch.inf)
        gradients(output, operands, towards)
        if step != 2:
            now = one.row_norms(towards).view(-1, positions).square().mean(0).sqrt()
            expected = now if expected is None else 0.9 * expected + 0.1 * now
        assert expected is not None
        torch.testing.assert_close(selector.running.double(), expected, rtol=1e-5, atol=0)


@types
def test_counts_are_aligned_and_what_is_not_run_or_switched_off_is_not_sampled(one: RoleCase) -> None:
    operands = one.case.operands(grad=True)
    for ratio, round_to, minimal in ((0.4, 2, 1), (0.1, 1, 2), (0.7, 3, 1), (0.1, 8, 1)):
        selector = selector_of(one, ONLINE, ratio, round_to=round_to, min_k=minimal, scores="uniform")
        k = selector.spec.count(one.pairs)
        choice = choose(selector, one, operands)
        if k == one.pairs:
            assert choice is None
        else:
            assert selection_in(choice).indices.shape == (one.groups, k)
            assert k % round_to == 0 or k == minimal
    selector = selector_of(one, ONLINE)
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


@pytest.mark.parametrize("case", [c for c in ROWS.values() if not c.vector], ids=lambda case: case.name)
def test_ratio_one_is_bitwise_exact_in_every_role(case: OpCase) -> None:
    operands, chosen = case.operands(dtype=torch.float32, grad=True), dict[str, Any]()
    for one in [one for one in EVERY if one.case is case]:
        for sampler in samplers_of(one.role):
            selector = selector_of(one, sampler, ratio=1.0)
            assert selector.exact
            chosen[one.argument] = choose(selector, one, operands)
            assert chosen[one.argument] is None
    exact = case.exact(operands)
    wanted = gradients(exact, operands)
    for straight_through in (False, True):
        output = case.call(case.op.function, operands, **chosen, straight_through=straight_through)
        assert torch.equal(output, exact)
        assert all(torch.equal(value, wanted[name]) for name, value in gradients(output, operands).items())


def test_a_product_with_a_vector_stays_exact() -> None:
    one = RoleCase(OP_CASES["linear-1d"], Role.OUTPUT)
    operands = one.case.operands()
    for sampler in SAMPLER_CASES.values():
        selector = selector_of(one, sampler, known=True)
        assert selector(operands["input"], operands["weight"], randomness(selector, 0)) is None
        # Scores that do not read the input cannot see its shape; the product takes the selection all the same.
        if selector.ahead:
            selection = selection_in(choose(selector, one, operands))
            close(one.case.sampled(operands, selection), one.case.oracle(operands, selection))


@pytest.mark.parametrize("case", [c for c in ROWS.values() if c.batch], ids=lambda case: case.name)
def test_an_empty_batch(case: OpCase) -> None:
    """By selectors, and by selections of the output."""
    operands = case.empty()
    chosen = [("selection", case.selection(True))]
    for one in [one for one in CHOOSING if one.case is case]:
        chosen += [(one.argument, choose(selector_of(one, s), one, operands)) for s in some_samplers(one)]
    for argument, choice in chosen:
        output = case.call(case.op.function, operands, **{argument: choice})
        assert output.shape == case.exact(operands).shape
        assert output.numel() == 0
        for name, gradient in gradients(output, operands).items():
            assert gradient.shape == operands[name].shape
            assert not gradient.any()


def spoiled(one: RoleCase, kind: str, number: float, step: int) -> list[tuple[Operands, Tensor]]:
    """Operands and gradients of the output, one of which has a number in a place that the scores read."""
    reads, found = READS[one.role][kind].split(), []
    names = {"input": one.case.op.lhs, "weight": one.case.op.rhs}
    for side in reads:
        operands = one.case.operands()
        towards = upstream(one.case.exact(operands))
        if one.role is Role.OUTPUT and not one.per_batch:
            place = (step % one.groups, (2 * step + 1) % one.pairs)
            one.case.factors(operands, *place)[side == "weight"].fill_(number)
        else:
            target = towards if side == "gradient" else operands[names[side]]
            target.view(-1)[target.numel() // 2 - step] = number
        found.append((operands, towards))
    return found


@choosing
def test_a_number_that_is_not_finite_is_never_hidden(one: RoleCase) -> None:
    """Where the exact product is not finite, the sampled one is not either, if the scores read the factor."""
    samplers = SAMPLER_CASES.values() if one in TYPES and one.role is Role.OUTPUT else some_samplers(one)
    for sampler, (step, number) in itertools.product(samplers, enumerate((math.nan, math.inf, -math.inf))):
        if sampler.scores not in READS[one.role]:
            continue
        selector = selector_of(one, sampler, ratio=0.3)
        for operands, towards in spoiled(one, sampler.scores, number, step):
            scores = one.scores(operands, towards, sampler.scores)
            if int((~torch.isfinite(scores)).sum(1).max()) > selector.spec.count(one.pairs):
                continue  # more than can be drawn: a number of the input may be read by many positions
            operands = {name: value.requires_grad_() for name, value in operands.items()}
            found, wanted = applied(one, operands, choose(selector, one, operands, step)), one.case.exact(operands)
            if one.role is not Role.OUTPUT:
                found, wanted = (torch.autograd.grad(of, operands[one.operand], towards)[0] for of in (found, wanted))
            if one.role is Role.OUTPUT and not one.per_batch:
                assert not torch.isfinite(wanted).all()
            assert not (~torch.isfinite(wanted) & torch.isfinite(found)).any(), (sampler.name, number)


@choosing
def test_zeros_give_zeros_and_one_pair_that_is_not_zero_is_always_drawn(one: RoleCase) -> None:
    """All pairs score zero: no NaN, and the other gradients as they are. One that does not, alone: it is exact."""
    output_role = one.role is Role.OUTPUT
    for zero in [one.case.op.rhs] if output_role else ["gradient", one.other]:
        operands = one.case.operands(grad=True)
        if zero != "gradient":
            operands[zero] = torch.zeros_like(operands[zero]).requires_grad_()
        exact = one.case.exact(operands)
        towards = upstream(exact) * (zero != "gradient")
        wanted = torch.autograd.grad(exact, list(operands.values()), towards)
        for sampler in some_samplers(one):
            output = applied(one, operands, choose(selector_of(one, sampler), one, operands))
            close(output, exact)
            found = dict(zip(operands, torch.autograd.grad(output, list(operands.values()), towards), strict=True))
            if output_role:
                assert bool(found[zero].any()) and bool(torch.isfinite(found[zero]).all()), "a weight of zeros learns"
                continue
            for (name, value), expected in zip(found.items(), wanted, strict=True):
                assert torch.equal(value, torch.zeros_like(value)) if name == one.operand else True
                close(value, expected)
    scores = ("online", "weight") if output_role else ("online", "gradient")
    for (name, kind), group in itertools.product(
        zip(("bernoulli", "systematic", "crs", "wta"), scores * 2, strict=True), {0, one.groups - 1}
    ):
        operands, selector = one.case.operands(grad=True), selector_of(one, SamplerCase("", name, kind))
        selector.epsilon = 0.0
        if output_role:
            rhs = torch.zeros_like(operands[one.case.op.rhs])
            with torch.no_grad():
                rhs.select(one.case.axes[1], 1).copy_(operands[one.case.op.rhs].select(one.case.axes[1], 1))
            operands[one.case.op.rhs] = rhs
            selection = selection_in(choose(selector, one, operands))
            # Certain to be drawn, so not scaled.
            close(dense(selection, one.pairs)[:, 1], torch.ones(one.groups, dtype=torch.float64))
            close(applied(one, operands, selection), one.case.exact(operands))
            continue
        output = applied(one, operands, choose(selector, one, operands))
        towards = torch.where(one.places == group * one.pairs + 1, upstream(output), 0.0)
        (found,) = torch.autograd.grad(output, operands[one.operand], towards)
        (wanted,) = torch.autograd.grad(one.case.exact(operands), operands[one.operand], towards)
        assert bool(wanted.any())
        close(found, wanted)


class Draws:
    """The randomness of step 3."""

    def draw_for(self, selector: Selector, inputs: list[Tensor]) -> Draw:
        return randomness(selector, 3)


@pytest.mark.parametrize("through", [False, True], ids=["forward", "straight-through"])
def test_a_layer_samples_all_its_products(through: bool) -> None:
    linear, conv = nn.Linear(6, 4).double(), nn.Conv2d(4, 6, 3, padding=1, groups=2).double()
    op_kwargs = {"stride": 1, "padding": 1, "dilation": 1, "groups": 2}
    todo: list[tuple[Any, str, dict[str, Any], Tensor]] = [
        (linear, "linear", {}, torch.randn(5, 6, dtype=torch.float64, requires_grad=True)),
        (conv, "conv2d", op_kwargs, torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True)),
    ]
    specs = {
        Role.OUTPUT: SamplerConfig("systematic", 0.5),
        Role.GRAD_INPUT: SamplerConfig("bernoulli", 0.5, scores="gradient"),
        Role.GRAD_WEIGHT: SamplerConfig("wta", 0.5, scores="input"),
    }
    for layer, kind, plain, x in todo:
        groups = plain.get("groups", 1)
        selectors = {
            role: Selector(kind, plain, spec, site, None, layer, groups, role)
            for site, (role, spec) in enumerate(specs.items())
        }
        swap(layer, Site(selectors, through, Draws()))
        assert isinstance(layer, SampledLinear | SampledConv2d)
        given = {role: selector(x, layer.weight, randomness(selector, 3)) for role, selector in selectors.items()}
        function: Any = getattr(ops, kind)
        how = {"selection": given[Role.OUTPUT], "straight_through": through}
        how |= {role.value: given[role] for role in (Role.GRAD_INPUT, Role.GRAD_WEIGHT)}
        expected, output = function(x, layer.weight, layer.bias, **plain, **how), layer(x)
        assert torch.equal(output, expected)
        # What a graph hands in is taken instead: four fields of ProductSampling, or the selection alone.
        alone = function(x, layer.weight, layer.bias, **plain, selection=given[Role.OUTPUT])
        assert torch.equal(layer(x, given[Role.OUTPUT]), alone)
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
    case: OpCase = conv_case("", (4, 3, 5, 5), (4, 3, 3, 3), padding=1)
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
    one = RoleCase(linear_case("linear", (40, 6), (40, 6)), Role.GRAD_INPUT)
    operands = one.case.operands(grad=True)
    rows = []
    for site, step in itertools.product((1, 2), (0, 1)):
        selector = selector_of(one, ONLINE, site=site, scores="uniform")
        rows.append(selection_in(choose(selector, one, operands, step)).indices)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(rows, 2))
