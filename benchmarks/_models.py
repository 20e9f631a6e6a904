"""The models that training steps are timed on, each with a batch and a narrower rival."""

from __future__ import annotations

import functools
import runpy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor, nn.Module | None]


class PreActivation(nn.Module):
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


def wide_resnet(depth: int, width: float, classes: int = 10, channels: int = 3) -> nn.Sequential:
    """WRN-depth-width for images of 32 x 32."""
    blocks, layers, inputs = (depth - 4) // 6, [nn.Conv2d(channels, 16, 3, 1, 1, bias=False)], 16
    for stage, outputs in enumerate((int(16 * width), int(32 * width), int(64 * width))):
        for block in range(blocks):
            layers.append(PreActivation(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    head = [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*layers, *head)


def _wrn() -> Built:
    form = torch.channels_last
    models = [wide_resnet(16, width).to(memory_format=form) for width in (4, 2)]
    return models[0], torch.randn(64, 3, 32, 32).contiguous(memory_format=form), models[1]


def torchvision_models() -> ModuleType:
    """torchvision.models, also beside a torch for which torchvision was not built."""
    compat = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "helpers" / "torchvision_compat.py"))
    models: ModuleType = compat["import_torchvision"]().models
    return models


def _resnet50() -> Built:
    models = torchvision_models()
    form = torch.channels_last
    exact = models.resnet50().to(memory_format=form)
    narrow = models.ResNet(models.resnet.Bottleneck, [3, 4, 6, 3], width_per_group=32).to(memory_format=form)
    return exact, torch.randn(8, 3, 224, 224).contiguous(memory_format=form), narrow


class ViTBlock(nn.Module):
    """One encoder block of ViT-B/16 (torchvision's)."""

    def __init__(self, heads: int = 12, width: int = 768, hidden: int = 3072) -> None:
        super().__init__()
        self.block = torchvision_models().vision_transformer.EncoderBlock(heads, width, hidden, 0.0, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, tokens, width]``."""
        result: Tensor = self.block(x)
        return result


def _vit_block() -> Built:
    return ViTBlock(), torch.randn(8, 197, 768), ViTBlock(6, 768, 1536)


class PlainBlock(nn.Module):
    """The same block with a linear layer for each projection, which swaps of modules can reach."""

    def __init__(self, heads: int = 12, width: int = 768, hidden: int = 3072) -> None:
        super().__init__()
        self.heads, inner = heads, 64 * heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, inner) for _ in range(3))
        self.projection = nn.Linear(inner, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, tokens, width]``."""
        h = self.norm1(x)
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, 64)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        x = x + self.projection(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


def _plain_block() -> Built:
    return PlainBlock(), torch.randn(8, 197, 768), PlainBlock(6, 768, 1536)


def _torchvision(name: str, batch: int, size: int = 224) -> Built:
    form = torch.channels_last
    made = getattr(torchvision_models(), name)().to(memory_format=form)
    return made, torch.randn(batch, 3, size, size).contiguous(memory_format=form), None


def _wrn_28_10() -> Built:
    form = torch.channels_last
    models = [wide_resnet(28, width).to(memory_format=form) for width in (10, 5)]
    return models[0], torch.randn(2, 3, 32, 32).contiguous(memory_format=form), models[1]


class GatedMLP(nn.Module):
    """The feed-forward part of a Llama block (Shazeer 2020, "GLU variants improve transformer")."""

    def __init__(self, width: int = 4096, hidden: int = 11008) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[tokens, width]``."""
        result: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return result


def _gated_mlp() -> Built:
    return GatedMLP(), torch.randn(64, 4096, requires_grad=True), GatedMLP(hidden=5504)


def _small() -> Built:
    return wide_resnet(10, 2), torch.randn(8, 3, 16, 16), wide_resnet(10, 1)


MODELS: dict[str, Callable[[], Built]] = {
    "wrn_16_4": _wrn,
    "wrn_28_10": _wrn_28_10,
    "resnet50": _resnet50,
    "vit_b_block": _vit_block,
    "vit_b_plain": _plain_block,
    "gated_mlp": _gated_mlp,
    "wrn_10_2": _small,
    "vgg11_bn": functools.partial(_torchvision, "vgg11_bn", 4),
    "mobilenet_v2": functools.partial(_torchvision, "mobilenet_v2", 8),
    "vit_b_16": functools.partial(_torchvision, "vit_b_16", 2),
}
"""By name: the exact model, a batch, and a narrower rival (None where there is no obvious one)."""
