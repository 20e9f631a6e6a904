"""Tokens of each example its own, padding first, and scores; the oracle is the model by hand, one example at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Exact, Override, Tokens, Uniform
from fx_approx.runtime.approx_module import find
from tests.helpers.quick import thinned
from tests.passes.test_token_checks import Model, examples, masked_mean
from tests.passes.test_tokens import HEADS, TOKENS, WIDTH, Block, Stack, by_policy, families, gradients, stack


def chosen_of(model: nn.Module) -> list[Tensor]:
    """What the next forwards choose for each example, ``[examples, n]``, with the tokens that are always kept."""
    found: list[Tensor] = []

    def note(module: Any, args: Any, chosen: Any) -> None:
        kept = torch.arange(module.others).expand(len(chosen.indices), -1)
        found.append(torch.cat([kept, chosen.indices + module.others], dim=1))

    for one in find(model)._fx_approx.tokens:
        one.register_forward_hook(note)
    return found


def by_hand(model: Stack, x: Tensor, chosen: list[Tensor], skip: bool, padding: Tensor | None = None) -> Tensor:
    """Each example by itself: none reads another."""
    own = [padding[i : i + 1] if padding is not None else None for i in range(len(x))]
    each = [model.by_hand(x[i : i + 1], [one[i] for one in chosen], skip, own[i]) for i in range(len(x))]
    return torch.cat(each)


def padding_of(lengths: tuple[int, ...] = (4, TOKENS, 7)) -> Tensor:
    return torch.arange(TOKENS) < torch.tensor(lengths)[:, None]


def agree(approx: nn.Module, output: Tensor, model: nn.Module, expected: Tensor) -> None:
    assert torch.allclose(output, expected, rtol=1e-10, atol=1e-12)
    for one, other in zip(gradients(approx, output), gradients(model, expected), strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("how", "head", "skip", "policy"),
    families(
        [
            ("class", False, Tokens(0.5, per_example=True)),
            ("mean", False, Tokens(0.5, keep=2, per_example=True, scores="norm")),
            ("all", True, Tokens(0.5, per_example=True)),
            ("all", True, Tokens(0.5, per_layer=True, per_example=True, scores="norm", sampler="topk")),
        ]
    ),
)
def test_each_example_is_the_model_by_hand_on_its_own_tokens(how: str, head: str, skip: bool, policy: Tokens) -> None:
    model, x = stack(how, head)
    approx = fx_approx.transform(model, policy, x)
    chosen = chosen_of(approx)
    output = approx(x)
    assert all(one.shape[0] == 3 and (one.diff() > 0).all() for one in chosen)
    assert not all(torch.equal(chosen[0][0], other) for other in chosen[0])
    agree(approx, output, model, by_hand(model, x, chosen, skip))


@pytest.mark.parametrize(
    ("head", "skip", "least"),
    thinned((head, head == "all", least) for least in (None, float("-inf"), -3e38) for head in ("mean", "all")),
)
def test_padding_is_left_out_first(head: str, skip: bool, least: float | None) -> None:
    """Five are kept: of four real ones all, and one of padding; of more, five of them. In another batch, too."""
    model, x = stack("plain", head)

    def mask_of(lengths: tuple[int, ...]) -> Tensor:
        there = padding_of(lengths)
        return there if least is None else torch.where(there, 0.0, torch.tensor(least, dtype=torch.float64))

    approx = fx_approx.transform(model, Tokens(0.5), (x, mask_of((4, TOKENS, 7))))
    chosen = chosen_of(approx)
    for lengths in ((4, TOKENS, 7), (TOKENS, 3, 5, 6)):
        batch, there = torch.randn(len(lengths), TOKENS, 5).double(), padding_of(lengths)
        chosen.clear()
        output = approx(batch, mask_of(lengths))
        (rows,) = chosen
        assert [int(real[row].sum()) for real, row in zip(there, rows, strict=True)] == [min(5, n) for n in lengths]
        agree(approx, output, model, by_hand(model, batch, chosen, skip, mask_of(lengths)))


def test_padding_is_counted_behind_the_tokens_that_are_always_kept() -> None:
    """Two are kept, and half of the others: of an example with four real tokens all, at every draw."""
    model, x = stack("plain", "mean")
    there = padding_of((4, TOKENS, 5))
    approx = fx_approx.transform(model, Tokens(0.5, keep=2), (x, there))
    chosen = chosen_of(approx)
    kept = 2 + round((TOKENS - 2) / 2)
    for _ in range(6):
        approx(x, there)
    for rows in chosen:
        assert [int(real[row].sum()) for real, row in zip(there, rows, strict=True)] == [4, kept, min(5, kept)]


def test_padding_may_be_a_token_like_any_other() -> None:
    model, x = stack("plain", "mean")
    there = padding_of()
    for policy in (Tokens(0.5, padding="ignore"), Tokens(0.5, per_example=False)):
        approx = fx_approx.transform(model, policy, (x, there))
        chosen = chosen_of(approx)
        approx(x, there)
        assert chosen[0].shape == (1, 5)
    apart = fx_approx.transform(model, Tokens(0.5, padding="ignore", per_example=True), (x, there))
    chosen = chosen_of(apart)
    for _ in range(8):
        apart(x, there)
    assert min(int(there[0, one[0]].sum()) for one in chosen) < 4


class Encoder(nn.Module):
    """Layers of torch with a ``key_padding_mask``; ``index`` leaves tokens out by hand, behind the first one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(5, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(3))
        self.index: Tensor | None = None

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = self.layers[0](self.embed(x), src_key_padding_mask=padding)
        if self.index is not None:
            x, padding = x[:, self.index], padding[:, self.index]
        for layer in list(self.layers)[1:]:
            x = layer(x, src_key_padding_mask=padding)
        return x.mean(1)


