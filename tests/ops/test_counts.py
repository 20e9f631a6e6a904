"""Counts of operations and of bytes kept for backward, against what torch counts and keeps.

torch's counter (2.13) ignores the groups of a convolution in the gradient of its weight, so grouped convolutions are
held against integers worked out here.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fx_approx.core.candidates import Candidate, GemmShape, ProductFacts, Role, RoleFlops
from fx_approx.core.flops import Kept, executed_flops, kept_bytes, role_flops, selection_flops
from fx_approx.ops import BackwardDrawn, Rule
from fx_approx.sampling import SamplerConfig, Selection, get_sampler, get_score
from tests.families import OpCase, SamplerCase, conv_case
from tests.ops.counting import counted, facts_of, kept, operands_of, shape_of
from tests.ops.roles import EVEN, PRODUCTS, READS, ROWS, RoleCase, products_of
from tests.ops.selecting import choose, selector_of

pytestmark = pytest.mark.filterwarnings(EVEN)

NEEDS = ((True, True), (True, False), (False, True))
Ways = tuple[RoleCase, ...]

# Row -> bytes that torch really keeps, exact, float32, no parameters: here it keeps other tensors than the operands.
REARRANGED = {
    "matmul-broadcast": 4 * 8 * (3 * 5 + 5 * 2),  # eight products are written out
    "einsum-two-contracted": 4 * (3 * 5 * 2 + 5 * 2 * 4),  # the parameter is copied, its contracted labels joined
    "einsum-row-summed": 4 * (3 * 5),  # summed over a label of its own first
}
REARRANGED_TOO = {"einsum-batch-block", "einsum-two-columns"}
# What torch writes out, sums up or copies on the way; documented as not counted.
COPIED = {"matmul-broadcast", "matmul-lhs-shared", "einsum-row-summed", "einsum-batch-turned"}
# Here a pair of the output is a block of two entries, and beside sampled gradients each has an index of its own.
BLOCKS = {"einsum-two-contracted", "einsum-batch-block"}
# Padded beforehand, since the sides differ: another tensor than the input.
PADDED = {"conv1d-same-even", "conv2d-same-even-grouped", "conv3d-same-even-unbatched"}


def ways_of(case: OpCase) -> list[Ways]:
    """None, each product alone, all gradients together, and those with the output."""
    to_output, to_lhs, to_rhs = products_of(case).values()
    found: list[Ways] = [(one,) for one in (*to_lhs, *to_rhs)] + [(to_lhs[0], one) for one in to_rhs]
    return [(), *found, *((to_output[0], *way) for way in found), *((one,) for one in to_output)]


def kept_of(way: Ways, straight_through: bool = False) -> Kept:
    """As :func:`arguments` computes them: all pairs where there is only one."""
    counts = {one.role.value: (one.pairs + 1) // 2 for one in way}
    return Kept(straight_through=straight_through, positions=any(one.positions for one in way), **counts)


def narrowed(selection: Selection, dtype: torch.dtype = torch.float32) -> Selection:
    """The scale in float32, or in float64 for float64 operands, as samplers give it."""
    wide = torch.promote_types(dtype, torch.float32)
    return selection if selection.scale is None else selection._replace(scale=selection.scale.to(wide))


def arguments(way: Ways, dtype: torch.dtype = torch.float32, scaled: bool = True) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for one in way:
        given |= one.given(narrowed(one.selection(scaled), dtype))
    return given


@pytest.mark.parametrize("case", [c for c in ROWS.values() if not c.vector], ids=lambda case: case.name)
def test_operations_are_those_torch_counts(case: OpCase) -> None:
    for way, through in itertools.product(ways_of(case), (False, True)):
        if through and not (way and way[0].role is Role.OUTPUT):
            continue
        if case.kind == "einsum" and len(way) == 1 and not through and kept_of(way).output == 1:
            continue  # torch.einsum multiplies a single pair elementwise, which its counter does not count
        for grads in NEEDS if len(way) < 2 and not through else NEEDS[:1]:
            if case.groups > 1 and grads[1] and not any(one.positions for one in way):
                continue
            operands = operands_of(case, grads)
            flops = executed_flops(facts_of(case, operands), kept_of(way, through))
            assert (flops.grad_input > 0, flops.grad_weight > 0) == grads
            found = counted(case, operands, **arguments(way), straight_through=through)
            assert found == (flops.output, flops.grad_input + flops.grad_weight), ([one.name for one in way], grads)


# Row -> multiply-adds of one role with all pairs:
# output elements x input channels of a group x kernel positions.
BY_HAND = {
    "conv1d-unbatched-grouped": 4 * 4 * 3 * 3,  # [4, 4] outputs: 8 - 2·2 = 4 positions
    "conv2d-grouped": (2 * 4 * 3 * 3) * 4 * 9,  # [2, 4, 3, 3]: (5 + 2 - 3)/2 + 1 = 3 rows, 5 - 2 = 3 columns
    "conv3d-grouped": (2 * 4 * 2 * 2 * 2) * 3 * 8,  # [2, 4, 2, 2, 2]: (3 + 2 - 2)//2 + 1 = 2 a side
}


@pytest.mark.parametrize("name", BY_HAND)
def test_operations_of_grouped_convolutions_by_hand(name: str) -> None:
    """``BY_HAND`` are the multiply-adds of all output channels of all examples."""
    case = ROWS[name]
    facts, role, k = facts_of(case, operands_of(case, (True, True))), 2 * BY_HAND[name], (case.pairs + 1) // 2
    half, examples, sampled = role // 2, case.shapes["input"][0] if case.batch else 1, role * k // case.pairs
    assert case.exact(case.operands()).numel() * case.pairs * shape_of(case).block == BY_HAND[name]
    assert executed_flops(facts, Kept()) == RoleFlops(role, role, role)
    assert executed_flops(facts, Kept(output=k)) == RoleFlops(sampled, sampled, sampled)
    assert executed_flops(facts, Kept(grad_input=1)) == RoleFlops(role, half, role)  # one of two channels a group
    assert executed_flops(facts, Kept(grad_weight=1)) == RoleFlops(role, role, role // examples)
    one_position = role // RoleCase(case, Role.GRAD_WEIGHT, positions=True).pairs
    assert executed_flops(facts, Kept(grad_weight=3, positions=True)) == RoleFlops(role, role, 3 * one_position)


def test_operations_of_a_linear_layer_by_hand() -> None:
    """[3, 6] @ [6, 4]: a multiply-add is two operations, so 2·3·6·4 = 144 a role; 72 with three of the six pairs.

    2·3·6·3 with three of the four features, 2·1·6·4 with one of the rows.
    """
    shape = shape_of(ROWS["linear"])
    assert shape == GemmShape(m=3, n=4, k=6)
    assert role_flops(shape, True, True) == RoleFlops(144, 144, 144)
    assert role_flops(shape, False, True, Kept(output=3)) == RoleFlops(72, 0, 72)
    assert role_flops(shape, True, False, Kept(output=3)).total == 144
    assert role_flops(shape, True, True, Kept(grad_input=3)) == RoleFlops(144, 108, 144)
    assert role_flops(shape, True, True, Kept(grad_weight=1)) == RoleFlops(144, 144, 48)
    assert role_flops(shape, True, True, Kept(2, 3, 1)) == RoleFlops(48, 36, 16)
    assert role_flops(shape, True, True, Kept(2, 3, 1, straight_through=True)) == RoleFlops(48, 108, 48)
    assert role_flops(shape, False, False, Kept(2, 3, 1)) == RoleFlops(48, 0, 0)
    # An LSTM or attention: no single GEMM, never sampled, counted as measured.
    facts = ProductFacts(None, RoleFlops(1, 2, 3), "torch.float32", "cpu")
    assert executed_flops(facts, Kept()) == executed_flops(facts, Kept(output=5)) == RoleFlops(1, 2, 3)
    assert kept_bytes(facts, Kept(), {}) == 0


def test_shapes_by_hand() -> None:
    """A right operand that is one matrix joins all rows; a batch of matrices is a batch; a convolution has examples."""
    shapes = {
        "linear-no-bias-4d": GemmShape(m=6, n=4, k=5),
        "matmul-folded": GemmShape(m=6, n=4, k=5),
        "matmul-broadcast": GemmShape(m=3, n=2, k=5, batch=8),
        "bmm": GemmShape(m=2, n=4, k=5, batch=3),
        "einsum-batch": GemmShape(m=3, n=2, k=5, batch=4),
        "einsum-two-contracted": GemmShape(m=3, n=4, k=10, block=2),
        # Positions: (5 - 3) + 1 = 3 by (4 - 2) + 1 = 3.
        "conv2d": GemmShape(m=2 * 9, n=3, k=5 * 6, block=6, row_block=9),
        "conv2d-grouped": GemmShape(m=2 * 9, n=2, k=4 * 9, groups=2, block=9, row_block=9),
        "conv2d-same": GemmShape(m=2 * 20, n=3, k=4 * 9, block=9, row_block=20),
        "conv1d-unbatched-grouped": GemmShape(m=4, n=2, k=3 * 3, groups=2, block=3, row_block=4),
    }
    for name, shape in shapes.items():
        assert shape_of(ROWS[name]) == shape, name
    grouped = shapes["conv2d-grouped"]
    assert [grouped.role_pairs(role) for role in Role] == [4, 2, 2]
    assert grouped.role_pairs(Role.GRAD_WEIGHT, positions=True) == 18


def candidate_of(case: OpCase, grads: tuple[bool, bool] = (True, True)) -> Candidate:
    facts = facts_of(case, operands_of(case, grads))
    return Candidate(case.name, case.name, case.kind, pairs=case.pairs, groups=case.groups, facts=facts)


def test_the_overhead_of_a_linear_layer_by_hand() -> None:
    """[3, 6] @ [6, 4]: 2·18 for the input's norms, 2·24 for the weight's, 2·12 for the gradient's, 1 a product."""
    expected: Mapping[Role, Mapping[str, int]] = {
        Role.OUTPUT: {"online": 36 + 48 + 6, "input": 36, "weight": 48, "uniform": 0},
        Role.GRAD_INPUT: {"online": 24 + 48 + 4, "gradient": 24, "weight": 48, "uniform": 0},
        # Stale scores read the norms of the gradient for the steps to come.
        Role.GRAD_WEIGHT: {"online": 24 + 36 + 3, "gradient": 24, "input": 36, "ema": 24 + 36 + 3, "uniform": 0},
    }
    candidate = candidate_of(ROWS["linear"])
    for role, kinds in expected.items():
        for kind, flops in kinds.items():
            assert selection_flops(candidate, role, SamplerConfig(scores=kind)) == flops, (role, kind)
    frozen = candidate_of(ROWS["linear"], (True, False))
    assert [selection_flops(frozen, role, SamplerConfig()) for role in Role] == [90, 76, 0]


