"""Tokens in the models of ``tests/helpers/token_families.py``, transformed; the oracle: their own layers by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.runtime.approx_module import find
from tests.helpers.token_families import POLICY, leave_out, made, of, result_of

SLOW = ("encoder", "diffusion", "bert", "roberta", "vit", "deit", "dinov2", "mistral", "qwen", "whisper", "wav2vec2")


def chosen_of(approx: nn.Module, whole: int) -> list[Tensor]:
    """Grows by the tokens that each forward keeps, in order."""
    found: list[Tensor] = []

    def note(module: Any, args: Any, chosen: Any) -> None:
        if chosen is None:
            return
        behind = module.start + whole - module.others
        index = chosen.indices[0] + module.start
        found.append(torch.cat([torch.arange(module.start), index, torch.arange(behind, whole)]))

    (one,) = find(approx)._fx_approx.tokens
    one.register_forward_hook(note)
    return found


def _cases() -> list[Any]:
    found = []
    for name in of("t"):
        slow = name.startswith(SLOW)
        for seed in range(3):
            marks = [pytest.mark.slow] if seed or slow else []
            found.append(pytest.param(name, seed, marks=marks, id=f"{name}-{seed}"))
    return found


@pytest.mark.parametrize(("name", "seed"), _cases())
def test_a_step_is_that_of_the_model_whose_layers_see_fewer_tokens(name: str, seed: int) -> None:
    family, model = made(name, seed)
    hand, exact = copy.deepcopy(model), copy.deepcopy(model)
    approx = fx_approx.transform(model, POLICY, family.inputs, seed=seed)
    chosen = chosen_of(approx, family.length)
    output = result_of(approx(**family.inputs))
    kept = family.length - find(approx)._fx_approx.tokens[0].others
    assert len(chosen[0]) == family.length - kept + (kept + 1) // 2
    leave_out(family, hand, chosen[0])
    expected = result_of(hand(**family.inputs))
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(output, result_of(exact(**family.inputs)))
    same_gradients(approx, output, hand, expected)
    with torch.no_grad():
        ours, theirs = (result_of(one.eval()(**family.inputs)) for one in (approx, exact))
    assert torch.equal(ours, theirs)


def same_gradients(one: nn.Module, output: Tensor, other: nn.Module, expected: Tensor) -> None:
    """Those of all parameters; what no one reads has none, or zeros."""
    output.square().sum().backward()
    expected.square().sum().backward()
    for (name, own), (_, theirs) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        if own.grad is None or theirs.grad is None:
            assert all(grad is None or not grad.any() for grad in (own.grad, theirs.grad)), name
        else:
            torch.testing.assert_close(own.grad, theirs.grad, rtol=1e-10, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("name", of("t"))
def test_compiled_as_one_graph_it_is_the_same(name: str) -> None:
    family, model = made(name)
    eager = fx_approx.transform(model, POLICY, family.inputs)
    compiled = torch.compile(copy.deepcopy(eager), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        output, expected = result_of(compiled(**family.inputs)), result_of(eager(**family.inputs))
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    same_gradients(compiled, output, eager, expected)
    torch.compiler.reset()
