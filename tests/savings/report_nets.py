"""Larger networks for the report after demand: torchvision's, a wide residual network, a transformer block."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.demand_nets import NETS
from tests.helpers.torchvision_compat import import_torchvision

MODELS = import_torchvision().models


class TransformerBlock(nn.Module):
    """Pre-norm, with a linear layer each for query, key and value."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        shape = x.shape[0], x.shape[1], self.heads, -1
        q, k, v = (layer(y).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(y)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def image(batch: int = 2, size: int = 32) -> Callable[[], Tensor]:
    return lambda: torch.randn(batch, 3, size, size)


def vgg() -> nn.Module:
    """vgg11_bn with a small classifier, flattened from 2 by 2 positions."""
    model = MODELS.vgg11_bn(num_classes=10)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier = nn.Sequential(nn.Linear(512 * 4, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))
    return model


def wide(width: int = 16) -> nn.Module:
    """A wide residual network of two blocks a stage."""
    blocks: list[nn.Module] = []
    before = width
    for stage in range(2):
        for block in range(2):
            after = width * 2**stage
            blocks.append(_Wide(before, after, 2 if stage and not block else 1))
            before = after
    head = nn.BatchNorm2d(before), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10)
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), *blocks, *head)


class _Wide(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(before), nn.BatchNorm2d(after)
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if before != after or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + shortcut


def zoo(name: str) -> tuple[nn.Module, Tensor]:
    """A network of either table, always the same, with an input."""
    torch.manual_seed(0)
    if name in LARGE:
        build, inputs = LARGE[name]
        return build(), inputs()
    small, shape = NETS[name]
    return small(), torch.randn(shape)


LARGE: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "resnet18": (lambda: MODELS.resnet18(num_classes=10), image()),
    "vgg11_bn": (vgg, image()),
    "densenet121": (lambda: MODELS.densenet121(num_classes=10), image()),
    "mobilenet_v2": (lambda: MODELS.mobilenet_v2(num_classes=10), image()),
    "transformer": (
        lambda: nn.Sequential(TransformerBlock(), TransformerBlock()),
        lambda: torch.randn(2, 7, 32, requires_grad=True),
    ),
    "wide": (wide, image(4)),
}
