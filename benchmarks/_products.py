"""Matrix products to approximate: random ones of several kinds, and those of a training step of the demo's networks."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import torch.nn.functional as F
from _digit_nets import NETWORKS, batches
from torch import Tensor, nn

from fx_approx.demo.images import digits

BATCH = 64
TRAINING_STEPS = 44
"""Two epochs of the digits: the networks have learned something, and their gradients have not vanished."""


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """Two float32 matrices to multiply.

    Attributes:
        name: For tables and figures.
        lhs: A ``[m, K]``; may be a view, as it is in training.
        rhs: B ``[K, n]``; likewise.
        captured: Whether it comes from a network in training.
        block: How many columns of A next to each other, and rows of B, the package's samplers choose together: those of
            a channel of a convolution.
    """

    name: str
    lhs: Tensor
    rhs: Tensor
    captured: bool = False
    block: int = 1

    def __post_init__(self) -> None:
        """Check the shapes."""
        if self.lhs.dim() != 2 or self.rhs.dim() != 2 or self.lhs.shape[1] != self.rhs.shape[0]:
            raise ValueError(f"{self.name}: shapes {tuple(self.lhs.shape)}, {tuple(self.rhs.shape)} do not multiply")
        if self.lhs.shape[1] % self.block:
            raise ValueError(f"{self.name}: {self.lhs.shape[1]} columns are no blocks of {self.block}")

    @property
    def sizes(self) -> tuple[int, int, int]:
        """``m, K, n``."""
        return self.lhs.shape[0], self.lhs.shape[1], self.rhs.shape[1]

    @property
    def flops(self) -> int:
        """Of the exact product: a multiply-add is two."""
        m, pairs, n = self.sizes
        return 2 * m * pairs * n

    @property
    def pairs(self) -> int:
        """What the package's samplers choose from."""
        return self.lhs.shape[1] // self.block

    @functools.cached_property
    def exact(self) -> Tensor:
        """A @ B, multiplied in float64."""
        return (self.lhs.double() @ self.rhs.double()).float()

    @functools.cached_property
    def norms(self) -> tuple[Tensor, Tensor]:
        """Norms of the blocks of columns of A and of rows of B: ``[pairs]`` each."""
        blocks = (self.pairs, self.block)
        return self.lhs.unflatten(1, blocks).norm(dim=(0, 2)), self.rhs.unflatten(0, blocks).norm(dim=(1, 2))

    def facts(self) -> dict[str, float]:
        """What decides which method is good at it: flatness of the pairs' norms, cancellation, and rank."""
        s = self.norms[0] * self.norms[1]
        size = float(self.exact.norm())
        singular = torch.linalg.svdvals(self.exact.double()).square()
        return {
            "effective_pairs": float(s.sum() ** 2 / s.square().sum() / len(s)),
            "coherence": size / float(s.sum()),
            "stable_rank": float(singular.sum() / singular[0]),
        }


