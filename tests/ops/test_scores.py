"""Scores of the pairs against the formulas: norms of terms, or of their factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fx_approx.ops import OPS
from fx_approx.sampling import SCORES, get_score
from tests.families import LAYOUTS, OP_CASES, OpCase, Operands

# The selector asks for no online scores of a product with a vector: it stays exact.
cases = pytest.mark.parametrize("case", [c for c in OP_CASES.values() if not c.vector], ids=lambda case: case.name)
# What learns from step to step is scored by the selector, from the weight's norms and its running ones.
KINDS = [name for name, kind in SCORES.items() if "output" in kind.products and not kind.learns]
kinds = pytest.mark.parametrize("kind", KINDS)


def scores(case: OpCase, operands: Operands, kind: str, ahead: bool = False) -> Tensor:
    lhs = None if ahead else operands[case.op.lhs]
    return case.op.scores(lhs, operands[case.op.rhs], get_score(kind), case.plain)


@kinds
@cases
def test_scores_equal_the_formula(case: OpCase, kind: str) -> None:
    """Online: ‖P_j‖ itself, or ‖A_j‖·‖B_j‖ where the table says proxy. Weight: ‖B_j‖. Input: ‖A_j‖. Uniform: 1."""
    operands = case.operands()
    actual, expected = scores(case, operands, kind), case.scores(operands, kind)
    assert actual.shape == (case.groups, case.pairs)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    if get_score(kind).ahead:
        assert torch.equal(scores(case, operands, kind, ahead=True), actual)


@pytest.mark.parametrize("name", [c.name for c in OP_CASES.values() if c.proxy])
def test_the_proxy_is_one(name: str) -> None:
    """Where the table says proxy, the norms of the terms are really others, else the online scores."""
    case = OP_CASES[name]
    operands = case.operands()
    terms = case.pairs_of(operands).flatten(2).norm(dim=2)
    # A 1x1 convolution has one position each: a matrix product, where both agree.
    assert torch.allclose(scores(case, operands, "online"), terms, rtol=1e-6) == (name == "conv2d-1x1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@kinds
@cases
def test_scores_of_narrow_operands_are_float32(case: OpCase, kind: str, dtype: torch.dtype) -> None:
    operands = case.operands(dtype=dtype)
    actual = scores(case, operands, kind)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), case.scores(operands, kind), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["online", "weight"])
@cases
def test_scores_of_large_values_do_not_overflow(case: OpCase, kind: str) -> None:
    """Squares of 3e4 are far outside float16, whose largest number is 65,504."""
    operands = {name: (value * 1e4).clamp(-6e4, 6e4).half() for name, value in case.operands().items()}
    actual = scores(case, operands, kind)
    assert bool((actual > 65_504).any()) or kind == "weight"
    torch.testing.assert_close(actual.double(), case.scores(operands, kind), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["online", "weight"])
def test_scores_are_summed_in_float32(kind: str) -> None:
    """A thousand ones: a running sum in bfloat16 would stop at 256."""
    ones = torch.ones(1000, 3, dtype=torch.bfloat16)
    actual = OPS["linear"].scores(ones, ones, get_score(kind), {})
    expected = 1000.0 if kind == "online" else 1000.0**0.5
    torch.testing.assert_close(actual, torch.full((1, 3), expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "plain"])
@cases
def test_scores_do_not_depend_on_the_layout(case: OpCase, layout: str) -> None:
    actual = scores(case, case.operands(layout=layout), "online")
    torch.testing.assert_close(actual, case.scores(case.operands(), "online"), rtol=1e-12, atol=0)


def test_batched_scores_are_no_product_of_norms() -> None:
    """t_j = √(Σ_b ‖A_b,j‖²·‖B_b,j‖²): a pair whose halves never meet in one batch has score 0."""
    lhs, rhs = torch.zeros(2, 3, 2), torch.zeros(2, 2, 4)
    lhs[0, :, 0], rhs[1, 0, :] = 1.0, 1.0
    lhs[:, :, 1], rhs[:, 1, :] = 1.0, 1.0
    expected = torch.tensor([[0.0, 24.0**0.5]])
    for kind in ("bmm", "matmul"):
        torch.testing.assert_close(OPS[kind].scores(lhs, rhs, get_score("online"), {}), expected)
    op_kwargs = {"equation": "bmk,bkn->bmn"}
    torch.testing.assert_close(OPS["einsum"].scores(lhs, rhs, get_score("online"), op_kwargs), expected)


def test_groups_are_scored_apart() -> None:
    """Each group of a convolution reads its own input channels and its own rows of the weight."""
    input, weight = torch.zeros(1, 4, 2, 2), torch.ones(6, 2, 1, 1)
    for channel in range(4):
        input[0, channel] = channel + 1
    weight[3:] = 10.0
    op_kwargs = {"stride": 1, "padding": 0, "dilation": 1, "groups": 2}
    actual = OPS["conv2d"].scores(input, weight, get_score("online"), op_kwargs)
    torch.testing.assert_close(actual, 12.0**0.5 * torch.tensor([[1.0, 2.0], [30.0, 40.0]]))


@pytest.mark.parametrize("name", [c.name for c in OP_CASES.values() if c.batch])
def test_an_empty_batch_has_scores_of_zero(name: str) -> None:
    case = OP_CASES[name]
    actual = scores(case, case.empty(), "online")
    assert actual.shape == (case.groups, case.pairs)
    assert not actual.any()


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_batched_scores_keep_the_range_of_float32(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    lhs = torch.randn(3, 4, 6, generator=generator) * size
    rhs = torch.randn(3, 6, 5, generator=generator) * size
    squares = lhs.double().square().sum(1) * rhs.double().square().sum(2)
    expected = squares.sum(0).sqrt().float().unsqueeze(0)
    for kind, plain in (("bmm", {}), ("einsum", {"equation": "bik,bkj->bij"})):
        torch.testing.assert_close(OPS[kind].scores(lhs, rhs, get_score("online"), plain), expected)
