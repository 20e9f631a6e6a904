"""Small models, one for each thing that a capture has to get right, and helpers to compare two runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from tests.helpers.modules import made_of

MODEL_FILE = __file__


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


class Cnn(nn.Module):
    """BatchNorm, dropout, a residual, a grouped and a depthwise convolution, an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)  # registered first, used last
        self.unused = nn.Linear(5, 5)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = x + F.relu(self.bn2(self.conv2(x)))
        x = self.depthwise(F.relu(self.grouped(x)))
        return self.fc(self.drop(x.mean((2, 3))))


@made_of(lambda: {"conv1": nn.Conv2d(3, 8, 3, padding=1), "conv2": nn.Conv2d(8, 8, 3, stride=2), "fc": nn.Linear(8, 4)})
def PlainCnn(self: Any, x: Tensor) -> Tensor:
    """Nothing random, no grouped convolution: torch's FLOP counter can be trusted with it."""
    x = F.relu(self.conv2(F.relu(self.conv1(x))))
    return self.fc(x.mean((2, 3)))


class Attention(nn.Module):
    """Products of two activations in four spellings."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        first = torch.matmul((q @ k.transpose(1, 2)).softmax(-1), v)
        second = torch.bmm(torch.einsum("bid,bjd->bij", q, k).softmax(-1), v)
        return self.out(first + second)


@made_of(lambda: {"fc1": nn.Linear(12, 16), "fc2": nn.Linear(16, 4)})
def FunctionalDropout(self: Any, x: Tensor) -> Tensor:
    return self.fc2(F.dropout(self.fc1(x).relu(), p=0.5, training=self.training))


@made_of(lambda: {"layer1": FunctionalDropout(), "layer2": nn.Linear(4, 4)})
def NestedDropout(self: Any, x: Tensor) -> Tensor:
    return F.dropout(self.layer2(self.layer1(x)), 0.5, self.training)


@made_of(lambda: {"body": nn.Linear(12, 16), "head": nn.Linear(16, 4), "aux": nn.Linear(16, 4)})
def AuxiliaryHead(self: Any, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """Returns another structure in training, as GoogLeNet does."""
    x = self.body(x).relu()
    if self.training:
        return self.head(x), self.aux(x)
    return self.head(x)


@made_of(lambda: {"first": nn.Linear(12, 12), "branch": _Branch(), "last": nn.Linear(12, 4)})
def NestedAuxiliary(self: Any, x: Tensor) -> Tensor:
    """The submodule that branches can be put in eval() alone."""
    return self.last(self.branch(self.first(x)))


@made_of(lambda: {"a": nn.Linear(12, 12), "b": nn.Linear(12, 12)})
def _Branch(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    if self.training:
        x = x + self.b(x).relu()
    return x


class DataDependent(nn.Module):
    """Python control flow on a value, which cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if x.sum() > 0:  # where tracing stops
            return x.relu()
        return x.tanh()


@made_of(lambda: {"fc1": nn.Linear(12, 16), "middle": DataDependent(), "fc2": nn.Linear(16, 4)})
def WithDataDependent(self: Any, x: Tensor) -> Tensor:
    return self.fc2(self.middle(self.fc1(x)).relu())


@made_of(lambda: {"fc1": nn.Linear(16, 16), "fc2": nn.Linear(16, 16), "calls": []})
def Block(self: Any, x: Tensor) -> Tensor:
    """Counts how often its forward runs."""
    self.calls.append(1)
    return x + self.fc2(self.fc1(x).relu())


class Checkpointed(nn.Module):
    """``mode`` is ``use_reentrant``, or None for no checkpoint."""

    def __init__(self, mode: bool | None = False) -> None:
        super().__init__()
        self.mode = mode
        self.stem, self.block, self.head = nn.Linear(12, 16), Block(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.block(x) if self.mode is None else checkpoint(self.block, x, use_reentrant=self.mode)
        return self.head(x.relu())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.body, self.decoder = nn.Linear(16, 16), nn.Linear(16, 10, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.body(self.embedding(x)).relu())


@made_of(lambda: {"fc": nn.Linear(16, 16), "head": nn.Linear(16, 4)})
def CalledTwice(self: Any, x: Tensor) -> Tensor:
    return self.head(self.fc(self.fc(x).relu()).relu())


class OwnParameters(nn.Module):
    """Functional calls on parameters of its own, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 12) / 4)
        self.bias = nn.Parameter(torch.zeros(16))
        self.kernel = nn.Parameter(torch.randn(4, 16, 1, 1) / 4)
        self.register_buffer("offset", torch.full((16,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight, self.bias).relu() - self.offset
        return F.conv2d(x[:, :, None, None], self.kernel).flatten(1)


class Counting(nn.Module):
    """Updates a buffer and a Python attribute in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 4)
        self.register_buffer("seen", torch.zeros(()))
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        self.last = x
        return self.fc(x)


