"""What an integration needs of a recipe, whoever made it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import nn

PREFIX = "fx_approx/"
"""In front of the names of what is logged."""


@runtime_checkable
class Recipe(Protocol):
    """See :class:`fx_approx.recipes.Recipe`."""

    steps: int
    taken: int

    @property
    def model(self) -> nn.Module:
        """What is called in this step."""
        ...

    @property
    def swaps(self) -> bool:
        """Whether that is another module from phase to phase."""
        ...

    @property
    def rises(self) -> bool:
        """Whether the next step makes layers read more."""
        ...

    @property
    def unserved(self) -> tuple[str, ...]:
        """Why the graph did not serve."""
        ...

    def step(self) -> None:
        """Goes on."""
        ...

    def scalars(self) -> dict[str, float]:
        """Numbers of this step."""
        ...

    def state_dict(self, *, model: bool = True) -> dict[str, Any]:
        """All that goes on from here."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        ...


def check_recipe(recipe: Any) -> None:
    """Makes sure that a host which holds one model can train by ``recipe``.

    Raises:
        TypeError: That is none.
        ValueError: Its model is another one from phase to phase.
    """
    if isinstance(recipe, type) or not isinstance(recipe, Recipe):
        raise TypeError(f"recipe: expected what a function of fx_approx.recipes returns, got {recipe!r}")
    if recipe.swaps:
        raise ValueError(
            "recipe: its model is another one from phase to phase, and one model is trained here; expected a recipe "
            "that was made without optimizer="
        )


def check_start(recipe: Recipe, host: str, steps: float, taken: int, model: nn.Module) -> None:
    """Makes sure that a host trains the model of ``recipe``, for as many steps, from where it is.

    Raises:
        ValueError: It does not; says what would be right.
    """
    if all(module is not recipe.model for module in model.modules()):
        raise ValueError(f"recipe: {host} trains another model; give it recipe.model")
    if steps != recipe.steps:
        raise ValueError(f"recipe: it has {recipe.steps} steps, and {host} takes {steps}; make it with steps={steps}")
    if taken != recipe.taken:
        raise ValueError(
            f"recipe: {recipe.taken} of its steps were taken, and {taken} of {host}; make a new recipe for a new "
            "training, and resume from a checkpoint that was written with the callback"
        )


def check_served(recipe: Recipe) -> None:
    """Makes sure that sampled steps run through the graph that the recipe has made.

    Raises:
        RuntimeError: They do not; says why.
    """
    if recipe.unserved:
        raise RuntimeError(
            f"recipe: its graph does not serve the calls of the training: {'; '.join(recipe.unserved)}. Make the "
            "recipe with a batch as the model is called with, inside of torch.autocast where that is used, and after "
            "activation checkpointing was switched on"
        )


def logged(recipe: Recipe) -> dict[str, float]:
    """What a host is to log of this step."""
    return {f"{PREFIX}{name}": value for name, value in recipe.scalars().items()}
