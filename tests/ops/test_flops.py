"""Counts of operations and of bytes kept for backward, against what torch counts and keeps.

torch's counter (2.13) ignores the groups of a convolution in the gradient of its weight, so grouped convolutions are
held against integers worked out here.
"""

from __future__ import annotations

import pytest
import torch

from fx_approx.core.candidates import GemmShape, ProductFacts, Role, RoleFlops
from fx_approx.core.flops import Kept, executed_flops, kept_bytes, role_flops
from fx_approx.sampling import SamplerConfig, Selection
from tests.families import OP_CASES, OpCase
from tests.ops.counting import counted, facts_of, kept, operands_of, selection_of, shape_of

ROWS = {name: case for name, case in OP_CASES.items() if not case.vector}
UNGROUPED = {name: case for name, case in ROWS.items() if case.groups == 1}

# Row -> bytes that torch really keeps, exact, float32, no parameters: here it keeps other tensors than the operands.
REARRANGED = {
    "matmul-broadcast": 4 * 8 * (3 * 5 + 5 * 2),  # eight products are written out
    "einsum-two-contracted": 4 * (3 * 5 * 2 + 5 * 2 * 4),  # the parameter is copied, its contracted labels joined
    "einsum-row-summed": 4 * (3 * 5),  # summed over a label of its own first
}

needs = pytest.mark.parametrize("grads", [(True, True), (True, False), (False, True)], ids=["both", "lhs", "rhs"])


# A sampler with scales, and one without.
OUTPUT = {scaled: {Role.OUTPUT: SamplerConfig("systematic" if scaled else "topk")} for scaled in (True, False)}


def of_output(selection: Selection | None) -> Kept:
    return Kept(output=None if selection is None else selection.indices.shape[1])


@needs
@pytest.mark.parametrize("case", UNGROUPED.values(), ids=UNGROUPED)
def test_operations_are_those_torch_counts(case: OpCase, grads: tuple[bool, bool]) -> None:
    operands = operands_of(case, grads)
    facts = facts_of(case, operands)
    # Two pairs at least: torch.einsum multiplies a single pair elementwise, which its counter does not count.
    for selection in (None, selection_of(case, True), case.selection(False, 2)):
        flops = executed_flops(facts, of_output(selection))
        assert (flops.grad_input > 0, flops.grad_weight > 0) == grads
        assert counted(case, operands, selection=selection) == (flops.output, flops.grad_input + flops.grad_weight)


def test_operations_of_a_linear_layer_by_hand() -> None:
    """[3, 6] @ [6, 4]: a multiply-add is two operations, so 2·3·6·4 = 144 a role; 72 with three of the six pairs."""
    shape = shape_of(OP_CASES["linear"])
    assert shape == GemmShape(m=3, n=4, k=6)
    assert role_flops(shape, True, True) == RoleFlops(144, 144, 144)
    assert role_flops(shape, False, True, Kept(output=3)) == RoleFlops(72, 0, 72)
    assert role_flops(shape, True, False, Kept(output=3)).total == 144


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
        assert shape_of(OP_CASES[name]) == shape, name
    grouped = shapes["conv2d-grouped"]
    assert [grouped.role_pairs(role) for role in Role] == [4, 2, 2]
    assert grouped.role_pairs(Role.GRAD_WEIGHT, positions=True) == 18


# Row -> multiply-adds of one role with all pairs:
# output elements x input channels of a group x kernel positions.
BY_HAND = {
    "conv1d-unbatched-grouped": 4 * 4 * 3 * 3,  # [4, 4] outputs: 8 - 2·2 = 4 positions
    "conv2d-grouped": (2 * 4 * 3 * 3) * 4 * 9,  # [2, 4, 3, 3]: (5 + 2 - 3)/2 + 1 = 3 rows, 5 - 2 = 3 columns
    "conv3d-grouped": (2 * 4 * 2 * 2 * 2) * 3 * 8,  # [2, 4, 2, 2, 2]: (3 + 2 - 2)//2 + 1 = 2 a side
}