@made_of(lambda: {"fc1": nn.Linear(8, 8), "lstm": nn.LSTM(8, 8, batch_first=True), "fc2": nn.Linear(8, 4)})
def Recurrent(self: Any, x: Tensor) -> Tensor:
    return self.fc2(self.lstm(self.fc1(x))[0])


class FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc2 = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + F.scaled_dot_product_attention(x, x, x)
        return self.fc2(x)


@made_of(lambda: {"fc1": nn.Linear(12, 16), "fc2": nn.Linear(16, 4)})
def Optional(
    self: Any, x: Tensor, mask: Tensor | None = None, *, gain: Tensor | None = None, double: bool = False
) -> Tensor:
    """An optional tensor, a keyword-only tensor and a keyword-only flag."""
    x = self.fc1(x).relu()
    if mask is not None:
        x = x * mask
    if gain is not None:
        x = x * gain
    if double:
        x = x + x
    return self.fc2(x)


@made_of(lambda: {"fc1": nn.Linear(12, 16), "fc2": nn.Linear(16, 4)})
def DictInput(self: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"logits": self.fc2(self.fc1(batch["x"]).relu() + batch["y"])}


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.1, batch_first=True)


def normed() -> nn.Module:
    """A parametrised layer between two that are not."""
    return nn.Sequential(nn.Linear(12, 16), weight_norm(nn.Linear(16, 16)), nn.Linear(16, 4))


# name -> (how to build it, an input batch)
ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "mlp": (mlp, lambda: torch.randn(6, 12)),
    "cnn": (Cnn, lambda: torch.randn(4, 3, 8, 8)),
    "attention": (Attention, lambda: torch.randn(3, 5, 8)),
    "functional_dropout": (FunctionalDropout, lambda: torch.randn(6, 12)),
    "nested_dropout": (NestedDropout, lambda: torch.randn(6, 12)),
    "auxiliary_head": (AuxiliaryHead, lambda: torch.randn(6, 12)),
    "nested_auxiliary": (NestedAuxiliary, lambda: torch.randn(6, 12)),
    "data_dependent": (WithDataDependent, lambda: torch.randn(6, 12)),
    "checkpointed": (Checkpointed, lambda: torch.randn(6, 12)),
    "checkpointed_reentrant": (lambda: Checkpointed(True), lambda: torch.randn(6, 12)),
    "tied": (Tied, lambda: torch.randint(10, (6, 3))),
    "called_twice": (CalledTwice, lambda: torch.randn(6, 16)),
    "own_parameters": (OwnParameters, lambda: torch.randn(6, 12)),
    "counting": (Counting, lambda: torch.randn(6, 12)),
    "recurrent": (Recurrent, lambda: torch.randn(3, 5, 8)),
    "fused_attention": (FusedAttention, lambda: torch.randn(3, 5, 8)),
    "optional": (Optional, lambda: torch.randn(6, 12)),
    "dict_input": (DictInput, lambda: {"x": torch.randn(6, 12), "y": torch.randn(6, 16)}),
    "encoder_layer": (encoder_layer, lambda: torch.randn(3, 5, 8)),
    "normed": (normed, lambda: torch.randn(6, 12)),
}

UNTRACED = {"data_dependent", "checkpointed", "checkpointed_reentrant", "encoder_layer", "counting"}
"""Models of the zoo with a part that cannot be traced, so that a transform warns."""


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def loss_of(output: Any) -> Tensor:
    """A scalar that depends on every entry of every output, differently."""
    total = torch.zeros((), dtype=torch.float64)
    for tensor in tensors(output):
        weights = torch.linspace(0.5, 1.5, tensor.numel(), dtype=torch.float64).view_as(tensor)
        total = total + (tensor.double() * weights).sum() + tensor.double().square().sum()
    return total


def train_step(model: nn.Module, x: Any, seed: int = 1) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs and gradients (of the parameters, zeroed before) of one forward and backward; same dropout masks."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    output = model(x)
    loss_of(output).backward()
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return [t.detach().clone() for t in tensors(output)], grads


def same(left: Any, right: Any) -> bool:
    """Bitwise equality of two structures of tensors."""
    if left is right:
        return True
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)
