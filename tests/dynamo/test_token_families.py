"""Tokens in the models of ``tests/helpers/token_families.py`` behind the backend; the oracle: their layers by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.runtime.token_selection import TokenSelection
from tests.helpers.token_families import POLICY, leave_out, made, of, result_of
from tests.passes.test_token_models import same_gradients

# Weights of GPT-2 are stored transposed; Dynamo looks at the gradient of those that its layers compute with.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

FAST = ("gpt2_written_out",)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[TokenSelection, Tensor]]]:
    """Grows by each selection that is made."""
    torch.compiler.reset()
    found: list[tuple[TokenSelection, Tensor]] = []
    usual = TokenSelection.forward

    def note(self: Any, *given: Any) -> Any:
        made = usual(self, *given)
        if made is not None:
            found.append((self, made.indices[0]))
        return made

    monkeypatch.setattr(TokenSelection, "forward", note)
    yield found
    torch.compiler.reset()


def kept_by(chosen: list[tuple[TokenSelection, Tensor]], whole: int) -> Tensor:
    """All tokens that the last selection keeps, in order."""
    one, index = chosen[-1]
    behind = one.start + whole - one.others
    return torch.cat([torch.arange(one.start), index + one.start, torch.arange(behind, whole)])


def _cases() -> list[Any]:
    return [
        pytest.param(name, seed, marks=[pytest.mark.slow] if seed or name not in FAST else [], id=f"{name}-{seed}")
        for name in of("b")
        for seed in range(3)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), _cases())
def test_a_step_is_that_of_the_model_whose_layers_see_fewer_tokens(
    name: str, seed: int, chosen: list[tuple[TokenSelection, Tensor]]
) -> None:
    family, model = made(name, seed)
    hand, exact = copy.deepcopy(model), copy.deepcopy(model)
    backend = fx_approx.backend(POLICY, inner="eager", seed=seed)
    model.compile(backend=backend)
    output = result_of(model(**family.inputs))
    index = kept_by(chosen, family.length)
    assert len(index) < family.length and "tokens" in str(fx_approx.report(backend))
    leave_out(family, hand, index)
    expected = result_of(hand(**family.inputs))
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(output, result_of(exact(**family.inputs)))
    same_gradients(model, output, hand, expected)
    with torch.no_grad():
        ours, theirs = (result_of(one.eval()(**family.inputs)) for one in (model, exact))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)  # compiled, torch has no fast path of attention


@pytest.mark.slow
@pytest.mark.parametrize("name", of("b"))
def test_compiled_it_is_the_same(name: str) -> None:
    outputs: list[Tensor] = []
    models: list[nn.Module] = []
    for inner in ("eager", "aot_eager"):
        torch.compiler.reset()
        family, model = made(name)
        model.compile(backend=fx_approx.backend(POLICY, inner=inner))
        outputs.append(result_of(model(**family.inputs)))
        models.append(model)
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
    same_gradients(models[0], outputs[0], models[1], outputs[1])
    torch.compiler.reset()
