"""What the tests of integrations share: a small network, its batches, a recipe, comparisons."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fx_approx import recipes
from fx_approx.recipes import Recipe

STEPS = 30
"""Of a recipe: 10 exact ones, 17 that sample, 3 exact ones."""

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [
    (torch.randn(8, 12, generator=GENERATOR), torch.randint(3, (8,), generator=GENERATOR)) for _ in range(2 * STEPS)
]


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))


def recipe_of(model: nn.Module | None = None, **options: Any) -> Recipe:
    return recipes.finetune(mlp() if model is None else model, BATCHES[0][0], STEPS, check=False, **options)


def loop(recipe: Recipe, accumulate: int = 1, after: Any = None) -> None:
    """Plain training with AdamW on the batches in their order, to the end."""
    optimizer = torch.optim.AdamW(recipe.model.parameters(), 1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        for x, y in BATCHES[accumulate * step : accumulate * (step + 1)]:
            (F.cross_entropy(recipe.model(x), y) / accumulate).backward()
        optimizer.step()
        recipe.step() if after is None else after()


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Bitwise."""
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)
