"""The networks of the demo."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fx_approx.demo.images import Images


class CNN(nn.Sequential):
    """Four blocks of convolution, BatchNorm and ReLU with ``width`` to ``2 * width`` channels."""

    def __init__(self, images: Images, width: int) -> None:
        large = images.train.shape[-1] > 16
        super().__init__()
        self.block1 = _block(1, width, stride=2 if large else 1)
        self.block2 = _block(width, width)
        self.block3 = _block(width, 2 * width)
        self.pool = nn.MaxPool2d(2)
        self.block4 = _block(2 * width, 2 * width)
        self.mean, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.fc = nn.Linear(2 * width, images.classes)


def _block(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    block = nn.Sequential()
    block.conv = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
    block.bn, block.relu = nn.BatchNorm2d(out), nn.ReLU()
    return block


class ViT(nn.Module):
    """A vision transformer of three blocks on 49 or 64 patches; the mean over them is classified.

    Two convolutions make overlapping patches, after "Early Convolutions Help Transformers See Better" (Xiao et al.,
    2021). What is in a dropped patch is then partly in its neighbours.
    """

    def __init__(self, images: Images, width: int) -> None:
        super().__init__()
        side = images.train.shape[-1]
        stride = 2 if side > 16 else 1
        first, second = (nn.Conv2d(*sizes, 3, stride, padding=1) for sizes in ((1, width // 2), (width // 2, width)))
        self.embed = nn.Sequential(first, nn.GELU(), second)
        self.positions = nn.Parameter(0.5 * torch.randn((-(-side // stride**2)) ** 2, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, images.classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 1, H, W]`` to ``[N, classes]``."""
        x = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        result: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return result


class MLP(nn.Sequential):
    """Two hidden layers of ``4 * width`` units."""

    def __init__(self, images: Images, width: int) -> None:
        hidden = 4 * width
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1, self.relu1 = nn.Linear(images.train[0].numel(), hidden), nn.ReLU()
        self.fc2, self.relu2 = nn.Linear(hidden, hidden), nn.ReLU()
        self.fc3 = nn.Linear(hidden, images.classes)
