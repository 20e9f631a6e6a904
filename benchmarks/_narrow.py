"""Networks written by hand at the narrow sizes of subnetworks: what those can reach at most.

At scope ``group`` the residual stream is narrow, too, and the narrow network is of the same class. At scope ``value``
the stream stays wide, and each of its readers reads some of it; here that is its first half, a view and no gather.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from _models import PreActivation, torchvision_models
from _zoo_thin import thin
from torch import Tensor, nn

_STEM = 16  # channels of the stem of a wide residual network: not sampled


def half(x: Tensor, dim: int = 1) -> Tensor:
    """The first half of the channels, a view."""
    return x.narrow(dim, 0, x.shape[dim] // 2)


class HalfReading(PreActivation):
    """Reads half of the residual stream, and adds to all of it, or to that half where the stream ends."""

    def __init__(self, inputs: int, read: int, outputs: int, inner: int, stride: int) -> None:
        super().__init__(read, outputs, stride)
        self.read = read
        self.conv1, self.bn2 = nn.Conv2d(read, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outputs, 3, 1, 1, bias=False)
        if stride == 1 and inputs in (outputs, 2 * outputs):
            self.shortcut = None

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` to ``[N, outputs, H / stride, W / stride]``."""
        part = x if x.shape[1] == self.read else half(x)
        h = torch.relu(self.bn1(part))
        h, x = self.conv2(torch.relu(self.bn2(self.conv1(h)))), x if self.shortcut is None else self.shortcut(h)
        return h + (x if x.shape == h.shape else part)


def half_reading_wide_resnet(depth: int, width: int) -> nn.Sequential:
    """WRN-depth-width of blocks of which each reads half of the residual stream; what no one reads is not computed."""
    layers: list[nn.Module] = [nn.Conv2d(3, _STEM, 3, 1, 1, bias=False)]
    inputs, blocks = _STEM, (depth - 4) // 6
    for stage, wide in enumerate((16 * width, 32 * width, 64 * width)):
        for block in range(blocks):
            read = inputs if block == 0 else inputs // 2  # the stage before, or the stem, ends in what is read
            outputs = wide // 2 if block == blocks - 1 else wide
            layers.append(HalfReading(inputs, read, outputs, wide // 2, 2 if stage and not block else 1))
            inputs = outputs
    head = [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10)]
    return nn.Sequential(*layers, *head)


def narrow_resnet50() -> nn.Module:
    """Torchvision's ResNet-50 with half of the channels everywhere."""
    with thin(1000, factor=2):
        made: nn.Module = torchvision_models().resnet50()
    return made


def half_reading_resnet50() -> nn.Module:
    """Torchvision's ResNet-50 with half of the inner channels, whose blocks read half of the residual stream."""
    models = torchvision_models()

    class Reading(models.resnet.Bottleneck):  # type: ignore[misc, name-defined]
        def forward(self, x: Tensor) -> Tensor:
            part = x if x.shape[1] == self.conv1.in_channels else half(x)
            out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(part))))))
            out = self.bn3(self.conv3(out))
            if self.downsample is not None:
                x = self.downsample(part)
            return self.relu(out + (x if x.shape == out.shape else half(x)))  # type: ignore[no-any-return]

    made = models.ResNet(Reading, [3, 4, 6, 3], width_per_group=32)
    made.conv1, made.bn1 = nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32)
    for layer in (made.layer1, made.layer2, made.layer3, made.layer4):
        for block in layer:
            reads = [block.conv1] if block.downsample is None else [block.conv1, block.downsample[0]]
            for convolution in reads:
                _read(convolution, convolution.in_channels // 2)
        last = layer[-1]  # the stage ends in what is read
        ends = last.conv3.out_channels // 2
        last.conv3, last.bn3 = nn.Conv2d(last.conv3.in_channels, ends, 1, bias=False), nn.BatchNorm2d(ends)
    made.fc = nn.Linear(ends, 1000)
    return made  # type: ignore[no-any-return]


def _read(convolution: nn.Conv2d, channels: int) -> None:
    """Has a convolution read so many channels."""
    convolution.in_channels = channels
    convolution.weight = nn.Parameter(convolution.weight.detach()[:, :channels].clone())


class HalfReadingBlock(nn.Module):
    """A block of ViT-B/16 with half of the heads and hidden units, which read half of the normalised stream."""

    def __init__(self, heads: int = 12, width: int = 768, hidden: int = 3072) -> None:
        super().__init__()
        self.heads, inner = heads // 2, width // 2
        self.ln_1, self.ln_2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.in_projection, self.out_projection = nn.Linear(inner, 3 * inner), nn.Linear(inner, width)
        self.mlp = nn.Sequential(nn.Linear(inner, hidden // 2), nn.GELU(), nn.Linear(hidden // 2, width))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, tokens, width]``."""
        projected = self.in_projection(half(self.ln_1(x), 2))
        q, k, v = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in projected.chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out_projection(attended)
        result: Tensor = x + self.mlp(half(self.ln_2(x), 2))
        return result


def narrow_minilm(made: Any) -> Any:
    """The encoder with half of the hidden units, and half of what attention gives read by its projection.

    Args:
        made: A classifier of ``examples/experiments/minilm.py``; changed in place.
    """
    for layer in made.layers:
        width, hidden = layer.projection.in_features, layer.fc1.out_features // 2
        layer.fc1, layer.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        layer.projection = nn.Sequential(Half(), nn.Linear(width // 2, width))
    return made


class Half(nn.Module):
    """The first half of the last axis, a view."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., channels]`` to ``[..., channels / 2]``."""
        return half(x, x.dim() - 1)
