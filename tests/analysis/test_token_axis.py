"""The token axis as text, as plain values and as a picture, and in the savings report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx.analysis import TokenAnalysis, token_axis
from fx_approx.policies import Tokens, Uniform
from tests.helpers.torchvision_compat import import_torchvision
from tests.passes.test_tokens import TOKENS, WIDTH, Block, stack

WIDE = 100


class Layers(nn.Module):
    """Blocks; behind the second one ``inner`` does something to the tokens."""

    def __init__(self, inner: Callable[[nn.Module, Tensor], Tensor] | None, layer: nn.Module) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(5, WIDTH), nn.ModuleList(Block("plain") for _ in range(4))
        self.layer, self.inner, self.head = layer, inner, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 1 and self.inner is not None:
                x = self.inner(self.layer, x)
        return self.head(x.mean(1))


class Windows(nn.Module):
    """Attention in windows of four tokens, and a residual stream of all."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch * tokens // 4, 4, 3, width).unbind(2)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).reshape(batch, tokens, width))


def along(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer`` along the sequence, for layers that have the channels first."""
    return layer(x.transpose(1, 2)).transpose(1, 2)


def lines(found: TokenAnalysis) -> list[str]:
    text = str(found)
    assert max(map(len, text.splitlines())) <= WIDE
    return [" ".join(line.split()) for line in text.splitlines()]


def test_a_vit_block_by_block() -> None:
    import_torchvision()
    from torchvision.models import VisionTransformer

    model = VisionTransformer(image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64)
    images = torch.randn(2, 3, 32, 32)
    text = lines(token_axis(model, images))
    assert text[:5] == [
        "Tokens of VisionTransformer",
        "",
        "stack 1: 17 tokens, which begin along axis 2 of reshape behind conv_proj",
        "blocks of encoder.layers",
        "1 of them is always kept",
    ]
    assert text[7:10] == [f"encoder_layer_{n} self_attention nothing else drop, skip" for n in range(3)]
    assert "row by row in encoder_layer_0 and 2 more: ln_1, self_attention.linear, self_attention.out_proj," in text
    assert text[-2:] == [
        "row by row behind the blocks: encoder.ln",
        "drop: from encoder_layer_0 on; nothing behind the blocks needs all positions",
    ]
    approx = fx_approx.transform(model, Tokens(0.5), images)
    assert lines(token_axis(approx))[7:10] == [
        "encoder_layer_0 self_attention nothing else drop, skip 17 of 17 whole by first=1",
        "encoder_layer_1 self_attention nothing else drop, skip 9 of 17 others are dropped",
        "encoder_layer_2 self_attention nothing else drop, skip 9 of 17 others are dropped",
    ]
    fx_approx.set_sampling(approx, tokens=0.25)
    assert [one.computed for one in fx_approx.report(approx).tokens] == [17, 5, 5]
    fx_approx.set_sampling(approx, enabled=False)
    said = str(fx_approx.report(approx))
    assert "Tokens that the blocks compute, 51 of 51 in all:" in said and "all 17, none is left out now" in said
    assert "blocks compute some" not in said


def test_a_gpt_skips_and_does_not_drop() -> None:
    model, x = stack("causal", "all")
    text = lines(token_axis(model, x))
    assert text[2] == "stack 1: 10 tokens, which begin along axis 1 of the input x"
    assert text[5:9] == [f"blocks.{n} attention nothing else skip" for n in range(4)]
    assert "row by row behind the blocks: norm, classes" in text
    assert text[-1] == "drop: no, since the model puts out every position"
    approx = fx_approx.transform(model, Tokens(0.5), x)
    report = fx_approx.report(approx)
    assert "2 of 4 blocks compute some of the tokens.\n" in str(report)
    both = fx_approx.transform(model, Tokens(0.5, layers=Uniform(0.5, min_k=2)), x)
    said_of_both = str(fx_approx.report(both)).replace("\n", " ")
    assert "2 of 4 blocks compute some of the tokens, " in said_of_both and "multiplies sampled." in said_of_both
    assert str(report).splitlines()[-4:] == [
        "Tokens that the blocks compute, 30 of 40 in all:",
        "  blocks.0: all 10, whole by first=1",
        "  blocks.1 to blocks.2: 5 of 10, others pass it by",
        "  blocks.3: all 10, whole by last=1",
    ]
    assert report.to_dict()["tokens"][1] == {
        **{"block": "blocks.1", "computed": 5, "tokens": 10},
        "reason": "others pass it by",
    }


def test_swin_stops_at_its_windows() -> None:
    import_torchvision()
    from torchvision.models import SwinTransformer

    model, images = SwinTransformer([4, 4], 32, [2, 2], [2, 4], [4, 4], num_classes=3), torch.randn(2, 3, 64, 64)
    said = " ".join(lines(token_axis(model, images)))
    assert "no blocks whose tokens could be sampled" in said
    assert "attention of features.1.0.attn and 3 more is one call of shifted_window_attention" in said


@pytest.mark.parametrize(
    ("inner", "layer", "said"),
    [
        (lambda m, x: x + along(m, x), nn.Conv1d(WIDTH, WIDTH, 3, padding=1), "layer mixes positions (convolution)"),
        (lambda m, x: x + m(x)[0], nn.LSTM(WIDTH, WIDTH, batch_first=True), "layer mixes positions (recurrence)"),
    ],
    ids=["convolution", "recurrence"],
)
def test_what_else_mixes_tokens_in_a_block(inner: Callable[..., Tensor], layer: nn.Module, said: str) -> None:
    model, x = Layers(inner, layer), torch.randn(2, TOKENS, 5)
    found = token_axis(model, x)
    assert [block.stops for block in found.stacks[0].blocks] == [(), (said,), (), ()]
    assert found.stacks[0].drop == 2, "behind it"
    report = fx_approx.report(fx_approx.transform(model, Tokens(0.5, mode="skip", last=0), x))
    assert [(row.computed, row.reason) for row in report.tokens] == [
        *((TOKENS, "whole by first=1"), (TOKENS, said)),
        *[(TOKENS // 2, "others pass it by")] * 2,
    ]
    assert not report.token_notes, "the rows say it"


def test_pooling_between_blocks_ends_a_stack() -> None:
    model = Layers(along, nn.AvgPool1d(2))
    found = token_axis(model, torch.randn(2, TOKENS, 5))
    assert [(one.begins, one.tokens, len(one.blocks)) for one in found.stacks] == [
        ("the input x", 10, 2),
        ("layer", 5, 2),
    ]
    assert found.stacks[0].whole == "layer reads every position (pooling)"
    assert "drop: no, since layer reads every position (pooling)" in str(found)


def test_windows_are_said_where_attention_is_seen() -> None:
    found = token_axis(nn.Sequential(nn.Linear(5, WIDTH), Windows()), torch.randn(2, 8, 5))
    assert found.stacks[0].tokens == 4 and found.stacks[0].drop is None and found.stacks[0].blocks[0].skip
    said = "reshape in 1 reads every position (they are folded with another axis, as in windows)"
    assert found.stacks[0].whole == said


def test_blocks_that_one_module_serves_are_numbered() -> None:
    block = Block("plain")
    found = token_axis(nn.Sequential(block, block, block), torch.randn(2, TOKENS, WIDTH))
    assert len({one.name for one in found.stacks[0].blocks}) == 3


def test_a_backend_and_a_model_without_tokens_in_its_plan() -> None:
    model, x = stack("causal", "all")
    sampling = fx_approx.backend(Tokens(0.5), inner="eager")
    with pytest.raises(ValueError, match="run a training step first"):
        token_axis(sampling)
    torch.compile(model, backend=sampling)(x).sum().backward()
    found = token_axis(sampling)
    assert [block.name for block in found.stacks[0].blocks] == [f"blocks.{n}" for n in range(4)]
    assert [block.reason for block in found.stacks[0].blocks][1] == "others pass it by"
    plain = token_axis(fx_approx.transform(model, Uniform(0.5, scores="weight"), x))
    assert plain.stacks and not plain.shares and "computes" not in str(plain)


def test_plain_values_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    model, x = stack("plain", "class")
    found = token_axis(fx_approx.transform(model, Tokens(0.5, mode="skip", per_layer=True), x))
    told = json.loads(json.dumps(found.to_dict()))
    assert told["model"] == "Stack" and told["modes"] == ["skip", "skip"] and told["shares"] == [[6, 11], [6, 11]]
    figure = found.plot(tmp_path / "tokens.svg")
    assert "<svg" in (tmp_path / "tokens.svg").read_text(encoding="utf-8")
    (axes,) = figure.axes
    cells = [patch for patch in axes.patches if patch.get_fill()]
    assert len(cells) == 11 + 6 + 6 + 11, "a cell for each token that is computed"
    assert len(axes.lines) == 2 * 5, "a line for each that passes by"
    with pytest.raises(ValueError, match="no block of Linear has tokens"):
        token_axis(nn.Linear(4, 4), torch.randn(2, 4)).plot()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"fx_approx\[plot\]"):
        found.plot()


@pytest.mark.parametrize(
    ("give", "error", "message"),
    [
        (lambda: (3, None), TypeError, "model: expected a torch.nn.Module, got int"),
        (lambda: (nn.Linear(4, 4), None), ValueError, "example_inputs: expected one training batch"),
        (lambda: (fx_approx.transform(*_given()), torch.randn(3, TOKENS, 5)), ValueError, "expected none for a"),
        (
            lambda: (fx_approx.transform(stack()[0], Uniform(0.5, scope="layer")), None),
            ValueError,
            "transformed with example_inputs",
        ),
    ],
    ids=["no module", "no inputs", "inputs", "no shapes"],
)
def test_bad_input(give: Callable[[], tuple[nn.Module, Tensor]], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        token_axis(*give())


def _given() -> tuple[nn.Module, Tokens, Tensor]:
    model, x = stack("plain", "mean")
    return model, Tokens(0.5), x
