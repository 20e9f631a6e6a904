"""Tokens: bad input, where it stops and says so, randomness inside attention, and how often torch.compile compiles."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import fx_approx
from fx_approx.errors import CaptureWarning, NoEffectWarning, UnsupportedError
from fx_approx.policies import Tokens
from fx_approx.runtime.approx_module import find
from fx_approx.schedules import Linear, RatioScheduler
from tests.passes.test_token_checks import made

WIDTH, HEADS, TOKENS = 16, 2, 10
Attend = Callable[["Small", int, Tensor], Tensor]
"""The number of a layer and ``[N, T, width]`` to the same, mixed."""


def heads(m: Small, number: int, x: Tensor) -> list[Tensor]:
    q, k, v = m.qkv[number](x).chunk(3, -1)  # three, whatever the inputs are: no second trace with values is needed
    return [one.unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in (q, k, v)]


def usual(m: Small, number: int, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*heads(m, number, x), dropout_p=m.dropout).transpose(1, 2).flatten(2)


def written(m: Small, number: int, x: Tensor) -> Tensor:
    q, k, v = heads(m, number, x)
    weights = F.dropout((q @ k.transpose(-2, -1)).softmax(-1), m.dropout)
    return (weights @ v).transpose(1, 2).flatten(2)


class Small(nn.Module):
    """Layers of attention and nothing else; ``index`` leaves tokens out by hand between the first and the last one."""

    def __init__(self, attend: Attend = usual, layers: int = 4, dropout: float = 0.0, head: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.attend, self.dropout, self.head, self.index = nn.Linear(5, WIDTH), attend, dropout, head, None
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))

    def forward(self, x: Tensor, *more: Any) -> Any:
        x = self.embed(x)
        for number in range(len(self.qkv)):
            x = self.layer(number, x)
        return x if self.head is None else self.head(x, *more)

    def layer(self, number: int, x: Tensor) -> Tensor:
        result: Tensor = x + self.out[number](self.attend(self, number, x))
        return result


def examples(batch: int = 3, tokens: int = TOKENS) -> Tensor:
    return torch.randn(batch, tokens, 5)


# ---- randomness inside


@pytest.mark.parametrize("attend", [usual, written])
def test_dropout_of_attention_is_that_of_the_tokens_that_are_there(attend: Attend) -> None:
    """Behind one layer the output is linear in the mask, so that its mean is the output without dropout."""
    model, x = Small(attend, layers=1, dropout=0.3), examples(1)
    approx = fx_approx.transform(model, Tokens(0.5, first=0, last=0), x)
    with fx_approx.reuse_selection(approx), torch.no_grad():
        found = torch.stack([approx(x) for _ in range(300)])
        model.dropout = 0.0
        whole = fx_approx.transform(model, Tokens(0.5, first=0, last=0), x)
        expected = whole(x)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - expected).abs() <= 5 * error + 1e-6).all()
    assert (error.amax(-1) > 0).sum() == TOKENS // 2, "the others pass unchanged"


# ---- values that several layers read


class Shared(Small):
    """The second layer of each pair reads the keys and values of the first one; or all read those of the first."""

    def __init__(self, pairs: bool) -> None:
        super().__init__(layers=8)
        self.pairs, self.query = pairs, nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        x, held = self.embed(x), []
        for number in range(8):
            x, held = self.step(number, x, held)
        return x

    def step(self, number: int, x: Tensor, held: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        if number % 2 == 0 and (self.pairs or number == 0):
            query, *held = heads(self, number, x)
        else:
            query = self.query[number](x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, *held)
        return x + self.out[number](mixed.transpose(1, 2).flatten(2)), held


def test_keys_and_values_that_two_layers_share_go_along() -> None:
    model, x = Shared(True).double(), examples().double()
    approx, chosen = made(model, Tokens(0.5), x)
    output = approx(x)
    part, held = model.embed(x), []
    for number in range(8):
        if number == 2:
            whole, part = part, part[:, chosen[0]]
        if number == 6:
            part = whole.index_copy(1, chosen[0], part)
        part, held = model.step(number, part, held)
    assert torch.allclose(output, part, rtol=1e-12, atol=1e-12)


def test_keys_and_values_that_all_layers_share_leave_no_block() -> None:
    with pytest.warns(NoEffectWarning, match="it has 1 blocks"):
        fx_approx.transform(Shared(False), Tokens(0.5), examples())


# ---- where it stops


def similar(m: Small, number: int, x: Tensor) -> Tensor:
    mask = (x @ x.transpose(-2, -1)).unsqueeze(1) > 0
    return F.scaled_dot_product_attention(*heads(m, number, x), attn_mask=mask).transpose(1, 2).flatten(2)


def weighted(m: Small, number: int, x: Tensor) -> Tensor:
    mask = x.mean(-1)[:, None, None, :]
    return F.scaled_dot_product_attention(*heads(m, number, x), attn_mask=mask).transpose(1, 2).flatten(2)


def strongest(m: Small, number: int, x: Tensor) -> Tensor:
    q, k, v = heads(m, number, x)
    scores = q @ k.transpose(-2, -1)
    least = scores.topk(3, dim=-1).values[..., -1:]
    return (scores.masked_fill(scores < least, -1e9).softmax(-1) @ v).transpose(1, 2).flatten(2)


def sums(m: Small, number: int, x: Tensor) -> Tensor:
    q, k, v = heads(m, number, x)
    return ((q @ k.transpose(-2, -1)).softmax(-1).cumsum(-1) @ v).transpose(1, 2).flatten(2)


def asks_its_size(m: Small, number: int, x: Tensor) -> Tensor:
    q, k, v = heads(m, number, x)
    scores = q @ k.transpose(-2, -1)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, -1e9).softmax(-1) @ v).transpose(1, 2).flatten(2)


def on_queries(m: Small, number: int, x: Tensor) -> Tensor:
    q, k, v = heads(m, number, x)
    return ((q @ k.transpose(-2, -1)).softmax(-2) @ v).transpose(1, 2).flatten(2)


def windows(m: Small, number: int, x: Tensor) -> Tensor:
    q, k, v = (one.unflatten(2, (2, TOKENS // 2)) for one in heads(m, number, x))
    return F.scaled_dot_product_attention(q, k, v).flatten(2, 3).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (similar, r"attention.* reads scores of attention, and is not known to serve some of them"),
        (weighted, "has a mask or bias that is made of the tokens"),
        (strongest, r"topk.* mixes positions"),
        (sums, r"cumsum.* reads scores of attention, and is not known to serve some of them"),
        (asks_its_size, "has parameters or sizes for each token"),
        (on_queries, r"matmul.* reads scores of attention, and is not known to serve some of them"),
        (windows, "no value before it has its tokens along one axis"),
    ],
)
def test_attention_of_unknown_meaning_stays_exact_and_says_where(attend: Attend, reason: str) -> None:
    model, x = Small(attend), examples()
    with pytest.warns(NoEffectWarning, match=reason):
        approx = fx_approx.transform(model, Tokens(0.5), x)
    assert re.search(reason, " ".join(str(fx_approx.report(approx)).split()))
    assert torch.equal(approx(x), model(x))


def test_one_odd_block_leaves_the_others() -> None:
    def odd(m: Small, number: int, x: Tensor) -> Tensor:
        return (strongest if number == 2 else written)(m, number, x)

    model, x = Small(odd, layers=6), examples()
    approx = fx_approx.transform(model, Tokens(0.5), x)
    assert len(find(approx)._fx_approx.tokens) == 2
    assert "topk" in str(fx_approx.report(approx)) and approx(x).shape == (3, TOKENS, WIDTH)


def test_tokens_that_become_places_of_an_image_again_are_skipped() -> None:
    model, x = Small(written, head=lambda x: x.transpose(1, 2).unflatten(-1, (2, 5)).mean((2, 3))).double(), examples()
    approx, chosen = made(model, Tokens(0.5), x.double())
    output = approx(x.double())
    whole = model.layer(0, model.embed(x.double()))
    part = model.layer(2, model.layer(1, whole[:, chosen[0]]))
    expected = model.head(model.layer(3, whole.index_copy(1, chosen[0], part)))
    assert torch.allclose(output, expected, rtol=1e-12)
    with pytest.warns(NoEffectWarning, match="reads every position"):
        fx_approx.transform(model, Tokens(0.5, mode="drop"), x.double())


def test_a_loss_of_every_token_in_the_model_is_skipped_and_not_dropped() -> None:
    def loss(x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(x.reshape(-1, WIDTH), labels.reshape(-1))

    model, x, labels = Small(head=loss).double(), examples().double(), torch.randint(0, WIDTH, (3, TOKENS))
    approx, chosen = made(model, Tokens(0.5), x, labels)
    output = approx(x, labels)
    whole = model.layer(0, model.embed(x))
    part = model.layer(2, model.layer(1, whole[:, chosen[0]]))
    expected = loss(model.layer(3, whole.index_copy(1, chosen[0], part)), labels)
    assert torch.allclose(output, expected, rtol=1e-12)
    with pytest.warns(NoEffectWarning, match="reads every position"):
        fx_approx.transform(model, Tokens(0.5, mode="drop"), (x, labels))


# ---- what is asked for


def pooled(x: Tensor, *more: Any) -> Tensor:
    return x.mean(1)


def last(x: Tensor, *more: Any) -> Tensor:
    return x[:, -1]


def test_fewer_than_two_tokens_are_refused() -> None:
    x = examples()
    with pytest.warns(NoEffectWarning, match="keeps 1 of 10 tokens, and attention needs two"):
        fx_approx.transform(Small(head=pooled), Tokens(0.05), x)
    approx = fx_approx.transform(Small(head=last), Tokens(0.05), x)
    assert find(approx)._fx_approx.tokens[0].others == 1 and approx(x).shape == (3, WIDTH)


def test_more_tokens_kept_than_there_are_is_said() -> None:
    with pytest.warns(NoEffectWarning, match="keep=12, and it has 10 tokens"):
        fx_approx.transform(Small(head=pooled), Tokens(0.5, keep=12), examples())


def test_a_token_that_is_read_by_its_number_is_kept_whatever_keep_says() -> None:
    model, x = Small(head=last).double(), examples().double()
    approx, chosen = made(model, Tokens(0.4, keep=2), x)
    output = approx(x)
    index = torch.cat([torch.arange(2), chosen[0][2:]])
    assert chosen[0][-1] == TOKENS - 1 and len(index) == 2 + 1 + round(0.4 * 7)
    part = model.layer(0, model.embed(x))[:, index]
    for number in range(1, 4):
        part = model.layer(number, part)
    assert torch.allclose(output, part[:, -1], rtol=1e-12)


# ---- rows of different lengths


class Recurrent(Small):
    """A recurrence over packed rows behind the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor, *more: Any) -> Tensor:
        packed = pack_padded_sequence(super().forward(x), lengths, batch_first=True)
        result: Tensor = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]
        return result


