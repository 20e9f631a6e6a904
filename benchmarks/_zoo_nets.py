"""Networks that people write themselves: a detector of the YOLO kind, U-Nets with various normalisations."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _zoo_run import Entry, Made, settle
from torch import Tensor, nn


class ConvBlock(nn.Module):
    """Convolution, BatchNorm and SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` to ``[N, outputs, H / stride, W / stride]``."""
        made: Tensor = self.act(self.bn(self.conv(x)))
        return made


class Bottleneck(nn.Module):
    """Two convolutions, with a shortcut or not."""

    def __init__(self, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvBlock(channels, channels, 3), ConvBlock(channels, channels, 3)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of ``x``."""
        made: Tensor = self.cv2(self.cv1(x))
        return x + made if self.shortcut else made


class C2f(nn.Module):
    """Cross-stage partial block: halves, each bottleneck's result kept, all put together again."""

    def __init__(self, inputs: int, outputs: int, count: int = 1, shortcut: bool = False) -> None:
        super().__init__()
        self.half = outputs // 2
        self.cv1 = ConvBlock(inputs, 2 * self.half)
        self.cv2 = ConvBlock((2 + count) * self.half, outputs)
        self.m = nn.ModuleList(Bottleneck(self.half, shortcut) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` to ``[N, outputs, H, W]``."""
        parts = list(self.cv1(x).chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.m)
        made: Tensor = self.cv2(torch.cat(parts, 1))
        return made


class SPPF(nn.Module):
    """Pooling pyramid: the same pooling three times, all results put together."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvBlock(inputs, inputs // 2), ConvBlock(2 * inputs, outputs)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` to ``[N, outputs, H, W]``."""
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        made: Tensor = self.cv2(torch.cat(parts, 1))
        return made


class Detect(nn.Module):
    """Boxes (as distributions over ``bins``) and classes, for each of several maps."""

    def __init__(self, channels: tuple[int, ...], classes: int = 4, bins: int = 4) -> None:
        super().__init__()
        self.bins, self.outputs = bins, classes + 4 * bins
        width = max(channels[0] // 2, 16)
        self.boxes = nn.ModuleList(
            nn.Sequential(ConvBlock(one, width, 3), ConvBlock(width, width, 3), nn.Conv2d(width, 4 * bins, 1))
            for one in channels
        )
        self.classes = nn.ModuleList(
            nn.Sequential(ConvBlock(one, width, 3), ConvBlock(width, width, 3), nn.Conv2d(width, classes, 1))
            for one in channels
        )

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Distances ``[N, 4, anchors]`` and class scores ``[N, classes, anchors]``."""
        made = [
            torch.cat((box(x), label(x)), 1).view(x.shape[0], self.outputs, -1)
            for x, box, label in zip(maps, self.boxes, self.classes, strict=True)
        ]
        boxes, scores = torch.cat(made, 2).split((4 * self.bins, self.outputs - 4 * self.bins), 1)
        places = torch.arange(self.bins, dtype=boxes.dtype)
        shares = boxes.view(boxes.shape[0], 4, self.bins, -1).softmax(2)
        return (shares * places.view(1, 1, -1, 1)).sum(2), scores


class Yolo(nn.Module):
    """Backbone, pyramid downwards and upwards, and the head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(ConvBlock(3, w, 3, 2), ConvBlock(w, 2 * w, 3, 2), C2f(2 * w, 2 * w, 1, True))
        self.down1 = nn.Sequential(ConvBlock(2 * w, 4 * w, 3, 2), C2f(4 * w, 4 * w, 2, True))
        self.down2 = nn.Sequential(ConvBlock(4 * w, 8 * w, 3, 2), C2f(8 * w, 8 * w, 1, True), SPPF(8 * w, 8 * w))
        self.up = nn.Upsample(scale_factor=2)
        self.merge1, self.merge2 = C2f(12 * w, 4 * w), C2f(12 * w, 8 * w)
        self.down3 = ConvBlock(4 * w, 4 * w, 3, 2)
        self.detect = Detect((4 * w, 8 * w))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As :class:`Detect`."""
        middle = self.down1(self.stem(x))
        deep = self.down2(middle)
        fine = self.merge1(torch.cat((self.up(deep), middle), 1))
        coarse = self.merge2(torch.cat((self.down3(fine), deep), 1))
        made: tuple[Tensor, Tensor] = self.detect([fine, coarse])
        return made


Norm = Callable[[int], nn.Module]


class UNet(nn.Module):
    """Double convolutions, pooling, and transposed convolutions or interpolation with concatenated skips."""

    def __init__(self, norm: Norm, depth: int = 2, width: int = 16, transposed: bool = False) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.first = self._double(3, width, norm)
        self.downs = nn.ModuleList(self._double(a, b, norm) for a, b in itertools.pairwise(widths))
        falling = widths[::-1]
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 2, 2) if transposed else nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(falling)
        )
        self.merges = nn.ModuleList(self._double(2 * b, b, norm) for b in falling[1:])
        self.head = nn.Conv2d(width, 2, 1)
        self.transposed = transposed

    @staticmethod
    def _double(inputs: int, outputs: int, norm: Norm) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            norm(outputs),
            nn.LeakyReLU(0.1),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            norm(outputs),
            nn.LeakyReLU(0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, H, W]`` to ``[N, 2, H, W]``; H and W are multiples of 2 to the depth."""
        skips = [self.first(x)]
        for down in self.downs:
            skips.append(down(F.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for up, merge in zip(self.ups, self.merges, strict=True):
            x = up(x) if self.transposed else F.interpolate(up(x), scale_factor=2.0, mode="bilinear")
            x = merge(torch.cat((skips.pop(), x), 1))
        made: Tensor = self.head(x)
        return made


def four_groups(channels: int) -> nn.Module:
    """GroupNorm of four groups."""
    return nn.GroupNorm(4, channels)


def instances(channels: int) -> nn.Module:
    """InstanceNorm with weights."""
    return nn.InstanceNorm2d(channels, affine=True)


class MultiScale(nn.Module):
    """Convolutions on a pyramid whose levels share their weights, as in the heads of detectors."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.tower = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU())
        self.head = nn.Conv2d(width, 6, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """A map for each level."""
        x = F.relu(self.stem(x))
        return [self.head(self.tower(F.avg_pool2d(x, size) if size > 1 else x)) for size in (1, 2, 4)]


class Mobile(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, a grouped convolution, a shortcut."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        wide = 4 * channels
        self.stem = ConvBlock(3, channels, 3)
        self.expand = ConvBlock(channels, wide)
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.squeeze, self.excite = nn.Conv2d(wide, wide // 4, 1), nn.Conv2d(wide // 4, wide, 1)
        self.grouped = nn.Conv2d(wide, channels, 3, padding=1, groups=4)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, H, W]`` to ``[N, 10]``."""
        x = self.stem(x)
        h = F.hardswish(self.depthwise(self.expand(x)))
        h = h * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(h, 1)))))
        made: Tensor = self.head((x + self.grouped(h)).mean((2, 3)))
        return made


