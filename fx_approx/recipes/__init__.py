"""Recipes: one call sets up a training that saves operations, by what the evidence says for the kind of model."""

from fx_approx.recipes.calls import finetune, pretrain, transformer
from fx_approx.recipes.recipe import Recipe

__all__ = ["Recipe", "finetune", "pretrain", "transformer"]
