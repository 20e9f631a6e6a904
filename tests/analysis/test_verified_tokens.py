"""verify, where tokens are left out: it compares with the model of all tokens, in which these are masked."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import fx_approx
from fx_approx.analysis import verify
from fx_approx.ops.token_masks import masked_attention, passed_by, those_there
from fx_approx.passes import mask_tokens, sample_tokens
from fx_approx.policies import Tokens, Uniform
from fx_approx.runtime.approx_module import find
from fx_approx.sampling.base import Selection
from tests.helpers.quick import thinned
from tests.passes.test_token_checks import Model, examples, lower, masked_mean, parts, rows
from tests.passes.test_tokens import TOKENS, stack

CASES: list[tuple[str, str, Tokens]] = [
    ("plain", "class", Tokens(0.5)),
    ("rows", "class", Tokens(0.5)),
    ("bias", "mean", Tokens(0.5, keep=2)),
    ("rotary", "mean", Tokens(0.5, mode="skip")),
    ("causal", "all", Tokens(0.5)),
    ("bias", "all", Tokens(0.5, per_layer=True, scores="norm")),
    ("plain", "mean", Tokens(0.5, layers=Uniform(0.5, min_k=2))),
]


@pytest.mark.parametrize(("how", "head", "policy"), thinned(CASES, 3))
def test_a_model_that_leaves_tokens_out_is_right(how: str, head: str, policy: Tokens) -> None:
    model, x = stack(how, head)
    approx = fx_approx.transform(model, policy, x)
    before = fx_approx.sampler_state_dict(approx)
    found = verify(approx, x)
    assert found.passed and found.hoisted and found.tokens and found.worst.relative < 1e-12, str(found)
    assert {one.kind for one in found.differences} >= {"output", "loss", "gradient"}
    assert "With some tokens, and with all but those left out masked: the same numbers" in str(found)
    assert str(before) == str(fx_approx.sampler_state_dict(approx))
    assert all(not one._forward_hooks for one in find(approx)._fx_approx.tokens)


@pytest.mark.parametrize(
    ("inner", "head"),
    [
        (rows, None),
        pytest.param(parts, None, marks=pytest.mark.slow),
        (lower, None),
        (None, lambda x, there, hidden: x[:, 1:].mean(1) + x[:, 0]),
    ],
    ids=["rows", "parts", "mask", "rest"],
)
def test_other_models(inner: Any, head: Any) -> None:
    model, x = Model(inner, head).double(), examples()
    assert verify(fx_approx.transform(model, Tokens(0.5), x), x).worst.relative < 1e-12


def test_padding_and_a_mean_over_it() -> None:
    model, x, there = Model(head=masked_mean).double(), examples(), torch.ones(3, TOKENS)
    there[0, 6:] = 0
    approx = fx_approx.transform(model, Tokens(0.7, mode="drop"), (x, there))
    assert verify(approx, (x, there)).worst.relative < 1e-12
    padded, x = stack("plain", "mean")
    padding = torch.ones(3, TOKENS, dtype=torch.bool)
    padding[0, 6:] = False
    approx = fx_approx.transform(padded, Tokens(0.8), (x, padding))
    assert verify(approx, (x, padding)).worst.relative < 1e-12


def test_behind_the_backend() -> None:
    torch._dynamo.reset()
    model, x = stack("bias", "all")
    backend = fx_approx.backend(Tokens(0.5), inner="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
        torch.compile(model, backend=backend)(x)
    found = verify(backend, x)
    assert found.tokens and found.worst.relative < 1e-12


# ---- mistakes that must be found


def shifted(input: Tensor, dim: int, chosen: Selection | None, size: int | None = None) -> Tensor:
    """The neighbours of the chosen tokens."""
    return input if chosen is None else input.index_select(dim, (chosen.indices[0] + 1) % input.shape[dim])


def of_tables(input: Tensor, dim: int, chosen: Selection | None, size: int | None = None) -> Tensor:
    """The first tokens of a table, as if positions counted those that are there."""
    if chosen is None:
        return input
    places = chosen.indices[0]
    return input.index_select(dim, places if input.dim() > 2 else torch.arange(len(places)))


def across(input: Tensor, dim: int, chosen: Selection | None, size: int | None = None) -> Tensor:
    """Of a square table the keys' axis in another order than the queries'."""
    if chosen is None:
        return input
    places = chosen.indices[0]
    return input.index_select(dim, places.flip(0) if input.dim() == 2 and dim == 1 else places)


def put_elsewhere(whole: Tensor, part: Tensor, dim: int, chosen: Selection | None, batch: Any = None) -> Tensor:
    return part if chosen is None else whole.index_copy(dim, chosen.indices[0].flip(0), part)


def put_on_nothing(whole: Tensor, part: Tensor, dim: int, chosen: Selection | None, batch: Any = None) -> Tensor:
    return part if chosen is None else torch.zeros_like(whole).index_copy(dim, chosen.indices[0], part)


@pytest.mark.parametrize(
    ("case", "name", "broken"),
    thinned(
        [
            (0, "token_positions", lambda own: Selection(torch.arange(6).unsqueeze(0), None)),
            (3, "narrow", shifted),
            (3, "narrow", of_tables),
            (2, "narrow", across),
            (3, "put_back", put_elsewhere),
            (4, "put_back", put_on_nothing),
        ]
    ),
    ids=["class", "shifted", "tables", "across", "elsewhere", "nothing"],
)
def test_a_broken_gather_is_found(monkeypatch: pytest.MonkeyPatch, case: int, name: str, broken: Any) -> None:
    how, head, policy = CASES[case]
    model, x = stack(how, head)
    with monkeypatch.context() as patched:
        patched.setattr(sample_tokens, name, broken)
        approx = fx_approx.transform(model, policy, x)
    found = verify(approx, x)
    assert not found.passed and found.worst.relative > 1e-3
    assert "DIFFERENT numbers" in str(found)


def test_a_mask_that_does_not_hide_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle's own parts matter: without each of them it disagrees with a model that is right."""
    model, x = stack("plain", "mean")
    for name, broken in [
        (
            "masked_attention",
            lambda args, kwargs, queries, keys, chosen: masked_attention(args, kwargs, None, None, None),
        ),
        ("those_there", lambda value, dim, own, chosen: value),
    ]:
        with monkeypatch.context() as patched:
            patched.setattr(mask_tokens, name, broken)
            approx = fx_approx.transform(model, Tokens(0.5), x)
        assert not verify(approx, x).passed, name
    model, x = stack("plain", "all")
    monkeypatch.setattr(mask_tokens, "passed_by", lambda start, end, dim, own, chosen: end)
    assert not verify(fx_approx.transform(model, Tokens(0.5), x), x).passed


