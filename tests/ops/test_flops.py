"""Counts of operations and of bytes kept for backward, against what torch counts and keeps.

torch's counter (2.13) ignores the groups of a convolution in the gradient of its weight, so grouped convolutions are
held against integers worked out here.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fx_approx.candidate import GemmShape, ProductFacts, RoleFlops
from fx_approx.flops import executed_flops, kept_bytes, role_flops
from fx_approx.sampling import Selection
from tests.families import OP_CASES, OpCase, Operands, gradients

ROWS = {name: case for name, case in OP_CASES.items() if not case.vector}
UNGROUPED = {name: case for name, case in ROWS.items() if case.groups == 1}

# Row -> bytes that torch really keeps, exact, float32, no parameters: here it keeps other tensors than the operands.
REARRANGED = {
    "matmul-broadcast": 4 * 8 * (3 * 5 + 5 * 2),  # eight products are written out
    "einsum-two-contracted": 4 * (3 * 5 * 2 + 5 * 2 * 4),  # the parameter is copied, its contracted labels joined
    "einsum-row-summed": 4 * (3 * 5),  # summed over a label of its own first
}

needs = pytest.mark.parametrize("grads", [(True, True), (True, False), (False, True)], ids=["both", "lhs", "rhs"])


def operands_of(case: OpCase, grads: tuple[bool, bool], dtype: torch.dtype = torch.float32) -> Operands:
    """Operands, the right one a parameter; what is added to the product needs no gradient."""
    operands = case.operands(dtype=dtype)
    operands[case.op.lhs].requires_grad_(grads[0])
    operands[case.op.rhs] = nn.Parameter(operands[case.op.rhs], requires_grad=grads[1])
    return operands


def selection_of(case: OpCase, scaled: bool, dtype: torch.dtype = torch.float32) -> Selection:
    """The scale in float32, or in float64 for float64 operands, as samplers give it."""
    selection = case.selection(scaled)
    wide = torch.promote_types(dtype, torch.float32)
    return selection if selection.scale is None else selection._replace(scale=selection.scale.to(wide))


def shape_of(case: OpCase) -> GemmShape:
    return case.op.geometry(torch.Size(case.shapes[case.op.lhs]), torch.Size(case.shapes[case.op.rhs]), case.plain)


def facts_of(case: OpCase, operands: Operands, parameter: bool = True) -> ProductFacts:
    lhs, rhs = operands[case.op.lhs], operands[case.op.rhs]
    return ProductFacts(
        shape=shape_of(case),
        flops=role_flops(shape_of(case), lhs.requires_grad, rhs.requires_grad),
        dtype=str(lhs.dtype),
        device="cpu",
        lhs_bytes=lhs.numel() * lhs.itemsize,
        rhs_bytes=rhs.numel() * rhs.itemsize,
        lhs_kept=rhs.requires_grad or (case.op.keeps_both and lhs.requires_grad),
        rhs_kept=lhs.requires_grad or (case.op.keeps_both and rhs.requires_grad),
        rhs_is_parameter=parameter,
    )


def counted(case: OpCase, operands: Operands, selection: Selection | None) -> tuple[int, int]:
    """Operations of forward and backward, as torch counts them."""
    with FlopCounterMode(display=False) as forward:
        output = case.sampled(operands, selection)
    with FlopCounterMode(display=False) as backward:
        gradients(output, operands)
    return forward.get_total_flops(), backward.get_total_flops()


@needs
@pytest.mark.parametrize("case", UNGROUPED.values(), ids=UNGROUPED)
def test_operations_are_those_torch_counts(case: OpCase, grads: tuple[bool, bool]) -> None:
    operands = operands_of(case, grads)
    facts = facts_of(case, operands)
    # Two pairs at least: torch.einsum multiplies a single pair elementwise, which its counter does not count.
    for selection in (None, selection_of(case, True), case.selection(False, 2)):
        flops = executed_flops(facts, None if selection is None else selection.indices.shape[1])
        assert (flops.grad_input > 0, flops.grad_weight > 0) == grads
        assert counted(case, operands, selection) == (flops.output, flops.grad_input + flops.grad_weight)


def test_operations_of_a_linear_layer_by_hand() -> None:
    """[3, 6] @ [6, 4]: a multiply-add is two operations, so 2·3·6·4 = 144 a role; 72 with three of the six pairs."""
    shape = shape_of(OP_CASES["linear"])
    assert shape == GemmShape(m=3, n=4, k=6)
    assert role_flops(shape, True, True) == RoleFlops(144, 144, 144)
    assert role_flops(shape, False, True, pairs=3) == RoleFlops(72, 0, 72)
    assert role_flops(shape, True, False, pairs=3).total == 144


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
    assert executed_flops(facts, None) == RoleFlops(role, role, role)
    sampled = role * k // case.pairs
    assert executed_flops(facts, k) == RoleFlops(sampled, sampled, sampled)
    # torch counts the output and the gradient of the input rightly.
    operands[case.op.rhs].requires_grad_(False)
    assert counted(case, operands, None) == (role, role)
    assert counted(case, operands, selection) == (sampled, sampled)


class Kept:
    """The bytes that autograd keeps while it is open, each piece of memory once, parameters left out."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.pieces: dict[int, Tensor] = {}
        self.ignored = {p.untyped_storage().data_ptr() for p in parameters}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in self.ignored:
            self.pieces[address] = tensor  # alive, so that its address is not used again
        return tensor

    def __enter__(self) -> Kept:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.pieces.values())