@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("name", [name for name, case in ROWS.items() if case.groups > 1])
def test_operations_of_grouped_convolutions_by_hand(name: str, scaled: bool) -> None:
    case = ROWS[name]
    operands = operands_of(case, (True, True))
    selection = selection_of(case, scaled)
    facts, k = facts_of(case, operands), selection.indices.shape[1]
    role = 2 * BY_HAND[name]
    assert case.exact(operands).numel() * case.pairs * shape_of(case).block == BY_HAND[name]
    assert executed_flops(facts, Kept()) == RoleFlops(role, role, role)
    sampled = role * k // case.pairs
    assert executed_flops(facts, Kept(output=k)) == RoleFlops(sampled, sampled, sampled)
    # torch counts the output and the gradient of the input rightly.
    operands[case.op.rhs].requires_grad_(False)
    assert counted(case, operands) == (role, role)
    assert counted(case, operands, selection=selection) == (sampled, sampled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [c for n, c in ROWS.items() if n not in REARRANGED], ids=lambda case: case.name)
def test_kept_bytes_are_those_autograd_keeps(case: OpCase, dtype: torch.dtype) -> None:
    """Indices and scale included: 8 bytes an entry, and 4 (8 in float64)."""
    for grads in ((True, True), (True, False), (False, True)):
        operands = operands_of(case, grads, dtype)
        facts = facts_of(case, operands)
        assert kept(case, operands) == kept_bytes(facts, Kept(), {})
        for scaled in (True, False):
            selection = selection_of(case, scaled, dtype)
            assert kept(case, operands, selection=selection) == kept_bytes(facts, of_output(selection), OUTPUT[scaled])


@pytest.mark.parametrize("name", REARRANGED)
def test_kept_bytes_are_those_of_the_operands_where_torch_rearranges_them(name: str) -> None:
    """As documented, a count of the operands: these rows show how far it is from what torch keeps."""
    case = ROWS[name]
    operands = operands_of(case, (True, True))
    parameter = case.kind == "einsum"
    facts = facts_of(case, operands, parameter)
    assert kept_bytes(facts, Kept(), {}) == facts.lhs_bytes + (0 if parameter else facts.rhs_bytes)
    assert kept(case, operands, parameter) == REARRANGED[name] != kept_bytes(facts, Kept(), {})


@needs
@pytest.mark.parametrize("name", ["matmul", "bmm", "einsum-batch"])
def test_kept_bytes_of_two_activations(name: str, grads: tuple[bool, bool]) -> None:
    """A right operand that is no parameter is kept in the exact product too."""
    case = ROWS[name]
    operands = operands_of(case, grads)
    facts = facts_of(case, operands, parameter=False)
    assert kept(case, operands, parameter=False) == kept_bytes(facts, Kept(), {})
    selection = selection_of(case, True)
    assert kept(case, operands, False, selection=selection) == kept_bytes(facts, of_output(selection), OUTPUT[True])


def test_kept_bytes_by_hand() -> None:
    """[3, 6] and [4, 6] in float32, three pairs: 36 + 48 bytes, 24 of indices, 12 of scales."""
    case = OP_CASES["linear"]
    facts = facts_of(case, operands_of(case, (True, True)))
    assert kept_bytes(facts, Kept(), {}) == 72
    assert kept_bytes(facts, Kept(output=3), OUTPUT[False]) == 36 + 48 + 24
    assert kept_bytes(facts, Kept(output=3), OUTPUT[True]) == 36 + 48 + 24 + 12


def test_nothing_is_kept_where_nothing_needs_a_gradient() -> None:
    case = OP_CASES["linear"]
    operands = operands_of(case, (False, False))
    assert kept(case, operands, selection=selection_of(case, True)) == 0
    assert kept_bytes(facts_of(case, operands), Kept(output=3), OUTPUT[True]) == 0


def test_a_product_without_a_shape_is_counted_as_measured() -> None:
    """An LSTM or attention: no single GEMM, never sampled."""
    facts = ProductFacts(None, RoleFlops(1, 2, 3), "torch.float32", "cpu")
    assert executed_flops(facts, Kept()) == executed_flops(facts, Kept(output=5)) == RoleFlops(1, 2, 3)
    assert kept_bytes(facts, Kept(), {}) == 0
