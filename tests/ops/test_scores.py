"""Scores of the pairs against the formulas: norms of terms, or of their factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fx_approx.core.candidates import Role
from fx_approx.ops import OPS
from fx_approx.ops.base import norm
from fx_approx.sampling import SamplerConfig, get_score
from tests.families import DTYPES, LAYOUTS, OP_CASES, Operands, pairwise
from tests.ops.roles import EVEN, PRODUCTS, READS, TYPES, RoleCase

pytestmark = pytest.mark.filterwarnings(EVEN)

# The selector asks for no online scores of a product with a vector: it stays exact.
EVERY = [one for one in PRODUCTS.values() if not one.case.vector]
#: Dtypes and layouts that operands may have; "large": squares of 3e4 are far outside float16, whose largest is 65,504.
FORMS = (*((str(dtype), dtype, "plain") for dtype in DTYPES), ("large", torch.float16, "plain"))
FORMS += tuple((layout, torch.float64, layout) for layout in LAYOUTS if layout != "plain")


def scores_of(one: RoleCase, operands: Operands, kind: str, withheld: bool = False) -> Tensor:
    """Scores that read no gradient."""
    case, op = one.case, one.case.op
    lhs, rhs = operands[op.lhs], operands[op.rhs]
    if one.role is Role.OUTPUT and not one.per_batch:
        return op.scores(None if withheld else lhs, rhs, get_score(kind), case.plain)
    spec = SamplerConfig(scores=kind, positions=one.positions, per_batch=one.per_batch)
    return op.roles.scores(one.role, lhs, rhs, case.plain, spec, None)


def kinds_of(one: RoleCase) -> list[str]:
    return [kind for kind in READS[one.role] if one.role is Role.OUTPUT or get_score(kind).early]


def rows() -> list[dict[str, Any]]:
    """All that operands may be for one product of each type."""
    found = []
    for role in Role:
        ones = [one for one in TYPES if one.role is role]
        found += pairwise(one=ones, kind=kinds_of(ones[0]), form=FORMS)
    return found


@pytest.mark.parametrize("one", EVERY, ids=lambda one: one.name)
def test_scores_pairs_and_groups_equal_the_formula(one: RoleCase) -> None:
    """Online: ‖P_j‖ itself, or ‖A_j‖·‖B_j‖ where the table says proxy. Weight: ‖B_j‖. Input: ‖A_j‖. Uniform: 1."""
    for kind in kinds_of(one):
        check_scores(one, kind, *FORMS[0])
    operands, spec = one.case.operands(), SamplerConfig(positions=one.positions, per_batch=one.per_batch)
    lhs, rhs = operands[one.case.op.lhs], operands[one.case.op.rhs]
    if one.role is not Role.OUTPUT or one.per_batch:
        assert one.case.op.roles.count(one.role, lhs, rhs, one.case.plain, spec) == (one.groups, one.pairs)
    shape = one.case.op.geometry(lhs.shape, rhs.shape, one.case.plain)
    assert shape.role_pairs(one.role, one.positions) == one.pairs
    if one.role is Role.GRAD_WEIGHT and not one.per_batch:
        # The product counts the same operations whichever way its pairs are cut: all of them together are all of it.
        assert shape.flops() == shape.flops(m=one.pairs * (1 if one.positions else shape.row_block))


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row['one'].name}-{row['kind']}-{row['form'][0]}")
def test_scores_do_not_depend_on_dtypes_and_layouts(row: dict[str, Any]) -> None:
    check_scores(row["one"], row["kind"], *row["form"])


def check_scores(one: RoleCase, kind: str, form: str, dtype: torch.dtype, layout: str) -> None:
    if form == "large":
        operands = {name: (value * 1e4).clamp(-6e4, 6e4).half() for name, value in one.case.operands().items()}
    else:
        operands = one.case.operands(dtype=dtype, layout=layout)
    actual, expected = scores_of(one, operands, kind), one.scores(operands, None, kind)
    assert actual.shape == (one.groups, one.pairs)
    assert actual.dtype == torch.promote_types(dtype, torch.float32)
    if kind == "uniform":  # all alike, whatever they are
        expected = expected * actual[0, 0].double()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0)
    if one.role is Role.OUTPUT and not one.per_batch and get_score(kind).ahead:
        assert torch.equal(scores_of(one, operands, kind, withheld=True), actual)


@pytest.mark.parametrize("name", [c.name for c in OP_CASES.values() if c.proxy])
def test_the_proxy_is_one(name: str) -> None:
    """Where the table says proxy, the norms of the terms are really others, else the online scores."""
    one = RoleCase(OP_CASES[name], Role.OUTPUT)
    operands = one.case.operands()
    terms = one.case.pairs_of(operands).flatten(2).norm(dim=2)
    # A 1x1 convolution has one position each: a matrix product, where both agree.
    assert torch.allclose(scores_of(one, operands, "online"), terms, rtol=1e-6) == (name == "conv2d-1x1")


@pytest.mark.parametrize("kind", ["online", "weight"])
def test_scores_are_summed_in_float32(kind: str) -> None:
    """A thousand ones: a running sum in bfloat16 would stop at 256."""
    ones = torch.ones(1000, 3, dtype=torch.bfloat16)
    actual = OPS["linear"].scores(ones, ones, get_score(kind), {})
    expected = 1000.0 if kind == "online" else 1000.0**0.5
    torch.testing.assert_close(actual, torch.full((1, 3), expected), rtol=1e-5, atol=0)


BATCHED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bmm", {}),
    ("matmul", {}),
    ("einsum", {"equation": "bmk,bkn->bmn"}),
)


@pytest.mark.parametrize("kind, plain", BATCHED)
def test_batched_scores_are_no_product_of_norms_and_keep_the_range_of_float32(kind: str, plain: dict[str, Any]) -> None:
    """t_j = √(Σ_b ‖A_b,j‖²·‖B_b,j‖²): a pair whose halves never meet in one batch has score 0."""
    lhs, rhs = torch.zeros(2, 3, 2), torch.zeros(2, 2, 4)
    lhs[0, :, 0], rhs[1, 0, :] = 1.0, 1.0
    lhs[:, :, 1], rhs[:, 1, :] = 1.0, 1.0
    actual = OPS[kind].scores(lhs, rhs, get_score("online"), plain)
    torch.testing.assert_close(actual, torch.tensor([[0.0, 24.0**0.5]]))
    for size in (1e-15, 1e15):
        generator = torch.Generator().manual_seed(0)
        lhs = torch.randn(3, 4, 6, generator=generator) * size
        rhs = torch.randn(3, 6, 5, generator=generator) * size
        squares = lhs.double().square().sum(1) * rhs.double().square().sum(2)
        expected = squares.sum(0).sqrt().float().unsqueeze(0)
        torch.testing.assert_close(OPS[kind].scores(lhs, rhs, get_score("online"), plain), expected)


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
    one = RoleCase(OP_CASES[name], Role.OUTPUT)
    actual = scores_of(one, one.case.empty(), "online")
    assert actual.shape == (one.groups, one.pairs)
    assert not actual.any()


SHAPES = ((128, 5), (100, 6), (2, 32, 7), (1, 64), (64, 1), (0, 3))


@pytest.mark.parametrize("compiled", [False, True])
def test_norms_of_columns(compiled: bool) -> None:
    """Against torch's own in float64. 64 rows and multiples of it are added up in two steps by compiled code."""
    call = norm
    for shape, dtype in zip(SHAPES, (torch.float64, torch.float32, torch.bfloat16) * 2, strict=True):
        if compiled:
            torch._dynamo.reset()
            call = torch.compile(norm, backend="aot_eager", fullgraph=True, dynamic=False)
        operand, dims = torch.randn(shape).to(dtype), tuple(range(len(shape) - 1))
        expected = torch.linalg.vector_norm(operand.double(), dim=dims)
        found = call(operand, dims)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found.double(), expected, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0)