def kept(case: OpCase, operands: Operands, selection: Selection | None, parameter: bool = True) -> int:
    with Kept([operands[case.op.rhs]] if parameter else []) as measured:
        output = case.sampled(operands, selection)
    del output
    return measured.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [c for n, c in ROWS.items() if n not in REARRANGED], ids=lambda case: case.name)
def test_kept_bytes_are_those_autograd_keeps(case: OpCase, dtype: torch.dtype) -> None:
    """Indices and scale included: 8 bytes an entry, and 4 (8 in float64)."""
    for grads in ((True, True), (True, False), (False, True)):
        operands = operands_of(case, grads, dtype)
        facts = facts_of(case, operands)
        assert kept(case, operands, None) == kept_bytes(facts, None, False)
        for scaled in (True, False):
            selection = selection_of(case, scaled, dtype)
            assert kept(case, operands, selection) == kept_bytes(facts, selection.indices.shape[1], scaled)


@pytest.mark.parametrize("name", REARRANGED)
def test_kept_bytes_are_those_of_the_operands_where_torch_rearranges_them(name: str) -> None:
    """As documented, a count of the operands: these rows show how far it is from what torch keeps."""
    case = ROWS[name]
    operands = operands_of(case, (True, True))
    parameter = case.kind == "einsum"
    facts = facts_of(case, operands, parameter)
    assert kept_bytes(facts, None, False) == facts.lhs_bytes + (0 if parameter else facts.rhs_bytes)
    assert kept(case, operands, None, parameter) == REARRANGED[name] != kept_bytes(facts, None, False)


@needs
@pytest.mark.parametrize("name", ["matmul", "bmm", "einsum-batch"])
def test_kept_bytes_of_two_activations(name: str, grads: tuple[bool, bool]) -> None:
    """A right operand that is no parameter is kept in the exact product too."""
    case = ROWS[name]
    operands = operands_of(case, grads)
    facts = facts_of(case, operands, parameter=False)
    assert kept(case, operands, None, parameter=False) == kept_bytes(facts, None, False)
    selection = selection_of(case, True)
    assert kept(case, operands, selection, False) == kept_bytes(facts, selection.indices.shape[1], True)


def test_kept_bytes_by_hand() -> None:
    """[3, 6] and [4, 6] in float32, three pairs: 36 + 48 bytes, 24 of indices, 12 of scales."""
    case = OP_CASES["linear"]
    facts = facts_of(case, operands_of(case, (True, True)))
    assert kept_bytes(facts, None, False) == 72
    assert kept_bytes(facts, 3, False) == 36 + 48 + 24
    assert kept_bytes(facts, 3, True) == 36 + 48 + 24 + 12


def test_nothing_is_kept_where_nothing_needs_a_gradient() -> None:
    case = OP_CASES["linear"]
    operands = operands_of(case, (False, False))
    assert kept(case, operands, selection_of(case, True)) == 0
    assert kept_bytes(facts_of(case, operands), 3, True) == 0


def test_a_product_without_a_shape_is_counted_as_measured() -> None:
    """An LSTM or attention: no single GEMM, never sampled."""
    facts = ProductFacts(None, RoleFlops(1, 2, 3), "torch.float32", "cpu")
    assert executed_flops(facts, None) == executed_flops(facts, 5) == RoleFlops(1, 2, 3)
    assert kept_bytes(facts, None, False) == 0