def test_packed_rows_inside_stop_it_and_outside_are_refused() -> None:
    model, x = Recurrent(), (examples(2), torch.tensor([10, 7]))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        approx = fx_approx.transform(model, Tokens(0.5), x)
    assert any("no tokens can be sampled" in str(one.message) for one in told)
    assert torch.equal(approx(*x), model(*x))
    with pytest.raises(ValueError, match="example_inputs: a PackedSequence is not traced"):
        fx_approx.transform(model, Tokens(0.5), pack_sequence([torch.randn(4, 5), torch.randn(2, 5)]))


def test_a_packed_input_runs_the_models_own_python() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.out = nn.LSTM(5, WIDTH, batch_first=True), nn.Linear(WIDTH, 3)

        def forward(self, x: Any) -> Tensor:
            result: Tensor = self.out(pad_packed_sequence(self.lstm(x)[0], batch_first=True)[0])
            return result

    model, packed = Reads(), pack_sequence([torch.randn(4, 5), torch.randn(2, 5)])
    approx = fx_approx.transform(model, fx_approx.policies.Uniform(0.5, scope="layer"))
    with pytest.warns(CaptureWarning, match="an input is a PackedSequence"):
        assert approx(packed).shape == (2, 4, 3)
    assert torch.equal(approx.eval()(packed), model(packed))