def test_selections_that_follow_the_tokens_cannot_be_compared() -> None:
    model, x = stack("plain", "mean")
    online = Uniform(0.5, scores="online", min_k=2, scope="layer")
    found = verify(fx_approx.transform(model, Tokens(0.5, layers=online), x), x)
    assert not found.passed
    assert found.incomparable == "the selection of embed (output) follows the tokens that are there"


# ---- the oracle's functions, each example with tokens of its own


def test_masks_of_examples_that_keep_tokens_of_their_own() -> None:
    """The oracle: each example by itself, with the tokens left out by hand."""
    torch.manual_seed(0)
    index = torch.tensor([[0, 3, 4], [1, 2, 5]])
    chosen, own = Selection(index, None), ((True, 6, 1),)
    q, k, v = (torch.randn(2, 2, 6, 4).double() for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    for causal in (False, True):
        found = masked_attention((q, k, v), {"is_causal": causal}, own, own, chosen)
        merged = masked_attention([one.flatten(0, 1) for one in (q, k, v)], {"is_causal": causal}, own, own, chosen)
        assert torch.allclose(merged.view_as(found), found)
        for number, places in enumerate(index):
            part = attend(*(one[number, :, places] for one in (q, k, v)), is_causal=causal)
            assert torch.allclose(found[number, :, places], part, rtol=1e-12)
    start, end = (torch.randn(2, 6, 4) for _ in range(2))
    back, pooled = passed_by(start, end, 1, own, chosen), those_there(end, 1, own, chosen)
    turned = passed_by(start.transpose(0, 1), end.transpose(0, 1), 0, own, chosen).transpose(0, 1)
    assert torch.equal(turned, back)
    for number, places in enumerate(index):
        others = [place for place in range(6) if place not in places]
        assert torch.equal(back[number, places], end[number, places])
        assert torch.equal(back[number, others], start[number, others])
        assert torch.equal(pooled[number], end[number, places])
    table = torch.arange(6).unsqueeze(0)
    assert torch.equal(those_there(table, 1, own, chosen), index)
