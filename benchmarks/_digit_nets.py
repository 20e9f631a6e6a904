"""An MLP and a small CNN for digits, whose products `_products.py` captures, and the batches that they see."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 64


class MLP(nn.Sequential):
    """Two hidden layers of ``16 * width`` units."""

    def __init__(self, images: Any, width: int) -> None:
        hidden = 16 * width
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1, self.relu1 = nn.Linear(images.train[0].numel(), hidden), nn.ReLU()
        self.fc2, self.relu2 = nn.Linear(hidden, hidden), nn.ReLU()
        self.fc3 = nn.Linear(hidden, images.classes)


class CNN(nn.Sequential):
    """Four blocks of convolution, BatchNorm and ReLU with ``width`` to ``4 * width`` channels."""

    def __init__(self, images: Any, width: int) -> None:
        super().__init__()
        self.block1, self.block2 = _block(1, width), _block(width, 2 * width)
        self.pool = nn.MaxPool2d(2)
        self.block3, self.block4 = _block(2 * width, 4 * width), _block(4 * width, 4 * width)
        self.mean, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.fc = nn.Linear(4 * width, images.classes)


NETWORKS: dict[str, tuple[type[nn.Sequential], float]] = {"MLP": (MLP, 0.05), "CNN": (CNN, 0.1)}
"""Each with its learning rate."""


def _block(channels: int, out: int) -> nn.Sequential:
    block = nn.Sequential()
    block.conv = nn.Conv2d(channels, out, 3, padding=1, bias=False)
    block.bn, block.relu = nn.BatchNorm2d(out), nn.ReLU()
    return block


def batches(images: Any, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Full batches in a random order, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(images.train), generator=generator)
        for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
            yield images.train[chosen], images.train_labels[chosen]
