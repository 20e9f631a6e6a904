"""Tells a validation of the full model while a narrow network trains: it would be one of older weights."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fx_approx.errors import NoEffectWarning


class StaleWatch:
    """Warns once where a model is called without gradients or in evaluation mode while its weights are old ones."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hook = _Told(id(model))
        self._handle: RemovableHandle | None = None

    def set(self, stale: bool) -> None:
        """Says whether the weights are old ones from now on."""
        if stale and self._handle is None:
            self._handle = self._model.register_forward_pre_hook(self._hook)
        elif not stale and self._handle is not None:
            self._handle.remove()
            self._handle = None


class _Told:
    """The hook; plain data, so that a model that has it can be copied and pickled. It means no copy."""

    def __init__(self, model: int) -> None:
        self._model = model
        self._said = False

    def __call__(self, module: nn.Module, inputs: object) -> None:
        if torch.compiler.is_compiling():  # a warning breaks the graph
            return
        if self._said or id(module) != self._model or (module.training and torch.is_grad_enabled()):
            return
        self._said = True
        warnings.warn(
            f"{type(module).__name__}: called with the weights from before this phase, in which a narrow network "
            "trains; call recipe.model, or phases.model, to validate what was trained so far",
            NoEffectWarning,
            stacklevel=4,
        )
