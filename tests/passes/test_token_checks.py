"""Tokens: what a single operation does not show; each model here gave other numbers, or none, with tokens left out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.errors import NoEffectWarning, UnsupportedError
from fx_approx.policies import Tokens, Uniform
from fx_approx.runtime.approx_module import find
from tests.passes.test_tokens import TOKENS, WIDTH, Block


class Model(nn.Module):
    """Blocks and what ``inner`` does behind each of them but the first, and ``head`` behind all.

    ``index`` leaves tokens out by hand, behind the first block.
    """

    def __init__(self, inner: Callable[..., Tensor] | None = None, head: Callable[..., Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks = nn.Linear(5, WIDTH), nn.ModuleList(Block("plain") for _ in range(4))
        self.inner, self.head, self.index = inner, head, None
        self.table, self.up = nn.Parameter(torch.randn(TOKENS, TOKENS)), nn.Linear(WIDTH, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor, there: Tensor | None = None) -> Any:
        x, hidden, table = self.blocks[0](self.embed(x)), None, self.table * 1
        x, there = self.narrow(x), self.narrow(there)
        for number, block in enumerate(list(self.blocks)[1:]):
            x = block(x)
            if self.inner is not None:
                x = self.inner(self, x, block, table)
            hidden = x if number == 0 else hidden
        return x.mean(1) if self.head is None else self.head(x, there, hidden)

    def narrow(self, x: Tensor | None) -> Any:
        return x if x is None or self.index is None else x[:, self.index]


def rows(model: Model, x: Tensor, block: Any, table: Tensor) -> Tensor:
    batch, tokens, width = x.shape
    return x + model.up(x.reshape(batch * tokens, width)).reshape(batch, tokens, width)


def parts(model: Model, x: Tensor, block: Any, table: Tensor) -> Tensor:
    rest = x[:, 1:]
    batch, tokens, width = rest.shape
    rest = model.up(rest).view(batch, tokens, 2, width // 2).reshape(batch, tokens, width)
    return torch.cat([x.narrow(1, 0, 1), rest], dim=1)


def split(model: Model, x: Tensor, block: Any, table: Tensor) -> Tensor:
    head, rest = x.split([1, TOKENS - 1 if model.index is None else len(model.index) - 1], dim=1)
    return torch.cat([head, model.up(rest)], dim=1)


def lower(model: Model, x: Tensor, block: Any, table: Tensor) -> Tensor:
    place = torch.arange(TOKENS)
    mask = place[:, None] >= place[None, :]
    return block(x, None, mask if model.index is None else mask[model.index][:, model.index])


def masked_mean(x: Tensor, there: Tensor, hidden: Any) -> Tensor:
    whole = there.unsqueeze(-1).expand(x.size()).to(x.dtype)
    return (x * whole).sum(1) / whole.sum(1).clamp(min=1e-9)


def made(model: nn.Module, policy: Tokens, *inputs: Tensor) -> tuple[nn.Module, list[Tensor]]:
    """The transformed model, and what each of its forwards chooses, with the tokens that are always kept."""
    approx = fx_approx.transform(model, policy, inputs)
    found: list[Tensor] = []

    def note(module: Any, args: Any, chosen: Any) -> None:
        if chosen is None:
            return
        behind = module.start + args[1].shape[module.dim] - module.others
        index = chosen.indices[0] + module.start
        found.append(torch.cat([torch.arange(module.start), index, torch.arange(behind, args[1].shape[module.dim])]))

    (one,) = find(approx)._fx_approx.tokens
    one.register_forward_hook(note)
    return approx, found


def examples(batch: int = 3, tokens: int = TOKENS) -> Tensor:
    return torch.randn(batch, tokens, 5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("inner", "head", "lengths"),
    [
        (rows, None, (TOKENS, 24)),
        pytest.param(parts, None, (TOKENS, 24), marks=pytest.mark.slow),
        pytest.param(split, None, (TOKENS,), marks=pytest.mark.slow),
        (lower, None, (TOKENS,)),
        (None, lambda x, there, hidden: x[:, -1], (TOKENS, 24)),
        (None, lambda x, there, hidden: x[:, 1:].mean(1) + x[:, 0], (TOKENS, 24)),
    ],
    ids=["rows", "parts", "split", "mask", "last", "rest"],
)
def test_other_batches_and_lengths_by_hand(inner: Any, head: Any, lengths: tuple[int, ...]) -> None:
    model = Model(inner, head).double()
    approx, chosen = made(model, Tokens(0.5), examples())
    for batch, tokens in [(3, TOKENS), (1, TOKENS), *((2, length) for length in lengths)]:
        x = examples(batch, tokens)
        output = approx(x)
        by_hand = copy.deepcopy(model)
        by_hand.index = chosen[-1]
        assert len(chosen[-1]) < tokens
        assert torch.allclose(output, by_hand(x), rtol=1e-12, atol=1e-12)
    for tokens in (TOKENS, 24):
        if tokens in lengths:
            approx.eval(), model.eval()
            x = examples(2, tokens)
            assert torch.equal(approx(x), model(x)), "exact in evaluation, at every length"


def test_the_count_below_a_masked_mean_goes_along() -> None:
    model, there = Model(head=masked_mean).double(), torch.ones(3, TOKENS)
    there[0, 6:] = 0
    x = examples()
    approx, chosen = made(model, Tokens(0.7, mode="drop"), x, there)
    output = approx(x, there)
    model.index = chosen[0]
    assert torch.allclose(output, model(x, there), rtol=1e-12, atol=1e-12)


def patch_mean(x: Tensor, there: Tensor, hidden: Any) -> Tensor:
    """A mask of all but the class token has an axis that is shorter than that of the tokens."""
    mask = torch.ones(x.shape[0], x.shape[1] - 1)
    return x[:, 0] + (x[:, 1:] * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


def shifted(model: Model, x: Tensor, block: Any, table: Tensor) -> Tensor:
    return x + torch.cat([x[:, 1:], x[:, :1]], dim=1)


def moving_bias(model: Model, x: Tensor, block: Any, table: Tensor) -> Tensor:
    x = block(x, None, table)
    table.add_(1.0)
    return x


def recurrent(model: Model, x: Tensor, block: Any, table: Tensor) -> Tensor:
    output: Tensor = model.lstm(x)[0]
    return x + output


@pytest.mark.parametrize(
    ("inner", "head", "reason"),
    [
        pytest.param(recurrent, None, "lstm mixes positions", marks=pytest.mark.slow),
        (None, lambda x, there, hidden: x.sum(1) / (x.numel() / 48), "numel behind .* reads every position"),
        (None, lambda x, there, hidden: x.sum(1) / x.shape[1], "computes with the number of tokens"),
        (lambda m, x, b, t: x * (1 + 1 / x.size(1)), None, "computes with the number of tokens"),
        (lambda m, x, b, t: x / x.shape[:-1][1], None, "computes with the number of tokens"),
        (
            None,
            lambda x, there, hidden: (x * there.unsqueeze(-1)).sum(1) / there.sum(1, keepdim=True),
            "is made of all tokens' entries of what goes along",
        ),
        (None, patch_mean, "sum .*is made of "),
        (None, lambda x, there, hidden: x[:, 0] + x[:, 1:].sum(1) / there[:, 1:].size(1), "computes with the number"),
        (None, lambda x, there, hidden: x.sum(1) / x.shape.numel(), "computes with the number of tokens"),
        (
            None,
            lambda x, there, hidden: x.sum(1) / torch.ones(x.shape[1]).sum(),
            "sum .*is made of the number of tokens",
        ),
        (None, lambda x, there, hidden: x.sum(1) / torch.full((1, 1), x.shape[1]), "is made of the number of tokens"),
        (None, lambda x, there, hidden: (x.mean(1), hidden), "the model puts out all positions"),
        (None, lambda x, there, hidden: x.max(1).indices, "max behind .* reads every position"),
        (shifted, None, "tokens at different places are combined"),
        (moving_bias, None, "in place, which goes along with the tokens"),
    ],
    ids=[
        *("recurrence", "numel", "mean", "scale", "sizes", "masked", "patches", "patch_mean", "product"),
        *("ones", "full", "hidden", "places", "shift", "moving"),
    ],
)
def test_it_stops_with_a_reason(inner: Any, head: Any, reason: str) -> None:
    model, x, there = Model(inner, head).double(), examples(), torch.ones(3, TOKENS, dtype=torch.float64)
    with pytest.warns(NoEffectWarning, match=reason):
        approx = fx_approx.transform(model, Tokens(0.5, mode="drop"), (x, there))
    assert not find(approx)._fx_approx.tokens


def test_a_hidden_value_that_is_put_out_has_all_tokens() -> None:
    model, x = Model(head=lambda x, there, hidden: (x, hidden)).double(), examples()
    approx = fx_approx.transform(model, Tokens(0.5), x)
    assert [one.shape[1] for one in approx(x)] == [TOKENS, TOKENS]


def test_masks_of_other_tokens_as_many_do_not_stop_it() -> None:
    """A decoder that makes its causal mask by its own length, which is that of what it looks at."""

    def decoder(x: Tensor, there: Tensor, hidden: Any) -> Tensor:
        tokens = there.shape[1]
        query, key, value = there.unsqueeze(-1).expand(-1, -1, 24).chunk(3, dim=-1)
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        query = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return nn.functional.scaled_dot_product_attention(query, x[..., :8], x[..., 8:16])

    model, x = Model(head=decoder).double(), examples()
    approx = fx_approx.transform(model, Tokens(0.5, mode="drop"), (x, torch.randn(3, TOKENS).double()))
    assert find(approx)._fx_approx.tokens


def test_two_stacks_whose_tokens_meet_are_not_sampled_apart() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = Model(head=lambda x, *_: x).double(), Model(head=lambda x, *_: x).double()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (self.one(x) * self.other(y)).mean(1)

    model, x, y = Towers(), examples(), examples()
    approx, chosen = made(model, Tokens(0.5), x, y)
    output = approx(x, y)
    model.one.index = chosen[0]
    assert torch.allclose(output, (model.one(x) * model.other(y)[:, chosen[0]]).mean(1), rtol=1e-12)
    assert "combined with those of another stack" in str(fx_approx.report(approx))


def test_a_subnetwork_of_a_model_that_samples_tokens_is_refused() -> None:
    model, x = Model().double(), examples()
    approx = fx_approx.transform(model, Tokens(0.5, layers=Uniform(0.5, scores="weight")), x)
    with pytest.raises(UnsupportedError, match="it samples tokens"):
        fx_approx.subnetworks.extract(approx)


@pytest.mark.slow
@pytest.mark.parametrize("inner", [rows, parts, split])
def test_compiled_as_one_graph(inner: Any) -> None:
    model = Model(inner).double()
    eager = fx_approx.transform(model, Tokens(0.5), examples())
    compiled = torch.compile(copy.deepcopy(eager), backend="aot_eager", fullgraph=True)
    for tokens in (TOKENS, *((14,) if inner is not split else ())):
        x = examples(2, tokens)
        assert torch.allclose(compiled(x), eager(x), rtol=1e-12)