def test_the_overhead_of_a_convolution_by_hand() -> None:
    """[2, 8, 5, 5] with two groups of [2, 4, 3, 3] onto [2, 4, 3, 3]: 400, 144 and 72 numbers."""
    candidate = candidate_of(ROWS["conv2d-grouped"])
    online, positions = SamplerConfig(), SamplerConfig(positions=True)
    assert selection_flops(candidate, Role.OUTPUT, online) == 2 * (400 + 144) + 8
    assert selection_flops(candidate, Role.GRAD_INPUT, online) == 2 * (72 + 144) + 4
    assert selection_flops(candidate, Role.GRAD_WEIGHT, online) == 2 * (72 + 400) + 2
    # The squares of nine places are added up for each of 2·9 positions.
    assert selection_flops(candidate, Role.GRAD_WEIGHT, positions) == 2 * (72 + 400 + 18 * 9) + 18


@pytest.mark.parametrize(
    "one", [one for one in PRODUCTS.values() if one.positions and one.pairs > 1], ids=lambda one: one.name
)
def test_the_sums_over_patches_are_those_torch_counts(one: RoleCase) -> None:
    operands = operands_of(one.case, (True, True))
    with FlopCounterMode(display=False) as counter:
        choose(selector_of(one, SamplerCase("", "topk", "input")), one, operands)
    norms = 2 * operands["input"].numel()  # which torch does not count
    spec = SamplerConfig("topk", scores="input", positions=True)
    assert counter.get_total_flops() + norms == selection_flops(candidate_of(one.case), one.role, spec)


