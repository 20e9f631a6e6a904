"""All classification models of torchvision: a training step at ratio 0.5, and exactness where it is promised.

Six small models always; all 80 with ``-m slow``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Uniform
from tests.helpers.torchvision_compat import import_torchvision

MODELS = import_torchvision().models

SMALL = ("resnet18", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5", "swin_t", "googlenet")

# The smallest square image that the model accepts; 32 for those not listed.
SIZES = {"alexnet": 63, "inception_v3": 299, "vit_h_14": 28, "maxvit_t": 224}
OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    **{name: {"image_size": SIZES.get(name, 32)} for name in MODELS.list_models(include="vit_*")},
}


def names() -> list[Any]:
    every = MODELS.list_models(module=MODELS)
    return [name if name in SMALL else pytest.param(name, marks=pytest.mark.slow) for name in every]


def build(name: str) -> tuple[nn.Module, Tensor]:
    model = MODELS.get_model(name, weights=None, num_classes=10, **OPTIONS.get(name, {}))
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


def without_gradient(grads: dict[str, Tensor | None]) -> set[str]:
    return {name for name, grad in grads.items() if grad is None}


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

    fx_approx.set_sampling(approx, 1.0)
    outputs, grads = step(approx, x)
    assert all_equal(outputs, exact_outputs)
    differing = [n for n, grad in grads.items() if grad is not None and not torch.equal(grad, exact[n])]
    assert not differing