def random_products(quick: bool = False, seed: int = 0) -> list[Product]:
    """Random products: what favours one kind of method or another.

    Gaussian (nothing to hold on to), column norms of a heavy tail (favours sampling by norms), singular values 1/i
    (favours low rank), non-negative (terms add up, as behind a ReLU), entries of a heavy
    tail (favours element-wise sampling), and a large one for the time.
    """
    generator = torch.Generator().manual_seed(seed)
    m, pairs, n = (64, 96, 64) if quick else (192, 512, 192)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def heavy(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        a, b = normal(rows, pairs), normal(pairs, columns)
        return a * normal(pairs).exp(), b * normal(pairs, 1).exp()

    def decaying(rows: int, columns: int) -> Tensor:
        left, right = (torch.linalg.qr(normal(size, min(rows, columns))).Q for size in (rows, columns))
        return left * torch.arange(1, left.shape[1] + 1) ** -1.0 @ right.T * rows

    def student(rows: int, columns: int) -> Tensor:
        chi = sum(normal(rows, columns).square() for _ in range(3))
        assert isinstance(chi, Tensor)
        return normal(rows, columns) / (chi / 3).sqrt()

    found = [
        Product("gaussian", normal(m, pairs), normal(pairs, n)),
        Product("heavy-tailed columns", *heavy(m, n)),
        Product("singular values 1/i", decaying(m, pairs), decaying(pairs, n)),
        Product("non-negative", normal(m, pairs).relu(), normal(pairs, n).abs()),
        Product("heavy-tailed entries", student(m, pairs), student(pairs, n)),
    ]
    if not quick:
        pairs = 1024
        found.append(Product("large, heavy-tailed", *heavy(2048, 1024)))
    return found


def captured_products(quick: bool = False, seed: int = 0) -> list[Product]:
    """The three products of a layer of a small CNN and an MLP, trained exactly on the digits, in the step after.

    A convolution multiplies as im2col: OUTPUT is ``[positions, channels x taps] @ [.., out channels]``. It comes twice,
    since the package chooses whole channels and any other method may take the columns one by one. GRAD_INPUT contracts
    the out-channels or out-features, GRAD_WEIGHT the positions or examples. That of the CNN comes twice, too: BatchNorm
    behind a convolution makes every row of its A sum to zero, so B may have any vector taken from all of its rows, and
    with their mean taken the product is the same and other terms are large.
    """
    images = digits(seed=seed)
    width, steps = (8, 10) if quick else (32, TRAINING_STEPS)
    found = []
    for kind, layer in (("CNN", "block3.conv"), ("MLP", "fc2")):
        torch.manual_seed(seed)
        build, rate = NETWORKS[kind]
        model = build(images, width)
        x, y = _train(model, images, rate, steps, seed)
        if quick:
            x, y = x[: BATCH // 4], y[: BATCH // 4]
        operand, weight, gradient = _capture(model, model.get_submodule(layer), x, y)
        label = f"{kind.lower()} {layer.partition('.')[0]}"
        for role, lhs, rhs in (
            ("OUTPUT", operand, weight.T),
            ("GRAD_INPUT", gradient, weight),
            ("GRAD_WEIGHT", gradient.T, operand),
        ):
            found.append(Product(f"{label} {role}", lhs, rhs, captured=True))
            if role == "OUTPUT" and kind == "CNN":
                taps = model.get_parameter(f"{layer}.weight")[0, 0].numel()
                found.append(Product(f"{label} OUTPUT, channels", lhs, rhs, captured=True, block=taps))
            if role == "GRAD_WEIGHT" and kind == "CNN":
                found.append(Product(f"{label} GRAD_WEIGHT, centred", lhs, rhs - rhs.mean(0), captured=True))
    return found


def _train(model: nn.Module, images: Any, rate: float, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Trains for ``steps`` and returns the batch that would come next."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    epochs = steps * BATCH // len(images.train) + 2
    for step, (x, y) in enumerate(batches(images, epochs, seed)):
        if step == steps:
            return x, y
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    raise AssertionError("too few batches")


def _capture(model: nn.Module, layer: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Input ``[rows, K]`` (im2col), weight ``[n, K]`` and output gradient ``[rows, n]`` of ``layer`` in one step."""
    seen: dict[str, Tensor] = {}

    def remember(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen["input"] = args[0].detach()
        output.register_hook(lambda gradient: seen.update(gradient=gradient.detach()))

    handle = layer.register_forward_hook(remember)
    F.cross_entropy(model(x), y).backward()
    handle.remove()
    operand, gradient = seen["input"], seen["gradient"]
    weight = layer.get_parameter("weight").detach().flatten(1).clone()
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        columns = F.unfold(operand, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        operand, gradient = columns.mT.flatten(0, 1).contiguous(), gradient.flatten(2).mT.flatten(0, 1).contiguous()
    return operand, weight, gradient
