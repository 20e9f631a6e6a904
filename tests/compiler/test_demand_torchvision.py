"""Demand on whole models of torchvision: every scope changes which channels are computed, and no number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

import fx_approx
from tests.compiler.test_torchvision import MODELS
from tests.helpers.hoisting import Layers, assert_hoisting_changes_nothing, narrow_producers, narrow_values

SCOPES = ("layer", "value", "group")
SCORES = ("weight", "ema", "uniform")
SAMPLERS = ("topk", "systematic", "bernoulli")

# Layers that compute fewer outputs, at least so many by scope.
LEAST: dict[str, tuple[int, int, int]] = {
    "resnet18": (9, 12, 20),
    "resnet50": (33, 37, 53),
    "wide_resnet50_2": (33, 37, 53),
    "vgg11_bn": (10, 10, 10),
    "densenet121": (58, 120, 120),
    "mobilenet_v2": (42, 42, 52),
    "mobilenet_v3_small": (29, 47, 53),
    "efficientnet_b0": (39, 71, 80),
    "regnet_y_400mf": (49, 70, 85),
    "convnext_tiny": (18, 18, 18),
    "vit_b_16": (12, 12, 12),
    "swin_t": (12, 12, 12),
}


def build(name: str, seed: int, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A model in which nothing is zero to begin with, and nothing random."""
    torch.manual_seed(seed)
    options = {"image_size": 32} if name.startswith("vit_") else {}
    model = MODELS.get_model(name, weights=None, num_classes=10, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    for module in model.modules():
        if isinstance(module, _DropoutNd) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    size = 32 if name.startswith("vit_") else 64
    return model.to(dtype), torch.randn(2, 3, size, size).to(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", LEAST)
def test_hoisting_changes_no_number(name: str, scope: str, seed: int) -> None:
    model, x = build(name, seed, torch.float64)
    scores, sampler = SCORES[(seed + SCOPES.index(scope)) % 3], SAMPLERS[seed]
    policy = Layers(sampler, 0.5, scores, scope)
    hoisted = assert_hoisting_changes_nothing(model, policy, x, steps=2 if scores == "ema" else 1, seed=seed)
    least = LEAST[name][SCOPES.index(scope)]
    assert len(narrow_producers(hoisted)) >= least
    assert narrow_values(hoisted)
    result = fx_approx.analysis.verify(hoisted, x)
    assert result.hoisted
    assert result.passed, str(result)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "swin_t"])
def test_float32_within_rounding(name: str) -> None:
    model, x = build(name, 0, torch.float32)
    hoisted = assert_hoisting_changes_nothing(model, Layers("systematic", scope="group"), x, steps=1, tolerance=5e-3)
    assert fx_approx.analysis.verify(hoisted, x).passed


def test_a_residual_network_shrinks_whole() -> None:
    """The quick one: all convolutions of a resnet18 at scope group, none of its numbers changed."""
    model, x = build("resnet18", 0, torch.float64)
    hoisted = assert_hoisting_changes_nothing(model, Layers("topk", scope="group"), x, steps=1)
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert narrow_producers(hoisted) == layers