def choices(
    way: Ways, grads: tuple[bool, bool], scores: Mapping[Role, str], name: str, dtype: torch.dtype
) -> dict[str, Any]:
    """What selectors of the sampler ``name`` hand to the op: selections, or what makes one later; None if not run."""
    given = arguments(way, dtype, get_sampler(name).unbiased)
    for one in way:
        if one.role is not Role.OUTPUT and not grads[one.role is Role.GRAD_WEIGHT]:
            given[one.role.value] = None
        if one.role is Role.OUTPUT or given[one.role.value] is None or get_score(scores[one.role]).early:
            continue
        k, sampler = (one.pairs + 1) // 2, get_sampler(name)
        reads = READS[one.role][scores[one.role]].split()
        rule = Rule(name, k, 0.0, "gradient" in reads, len(reads) > 1, one.positions, one.per_batch)
        numbers = torch.full((one.groups, sampler.uniforms(one.pairs, k)), 0.5) if sampler.random else None
        given[one.role.value] = BackwardDrawn(rule, numbers)
    return given


SCORES = (
    {Role.OUTPUT: "online", Role.GRAD_INPUT: "weight", Role.GRAD_WEIGHT: "input"},
    {Role.OUTPUT: "online", Role.GRAD_INPUT: "online", Role.GRAD_WEIGHT: "gradient"},  # made in the backward pass
)
KEPT = (
    ("systematic", torch.float32, (True, True)),
    ("crs", torch.float64, (True, True)),
    ("topk", torch.float32, (True, True)),
    ("systematic", torch.bfloat16, (True, False)),
    ("topk", torch.float32, (False, True)),
)
FIRST = {case.kind: case for case in reversed(ROWS.values()) if case.name not in COPIED | PADDED and not case.vector}
"""One row of each op, which goes through all of them; the others through the first."""


