"""Small networks, one of each family whose channels the demand pass follows, with an input each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Activation behind the addition, in place as in torchvision."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x += identity
        return self.relu(x)


def post_activation() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(BasicBlock(8, 8), BasicBlock(8, 12, 2), BasicBlock(12, 12)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
    )


class PreBlock(nn.Module):
    """Activation before the convolutions, as in wide residual networks."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        identity = x if self.shortcut is None else self.shortcut(y)
        y = self.conv2(F.relu(self.bn2(self.conv1(y))))
        return identity + y


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.Sequential(PreBlock(6, 8), PreBlock(8, 8), PreBlock(8, 12, 2), PreBlock(12, 12))
        self.bn, self.fc = nn.BatchNorm2d(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.blocks(self.stem(x))))
        x = F.avg_pool2d(x, x.shape[-1])
        return self.fc(x.view(x.size(0), -1))


class Vgg(nn.Module):
    """Flattens maps of 2x2 before its first linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(True), nn.AdaptiveAvgPool2d(2)),
        )
        self.classifier = nn.Sequential(nn.Linear(40, 12), nn.ReLU(True), nn.Dropout(0.0), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 8, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = F.relu(self.norm1(torch.cat(features, 1)), inplace=True)
        return self.conv2(F.relu(self.norm2(self.conv1(x)), inplace=True))


class Dense(nn.Module):
    """Every layer reads what all before it have made."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.layers = nn.ModuleList(DenseLayer(6 + 4 * i, 4) for i in range(3))
        self.transition = nn.Sequential(nn.BatchNorm2d(18), nn.ReLU(), nn.Conv2d(18, 8, 1), nn.AvgPool2d(2))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        return self.fc(self.transition(torch.cat(features, 1)).mean((2, 3)))


class Squeeze(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


class Inverted(nn.Module):
    """Expand, depthwise, squeeze and excite, project, as in MobileNet and EfficientNet."""

    def __init__(self, width: int = 6, inner: int = 12) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.Hardswish(inplace=True)),
            *(nn.Conv2d(inner, inner, 3, padding=1, groups=inner), nn.BatchNorm2d(inner), nn.SiLU()),
            *(Squeeze(inner), nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def squeeze_excite() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU6(inplace=True), Inverted(), Inverted()),
        *(nn.Conv2d(6, 10, 1), nn.BatchNorm2d(10), nn.PReLU(10)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 5)),
    )


class GroupedBlock(nn.Module):
    """A grouped convolution between two of 1x1, as in ResNeXt and RegNet."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.b, self.bn_b = nn.Conv2d(outputs, outputs, 3, padding=1, groups=groups), nn.BatchNorm2d(outputs)
        self.squeeze = Squeeze(outputs)
        self.c, self.bn_c = nn.Conv2d(outputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn_a(self.a(x)))
        y = self.squeeze(F.relu(self.bn_b(self.b(y))))
        return F.relu(self.bn_c(self.c(y)) + self.shortcut(x))


def grouped() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(GroupedBlock(8, 12, 3), GroupedBlock(12, 12, 2), nn.Conv2d(12, 12, 1, groups=6)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
    )


class Gated(nn.Module):
    """The halves of one product, as SwiGLU, as F.glu and as nn.GLU."""

    def __init__(self) -> None:
        super().__init__()
        self.up1, self.down1 = nn.Linear(6, 16), nn.Linear(8, 6)
        self.up2, self.down2 = nn.Linear(6, 20), nn.Linear(10, 6)
        self.up3, self.down3 = nn.Linear(6, 12), nn.Linear(6, 5)
        self.glu = nn.GLU()

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up1(x).chunk(2, dim=-1)
        x = x + self.down1(F.silu(gate) * value)
        x = x + self.down2(F.glu(self.up2(x), -1))
        return self.down3(self.glu(self.up3(x)))


class FusedHeads(nn.Module):
    """GPT's block: one product for query, key and value, split, heads by view and transpose."""

    def __init__(self, width: int = 12, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.size()
        q, k, v = self.qkv(self.ln1(x)).split(width, dim=2)
        q, k, v = (t.view(rows, length, self.heads, width // self.heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(rows, length, width)
        x = x + self.proj(y)
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class WrittenAttention(nn.Module):
    """Attention as two products and a softmax, with a mask."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out, self.fc = nn.Linear(width, width), nn.Linear(width, 5)
        self.register_buffer("mask", torch.full((5, 5), float("-inf")).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[0], x.shape[1], self.heads, -1
        q, k, v = (layer(x).reshape(shape).permute(0, 2, 1, 3) for layer in (self.q, self.k, self.v))
        scores = torch.matmul(q, k.transpose(-2, -1)) / 2.0 + self.mask
        y = torch.matmul(F.softmax(scores, dim=-1), v)
        return self.fc(x + self.out(y.transpose(1, 2).flatten(2)))


class StackedHeads(nn.Module):
    """timm's spelling: three axes at once, permuted, unbound."""

    def __init__(self, width: int = 12, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(rows, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attention = ((q * 0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        return x + self.proj((attention @ v).transpose(1, 2).reshape(rows, length, width))


class NextBlock(nn.Module):
    """ConvNeXt's block: channels move last for normalisation and linear layers, and back."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(16, width)
        self.scale = nn.Parameter(torch.randn(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y)))
        return x + self.scale * y.permute(0, 3, 1, 2)


def conv_next() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 2, stride=2), NextBlock(), NextBlock(), nn.Conv2d(8, 10, 2, stride=2), NextBlock(10)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 5)),
    )


class PlainResidual(nn.Module):
    """No normalisation, a layer called twice, a stream that nothing needs whole: it shrinks at scope group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(7, 12), nn.Linear(12, 5)
        self.a, self.b, self.c = nn.Linear(12, 10), nn.Linear(10, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + 0.5 * self.b(self.a(x).relu())
        x = x - self.c(torch.tanh(self.c(x)))
        return self.head(x)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "post-activation": (post_activation, (3, 3, 8, 8)),
    "pre-activation": (PreActivation, (3, 3, 8, 8)),
    "vgg": (Vgg, (3, 3, 8, 8)),
    "dense": (Dense, (3, 3, 6, 6)),
    "squeeze-excite": (squeeze_excite, (3, 3, 6, 6)),
    "grouped": (grouped, (3, 3, 6, 6)),
    "gated": (Gated, (4, 3, 6)),
    "fused-heads": (FusedHeads, (2, 5, 12)),
    "written-attention": (WrittenAttention, (2, 5, 12)),
    "stacked-heads": (StackedHeads, (2, 5, 12)),
    "conv-next": (conv_next, (3, 3, 8, 8)),
    "plain-residual": (PlainResidual, (4, 7)),
}
"""Name -> how to build it, and the shape of its input."""
