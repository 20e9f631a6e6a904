"""Training steps whose gradients are real and whose computing is waited for, so that many fit on few cores.

A network runs once for real, on a small batch of small images, and its gradients are kept: real shapes, real
selections, zeros where they belong. A replayed step waits as long as the forward pass takes on the machine it stands
for, then walks backward through the layers, waits for each its share of the backward pass by operations, and hands its
gradients to autograd. All from there on is real: DistributedDataParallel's buckets, hooks, packing, gloo. Waiting takes
no core, as computing on an accelerator takes none from the network.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from _models import torchvision_models, wide_resnet
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Uniform
from fx_approx.runtime.approx_module import ApproxModule, find

FORWARD = 1 / 3
"""Share of the forward pass; backward makes two products for each of its one."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A network to train: ``batch`` images of ``size`` on each worker; images of ``small`` are enough to record it."""

    build: Callable[[], nn.Module]
    size: int
    small: int
    batch: int


NETWORKS = {
    "resnet50": Network(lambda: torchvision_models().resnet50(), 224, 64, 64),
    "resnet152": Network(lambda: torchvision_models().resnet152(), 224, 64, 32),
    "wrn_28_10": Network(lambda: wide_resnet(28, 10), 32, 16, 128),
    "wrn_10_2": Network(lambda: wide_resnet(10, 2), 16, 16, 8),
}
"""By name; the last one for a quick look."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A module with parameters of its own: their names, bytes, and multiply-adds of a forward pass over one image."""

    name: str
    parameters: tuple[str, ...]
    nbytes: int
    macs: int


def layers_of(model: nn.Module, size: int) -> list[Layer]:
    """In the order of the forward pass; computed on the meta device, where nothing is multiplied."""
    found: list[Layer] = []
    shadow = copy.deepcopy(model).to("meta")

    def note(name: str, module: nn.Module, result: Tensor) -> None:
        own = dict(module.named_parameters(recurse=False))
        product = isinstance(module, (nn.Conv2d, nn.Linear))
        macs = result.numel() * module.weight.numel() // module.weight.shape[0] if product else 0
        names = tuple(f"{name}.{key}" for key in own)
        found.append(Layer(name, names, sum(p.nbytes for p in own.values()), macs))

    for name, module in shadow.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(lambda module, _, result, name=name: note(name, module, result))
    with torch.no_grad():
        shadow(torch.empty(1, 3, size, size, device="meta"))
    if {p for one in found for p in one.parameters} != {name for name, _ in model.named_parameters()}:
        raise ValueError("model: expected each parameter to be used by its own module once in a forward pass")
    return found


def seconds_of(layers: Sequence[Layer]) -> list[float]:
    """Of each layer's backward pass, as a share of the step."""
    whole = sum(one.macs for one in layers)
    return [(1 - FORWARD) * one.macs / whole for one in layers]


@dataclasses.dataclass
class Recording:
    """What one real step left: gradients by name, and which units the selections chose (None where there are none)."""

    gradients: dict[str, Tensor]
    chosen: Tensor | None


def sampled(
    exact: nn.Module, ratio: float, small: int, scope: str, scores: str, min_k: int, demand: bool = True
) -> nn.Module:
    """``exact`` with every layer sampled by TopK."""
    policy = Uniform(ratio, min_k=min_k, scores=scores, scope=scope)
    return fx_approx.transform(copy.deepcopy(exact), policy, torch.randn(2, 3, small, small), prune_unread=demand)


def record(model: nn.Module, inputs: Tensor, between: Callable[[], None] = lambda: None) -> Recording:
    """A real step on ``inputs``; ``ema`` scores get two before it, with ``between`` called after each."""
    chosen = None
    resample = find(model)._fx_approx.resample if isinstance(model, ApproxModule) else None
    if resample is not None:
        for _ in range(2):
            model(inputs).square().mean().backward()
            between()
        resample.published = resample.tracker()
        model.zero_grad()
    model(inputs).square().mean().backward()
    if resample is not None:
        chosen = resample.published.mask.clone()
        resample.published = None
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return Recording(gradients, chosen)


class _Produce(torch.autograd.Function):
    """The identity, whose backward waits and hands out recorded gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, replay: Replay, place: int, *parameters: Tensor) -> Tensor:
        ctx.replay, ctx.place = replay, place
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None, None, *ctx.replay.produced(ctx.place)


class Replay(nn.Module):
    """Holds a network; its forward and backward pass replay a recording.

    Attributes:
        compute: Seconds that a step waits altogether.
    """

    def __init__(self, model: nn.Module, recording: Recording, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.model, self.compute = model, 0.0
        self._chosen, self._shares = recording.chosen, seconds_of(layers)
        parameters = dict(model.named_parameters())
        self._fed = [[parameters[name] for name in one.parameters] for one in layers]
        self._produced = [[recording.gradients[name] for name in one.parameters] for one in layers]

    def forward(self, x: Tensor) -> Tensor:
        """A scalar to call ``backward`` on; ``x`` is a scalar that requires a gradient."""
        if self._chosen is not None:  # what the forward pass of the network itself would publish
            resample = find(self.model)._fx_approx.resample
            if resample.published is not None:
                resample.published.mask.copy_(self._chosen)
        _wait(FORWARD * self.compute)
        for place, parameters in enumerate(self._fed):
            x = _Produce.apply(x, self, place, *parameters)
        return x

    def produced(self, place: int) -> list[Tensor]:
        """The gradients of one layer, after its share of the time."""
        _wait(self._shares[place] * self.compute)
        return self._produced[place]


def _wait(seconds: float) -> None:
    if seconds > 2e-5:
        time.sleep(seconds)


def share_storage(model: nn.Module, other: nn.Module) -> None:
    """Makes the parameters of ``model`` the memory of those of ``other``, which has the same."""
    theirs: Mapping[str, Tensor] = dict(other.named_parameters())
    for name, own in model.named_parameters():
        own.data = theirs[name].data
