"""Every kernel against a plain float64 oracle; the Triton ones on CPU, by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fx_approx import kernels

TYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
KERNELS = ["reference", "triton"]
# m, n, K, k: whole blocks, no multiple of one, single rows and columns, less than a block.
SHAPES = [(32, 16, 64, 32), (37, 29, 50, 23), (1, 5, 7, 3), (40, 1, 19, 18), (3, 33, 17, 1)]

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.T.contiguous().T,
    "strided": lambda t: torch.stack((t, torch.full_like(t, torch.nan)), -1).flatten(1)[:, ::2],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def name(kernel: str, own: str) -> str:
    pytest.importorskip("triton")
    return own if kernel == "triton" else kernel


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype is dtype
    scale = float(expected.abs().max()) or 1.0
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=ROUNDING[dtype] * scale)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("extras", ["none", "scale", "bias", "all", "count", "scaled count"])
def test_products_over_columns(extras: str, kernel: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    m, n, pairs, k = shape
    x, w = torch.randn(m, pairs).to(dtype), torch.randn(n, pairs).to(dtype)
    index = torch.randperm(pairs)[:k].to(torch.int32 if extras == "scale" else torch.int64)
    scale = torch.rand(k) + 0.5 if "scale" in extras or extras == "all" else None
    bias = torch.randn(n).to(dtype) if extras in ("bias", "all") else None
    count = torch.tensor([k // 2]) if "count" in extras else None
    found = kernels.gathered_k_matmul(x, w, index, scale, bias, count, kernel=name(kernel, "gathered_k_matmul"))
    used = index.long() if count is None else index.long()[: k // 2]
    factor = torch.ones(len(used)) if scale is None else scale[: len(used)]
    expected = x.double()[:, used] @ (w.double()[:, used] * factor.to(dtype).double()).T
    assert_near(found, expected if bias is None else expected + bias.double(), dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("extras", ["none", "scale", "kept", "count", "kept count"])
def test_products_over_rows(extras: str, kernel: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n, features, m, r = shape
    grad, x = torch.randn(m, n).to(dtype), torch.randn(m, features).to(dtype)
    index, scale = torch.randperm(m)[:r], torch.rand(r) + 0.5 if extras in ("scale", "kept") else None
    count = torch.tensor(r // 2, dtype=torch.int32) if "count" in extras else None
    kept = "kept" in extras
    given = x[index] if kept else x
    own = name(kernel, "gathered_rows_matmul")
    found = kernels.gathered_rows_matmul(grad, given, index, scale, count, kept=kept, kernel=own)
    used = index if count is None else index[: r // 2]
    factor = torch.ones(len(used)) if scale is None else scale[: len(used)]
    expected = grad.double()[used].T @ (x.double()[used] * factor.to(dtype).double().unsqueeze(1))
    assert_near(found, expected, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_any_strides(kernel: str, layout: str, other: str) -> None:
    x, w = LAYOUTS[layout](torch.randn(21, 18)), LAYOUTS[other](torch.randn(21, 18))
    index = torch.tensor([17, 0, 5, 6, 11])
    found = kernels.gathered_k_matmul(x, w, index, kernel=name(kernel, "gathered_k_matmul"))
    assert_near(found, x.double()[:, index] @ w.double()[:, index].T, torch.float32)
    found = kernels.gathered_rows_matmul(x, w, index, kernel=name(kernel, "gathered_rows_matmul"))
    assert_near(found, x.double()[index].T @ w.double()[index], torch.float32)
    found = kernels.column_norms(x, kernel=name(kernel, "column_norms"))
    assert_near(found, x.double().norm(dim=0), torch.float32)


@pytest.mark.parametrize("kernel", KERNELS)
def test_vectors_of_any_strides(kernel: str) -> None:
    x, w, index = torch.randn(8, 12), torch.randn(4, 12), torch.randperm(12)[::3]
    scale, bias = torch.rand(8)[::2] + 0.5, torch.randn(1).expand(4)
    found = kernels.gathered_k_matmul(x, w, index, scale, bias, kernel=name(kernel, "gathered_k_matmul"))
    assert_near(found, x.double()[:, index] @ (w.double()[:, index] * scale).T + bias, torch.float32)
    index = torch.randperm(8)[::2]
    found = kernels.gathered_rows_matmul(x, x, index, scale, kernel=name(kernel, "gathered_rows_matmul"))
    assert_near(found, x.double()[index].T @ (x.double()[index] * scale.unsqueeze(1)), torch.float32)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("count", "used"), [(-1, 0), (0, 0), (1, 1), (3, 3), (2**32, 3)])
def test_what_is_beyond_the_count_may_be_anything(count: int, used: int, kernel: str) -> None:
    """A buffer is longer than what was drawn; its rest is never read, or read and left out."""
    x, index = torch.randn(5, 5), torch.tensor([3, 1, 4])
    x[:, 0] = x[0] = torch.inf
    index[used:], scale = 10**6, torch.rand(3)
    scale[used:] = torch.nan
    chosen, factor, number = index[:used], scale[:used].double(), torch.tensor(count)
    own = name(kernel, "gathered_k_matmul")
    found = kernels.gathered_k_matmul(x[1:], x[1:], index, scale, count=number, kernel=own)
    columns = x.double()[1:, chosen]
    assert_near(found, (columns * factor) @ columns.T, torch.float32)
    own = name(kernel, "gathered_rows_matmul")
    found = kernels.gathered_rows_matmul(x[:, 1:], x[:, 1:], index, scale, number, kernel=own)
    rows = x.double()[chosen, 1:]
    assert_near(found, (rows * factor.unsqueeze(1)).T @ rows, torch.float32)


def test_norms_of_columns_in_float64() -> None:
    x = torch.randn(6, 3, dtype=torch.float64)
    torch.testing.assert_close(kernels.column_norms(x), x.norm(dim=0))


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [("allow_tf32", True, True), ("allow_tf32", False, False), ("fp32_precision", "tf32", True)],
)
def test_tf32_is_used_where_torch_uses_it(setting: str, value: object, expected: bool) -> None:
    """Torch has two interfaces for it, and an error where the older one is asked about what the newer one has set."""
    pytest.importorskip("triton")
    from fx_approx.kernels.triton_ops import uses_tf32

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        setattr(matmul, setting, value)
        assert uses_tf32() == expected
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = before


@pytest.mark.parametrize("own", ["gathered_k_matmul", "gathered_rows_matmul", "column_norms"])
@pytest.mark.parametrize(
    ("kernel", "dtype", "match"),
    [
        ("triton", torch.float32, "kernel: expected 'reference' or '{own}', got 'triton'"),
        (None, torch.float64, "kernel: {own} does not take torch.float64"),
        (None, torch.complex64, "kernel: {own} does not take torch.complex64"),
    ],
)
def test_a_kernel_of_another_name_or_type(kernel: str | None, dtype: torch.dtype, match: str, own: str) -> None:
    x = torch.randn(4, 4, dtype=dtype)
    operands = (x,) if own == "column_norms" else (x, x, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=match.format(own=own)):
        getattr(kernels, own)(*operands, kernel=kernel or own)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bad_input_over_rows(kernel: str) -> None:
    own, grad, index = name(kernel, "gathered_rows_matmul"), torch.randn(4, 3), torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"x: expected a matrix with 4 entries along axis 0, got \(3, 6\)"):
        kernels.gathered_rows_matmul(grad, torch.randn(3, 6), index, kernel=own)
    with pytest.raises(ValueError, match=r"x: expected a matrix with 2 entries along axis 0, got \(4, 6\)"):
        kernels.gathered_rows_matmul(grad, torch.randn(4, 6), index, kept=True, kernel=own)
    with pytest.raises(ValueError, match=r"scale: expected shape \(2,\), got \(4,\)"):
        kernels.gathered_rows_matmul(grad, torch.randn(4, 6), index, torch.ones(4), kernel=own)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 32), (37, 29), (1, 5), (300, 1), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_norms_of_columns(kernel: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    found = kernels.column_norms(x, kernel=name(kernel, "column_norms"))
    torch.testing.assert_close(found.double(), x.double().norm(dim=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_chosen_is_zero_and_the_bias(kernel: str) -> None:
    x, w, bias, index = torch.randn(4, 6), torch.randn(3, 6), torch.randn(3), torch.empty(0, dtype=torch.int64)
    found = kernels.gathered_k_matmul(x, w, index, None, bias, kernel=name(kernel, "gathered_k_matmul"))
    assert torch.equal(found, bias.expand(4, 3))
    found = kernels.gathered_rows_matmul(x, x, index, kernel=name(kernel, "gathered_rows_matmul"))
    assert torch.equal(found, torch.zeros(6, 6))
    assert kernels.gathered_k_matmul(x[:0], w, index, kernel=name(kernel, "gathered_k_matmul")).shape == (0, 3)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_and_their_gradients(kernel: str, scaled: bool) -> None:
    own = name(kernel, "gathered_k_matmul")
    x, w, bias = torch.randn(5, 7), torch.randn(4, 7), torch.randn(4)
    index, scale = torch.tensor([6, 1, 3]), torch.rand(3) + 0.5 if scaled else None
    found = []
    for one in (own, "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, w, bias)]
        result = kernels.gathered_k_matmul(leaves[0], leaves[1], index, scale, leaves[2], kernel=one)
        first = torch.autograd.grad(result.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        found.append([*first, *second])
        assert first[0][:, 0].eq(0).all() and first[0][:, 1].ne(0).all()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("operator", ["gathered_k_matmul", "gathered_rows_matmul", "column_norms"])
def test_the_operators_are_sound_for_torch(operator: str) -> None:
    pytest.importorskip("triton")
    from fx_approx.kernels.triton_ops import OPERATORS

    x, w, index, scale = torch.randn(8, 6), torch.randn(8, 6), torch.tensor([5, 2]), torch.rand(2)
    arguments = {
        "gathered_k_matmul": (x.requires_grad_(), w.requires_grad_(), index, scale, None, None),
        "gathered_rows_matmul": (torch.randn(8, 3), x.detach(), index, scale, None, False),
        "column_norms": (x.detach(),),
    }
    # Interpreted kernels cannot be traced on fake tensors, which have no memory to read.
    checks = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(OPERATORS[operator], arguments[operator], test_utils=checks)


def test_a_gradient_with_a_count_on_the_device_is_refused() -> None:
    own = name("triton", "gathered_k_matmul")
    x, w = torch.randn(4, 6, requires_grad=True), torch.randn(3, 6)
    with pytest.raises(NotImplementedError, match="no gradient is defined with a count"):
        kernels.gathered_k_matmul(x, w, torch.tensor([1, 2]), count=torch.tensor(1), kernel=own)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"w": torch.randn(3, 5)}, r"w: expected a matrix with 6 entries along axis 1, got \(3, 5\) beside \(4, 6\)"),
        ({"w": torch.randn(6)}, "w: expected a matrix"),
        ({"w": torch.randn(3, 6).double()}, "w: expected the type of the other operand, torch.float32, got"),
        ({"index": torch.tensor([[1]])}, r"index: expected a vector of int32 or int64, got torch.int64 \(1, 1\)"),
        ({"index": torch.tensor([1.0])}, "index: expected a vector of int32 or int64"),
        ({"scale": torch.ones(3)}, r"scale: expected shape \(2,\), got \(3,\)"),
        ({"bias": torch.ones(4)}, r"bias: expected shape \(3,\), got \(4,\)"),
        ({"count": torch.ones(2).long()}, "count: expected one int32 or int64"),
    ],
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_bad_input(kernel: str, change: dict[str, Tensor], match: str) -> None:
    given = {"x": torch.randn(4, 6), "w": torch.randn(3, 6), "index": torch.tensor([1, 2]), **change}
    with pytest.raises(ValueError, match=match):
        kernels.gathered_k_matmul(**given, kernel=name(kernel, "gathered_k_matmul"))
    with pytest.raises(ValueError, match="x: expected a matrix, got shape"):
        kernels.column_norms(torch.randn(3), kernel=name(kernel, "column_norms"))
