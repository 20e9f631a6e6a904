"""Tokens where attention is written out: the same oracle, the model with the tokens left out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fx_approx
from fx_approx.policies import Tokens, Uniform
from tests.helpers.quick import in_turn, thinned
from tests.passes.test_token_checks import made

WIDTH, HEADS, TOKENS = 16, 2, 10
EACH = WIDTH // HEADS

Attend = Callable[["Written", Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Queries, keys and values ``[N, heads, T, each]`` and a bias or mask ``[T, T]`` to ``[N, heads, T, each]``."""


def plain(m: Written, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-2, -1) * EACH**-0.5
    if bias is not None:
        scores = scores + bias
    return F.dropout(scores.softmax(dim=-1), 0.0) @ v


def causal(m: Written, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) / EACH**0.5
    scores = scores.masked_fill(m.hidden[: m.length, : m.length][m.rows(), :][:, m.rows()], float("-inf"))
    return torch.matmul(m.drop(torch.softmax(scores.float(), dim=-1).type_as(q)), v)


def in_place(m: Written, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    scores = torch.matmul(q, k.transpose(3, 2))
    if bias is not None:
        scores += bias
    return torch.matmul(m.softmax(scores), v)


def by_labels(m: Written, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k)
    return torch.einsum("bhij,bhjd->bhid", (scores * EACH**-0.5).softmax(-1), v)


def positions_first(m: Written, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    q, k, v = (one.transpose(1, 2) for one in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", [q, k])
    return torch.einsum("bhqk,bkhd->bqhd", [torch.special.softmax(scores, dim=3), v]).transpose(1, 2)


def rows(m: Written, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Examples and heads as one axis, as Bloom has it."""
    batch, tokens = q.shape[0], q.shape[2]
    q, k, v = (one.reshape(-1, tokens, EACH) for one in (q, k, v))
    slopes = (m.slopes.repeat(batch)[:, None, None] * m.places()[None, None, :]).to(q.dtype)
    scores = torch.baddbmm(slopes, q, k.transpose(1, 2), beta=1.0, alpha=EACH**-0.5)
    weights = scores.view(batch, HEADS, tokens, tokens).softmax(-1).view(-1, tokens, tokens)
    return torch.bmm(weights, v).view(batch, HEADS, tokens, EACH)


def shared_keys(m: Written, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Multi-query attention: one head of keys and values for all queries."""
    return plain(m, q, k[:, :1], v[:, :1], bias)


def own_weights(m: Written, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Each token has a matrix of its own, which goes where the token goes."""
    assert m.own is not None
    return plain(m, q, k, torch.einsum("bhtd,tde->bhte", v, m.own[m.rows()]), bias)


class Written(nn.Module):
    """Four blocks of attention; ``index`` leaves tokens out by hand."""

    def __init__(self, attend: Attend, bias: bool = False, head: str = "all") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.head, self.index, self.length = attend, head, None, TOKENS
        self.embed, self.position = nn.Linear(5, WIDTH), nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(4))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.bias = nn.Parameter(torch.randn(TOKENS, TOKENS)) if bias else None
        self.own = nn.Parameter(torch.randn(TOKENS, EACH, EACH)) if attend is own_weights else None
        self.softmax, self.drop = nn.Softmax(dim=-1), nn.Dropout(0.0)
        self.register_buffer("hidden", torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1))
        self.register_buffer("slopes", torch.tensor([0.5, 0.25]))

    def rows(self) -> Any:
        return slice(None) if self.index is None else self.index

    def places(self) -> Tensor:
        return torch.arange(TOKENS)[self.rows()]

    def block(self, number: int, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv[number](x).reshape(batch, tokens, 3, HEADS, EACH).permute(2, 0, 3, 1, 4)
        bias = None if self.bias is None else self.bias[self.rows(), :][:, self.rows()]
        mixed = self.attend(self, q, k, v, bias)
        return x + self.out[number](mixed.transpose(1, 2).reshape(batch, tokens, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(0, self.embed(x) + self.position)
        x = self.block(2, self.block(1, x))
        return self.read(self.block(3, x))

    def read(self, x: Tensor) -> Tensor:
        return x.mean(1) if self.head == "mean" else x

    def by_hand(self, x: Tensor, index: Tensor) -> Tensor:
        whole = self.block(0, self.embed(x) + self.position)
        self.index = index
        part = self.block(2, self.block(1, whole[:, index]))
        if self.head == "mean":
            return self.read(self.block(3, part))
        self.index = None
        return self.block(3, whole.index_copy(1, index, part))


def examples(batch: int = 3) -> Tensor:
    return torch.randn(batch, TOKENS, 5, dtype=torch.float64)


WAYS = [plain, causal, in_place, by_labels, positions_first, rows, shared_keys, own_weights]


@pytest.mark.parametrize("head", thinned(["all", "mean"]))
@pytest.mark.parametrize(("attend", "bias"), in_turn(WAYS, [False, True]))
def test_values_and_gradients_are_those_of_the_model_by_hand(attend: Any, bias: bool, head: str) -> None:
    if bias and attend not in (plain, in_place, shared_keys, own_weights):
        pytest.skip("takes no bias")
    model = Written(attend, bias, head).double()
    approx, chosen = made(model, Tokens(0.5), examples())
    x = examples()
    output = approx(x)
    assert len(chosen[-1]) == TOKENS // 2
    hand = copy.deepcopy(model)
    expected = hand.by_hand(x, chosen[-1])
    assert torch.allclose(output, expected, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(output, model(x)), "something was left out"
    output.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(approx.parameters(), hand.parameters(), strict=True):
        assert one.grad is not None and torch.allclose(one.grad, other.grad, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(approx.eval()(x), model.eval()(x))
    if attend not in (causal, rows):
        assert approx.train()(examples(1)).shape[0] == 1, "another batch"


def test_the_report_counts_both_products_and_the_memory_of_scores() -> None:
    """The oracle: operations that torch counts, whose scores shrink with the square of the share."""
    model, x = Written(plain, head="mean").double(), examples()
    approx, _ = made(model, Tokens(0.5), x)
    with FlopCounterMode(display=False) as counted:
        approx(x).sum().backward()
    report = fx_approx.report(approx)
    assert report.totals.executed.total == counted.get_total_flops()
    assert 0 < report.totals.memory < report.totals.memory_exact


@pytest.mark.parametrize("attend", [plain, by_labels, rows])
def test_products_of_attention_are_sampled_on_the_tokens_that_are_there(attend: Any) -> None:
    """Pairs of the second product are keys; a sample of them is one of those that are there."""
    model, x = Written(attend, head="mean").double(), examples()
    approx = fx_approx.transform(model, Tokens(0.5, layers=Uniform(0.5)), x)
    with torch.no_grad():
        found = torch.stack([approx(x) for _ in range(3)])
    assert found.isfinite().all() and not torch.equal(found[0], found[1])
