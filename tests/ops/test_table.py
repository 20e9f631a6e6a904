"""The table of ops and samplers is complete, and its oracles are right where torch can tell."""

from __future__ import annotations

import inspect

import pytest
import torch

from fx_approx.ops import OPS, SAMPLING_ARGUMENTS, ProductOp
from fx_approx.ops.gradient_selection import ProductSampling, SamplingKeywords
from fx_approx.sampling import SAMPLERS, SCORES
from tests.families import GRADIENT_CASES, OP_CASES, SAMPLER_CASES, OpCase


def test_every_op_sampler_and_score_has_a_row() -> None:
    assert {case.kind for case in OP_CASES.values()} == set(OPS), "an op is missing in tests/families.py"
    rows = SAMPLER_CASES.values()
    assert {row.sampler for row in rows} == set(SAMPLERS), "a sampler is missing in tests/families.py"
    of_output = {name for name, kind in SCORES.items() if "output" in kind.products and not kind.learns}
    assert {row.scores for row in rows} == of_output, "a kind of scores is missing in tests/families.py"
    others = {row.scores for row in GRADIENT_CASES.values()}
    assert others == set(SCORES) - of_output, "a kind of scores is missing in tests/families.py"


@pytest.mark.parametrize("case", OP_CASES.values(), ids=OP_CASES)
def test_the_pairs_of_the_table_are_all_of_the_product_and_those_that_the_op_tells_the_passes(case: OpCase) -> None:
    operands, op_kwargs = case.operands(), case.plain
    rest = case.weighted(operands, torch.zeros(case.groups * case.pairs))
    added = case.pairs_of(operands).sum((0, 1)) + rest
    torch.testing.assert_close(added, case.exact(operands), rtol=0, atol=1e-12)
    bound = case.op.bind(*case.call(lambda *args, **kwargs: (args, kwargs), operands))
    assert {name: bound[name] for name in case.op.kwarg_names} == op_kwargs
    lhs, rhs = operands[case.op.lhs], operands[case.op.rhs]
    assert case.op.geometry(lhs.shape, rhs.shape, op_kwargs).pairs == case.pairs
    assert case.op.geometry(lhs.shape, rhs.shape, op_kwargs).groups == case.groups
    assert case.op.pairs(lhs, rhs, op_kwargs) == (0 if case.vector else case.pairs)
    assert case.op.pairs(None, rhs, op_kwargs) == case.pairs
    # A pair is the product of what it reads of the two operands, by hand for a matrix product.
    if case.kind == "mm":
        outer = torch.einsum("mk,kn->kmn", operands["input"], operands["mat2"])
        torch.testing.assert_close(case.pairs_of(operands)[0], outer, rtol=0, atol=1e-12)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_op_shows_the_sampling_arguments_by_keyword(op: ProductOp) -> None:
    parameters = inspect.signature(op.function).parameters.values()
    operands = [torch.ones(2, 2) for p in parameters if p.default is p.empty]
    shown = list(parameters)[-4:]
    assert tuple(p.name for p in shown) == SAMPLING_ARGUMENTS == tuple(SamplingKeywords.__annotations__)
    assert {p.name: p.default for p in shown} == ProductSampling()._asdict()
    assert all(p.kind is p.KEYWORD_ONLY for p in shown)
    with pytest.raises(TypeError, match="selections"):
        op.function(*operands, selections=None)
