"""A recipe in the Trainer of Hugging Face."""

from __future__ import annotations

from typing import Any

from fx_approx.integrations.served import Recipe, check_recipe, check_served, check_start, logged
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.utils.optional_imports import absent

try:
    from transformers.trainer_callback import ExportableState, TrainerCallback
except ImportError as error:
    raise ImportError(absent("fx_approx.integrations.trainer", "transformers")) from error


class RecipeCallback(TrainerCallback, ExportableState):
    """Steps a recipe after each step of the optimiser, whatever micro-batches it has.

    ::

        recipe = fx_approx.recipes.finetune(model, batch, steps=arguments.max_steps)
        trainer = Trainer(recipe.model, arguments, train_dataset=data, callbacks=[RecipeCallback(recipe)])
        trainer.train()
        recipe.finish().save_pretrained(folder)

    Its state lies in ``trainer_state.json`` of each checkpoint; ``train(resume_from_checkpoint=...)`` with a recipe
    that was made alike goes on from there. The log has ``fx_approx/mean_ratio`` and ``fx_approx/saved_flops`` beside
    the loss, in ``trainer.state.log_history``, and in all that stands behind the callback; :meth:`add_to` puts it in
    front of what ``report_to`` names.

    ``load_best_model_at_end`` may bring back a network that has not had the exact steps at the end, and
    ``restore_callback_states_from_checkpoint`` makes callbacks anew, which this one does not allow: leave both off.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Makes it; a transformed model then tells the Trainer that it takes no count of items beside its inputs.

        Args:
            recipe: Of a function of :mod:`fx_approx.recipes`, without ``optimizer=``; its batch as the Trainer makes
                it.

        Raises:
            TypeError: That is no recipe.
            ValueError: It was made with an optimiser.
        """
        check_recipe(recipe)
        self.recipe = recipe
        self._numbers: dict[str, float] = {}
        model: Any = recipe.model
        if isinstance(recipe.model, ApproxModule):
            model.accepts_loss_kwargs = False

    def add_to(self, trainer: Any) -> None:
        """Puts the callback in front of all others of a ``transformers.Trainer``, so that they log what it adds."""
        trainer.callback_handler.callbacks.insert(0, self)
        if isinstance(self.recipe.model, ApproxModule):
            trainer.model_accepts_loss_kwargs = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Takes over the state of a checkpoint, if there is one.

        Raises:
            ValueError: The Trainer has another model or number of steps, or a checkpoint without this callback.
        """
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and saved is not None:
            self.recipe.load_state_dict(saved["attributes"]["recipe"])
        check_start(self.recipe, "the Trainer", state.max_steps, state.global_step, given["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Goes on with the recipe.

        Raises:
            RuntimeError: Its graph does not serve the Trainer's calls.
        """
        check_served(self.recipe)
        self._numbers = logged(self.recipe)
        self.recipe.step()

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Adds to what is logged of training steps."""
        if "loss" in given["logs"]:
            given["logs"].update(self._numbers)
            state.log_history[-1].update(self._numbers)

    def state(self) -> dict[str, Any]:
        """What the Trainer stores, plain values."""
        return {"args": {}, "attributes": {"recipe": self.recipe.state_dict(model=False)}}