def test_nested_tensors_are_refused_in_training_and_run_in_evaluation() -> None:
    model, rows = Small(), torch.nested.nested_tensor([torch.randn(4, 5), torch.randn(7, 5)], layout=torch.jagged)
    approx = fx_approx.transform(model, Tokens(0.5), examples())
    with pytest.raises(UnsupportedError, match="a nested tensor has no one shape"):
        approx(rows)
    with pytest.raises(ValueError, match="example_inputs: a nested tensor has no one shape"):
        fx_approx.transform(model, Tokens(0.5), rows)
    model = nn.Sequential(nn.Linear(5, WIDTH), nn.GELU(), nn.Linear(WIDTH, 3))
    approx = fx_approx.transform(model, fx_approx.policies.Uniform(0.5), examples())
    assert torch.equal(approx.eval()(rows).values(), model.eval()(rows).values())


# ---- how often torch.compile compiles


class Counted:
    """A backend that compiles nothing and counts."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return gm.forward


@pytest.mark.slow
@pytest.mark.parametrize("attend", [usual, written])
def test_a_share_that_stays_is_one_compilation_and_a_ladder_one_for_each_rung(attend: Attend) -> None:
    torch.compiler.reset()
    approx, counted = fx_approx.transform(Small(attend), Tokens(0.5), examples()), Counted()
    compiled = torch.compile(approx, backend=counted, fullgraph=True)
    for _ in range(4):
        compiled(examples()).sum().backward()
    assert counted.graphs == 1
    scheduler = RatioScheduler(approx, Linear(0.3, 0.9, steps=8, levels=3))
    counted.graphs, shares = 0, set()
    for _ in range(10):
        compiled(examples()).sum().backward()
        shares.add(scheduler.get_last_ratio()["tokens"])
        scheduler.step()
    assert counted.graphs <= len(shares) <= 4
    torch.compiler.reset()


@pytest.mark.slow
def test_all_other_lengths_are_one_more_compilation_and_keep_the_share() -> None:
    torch.compiler.reset()
    approx, counted = fx_approx.transform(Small(), Tokens(0.5), examples()), Counted()
    compiled = torch.compile(approx, backend=counted, fullgraph=True)
    for tokens in (TOKENS, 14, 24, 16, TOKENS, 30):
        assert compiled(examples(tokens=tokens)).shape == (3, tokens, WIDTH)
    assert counted.graphs == 2
    torch.compiler.reset()
