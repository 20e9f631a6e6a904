"""Fused attention is counted on every device, with and without a mask, in reports, budgets and predictions."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count

import fx_approx
from fx_approx.core.flops import attention_backward_flops, attention_flops
from fx_approx.policies import Exact, FlopBudget, RooflineModel, Uniform
from fx_approx.policies.cost_roofline import Device
from tests.helpers.modules import made_of
from tests.helpers.quick import thinned

VALUE = Uniform(0.5)
WIDTH, HEADS = 32, 4


class Attend(nn.Module):
    """Attention over ``memory``, or over its own input, with ``keys`` heads of keys and values."""

    def __init__(self, causal: bool = False, masked: bool = False, keys: int = HEADS, size: int = 8, own: int = 8):
        super().__init__()
        self.causal, self.masked, self.keys, self.size, self.own = causal, masked, keys, size, own
        self.q, self.k = nn.Linear(WIDTH, HEADS * size), nn.Linear(WIDTH, keys * size)
        self.v, self.o = nn.Linear(WIDTH, keys * own), nn.Linear(HEADS * own, WIDTH)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
        k = self.k(memory).unflatten(-1, (-1, self.size)).transpose(1, 2)
        v = self.v(memory).unflatten(-1, (-1, self.own)).transpose(1, 2)
        mask = x.new_zeros(x.shape[1], memory.shape[1]) if self.masked else None
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal, enable_gqa=self.keys != HEADS
        )
        return self.o(y.transpose(1, 2).flatten(2))


CASES: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 24),
    "causal": ({"causal": True}, 24),
    "masked": ({"masked": True}, 24),
    "cross": ({}, 40),
    "grouped": ({"keys": 2}, 24),
    "values": ({"own": 16}, 40),
}


def inputs(length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 24, WIDTH), torch.randn(2, length, WIDTH)


def math_forward(model: nn.Module, given: tuple[Tensor, ...]) -> int:
    """What torch counts of the products of attention where they are apart, those of the layers left out."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*given)
    operators = counter.get_flop_counts()["Global"]
    return sum(flops for operator, flops in operators.items() if "bmm" in str(operator))


@pytest.mark.parametrize("case", CASES)
def test_the_report_counts_both_products_forward_and_backward(case: str) -> None:
    options, length = CASES[case]
    model, given = Attend(**options), inputs(length)
    report = fx_approx.explain(model, Exact(), given).report
    row = report["scaled_dot_product_attention"]
    expected = math_forward(model, given)
    assert row.exact is not None and row.exact.output == expected == 2 * 2 * HEADS * 24 * length * (8 + model.own)
    fused = sdpa_backward_flop_count(
        (2, HEADS, 24, model.own), (2, HEADS, 24, 8), (2, HEADS, length, 8), (2, HEADS, length, model.own)
    )
    # Where no fused kernel takes it, torch runs four products in place of five, and counts those.
    assert row.exact.grad_input in (fused, 2 * expected) and row.exact.grad_weight == 0
    if case in ("plain", "causal", "cross"):
        assert row.exact.grad_input == fused
    assert report.totals.exact.total == sum(one.exact.total for one in report.rows if one.exact is not None)


@pytest.mark.parametrize("case", thinned(CASES))
def test_torchs_counter_finds_as_much_on_the_running_model(case: str) -> None:
    options, length = CASES[case]
    model, given = Attend(**options), tuple(t.requires_grad_() for t in inputs(length))
    approx = fx_approx.transform(model, VALUE, given)
    report = fx_approx.report(approx)
    for one, total in ((model, report.totals.exact.total), (approx, report.totals.executed.total)):
        with FlopCounterMode(display=False) as counter:
            one(*given).sum().backward()
        assert counter.get_total_flops() == total


def test_the_formulas_are_those_of_torch() -> None:
    for query, key, value in (
        ((2, 4, 24, 8), (2, 4, 40, 8), (2, 4, 40, 16)),
        ((1, 1, 1, 4), (1, 1, 3, 4), (1, 1, 3, 4)),
    ):
        grad = (*query[:-1], value[-1])
        assert attention_backward_flops(grad, query, key, value) == sdpa_backward_flop_count(grad, query, key, value)
        apart = torch.rand(query), torch.rand(key), torch.rand(value)
        with FlopCounterMode(display=False) as counter:
            (apart[0] @ apart[1].mT).softmax(-1) @ apart[2]
        assert attention_flops(query, key, value) == counter.get_total_flops()


def test_the_dynamo_frontend_counts_the_same() -> None:
    torch._dynamo.reset()
    model, given = Attend(causal=True), inputs(24)
    rows = [
        explained.report["scaled_dot_product_attention"].exact
        for explained in (fx_approx.explain(model, VALUE, given), fx_approx.backend(VALUE).explain(model, *given))
    ]
    assert rows[0] == rows[1] and rows[0] is not None and rows[0].output > 0


@made_of(lambda: {"enter": nn.Linear(WIDTH, WIDTH), "a": nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)})
def Fused(self: Any, x: Tensor) -> Tensor:
    """Attention inside Python that is not traced, so that it stays one module."""
    x = torch.stack([row for row in self.enter(x)])
    return self.a(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore::fx_approx.errors.CaptureWarning")
def test_a_whole_module_has_its_attention() -> None:
    x = torch.randn(2, 24, WIDTH)
    model = Fused()
    row = fx_approx.explain(model, Exact(), x).report["a"]
    attention = 2 * 2 * 2 * HEADS * 24 * 24 * 8
    projections = 2 * 2 * 24 * WIDTH * 4 * WIDTH
    assert row.exact is not None and row.exact.output == attention + projections


def test_narrowed_heads_save_their_share() -> None:
    model, given = Attend(), inputs(24)
    report = fx_approx.report(fx_approx.transform(model, Uniform(0.5), given))
    row = report["scaled_dot_product_attention"]
    assert row.saved == 0.5 and row.executed is not None and row.executed.total > 0


def test_budgets_and_predictions_have_it() -> None:
    """Long sequences: nearly all of the step is attention, so that a budget must narrow its heads."""
    model, given = Attend(), (torch.randn(1, 512, WIDTH), torch.randn(1, 512, WIDTH))
    report = fx_approx.explain(model, FlopBudget(0.8, keep_last=False, min_k=1, round_to=1), given).report
    assert report["scaled_dot_product_attention"].saved > 0.2
    assert 0.7 < (report.totals.executed.total + report.totals.selection) / report.totals.exact.total <= 0.8
    device = Device("a device", "torch.float32", 1e9, 1e12, 1e12, 0.0, 1.0, 1.0, 1.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seconds = [
            fx_approx.analysis.estimate_step_time(model, Exact(), x, cost=RooflineModel(device=device)).exact.seconds
            for x in (given, tuple(t[:, :256] for t in given))
        ]
    assert seconds[0] is not None and seconds[1] is not None and seconds[0] > 3 * seconds[1], "quadratic in the length"
