"""The modes in which a transformed model trains, as functions of the ratio: the table that tests of modes walk."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx import SamplerConfig
from fx_approx.policies import GradientSampling
from tests.helpers.models import train_step

Mode = Callable[[float], GradientSampling]

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
"""Backends of torch.compile."""


def _combined(ratio: float, straight_through: bool = False) -> GradientSampling:
    """Another sampler, ratio and score for each product."""
    return GradientSampling(
        SamplerConfig("topk", ratio),
        SamplerConfig("crs", ratio, scores="weight"),
        SamplerConfig("bernoulli", min(1.0, 1.25 * ratio), scores="uniform"),
        straight_through=straight_through,
    )


MODES: dict[str, Mode] = {
    "forward": lambda ratio: GradientSampling(output=SamplerConfig("systematic", ratio)),
    "straight": lambda ratio: GradientSampling.straight(ratio, "systematic"),
    "backward": GradientSampling.backward,
    "per_batch": lambda ratio: GradientSampling.backward(ratio, "wta_unique", per_batch=True),
    "weight_gradient": GradientSampling.weight_gradient,
    "positions": lambda ratio: GradientSampling.weight_gradient(ratio, "systematic", positions=True),
    "ema": lambda ratio: GradientSampling.weight_gradient(ratio, "systematic", "ema"),
    "combined": _combined,
    "combined_straight": lambda ratio: _combined(ratio, True),
}

#: Modes whose forward pass is the exact one.
EXACT_FORWARD = ("backward", "per_batch", "weight_gradient", "positions", "ema")


def transformed(model: nn.Module, policy: Any, *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
        return fx_approx.transform(model, policy, *args, **options)


def steps(model: nn.Module, count: int, x: Tensor, optimizer: Any = None) -> list[Any]:
    """Outputs and gradients of some training steps on one batch; they depend on nothing but the model."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3) if optimizer is None else optimizer
    found = []
    for _ in range(count):
        found.append(train_step(model, x))
        optimizer.step()
    return found
