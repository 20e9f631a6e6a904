"""A recipe beside the moving average of timm."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fx_approx.integrations.served import Recipe, check_recipe


@torch.no_grad()
def step_with_ema(recipe: Recipe, ema: Any, step: int | None = None) -> None:
    """Goes on with a recipe, and averages its weights; to be called after each step of the optimiser.

    What the recipe sets to zero, since no layer has read it, is set to zero in the average, too. There it would else
    stand as it was in the beginning, and the average be another network than the one that was trained.

    Args:
        recipe: Of a function of :mod:`fx_approx.recipes`, without ``optimizer=``.
        ema: ``timm.utils.ModelEmaV3(recipe.model)``, or what has ``update(model, step)`` and ``module`` as that has.
        step: Of the optimiser, for averages that warm up.

    Raises:
        TypeError: ``recipe`` is none, or ``ema`` no average.
        ValueError: ``recipe`` was made with an optimiser, or all its steps were taken.
    """
    check_recipe(recipe)
    if not (callable(getattr(ema, "update", None)) and isinstance(getattr(ema, "module", None), nn.Module)):
        raise TypeError(f"ema: expected an average such as timm.utils.ModelEmaV3(recipe.model), got {ema!r}")
    ema.update(recipe.model, step)
    rises = recipe.rises
    recipe.step()
    if not rises:
        return
    averages = dict(ema.module.named_parameters())
    for name, parameter in recipe.model.named_parameters():
        if parameter.dim() > 1:
            average = averages[name]
            average.masked_fill_((parameter == 0).to(average.device), 0)
