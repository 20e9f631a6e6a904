"""A recipe in Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fx_approx.integrations.served import Recipe, check_recipe, check_served, check_start, logged
from fx_approx.utils.optional_imports import absent

try:
    from lightning.pytorch.callbacks import Callback
except ImportError as error:
    raise ImportError(absent("fx_approx.integrations.lightning", "lightning")) from error


class RecipeCallback(Callback):
    """Steps a recipe after each step of the optimiser, whatever batches it accumulates.

    ::

        recipe = fx_approx.recipes.finetune(network, images, steps=1000)
        learner = Learner(recipe.model)  # a LightningModule that calls it in training_step
        Trainer(max_steps=1000, callbacks=[RecipeCallback(recipe)]).fit(learner, loader)
        network = recipe.finish()

    Its state lies in each checkpoint; ``fit(..., ckpt_path=...)`` with a recipe that was made alike goes on from there.
    ``fx_approx/mean_ratio`` and ``fx_approx/saved_flops`` go to the module's logger. With several optimisers their
    steps are counted together, as ``trainer.global_step`` counts them.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Makes it.

        Args:
            recipe: Of a function of :mod:`fx_approx.recipes`, without ``optimizer=``.

        Raises:
            TypeError: That is no recipe.
            ValueError: It was made with an optimiser.
        """
        check_recipe(recipe)
        self.recipe = recipe

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Makes sure that both count alike.

        Raises:
            ValueError: Lightning has another model or number of steps, or a checkpoint without this callback.
        """
        steps = trainer.estimated_stepping_batches
        check_start(self.recipe, "Lightning", steps, trainer.global_step, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Goes on with the recipe where the optimiser did.

        Raises:
            RuntimeError: Its graph does not serve the module's calls.
        """
        while self.recipe.taken < trainer.global_step:
            check_served(self.recipe)
            pl_module.log_dict(logged(self.recipe))
            self.recipe.step()

    def state_dict(self) -> dict[str, Any]:
        """What Lightning stores."""
        return self.recipe.state_dict(model=False)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over the state of a checkpoint; the model has loaded its own."""
        self.recipe.load_state_dict(state_dict)
