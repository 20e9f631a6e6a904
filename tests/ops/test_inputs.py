"""Every sampled op for what may come in: dtypes, autocast, memory layouts, empty batches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fx_approx.ops import gather, linear
from fx_approx.sampling import Selection
from tests.families import DTYPES, LAYOUTS, OP_CASES, OpCase, Operands, gradients

cases = pytest.mark.parametrize("case", OP_CASES.values(), ids=OP_CASES)
convs = pytest.mark.parametrize(
    "case",
    # An unbatched image has no memory format.
    [case for case in OP_CASES.values() if case.kind in ("conv2d", "conv3d") and case.batch],
    ids=lambda case: case.name,
)


def near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal up to a few roundings of ``dtype``, as a share of the largest entry."""
    actual, expected = actual.detach().double(), expected.detach()
    error = (actual - expected).abs().max()
    assert float(error) <= DTYPES[dtype] * max(1.0, float(expected.abs().max()))


def rounded(selection: Selection, dtype: torch.dtype) -> Selection:
    """The scale as a sampler gives it: float64 for float64 operands, else float32."""
    assert selection.scale is not None
    return Selection(selection.indices, selection.scale.to(torch.promote_types(dtype, torch.float32)))


def wide(operands: Operands) -> Operands:
    return {name: value.detach().double().requires_grad_(value.requires_grad) for name, value in operands.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
def test_dtypes(case: OpCase, dtype: torch.dtype) -> None:
    operands, selection = case.operands(dtype=dtype, grad=True), case.selection(True)
    selection = rounded(selection, dtype)
    output, exact = case.sampled(operands, selection), case.exact(operands)
    assert output.dtype == exact.dtype == dtype
    reference = wide(operands)
    expected = case.oracle(reference, selection)
    near(output, expected, dtype)
    found, wanted = gradients(output, operands), gradients(expected, reference)
    for name, value in operands.items():
        assert found[name].dtype == value.dtype
        near(found[name], wanted[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=["float32", "bfloat16", "mixed"])
@cases
def test_autocast(case: OpCase, dtype: torch.dtype | None) -> None:
    """Mixed: a bfloat16 activation meets float32 parameters, as behind another autocast layer."""
    operands = case.operands(dtype=dtype or torch.float32, grad=True)
    if dtype is None:
        operands[case.op.lhs] = operands[case.op.lhs].detach().bfloat16().requires_grad_()
    selection = rounded(case.selection(True), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, exact = case.sampled(operands, selection), case.exact(operands)
        assert case.sampled(operands, None).dtype == exact.dtype
    assert output.dtype == exact.dtype
    reference = wide(operands)
    expected = case.oracle(reference, selection)
    near(output, expected, torch.bfloat16)
    found, wanted = gradients(output, operands), gradients(expected, reference)
    for name, value in operands.items():
        assert found[name].dtype == value.dtype
        near(found[name], wanted[name], torch.bfloat16)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "plain"])
@cases
def test_layouts(case: OpCase, layout: str) -> None:
    selection = case.selection(True)
    plain, laid = case.operands(grad=True), case.operands(layout=layout, grad=True)
    output, expected = case.sampled(laid, selection), case.oracle(plain, selection)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    found, wanted = gradients(output, laid), gradients(expected, plain)
    for name in plain:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-12)


def test_layouts_are_what_they_say() -> None:
    values = torch.randn(2, 3, 4, 5)
    assert not LAYOUTS["turned"](values).is_contiguous()
    assert not LAYOUTS["spaced"](values).is_contiguous()
    assert LAYOUTS["channels_last"](values).is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(layout(values), values) for layout in LAYOUTS.values())


@pytest.mark.parametrize("expanded", ["lhs", "rhs"])
@cases
def test_an_expanded_operand(case: OpCase, expanded: str) -> None:
    """Stride 0: all rows are one row in memory."""
    operands, selection = case.operands(), case.selection(True)
    name = case.op.lhs if expanded == "lhs" else case.op.rhs
    operands[name] = operands[name].narrow(0, 0, 1).expand_as(operands[name])
    torch.testing.assert_close(case.sampled(operands, selection), case.oracle(operands, selection), rtol=0, atol=1e-12)


