"""Memory and operations in the report of a model that leaves tokens out, against what torch keeps and counts."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fx_approx
from fx_approx.policies import Tokens, Uniform
from tests.helpers.quick import quick
from tests.ops.counting import Keeping
from tests.passes.test_token_checks import Model, examples, parts
from tests.passes.test_tokens import stack


def kept(model: nn.Module, *inputs: Tensor) -> int:
    with Keeping([*model.parameters(), *model.buffers()]) as measured:
        output = model(*inputs)
    del output
    return measured.bytes


def counted(model: nn.Module, *inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(*inputs).sum().backward()
    return int(counter.get_total_flops())


EXACT = [
    ("plain", "mean", Tokens(0.5, keep=2)),
    ("plain", "all", Tokens(0.5, per_layer=True)),
    ("bias", "mean", Tokens(0.3, mode="skip", first=0)),
    ("rows", "mean", Tokens(0.5, keep=2)),
]
CLOSE = [
    ("rotary", "mean", Tokens(0.5, keep=2)),
    ("plain", "mean", Tokens(0.5, layers=Uniform(0.5, min_k=2))),
    ("rows", "mean", Tokens(0.5, mode="skip", layers=Uniform(0.5, min_k=2, scope="group"))),
]


@pytest.mark.parametrize(
    ("how", "head", "policy"),
    quick([*EXACT, *CLOSE], lambda how, head, policy: how != "rows" or (how, head, policy) in EXACT),
)
def test_memory_is_what_autograd_keeps(how: str, head: str, policy: Tokens) -> None:
    """To the byte, but for copies of buffers and what copies of channels leave behind."""
    model, x = stack(how, head)
    approx = fx_approx.transform(model, policy, x)
    totals = fx_approx.report(approx).totals
    assert totals == fx_approx.explain(model, policy, x).report.totals
    assert totals.memory_exact == kept(model, x)
    found = kept(approx, x)
    if (how, head, policy) in EXACT:
        assert totals.memory == found
    assert totals.memory == pytest.approx(found, rel=0.02)
    assert found < 0.85 * totals.memory_exact


def test_a_product_of_some_of_the_tokens_counts_its_own() -> None:
    """All tokens but the first, which is always there, in the middle of a block."""
    model, x = Model(parts).double(), examples()
    approx = fx_approx.transform(model, Tokens(0.5), x)
    report = fx_approx.report(approx)
    assert report.totals.executed.total == counted(approx, x)
    assert report["up"].exact is not None and report["up"].executed is not None
    assert report["up"].executed.total * 9 == report["up"].exact.total * Tokens(0.5).tokens.count(9)
    assert report.totals.memory == pytest.approx(kept(approx, x), rel=0.02)


def test_what_is_copied_is_told() -> None:
    model, x = stack("plain", "all")
    whole = 3 * 10 * 16 * 8
    totals: Any = fx_approx.explain(model, Tokens(0.5), x).report.totals
    assert totals.gathered == whole // 2 + whole, "the chosen tokens, and all of them where they come back"
    assert totals.moved < totals.moved_exact
    approx = fx_approx.transform(model, Tokens(0.5), x)
    fx_approx.set_sampling(approx, tokens=1.0)
    now: Any = fx_approx.report(approx).totals
    assert (now.memory, now.moved, now.gathered) == (totals.memory_exact, totals.moved_exact, 0)