class Late(nn.Module):
    """Masks that each block makes of lengths for itself, by the sizes of its own values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks = nn.Linear(5, WIDTH), nn.ModuleList(Block("plain") for _ in range(3))
        self.index: Tensor | None = None

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = self.embed(x)
        for number, block in enumerate(self.blocks):
            if number == 1 and self.index is not None:
                x, padding = x[:, self.index], padding[:, self.index]
            mask = padding.logical_not()[:, None, None, :].expand(x.shape[0], 1, x.size(1), padding.shape[1])
            x = block(x, None, mask)
        return x.mean(1)


@pytest.mark.parametrize("make", [Encoder, Late])
def test_padding_masks_that_the_layers_make_of_what_they_are_given(make: Any) -> None:
    model, x = make().double(), examples()
    approx = fx_approx.transform(model, Tokens(0.5), (x, ~padding_of()))
    chosen = chosen_of(approx)
    for there in (padding_of(), padding_of((TOKENS, 2, 6))):
        chosen.clear()
        output = approx(x, ~there)
        each = []
        for place, index in enumerate(chosen[0]):
            assert int(there[place, index].sum()) == min(5, int(there[place].sum()))
            model.index = index
            each.append(model(x[place : place + 1], ~there[place : place + 1]))
        agree(approx, output, model, torch.cat(each))
    assert "padding is a token like any other" not in str(fx_approx.report(approx))


def test_a_masked_mean_counts_the_tokens_that_each_example_has() -> None:
    model, there = Model(head=masked_mean).double(), padding_of((3, TOKENS, 7)).double()
    x = examples()
    approx = fx_approx.transform(model, Tokens(0.5, mode="drop", per_example=True), (x, there))
    chosen = chosen_of(approx)
    output = approx(x, there)
    each = []
    for place, index in enumerate(chosen[0]):
        model.index = index
        each.append(model(x[place : place + 1], there[place : place + 1]))
    agree(approx, output, model, torch.cat(each))


@pytest.mark.parametrize(
    ("inner", "batch", "reason"),
    [
        (lambda m, x, b, t: x - x.mean(0, keepdim=True), 3, "does not keep them apart"),
        (lambda m, x, b, t: x + x.flip(0), 3, "does not keep them apart"),
        (None, 1, "no axis of it holds several examples"),
    ],
)
def test_where_examples_are_not_apart_one_selection_serves_all_and_the_report_says_so(
    inner: Any, batch: int, reason: str
) -> None:
    model, x = Model(inner).double(), examples(batch)
    approx = fx_approx.transform(model, Tokens(0.5, per_example=True), x)
    chosen = chosen_of(approx)
    output = approx(x)
    assert chosen[0].shape == (1, 5)
    model.index = chosen[0][0]
    assert torch.allclose(output, model(x), rtol=1e-12)
    said = " ".join(str(fx_approx.report(approx)).split())
    assert "one selection serves all examples" in said and reason in said


def test_a_mask_at_random_tells_no_padding_and_the_report_says_so() -> None:
    def gated(model: Model, x: Tensor, block: Any, table: Tensor) -> Tensor:
        return block(x, None, (torch.rand_like(table[:3]) > 0.1)[:, None, None, :])

    model, x = Model(gated).double(), examples()
    for asked, rows in ((None, 1), (True, 3)):
        approx = fx_approx.transform(model, Tokens(0.5, per_example=asked), x)
        chosen = chosen_of(approx)
        approx(x)
        assert chosen[0].shape == (rows, 5)
        said = " ".join(str(fx_approx.report(approx)).split())
        assert "padding is a token like any other: the mask of" in said and "is made of tokens, or at random" in said


def test_a_mask_of_written_out_attention_tells_no_padding_and_the_report_says_so() -> None:
    def written(model: Model, x: Tensor, block: Any, table: Tensor) -> Tensor:
        scores = (x @ x.transpose(1, 2)).masked_fill((table[:3] < -9).unsqueeze(1), float("-inf"))
        return x + scores.softmax(-1) @ x

    model, x = Model(written).double(), examples()
    for policy, rows in ((Tokens(0.5), 1), (Tokens(0.5, per_example=True), 3), (Tokens(0.5, padding="ignore"), 1)):
        approx = fx_approx.transform(model, policy, x)
        chosen = chosen_of(approx)
        approx(x)
        assert chosen[0].shape == (rows, 5)
        said = " ".join(str(fx_approx.report(approx)).split())
        told = "padding is a token like any other: masked_fill" in said
        assert told == (policy.padding == "first"), said


@pytest.mark.parametrize(
    "layers",
    [Override({"*.down": Uniform(0.5)}, Exact()), pytest.param(Uniform(0.5), marks=pytest.mark.slow)],
    ids=["hidden", "value"],
)
def test_channels_of_the_layers_are_sampled_on_the_tokens_of_each_example(layers: Any) -> None:
    """The oracle: the model written by hand, itself transformed by the policy of the layers."""
    model, x = stack("plain", "mean")
    approx = fx_approx.transform(model, Tokens(0.5, layers=layers, per_example=True), x)
    chosen = chosen_of(approx)
    output = approx(x)

    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.register_buffer("index", chosen[0])

        def forward(self, x: Tensor) -> Tensor:
            x = self.model.embed(x) + self.model.position
            x = self.model.blocks[0](x)
            x = x[torch.arange(3)[:, None], self.index]
            for block in list(self.model.blocks)[1:]:
                x = block(x)
            return self.model.read(x)

    hand = by_policy(ByHand(), layers, x)
    agree(approx, output, hand, hand(x))
