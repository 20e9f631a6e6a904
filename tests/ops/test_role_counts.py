"""Counts of operations and of bytes kept for backward where gradients are sampled, against what torch counts and keeps.

As in ``test_flops.py``: torch's counter ignores the groups of a convolution in the gradient of its weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fx_approx.core.candidates import Candidate, GemmShape, Role, RoleFlops
from fx_approx.core.flops import Kept, executed_flops, kept_bytes, role_flops, selection_flops
from fx_approx.ops import BackwardDrawn, Rule
from fx_approx.sampling import SamplerConfig, get_sampler, get_score
from tests.families import OpCase, SamplerCase
from tests.op_case import conv_case
from tests.ops.counting import counted, facts_of, kept, narrowed, operands_of
from tests.ops.role_selecting import choose, role_selector
from tests.ops.roles import EACH_OUTPUT, EVEN, READS, ROLE_CASES, ROWS, RoleCase
from tests.ops.test_flops import BY_HAND

pytestmark = pytest.mark.filterwarnings(EVEN)

NEEDS = ((True, True), (True, False), (False, True))
Way = tuple[RoleCase, ...]


def ways_of(case: OpCase, output: bool = True) -> list[Way]:
    """Each product alone, all gradients together, and those with the output."""
    to_lhs, to_rhs = (
        [one for one in ROLE_CASES.values() if one.case is case and one.role is role]
        for role in (Role.GRAD_INPUT, Role.GRAD_WEIGHT)
    )
    found: list[Way] = [(one,) for one in (*to_lhs, *to_rhs)] + [(to_lhs[0], one) for one in to_rhs]
    if output:
        of_output = [RoleCase(case, Role.OUTPUT)] + [one for one in EACH_OUTPUT.values() if one.case is case]
        found += [(of_output[0], *way) for way in found] + [(one,) for one in of_output]
    return found


def kept_of(way: Way, straight_through: bool = False) -> Kept:
    """As :func:`arguments` computes them: all pairs where there is only one."""
    counts = {one.role.value: (one.pairs + 1) // 2 for one in way}
    return Kept(straight_through=straight_through, positions=any(one.positions for one in way), **counts)


def arguments(way: Way, dtype: torch.dtype = torch.float32, scaled: bool = True) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for one in way:
        given |= one.given(narrowed(one.selection(scaled), dtype))
    return given


@pytest.mark.parametrize("straight_through", [False, True], ids=["forward", "straight-through"])
@pytest.mark.parametrize("case", ROWS.values(), ids=ROWS)
def test_operations_are_those_torch_counts(case: OpCase, straight_through: bool) -> None:
    for way in ways_of(case):
        if straight_through and way[0].role is not Role.OUTPUT:
            continue
        if case.kind == "einsum" and len(way) == 1 and not straight_through and kept_of(way).output == 1:
            continue  # torch.einsum multiplies a single pair elementwise, which its counter does not count
        for grads in NEEDS if len(way) == 1 and not straight_through else NEEDS[:1]:
            if case.groups > 1 and grads[1] and not any(one.positions for one in way):
                continue
            operands = operands_of(case, grads)
            flops = executed_flops(facts_of(case, operands), kept_of(way, straight_through))
            found = counted(case, operands, **arguments(way), straight_through=straight_through)
            assert found == (flops.output, flops.grad_input + flops.grad_weight), ([one.name for one in way], grads)


@pytest.mark.parametrize("name", BY_HAND)
def test_operations_of_grouped_convolutions_by_hand(name: str) -> None:
    """``BY_HAND`` are the multiply-adds of all output channels of all examples."""
    case = ROWS[name]
    facts, role = facts_of(case, operands_of(case, (True, True))), 2 * BY_HAND[name]
    half, examples = role // 2, case.shapes["input"][0] if case.batch else 1
    assert executed_flops(facts, Kept(grad_input=1)) == RoleFlops(role, half, role)  # one of two channels a group
    assert executed_flops(facts, Kept(grad_weight=1)) == RoleFlops(role, role, role // examples)
    positions = RoleCase(case, Role.GRAD_WEIGHT, positions=True).pairs
    one_position = role // positions
    assert executed_flops(facts, Kept(grad_weight=3, positions=True)) == RoleFlops(role, role, 3 * one_position)


def test_operations_of_a_linear_layer_by_hand() -> None:
    """[3, 6] @ [6, 4], 144 operations a role: 2·3·6·3 with three of the four features, 2·1·6·4 with one of the rows."""
    shape = GemmShape(m=3, n=4, k=6)
    assert role_flops(shape, True, True, Kept(grad_input=3)) == RoleFlops(144, 108, 144)
    assert role_flops(shape, True, True, Kept(grad_weight=1)) == RoleFlops(144, 144, 48)
    assert role_flops(shape, True, True, Kept(2, 3, 1)) == RoleFlops(48, 36, 16)
    assert role_flops(shape, True, True, Kept(2, 3, 1, straight_through=True)) == RoleFlops(48, 108, 48)
    assert role_flops(shape, False, False, Kept(2, 3, 1)) == RoleFlops(48, 0, 0)


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
    for role, kinds in expected.items():
        for kind, flops in kinds.items():
            assert selection_flops(candidate_of(ROWS["linear"]), role, SamplerConfig(scores=kind)) == flops, (
                role,
                kind,
            )
    frozen = candidate_of(ROWS["linear"], (True, False))
    assert selection_flops(frozen, Role.GRAD_WEIGHT, SamplerConfig()) == 0
    assert selection_flops(frozen, Role.GRAD_INPUT, SamplerConfig()) == 76
    assert selection_flops(frozen, Role.OUTPUT, SamplerConfig()) == 90


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
    "one", [one for one in ROLE_CASES.values() if one.positions and one.pairs > 1], ids=lambda one: one.name
)
def test_the_sums_over_patches_are_those_torch_counts(one: RoleCase) -> None:
    operands = operands_of(one.case, (True, True))
    with FlopCounterMode(display=False) as counter:
        choose(role_selector(one, SamplerCase("", "topk", "input")), one, operands)
    norms = 2 * operands["input"].numel()  # which torch does not count
    spec = SamplerConfig("topk", scores="input", positions=True)
    assert counter.get_total_flops() + norms == selection_flops(candidate_of(one.case), one.role, spec)


# What torch writes out, sums up or copies on the way; documented as not counted.
COPIED = {"matmul-broadcast", "matmul-lhs-shared", "einsum-row-summed", "einsum-batch-turned"}
# Here a pair of the output is a block of two entries, and beside sampled gradients each has an index of its own.
BLOCKS = {"einsum-two-contracted", "einsum-batch-block"}
# Padded beforehand, since the sides differ: another tensor than the input.
PADDED = {"conv1d-same-even", "conv2d-same-even-grouped", "conv3d-same-even-unbatched"}


def choices(
    way: Way, grads: tuple[bool, bool], scores: Mapping[Role, str], name: str, dtype: torch.dtype
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


SCORES = {
    "early": {Role.OUTPUT: "online", Role.GRAD_INPUT: "weight", Role.GRAD_WEIGHT: "input"},
    "late": {Role.OUTPUT: "online", Role.GRAD_INPUT: "online", Role.GRAD_WEIGHT: "gradient"},
}


@pytest.mark.parametrize("when", SCORES)
@pytest.mark.parametrize(
    "case", [c for c in ROWS.values() if c.name not in COPIED | PADDED], ids=lambda case: case.name
)
def test_kept_bytes_are_those_autograd_keeps(case: OpCase, when: str) -> None:
    """Samples and uniforms included: 8 bytes an index, 4 a scale (8 in float64), 4 a uniform."""
    for way in ways_of(case):
        if case.name in BLOCKS and way[0].role is Role.OUTPUT:
            continue
        for straight_through in (False, True) if way[0].role is Role.OUTPUT else (False,):
            for name, dtype, grads in (
                ("systematic", torch.float32, (True, True)),
                ("crs", torch.float64, (True, True)),
                ("topk", torch.float32, (True, True)),
                ("systematic", torch.bfloat16, (True, False)),
                ("topk", torch.float32, (False, True)),
            ):
                if case.kind == "einsum" and len(way) == 1 and way[0].role is not Role.OUTPUT and not all(grads):
                    continue  # exact if that gradient is not run, and torch.einsum copies operands
                operands = operands_of(case, grads, dtype)
                specs = {
                    one.role: SamplerConfig(
                        name, scores=SCORES[when][one.role], positions=one.positions, per_batch=one.per_batch
                    )
                    for one in way
                }
                expected = kept_bytes(facts_of(case, operands), kept_of(way, straight_through), specs)
                given = choices(way, grads, SCORES[when], name, dtype)
                found = kept(case, operands, straight_through=straight_through, **given)
                assert found == expected, ([one.name for one in way], straight_through, name, grads)


def test_kept_bytes_of_a_linear_layer_by_hand() -> None:
    """[3, 6] and [4, 6] in float32: 72 bytes of input; two rows are 48, and 16 of indices, 8 of scales."""
    case = ROWS["linear"]
    facts = facts_of(case, operands_of(case, (True, True)))
    early, late = SamplerConfig("systematic", scores="input"), SamplerConfig("systematic")
    rows = {Role.GRAD_WEIGHT: early}
    assert kept_bytes(facts, Kept(grad_weight=2), rows) == 48 + 16 + 8
    assert kept_bytes(facts, Kept(grad_weight=2), {Role.GRAD_WEIGHT: late}) == 72 + 4 * 4  # three keys, one offset
    features = {Role.GRAD_INPUT: SamplerConfig("topk", scores="weight")}
    assert kept_bytes(facts, Kept(grad_input=2), features) == 72 + 16
    # Three of six pairs: half of the rows, and half of the weight, which is new.
    both = {Role.OUTPUT: SamplerConfig("topk"), **rows}
    assert kept_bytes(facts, Kept(output=3, grad_weight=2), both) == 24 + 48 + 3 * 8 + 16 + 8
    assert kept_bytes(facts, Kept(3, None, 2, straight_through=True), both) == 48 + 16 + 8


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


@pytest.mark.parametrize("name", sorted(PADDED))
def test_the_padded_input_is_kept_where_the_sides_differ(name: str) -> None:
    """Another tensor than the input, written out beforehand: the count is that of the input, as documented."""
    case = ROWS[name]
    operands = operands_of(case, (True, True))
    one = RoleCase(case, Role.GRAD_INPUT)
    facts, specs = facts_of(case, operands), {Role.GRAD_INPUT: SamplerConfig("topk", scores="weight")}
    found = kept(case, operands, **one.given(one.selection(False)))
    assert found > kept_bytes(facts, kept_of((one,)), specs) >= facts.lhs_bytes
