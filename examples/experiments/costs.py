"""What steps cost: operations as torch counts them, and seconds."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from config import Training
from networks import Network
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fx_approx

WARM = 3
"""Steps of each phase before those that are timed."""


def loss_of(output: Tensor, labels: Tensor, smoothing: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """Cross entropy of the last axis, its mean over all, with ``weights`` of them."""
    own = {"label_smoothing": smoothing, "reduction": "mean" if weights is None else "none"}
    found = F.cross_entropy(output.flatten(0, -2).float(), labels.flatten(), **own)
    return found if weights is None else (found * weights.to(found)).mean()


def counted(model: nn.Module, x: Tensor, y: Tensor, times: int = 1) -> tuple[float, float]:
    """Operations of a training step of the running, uncompiled model, and of its forward pass.

    ``FlopCounterMode`` counts products; attention is counted as its two products on every device; the operations that
    scores take are added from the library's own report. Gradients are left as they were: none.
    """
    total = forward = 0.0
    for _ in range(times):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            output = model(x)
            forward += counter.get_total_flops() / times
            loss_of(output, y).backward()
        total += counter.get_total_flops() / times
        model.zero_grad(set_to_none=True)
    return total + selecting(model), forward


def selecting(model: nn.Module) -> float:
    """Operations that scores take in a step, where sampling is on."""
    if not isinstance(model, nn.Module) or not hasattr(model, "_fx_approx"):
        return 0.0
    return float(sum(row.selection for row in fx_approx.report(model).rows if row.samples))


def exact_flops(network: Network, classes: int, example: Tensor, labels: Tensor, width: float) -> tuple[float, float]:
    """Operations of an exact step, and of its forward pass, without computing them."""
    with torch.device("meta"), warnings.catch_warnings():
        # Weights that a network begins with are not copied there, nor need they be.
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        model = network.build(classes, example.to("meta"), width).train()
    return counted(model, example.to("meta"), labels.to("meta"))


def narrowed(network: Network, classes: int, example: Tensor, labels: Tensor, target: float) -> tuple[float, float]:
    """The largest width whose exact step has at most ``target`` operations, and how many it has.

    Raises:
        ValueError: Even the narrowest has more.
    """
    return _largest(lambda width: exact_flops(network, classes, example, labels, width)[0], target, 18)


def _largest(cost: Callable[[float], float], target: float, rounds: int) -> tuple[float, float]:
    low, high, found = 0.0, 1.0, None
    for _ in range(rounds):
        middle = (low + high) / 2
        spent = cost(middle)
        if spent <= target:
            low, found = middle, (middle, spent)
        else:
            high = middle
    if found is None:
        raise ValueError(f"no width is narrow enough for {target:.4g}")
    return found


def quicker(cost: Callable[[float], float], target: float) -> tuple[float, float]:
    """The largest width whose step takes at most ``target`` seconds, to a 64th, and how many it takes."""
    return _largest(cost, target, 6)


def quartiles(values: Sequence[float]) -> list[float]:
    """Quartiles of two values or more."""
    return statistics.quantiles(values, n=4, method="inclusive")


def rate_at(training: Training, step: float, steps: int) -> float:
    """The learning rate of ``step`` as a share of the peak; schedules stretch over ``steps``."""
    warm = training.warmup or (0.3 if training.schedule == "onecycle" else 0.0)
    place = step / max(1, steps)
    if place < warm:
        return 1 / 25 + (1 - 1 / 25) * place / warm if training.schedule == "onecycle" else (step + 1) / (warm * steps)
    if training.schedule == "stairs":
        return training.factor ** sum(place >= milestone for milestone in training.milestones)
    if training.schedule == "trapezoid":
        return min(1.0, (1 - place) / (1 - training.milestones[0]))
    if training.schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (place - warm) / (1 - warm))) / 2


def optimizer_of(training: Training, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """The optimiser; with ``decay_all`` off, vectors (biases, norms) do not decay. Fused: its fastest form."""
    parameters = [one for one in model.parameters() if one.requires_grad]
    decays = [one for one in parameters if training.decay_all or one.dim() > 1]
    chosen = {id(one) for one in decays}
    groups: list[dict[str, Any]] = [{"params": decays}]
    rest = [one for one in parameters if id(one) not in chosen]
    if rest:
        groups.append({"params": rest, "weight_decay": 0.0})
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, rate, weight_decay=training.weight_decay, fused=True)
    nesterov = training.nesterov and training.momentum > 0
    return torch.optim.SGD(
        groups, rate, momentum=training.momentum, nesterov=nesterov, weight_decay=training.weight_decay, fused=True
    )
