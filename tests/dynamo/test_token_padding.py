"""Padding in transformers' own models, behind the backend: it is left out first, of each example its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fx_approx
from fx_approx.policies import Tokens
from fx_approx.runtime.token_selection import TokenSelection
from tests.dynamo.test_token_backend import CASES, LENGTH, PADDED, leave_out


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "bert"])
def test_padding_is_left_out_first(name: str) -> None:
    """Nine tokens of the first example are real, and all twelve of the second; ten are kept of each."""
    case = CASES[name]
    torch.manual_seed(0)
    torch.compiler.reset()
    model = case.make().double().train()
    exact = copy.deepcopy(model)
    backend = fx_approx.backend(Tokens(0.8), inner="eager")
    model.compile(backend=backend)
    chosen: list[Tensor] = []
    usual = TokenSelection.forward

    def note(self: Any, *args: Any) -> Any:
        found = usual(self, *args)
        chosen.append(torch.cat([torch.arange(self.others).expand(2, -1), found.indices + self.others], dim=1))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenSelection, "forward", note)
        logits = model(**case.inputs).logits
    index = chosen[-1]
    assert index.shape == (2, 10)
    assert PADDED[0, index[0]].sum() == 9 and PADDED[1, index[1]].sum() == 10
    found = []
    for place, own in enumerate(index):
        hand = copy.deepcopy(exact)
        leave_out(case.layers(hand), own, LENGTH, case.skips)
        expected = hand(**{key: value[place : place + 1] for key, value in case.inputs.items()}).logits
        assert torch.allclose(logits[place : place + 1], expected, rtol=1e-10, atol=1e-12)
        expected.square().sum().backward()
        found.append([p.grad for p in hand.parameters()])
    logits.square().sum().backward()
    for own, *each in zip(model.parameters(), *found, strict=True):
        there = [grad for grad in each if grad is not None]
        assert (own.grad is None) == (not there) or not own.grad.any()
        if there:
            assert torch.allclose(own.grad, sum(there[1:], there[0]), rtol=1e-8, atol=1e-11)
    torch.compiler.reset()
