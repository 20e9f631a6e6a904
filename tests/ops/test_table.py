"""The table of ops and samplers is complete, and its oracles are right where torch can tell."""

from __future__ import annotations

import inspect

import pytest
import torch

from fx_approx.ops import OPS, SAMPLING_ARGUMENTS, ProductOp
from fx_approx.ops.gradient_selection import ProductSampling, SamplingKeywords
from fx_approx.sampling import SAMPLERS, SCORES, Selection
from tests.families import GRADIENT_CASES, OP_CASES, SAMPLER_CASES, OpCase

cases = pytest.mark.parametrize("case", OP_CASES.values(), ids=OP_CASES)


def test_every_op_has_a_row() -> None:
    assert {case.kind for case in OP_CASES.values()} == set(OPS), "an op is missing in tests/families.py"


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_every_op_shows_the_sampling_arguments_by_keyword(op: ProductOp) -> None:
    parameters = inspect.signature(op.function).parameters.values()
    operands = [torch.ones(2, 2) for p in parameters if p.default is p.empty]
    shown = list(parameters)[-4:]
    assert tuple(p.name for p in shown) == SAMPLING_ARGUMENTS == tuple(SamplingKeywords.__annotations__)
    assert {p.name: p.default for p in shown} == ProductSampling()._asdict()
    assert all(p.kind is p.KEYWORD_ONLY for p in shown)
    with pytest.raises(TypeError, match="selections"):
        op.function(*operands, selections=None)


def test_every_sampler_and_score_has_a_row() -> None:
    rows = SAMPLER_CASES.values()
    assert {row.sampler for row in rows} == set(SAMPLERS), "a sampler is missing in tests/families.py"
    of_output = {name for name, kind in SCORES.items() if "output" in kind.products and not kind.learns}
    assert {row.scores for row in rows} == of_output, "a kind of scores is missing in tests/families.py"
    others = {row.scores for row in GRADIENT_CASES.values()}
    assert others == set(SCORES) - of_output, "a kind of scores is missing in tests/families.py"


@cases
def test_all_pairs_of_the_oracle_are_the_exact_product(case: OpCase) -> None:
    operands = case.operands()
    everything = Selection(torch.arange(case.pairs).expand(case.groups, -1), None)
    torch.testing.assert_close(case.oracle(operands, everything), case.exact(operands), rtol=0, atol=1e-12)
    pairs = case.finish(operands, case.op_kwargs, case.pairs_of(operands).sum((0, 1)))
    torch.testing.assert_close(pairs, case.exact(operands), rtol=0, atol=1e-12)


@cases
def test_the_op_tells_the_passes_the_pairs_of_the_table(case: OpCase) -> None:
    operands = case.operands()
    op_kwargs = case.plain
    bound = case.op.bind(*case.call(lambda *args, **kwargs: (args, kwargs), operands))
    assert {name: bound[name] for name in case.op.kwarg_names} == op_kwargs
    lhs, rhs = operands[case.op.lhs], operands[case.op.rhs]
    assert case.op.geometry(lhs.shape, rhs.shape, op_kwargs).pairs == case.pairs
    assert case.op.geometry(lhs.shape, rhs.shape, op_kwargs).groups == case.groups
    assert case.op.pairs(lhs, rhs, op_kwargs) == (0 if case.vector else case.pairs)
    assert case.op.pairs(None, rhs, op_kwargs) == case.pairs
