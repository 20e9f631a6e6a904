"""A recipe beside the training pieces of timm: moving average, rates by layer, rates by schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fx_approx import recipes
from tests.helpers.torchvision_compat import define_missing_schemas
from tests.integrations.nets import BATCHES, STEPS, loop, loss_of, recipe_of

pytest.importorskip("timm")
define_missing_schemas()  # timm imports torchvision
import timm  # noqa: E402
from timm.optim import create_optimizer_v2, param_groups_layer_decay  # noqa: E402
from timm.scheduler import CosineLRScheduler  # noqa: E402
from timm.utils import ModelEmaV3  # noqa: E402

from fx_approx.integrations.timm import step_with_ema  # noqa: E402


def test_the_average_is_zero_where_the_recipe_sets_zero() -> None:
    recipe, plain = recipe_of(), recipe_of()
    ema, stale = ModelEmaV3(recipe.model, decay=0.9), ModelEmaV3(plain.model, decay=0.9)
    weights, zeros = [], []

    def step() -> None:
        step_with_ema(recipe, ema)
        weights.append(ema.module[2].weight.clone())
        zeros.append(int((ema.module[2].weight == 0).all(0).sum()))

    def without() -> None:
        stale.update(plain.model)
        plain.step()

    loop(recipe, after=step)
    loop(plain, after=without)
    assert zeros == [0] * 26 + [32] + [0] * 3  # read again in the exact steps, which train them
    for one, other in zip(recipe.finish().parameters(), plain.finish().parameters(), strict=True):
        assert torch.equal(one, other)

    kept = (weights[26] != 0).any(0)
    torch.testing.assert_close(weights[26][:, kept], (0.9 * weights[25] + 0.1 * before_the_exact_steps())[:, kept])
    x = BATCHES[0][0]
    far = (ema.module(x) - recipe.model.eval()(x)).abs().max(), (stale.module(x) - plain.model.eval()(x)).abs().max()
    assert far[0] < far[1]


def before_the_exact_steps() -> torch.Tensor:
    """The weight before the recipe sets a part of it to zero."""
    recipe, seen = recipe_of(), []

    def step() -> None:
        seen.append(recipe.model[2].weight.detach().clone())
        recipe.step()

    loop(recipe, after=step)
    return seen[26]


def test_rates_by_layer_and_by_schedule_on_a_transformed_model() -> None:
    """Fine-tuning as timm's own script does: layer decay, a cosine with warm-up, an average, and a recipe."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.models.VisionTransformer(**sizes, num_classes=3)
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    recipe = recipes.finetune(model, images, STEPS, check=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def described(one: nn.Module) -> list[tuple[float, list[str]]]:
        groups = param_groups_layer_decay(one, 0.05, layer_decay=0.5)
        return [(group["lr_scale"], [names[id(parameter)] for parameter in group["params"]]) for group in groups]

    assert described(recipe.model) == described(model) and len({scale for scale, _ in described(model)}) == 4
    optimizer = create_optimizer_v2(recipe.model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    scheduler = CosineLRScheduler(optimizer, t_initial=STEPS, warmup_t=5, warmup_lr_init=1e-6, t_in_epochs=False)
    ema = ModelEmaV3(recipe.model, decay=0.9, use_warmup=True)
    scheduler.step_update(0)
    for step in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(recipe.model(images), labels).backward()
        optimizer.step()
        step_with_ema(recipe, ema, step)
        scheduler.step_update(step + 1)
    assert recipe.unserved == () and recipe.finish() is model
    assert F.cross_entropy(ema.module(images), labels) < 1.0 and not ema.module.training


def test_what_is_wrong_is_named() -> None:
    recipe = recipe_of()
    with pytest.raises(TypeError, match="ema: expected an average such as timm"):
        step_with_ema(recipe, recipe.model)
    with pytest.raises(TypeError, match="recipe: expected what a function"):
        step_with_ema(recipe.model, ModelEmaV3(recipe.model))  # type: ignore[arg-type]
    assert recipe.taken == 0 and loss_of(recipe.model, BATCHES[0]).isfinite()