class Encoder(nn.Module):
    """A block of self-attention and a block of linear layers, each before its normalisation."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, tokens, width]``."""
        x = self.norm1(x + self.attention(x, x, x, need_weights=False)[0])
        made: Tensor = self.norm2(x + self.mlp(x))
        return made


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "yolo": (Yolo, (2, 3, 64, 64)),
    "c2f": (lambda: nn.Sequential(ConvBlock(3, 16, 3), C2f(16, 32, 2, True), C2f(32, 32, 1)), (2, 3, 16, 16)),
    "sppf": (lambda: nn.Sequential(ConvBlock(3, 32, 3), SPPF(32, 32), nn.Conv2d(32, 4, 1)), (2, 3, 16, 16)),
    "unet_batchnorm": (lambda: UNet(nn.BatchNorm2d), (2, 3, 32, 32)),
    "unet_groupnorm": (lambda: UNet(four_groups), (2, 3, 32, 32)),
    "unet_instancenorm": (lambda: UNet(instances), (2, 3, 32, 32)),
    "unet_transposed": (lambda: UNet(nn.BatchNorm2d, transposed=True), (2, 3, 32, 32)),
    "mobile": (Mobile, (2, 3, 16, 16)),
    "encoder": (Encoder, (2, 6, 32)),
    "multi_scale": (MultiScale, (2, 3, 16, 16)),
}
"""By name: how it is made, and the shape of its input."""


def net(name: str) -> tuple[nn.Module, Any]:
    """A network of :data:`NETS` and an input for it, in float64."""
    make, shape = NETS[name]
    return make(), torch.randn(shape, dtype=torch.float64)


def _settled(name: str) -> Made:
    model, given = net(name)
    return Made(settle(model), (given,))


def net_entries() -> list[Entry]:
    """All networks of this module."""
    return [Entry(name, "nets", functools.partial(_settled, name)) for name in NETS]