@pytest.mark.parametrize(
    "case",
    [c for c in ROWS.values() if c.name not in COPIED | PADDED and not c.vector],
    ids=lambda case: case.name,
)
def test_kept_bytes_are_those_autograd_keeps(case: OpCase) -> None:
    """Samples and uniforms included: 8 bytes an index, 4 a scale (8 in float64), 4 a uniform."""
    samplers = KEPT if case is FIRST[case.kind] else KEPT[:1]
    for way, (name, dtype, grads), scores in itertools.product(ways_of(case), samplers, SCORES):
        of_output = bool(way) and way[0].role is Role.OUTPUT
        if (case.name in BLOCKS and of_output) or (not way and case.name in (*REARRANGED, *REARRANGED_TOO)):
            continue
        if case.kind == "einsum" and len(way) == 1 and not of_output and not all(grads):
            continue  # exact if that gradient is not run, and torch.einsum copies operands
        for through in (False, True) if of_output else (False,):
            operands = operands_of(case, grads, dtype)
            specs = {
                one.role: SamplerConfig(name, scores=scores[one.role], positions=one.positions, per_batch=one.per_batch)
                for one in way
            }
            expected = kept_bytes(facts_of(case, operands), kept_of(way, through), specs)
            given = choices(way, grads, scores, name, dtype)
            found = kept(case, operands, straight_through=through, **given)
            assert found == expected, ([one.name for one in way], through, name, grads)


@pytest.mark.parametrize("name", REARRANGED)
def test_kept_bytes_are_those_of_the_operands_where_torch_rearranges_them(name: str) -> None:
    """As documented, a count of the operands: these rows show how far it is from what torch keeps."""
    case = ROWS[name]
    operands = operands_of(case, (True, True))
    parameter = case.kind == "einsum"
    facts = facts_of(case, operands, parameter)
    assert kept_bytes(facts, Kept(), {}) == facts.lhs_bytes + (0 if parameter else facts.rhs_bytes)
    assert kept(case, operands, parameter) == REARRANGED[name] != kept_bytes(facts, Kept(), {})


@pytest.mark.parametrize("name", sorted(PADDED))
def test_the_padded_input_is_kept_where_the_sides_differ(name: str) -> None:
    """Another tensor than the input, written out beforehand: the count is that of the input, as documented."""
    case = ROWS[name]
    operands = operands_of(case, (True, True))
    one = RoleCase(case, Role.GRAD_INPUT)
    facts, specs = facts_of(case, operands), {Role.GRAD_INPUT: SamplerConfig("topk", scores="weight")}
    found = kept(case, operands, **one.given(one.selection(False)))
    assert found > kept_bytes(facts, kept_of((one,)), specs) >= facts.lhs_bytes


