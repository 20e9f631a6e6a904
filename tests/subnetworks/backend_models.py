"""Models of Hugging Face, compiled by a backend, and how they are trained and compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.dynamo.backend import Backend
from fx_approx.policies import Uniform

HALF = Uniform(0.5)
SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
Made = tuple[nn.Module, dict[str, Tensor]]


def transformers() -> Any:
    library = pytest.importorskip("transformers")
    library.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


def tokens() -> Tensor:
    return torch.randint(3, 100, (4, 8))


def bert() -> Made:
    library = transformers()
    model = library.BertForSequenceClassification(library.BertConfig(vocab_size=100, **SIZES, **NO_DROPOUT))
    return model, {"input_ids": tokens(), "labels": torch.randint(0, 2, (4,))}


def distilbert() -> Made:
    library = transformers()
    sizes = {"dim": 64, "hidden_dim": 128, "n_layers": 1, "n_heads": 4}
    model = library.DistilBertForSequenceClassification(library.DistilBertConfig(vocab_size=100, **sizes))
    return model, {"input_ids": tokens(), "labels": torch.randint(0, 2, (4,))}


def gpt2() -> Made:
    library = transformers()
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 1}
    ids = tokens()
    config = library.GPT2Config(vocab_size=100, use_cache=False, **sizes)
    return library.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


def llama() -> Made:
    library = transformers()
    ids = tokens()
    config = library.LlamaConfig(vocab_size=100, num_key_value_heads=2, use_cache=False, **SIZES)
    return library.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def vit() -> Made:
    library = transformers()
    model = library.ViTForImageClassification(library.ViTConfig(image_size=16, patch_size=8, **SIZES, **NO_DROPOUT))
    return model, {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.randint(0, 2, (4,))}


def compiled(build: Callable[[], Made], policy: Any = HALF, inner: str = "eager") -> tuple[Any, Backend, Any]:
    """A model after its first training step, the backend, and its batch."""
    torch.manual_seed(0)
    model, batch = build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    backend = fx_approx.backend(policy, inner=inner)
    model.compile(backend=backend)
    loss_of(model, batch).backward()
    model.zero_grad()
    return model, backend, batch


def loss_of(model: Any, batch: Any) -> Tensor:
    result = model(**batch)
    return result if isinstance(result, Tensor) else result.loss


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, count: int = 5) -> None:
    for step in range(count):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def largest(one: nn.Module, other: nn.Module) -> float:
    pairs = zip((*one.parameters(), *one.buffers()), (*other.parameters(), *other.buffers()), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


def restore(model: nn.Module, before: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(before[name])
