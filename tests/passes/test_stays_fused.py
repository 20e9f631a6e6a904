"""Multi-head attention that stays one call: exact, and the report says why."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fx_approx
from fx_approx.policies import Exact, Override

from .attention import AHEAD, HEADS, LENGTH, ONLINE, SIZE, Calls, names, transformed


class Subclass(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Named(nn.MultiheadAttention):
    """Overrides nothing."""


def attention(**options: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(SIZE, HEADS, batch_first=True, **options)


def hooked() -> nn.MultiheadAttention:
    made = attention()
    made.out_proj.register_forward_hook(lambda module, args, output: None)
    return made


def replaced() -> nn.MultiheadAttention:
    made = attention()
    made.forward = made.forward
    return made


def no_weights(attn: nn.Module, x: Tensor) -> Any:
    return attn(x, x, x, need_weights=False)[0]


FUSED: dict[str, tuple[Callable[..., Any], nn.Module | None, str]] = {
    "weights": (lambda attn, x: attn(x, x, x)[0], None, "returns its weights (need_weights=True)"),
    "cross": (lambda attn, x: attn(x, x + 1, x + 1, need_weights=False)[0], None, "query, key and value differ"),
    "pair": (lambda attn, x: attn(x, x, x, None, False), None, "its pair of results is used as a whole"),
    "added_key": (no_weights, attention(add_bias_kv=True), "attends to a key of its own"),
    "zero_key": (no_weights, attention(add_zero_attn=True), "attends to a key of its own"),
    "subclass": (no_weights, Subclass(SIZE, HEADS, batch_first=True), "Subclass is a subclass"),
    "hooked": (no_weights, hooked(), "out_proj: has hooks"),
    "parametrised": (no_weights, parametrizations.weight_norm(attention(), "in_proj_weight"), "parametrised"),
    "replaced": (no_weights, replaced(), "its forward was replaced"),
}


@pytest.mark.parametrize("name", FUSED)
def test_what_cannot_be_taken_apart_stays_whole_and_says_why(name: str) -> None:
    call, layer, reason = FUSED[name]
    model, x = Calls(call, layer), torch.randn(3, LENGTH, SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)  # a parametrised layer is not traced
        approx = transformed(model, Override({"fc": ONLINE}, Exact()), x)
    if name == "parametrised":
        assert not [row for row in names(approx) if row.startswith("attn.linear")]
    else:
        assert names(approx) == ["fc", "attn"]
        assert f"fused multi-head attention: {reason}" in fx_approx.report(approx)["attn"].reason
    fx_approx.set_sampling(approx, 1.0)
    ours, theirs = approx(x), model(x)
    for one, other in zip(ours if name == "pair" else [ours], theirs if name == "pair" else [theirs], strict=True):
        assert one is other or torch.equal(one, other)


def test_a_decoder_layer_is_traced_and_its_packed_cross_attention_stays_whole() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(SIZE, HEADS, 32, dropout=0.0, batch_first=True)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return self.layer(x, memory)

    model = Decoder().double()
    x, memory = torch.randn(2, 3, LENGTH, SIZE, dtype=torch.float64)
    approx = transformed(model, AHEAD, (x, memory))
    assert "layer.self_attn.linear" in names(approx)
    assert "differ" in fx_approx.report(approx)["layer.multihead_attn"].reason
    assert fx_approx.analysis.verify(approx, (x, memory)).passed


def test_a_subclass_that_overrides_nothing_is_taken_apart() -> None:
    model = Calls(no_weights, Named(SIZE, HEADS, batch_first=True))
    approx = transformed(model, Override({"fc": ONLINE}, Exact()), torch.randn(3, LENGTH, SIZE))
    assert names(approx) == ["fc", "attn.linear", "attn.scaled_dot_product_attention", "attn.out_proj"]


@pytest.mark.parametrize("given", [True, False])
def test_an_encoder_layer_is_traced_with_example_inputs_and_exact_in_evaluation(given: bool) -> None:
    """Its Python asks for the number of axes, to find torch's fast path."""
    layer = nn.TransformerEncoderLayer(SIZE, HEADS, 32, batch_first=True)
    model, x = nn.Sequential(nn.Linear(SIZE, SIZE), layer), torch.randn(3, LENGTH, SIZE)
    if given:
        approx = fx_approx.transform(model, AHEAD, x)
        assert "1.self_attn.linear" in names(approx)
    else:
        with pytest.warns(fx_approx.errors.CaptureWarning, match="not traced"):
            approx = fx_approx.transform(model, ONLINE)
        assert names(approx) == ["0", "1.self_attn", "1.linear1", "1.linear2"]
        assert "fused multi-head attention" in fx_approx.report(approx)["1.self_attn"].reason
    with torch.no_grad():
        assert torch.equal(approx.eval()(x), model.eval()(x))