def formats(value: Tensor) -> tuple[bool, bool]:
    channels_last = torch.channels_last if value.dim() == 4 else torch.channels_last_3d
    return value.is_contiguous(), value.is_contiguous(memory_format=channels_last)


@pytest.mark.parametrize("shape", [(2, 6, 3, 4), (2, 6, 3, 4, 2)], ids=["4d", "5d"])
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_gather_keeps_channels_last(shape: tuple[int, ...], dim: int) -> None:
    index = torch.tensor([0, 1])
    for layout in ("plain", "channels_last"):
        source = LAYOUTS[layout](torch.randn(shape)).requires_grad_()
        output = gather(source, dim, index)
        assert torch.equal(output, source.index_select(dim, index))
        assert formats(output) == formats(source)
        # Backward: the layout of the incoming gradient is kept as well.
        (gradient,) = torch.autograd.grad(output, source, torch.ones_like(output))
        assert formats(gradient) == formats(source)
        assert torch.equal(gradient.sum(), torch.tensor(float(output.numel())))


@convs
def test_sampled_convolutions_keep_the_memory_format_of_the_exact_one(case: OpCase) -> None:
    selection = rounded(case.selection(True), torch.float32)
    for layout in ("plain", "channels_last"):
        operands = case.operands(dtype=torch.float32, layout=layout, grad=True)
        sampled, exact = case.sampled(operands, selection), case.exact(operands)
        assert formats(sampled) == formats(exact)
        assert formats(gradients(sampled, operands)["input"]) == formats(gradients(exact, operands)["input"])


@pytest.mark.parametrize(
    "case",
    [case for case in OP_CASES.values() if case.batch],
    ids=[n for n, c in OP_CASES.items() if c.batch],
)
def test_an_empty_batch(case: OpCase) -> None:
    operands = case.empty()
    output, exact = case.sampled(operands, case.selection(True)), case.exact(operands)
    assert output.shape == exact.shape
    assert output.numel() == 0
    found = gradients(output, operands)
    for name, value in operands.items():
        assert found[name].shape == value.shape
        assert not found[name].any()


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (1, 2, 1, 3), (2, 0, 3)], ids=str)
def test_linear_takes_any_number_of_leading_dimensions(leading: tuple[int, ...]) -> None:
    case = OP_CASES["linear"]
    operands, selection = case.operands(), case.selection(True)
    operands["input"] = torch.randn(*leading, case.pairs, dtype=torch.float64, requires_grad=True)
    output = case.sampled(operands, selection)
    assert output.shape == (*leading, 4)
    torch.testing.assert_close(output, case.oracle(operands, selection), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(output.sum(), operands["input"])
    assert gradient.shape == operands["input"].shape


def test_a_weight_that_is_read_twice_collects_both_gradients() -> None:
    """Two calls with different selections, as two heads with tied weights."""
    case = OP_CASES["linear"]
    operands = case.operands(grad=True)
    first, second = case.selection(True, 2, seed=1), case.selection(False, 4, seed=2)
    both = case.sampled(operands, first) + case.sampled(operands, second)
    expected = case.oracle(operands, first) + case.oracle(operands, second)
    found, wanted = gradients(both, operands), gradients(expected, operands)
    for name in operands:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-12)


def test_a_large_scale_does_not_overflow_before_the_product() -> None:
    """The product of scale and weight is taken in float32 and rounded once: 1e5 itself is no float16."""
    weight = torch.full((1, 2), 1e-3, dtype=torch.float16)
    selection = Selection(torch.tensor([[1]]), torch.tensor([[1e5]]))
    output = linear(torch.ones(1, 2, dtype=torch.float16), weight, selection=selection)
    torch.testing.assert_close(
        output, F.linear(torch.ones(1, 1).half(), torch.tensor([[100.0]]).half()), rtol=1e-3, atol=0
    )
