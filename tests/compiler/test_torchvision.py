"""Models of torchvision: a step at ratio 0.5, exactness where it is promised, and demand, which changes no number.

A few kinds that no other test has always; all 80 with ``-m slow``.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

import fx_approx
from fx_approx.policies import Uniform
from tests.helpers.hoisting import Layers, assert_hoisting_changes_nothing, narrow_producers, narrow_values
from tests.helpers.torchvision_compat import import_torchvision

MODELS = import_torchvision().models

SMALL = ("shufflenet_v2_x0_5", "googlenet")

# The smallest square image that the model accepts; 32 for those not listed.
SIZES = {"alexnet": 63, "inception_v3": 299, "vit_h_14": 28, "maxvit_t": 224}
OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    **{name: {"image_size": SIZES.get(name, 32)} for name in MODELS.list_models(include="vit_*")},
}

# Of a stack of equal blocks of the largest models so many are left, so that no test needs more than 4 GB.
BLOCKS = {
    **{name: ("encoder.layers", 6) for name in MODELS.list_models(include="vit_*")},
    "regnet_y_128gf": ("trunk_output.block3", 2),
}
HIDDEN = 256  # of the classifiers of VGG and AlexNet, whose own 4096 are most of the model


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    """Graphs refer to themselves: without this, the models of several tests would be in memory at once."""
    yield
    gc.collect()


def names() -> list[Any]:
    every = MODELS.list_models(module=MODELS)
    return [name if name in SMALL else pytest.param(name, marks=pytest.mark.slow) for name in every]


def made(name: str, **options: Any) -> nn.Module:
    """A model with random weights, smaller where it is among the largest."""
    model = MODELS.get_model(name, weights=None, num_classes=10, **options)
    if name in BLOCKS:
        path, count = BLOCKS[name]
        del model.get_submodule(path)[count:]
    if name.startswith(("vgg", "alexnet")):
        places = [place for place, layer in enumerate(model.classifier) if isinstance(layer, nn.Linear)]
        sizes = (model.classifier[places[0]].in_features, HIDDEN, HIDDEN, 10)
        for place, inputs, outputs in zip(places, sizes[:-1], sizes[1:], strict=True):
            model.classifier[place] = nn.Linear(inputs, outputs)
    return model


def build(name: str) -> tuple[nn.Module, Tensor]:
    model = made(name, **OPTIONS.get(name, {}))
    if name.startswith("vit_"):  # its head starts at zero, and all gradients with it
        nn.init.normal_(model.heads.head.weight, std=0.02)
    size = SIZES.get(name, 32)
    return model, torch.randn(2, 3, size, size)


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def step(model: nn.Module, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs and gradients of one training step, always with the same dropout masks."""
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    outputs = tensors(model(x))
    sum(output.square().sum() for output in outputs).backward()
    return [output.detach() for output in outputs], {name: p.grad for name, p in model.named_parameters()}


@torch.no_grad()
def evaluated(model: nn.Module, x: Tensor) -> list[Tensor]:
    return tensors(model.eval()(x))


def all_equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def test_there_are_eighty_models() -> None:
    assert len(names()) == 80


@pytest.mark.parametrize("name", names())
def test_model(name: str) -> None:
    model, x = build(name)
    approx = fx_approx.transform(model, Uniform(0.5, scores="online"), x)

    assert all(row.exact is not None for row in fx_approx.report(approx).rows)
    assert list(approx.state_dict()) == list(model.state_dict())
    assert [id(p) for p in approx.parameters()] == [id(p) for p in model.parameters()]
    assert [n for n, _ in approx.named_modules()] == [n for n, _ in model.named_modules()]
    assert all_equal(evaluated(approx, x), evaluated(model, x))

    exact_outputs, exact = step(model, x)
    outputs, sampled = step(approx, x)
    assert not all_equal(outputs, exact_outputs), "nothing was sampled"
    assert {n for n, grad in sampled.items() if grad is None} == {n for n, grad in exact.items() if grad is None}
    not_finite = [n for n, grad in sampled.items() if grad is not None and not bool(grad.isfinite().all())]
    assert not not_finite
    del sampled

    fx_approx.set_sampling(approx, 1.0)
    outputs, grads = step(approx, x)
    assert all_equal(outputs, exact_outputs)
    differing = [n for n, grad in grads.items() if grad is not None and not torch.equal(grad, exact[n])]
    assert not differing


# ---- demand


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
    "vit_b_16": (6, 6, 6),
    "swin_t": (12, 12, 12),
}


def build_demand(name: str, seed: int, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A model in which nothing is zero to begin with, and nothing random."""
    torch.manual_seed(seed)
    options = {"image_size": 32} if name.startswith("vit_") else {}
    model = made(name, **options)
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
    model, x = build_demand(name, seed, torch.float64)
    scores, sampler = SCORES[(seed + SCOPES.index(scope)) % 3], SAMPLERS[seed]
    policy = Layers(sampler, 0.5, scores, scope)
    hoisted = assert_hoisting_changes_nothing(model, policy, x, steps=2 if scores == "ema" else 1, seed=seed)
    gc.collect()  # the model that computes all
    least = LEAST[name][SCOPES.index(scope)]
    assert len(narrow_producers(hoisted)) >= least
    assert narrow_values(hoisted)
    result = fx_approx.analysis.verify(hoisted, x)
    assert result.hoisted
    assert result.passed, str(result)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "swin_t"])
def test_float32_within_rounding(name: str) -> None:
    model, x = build_demand(name, 0, torch.float32)
    hoisted = assert_hoisting_changes_nothing(model, Layers("systematic", scope="group"), x, steps=1, tolerance=5e-3)
    assert fx_approx.analysis.verify(hoisted, x).passed


def test_a_residual_network_shrinks_whole() -> None:
    """The quick one: all convolutions of a resnet18 at scope group, none of its numbers changed."""
    model, x = build_demand("resnet18", 0, torch.float64)
    hoisted = assert_hoisting_changes_nothing(model, Layers("topk", scope="group"), x, steps=1)
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert narrow_producers(hoisted) == layers
