"""Tokens in transformers' own models, behind the backend; the oracle is the model itself with hooks on its layers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fx_approx
from fx_approx.analysis import verify
from fx_approx.policies import Tokens
from fx_approx.runtime.token_selection import TokenSelection
from tests.helpers.quick import quick

BATCH, LENGTH = 2, 12
IDS = torch.randint(0, 50, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS)
PADDED[0, 9:] = 0
SMALL = {"num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 50}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, what it is called with, where its layers are, and whether tokens are skipped."""

    make: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    layers: Callable[[Any], nn.ModuleList]
    skips: bool


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(num_key_value_heads=2, use_cache=False, max_position_embeddings=32, **SMALL)
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    sizes = {"n_layer": 4, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 32}
    config = transformers.GPT2Config(use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes)
    return transformers.GPT2LMHeadModel(config)


CASES = {
    "llama": Case(_llama, {"input_ids": IDS, "attention_mask": PADDED}, lambda m: m.model.layers, True),
    "gpt2": Case(_gpt2, {"input_ids": IDS}, lambda m: m.transformer.h, True),
    "bert": Case(
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, **NO_DROPOUT)),
        {"input_ids": IDS, "attention_mask": PADDED},
        lambda m: m.bert.encoder.layer,
        False,
    ),
    "vit": Case(
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(
                **{k: v for k, v in SMALL.items() if k != "vocab_size"}, **NO_DROPOUT, image_size=16, patch_size=4
            )
        ),
        {"pixel_values": torch.randn(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(0))},
        lambda m: m.vit.layers if hasattr(m.vit, "layers") else m.vit.encoder.layer,
        False,
    ),
}


def taken(value: Any, index: Tensor, length: int) -> Any:
    """What a layer is called with, for the chosen tokens."""
    if isinstance(value, (tuple, list)):
        return type(value)(taken(one, index, length) for one in value)
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 4:
        value = value[..., index] if value.shape[-1] == length else value
        return value[..., index, :] if value.shape[-2] == length else value
    return value[:, index] if value.dim() > 1 and value.shape[1] == length else value


def leave_out(layers: nn.ModuleList, index: Tensor, length: int, skips: bool, first: int = 1) -> None:
    """Hooks that have all layers behind the ``first`` (and before the last) see the chosen tokens only."""
    last = len(layers) - 2 if skips else len(layers) - 1
    whole: list[Tensor] = []

    def before(number: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            if number == first:
                whole.append(states)
                states = states[:, index]
            rest = {name: taken(value, index, length) for name, value in kwargs.items() if name != "hidden_states"}
            return (states, *taken(args[1:], index, length)), rest

        return hook

    def behind(module: nn.Module, args: Any, output: Any) -> Any:
        part = output[0] if isinstance(output, tuple) else output
        back = whole[-1].index_copy(1, index, part)
        return (back, *output[1:]) if isinstance(output, tuple) else back

    for number in range(first, last + 1):
        layers[number].register_forward_pre_hook(before(number), with_kwargs=True)
    if skips:
        layers[last].register_forward_hook(behind)


@pytest.mark.parametrize(
    ("name", "first"),
    quick([("llama", 1), ("bert", 0), ("vit", 1), ("gpt2", 1), ("bert", 1)], lambda name, first: name == "llama"),
)
def test_numbers_are_those_of_the_model_whose_layers_see_fewer_tokens(name: str, first: int) -> None:
    """Also where the mask is made behind the embeddings (first=0)."""
    case = CASES[name]
    torch.manual_seed(0)
    torch.compiler.reset()
    model = case.make().double().train()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in case.inputs.items()}
    hand, exact = copy.deepcopy(model), copy.deepcopy(model)
    backend = fx_approx.backend(Tokens(0.5, first=first, per_example=False), inner="eager")
    model.compile(backend=backend)
    chosen: list[Tensor] = []
    usual = TokenSelection.forward

    def note(self: Any, given: Any, value: Tensor) -> Any:
        found = usual(self, given, value)
        chosen.append(torch.cat([torch.arange(self.others), found.indices[0] + self.others]))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenSelection, "forward", note)
        logits = model(**inputs).logits
    index = chosen[-1]
    length = LENGTH if "input_ids" in inputs else 17
    assert length // 2 <= len(index) <= length // 2 + 1
    leave_out(case.layers(hand), index, length, case.skips, first)
    expected = hand(**inputs).logits
    assert torch.allclose(logits, expected, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(logits, exact(**inputs).logits)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(model.parameters(), hand.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None) or one.grad is None or not one.grad.any()
        if one.grad is not None and other.grad is not None:
            assert torch.allclose(one.grad, other.grad, rtol=1e-8, atol=1e-11)
    assert verify(backend, inputs, lambda found: found.logits.square().sum()).worst.relative < 1e-12
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, exact.eval()(**inputs).logits)
    assert "tokens" in str(fx_approx.report(backend))
    torch.compiler.reset()


def test_a_cache_of_keys_and_values_keeps_every_token_and_says_so() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    config = transformers.LlamaConfig(num_key_value_heads=2, use_cache=True, max_position_embeddings=32, **SMALL)
    model = transformers.LlamaForCausalLM(config).train()
    backend = fx_approx.backend(Tokens(0.5), inner="eager")
    model.compile(backend=backend)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert "as a cache of keys and values does" in " ".join(str(fx_approx.report(backend)).split())
    torch.compiler.reset()