@pytest.mark.parametrize("name", ["matmul", "bmm", "einsum-batch"])
def test_kept_bytes_of_two_activations(name: str) -> None:
    """A right operand that is no parameter is kept in the exact product too."""
    case, spec = ROWS[name], {Role.OUTPUT: SamplerConfig("systematic")}
    for grads in NEEDS:
        operands = operands_of(case, grads)
        facts = facts_of(case, operands, parameter=False)
        assert kept(case, operands, parameter=False) == kept_bytes(facts, Kept(), {})
        selection = narrowed(case.selection(True))
        expected = kept_bytes(facts, Kept(output=selection.indices.shape[1]), spec)
        assert kept(case, operands, False, selection=selection) == expected


def test_kept_bytes_of_a_linear_layer_by_hand() -> None:
    """[3, 6] and [4, 6] in float32: 72 bytes of input; two rows are 48, and 16 of indices, 8 of scales."""
    case = ROWS["linear"]
    facts = facts_of(case, operands_of(case, (True, True)))
    topk, early, late = SamplerConfig("topk"), SamplerConfig("systematic", scores="input"), SamplerConfig("systematic")
    assert kept_bytes(facts, Kept(), {}) == 72
    assert kept_bytes(facts, Kept(output=3), {Role.OUTPUT: topk}) == 36 + 48 + 24
    assert kept_bytes(facts, Kept(output=3), {Role.OUTPUT: late}) == 36 + 48 + 24 + 12
    rows = {Role.GRAD_WEIGHT: early}
    assert kept_bytes(facts, Kept(grad_weight=2), rows) == 48 + 16 + 8
    assert kept_bytes(facts, Kept(grad_weight=2), {Role.GRAD_WEIGHT: late}) == 72 + 4 * 4  # three keys, one offset
    features = {Role.GRAD_INPUT: SamplerConfig("topk", scores="weight")}
    assert kept_bytes(facts, Kept(grad_input=2), features) == 72 + 16
    # Three of six pairs: half of the rows, and half of the weight, which is new.
    both = {Role.OUTPUT: topk, **rows}
    assert kept_bytes(facts, Kept(output=3, grad_weight=2), both) == 24 + 48 + 3 * 8 + 16 + 8
    assert kept_bytes(facts, Kept(3, None, 2, straight_through=True), both) == 48 + 16 + 8
    # Nothing is kept where nothing needs a gradient.
    operands = operands_of(case, (False, False))
    assert kept(case, operands, selection=narrowed(case.selection(True))) == 0
    assert kept_bytes(facts_of(case, operands), Kept(output=3), {Role.OUTPUT: late}) == 0


def test_kept_bytes_of_a_convolution_by_hand() -> None:
    """[4, 4, 16, 16] in float32 is 16,384 bytes, an example 4,096; a position reads 4·9 numbers, 144 bytes."""
    case = conv_case("", (4, 4, 16, 16), (8, 2, 3, 3), padding=1, groups=2)
    operands = operands_of(case, (True, True))
    facts = facts_of(case, operands)
    for positions, k, expected in ((False, 1, 4096 + 12), (True, 50, 50 * (144 + 12)), (True, 120, 16_384 + 120 * 12)):
        one = RoleCase(case, Role.GRAD_WEIGHT, positions=positions)
        roles = {Role.GRAD_WEIGHT: SamplerConfig("systematic", scores="uniform", positions=positions)}
        found = kept(case, operands, **one.given(narrowed(one.selection(True, k))))
        assert found == kept_bytes(facts, Kept(grad_weight=k, positions=positions), roles) == expected
    # Half of the channels of the output: the patches are half as large, and so is the weight, which is new.
    output = RoleCase(case, Role.OUTPUT)
    roles[Role.OUTPUT] = SamplerConfig("topk")
    found = kept(
        case, operands, **one.given(narrowed(one.selection(True, 50))), **output.given(output.selection(False))
    )
    by_hand = 50 * (72 + 12) + 8 * 9 * 4 + 2 * 8
    assert found == kept_bytes(facts, Kept(output=1, grad_weight=50, positions=True), roles) == by_hand
