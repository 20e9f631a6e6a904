"""What the BatchNorm statistics of a transformed model were gathered from, and the warning where that matters."""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import nn

from fx_approx.errors import BatchNormWarning
from fx_approx.runtime.batchnorm import averages, batches_seen, enough_exact_batches, tracked

_TAIL = ", or end training with some exact steps: fx_approx.set_sampling(model, enabled=False) for at least {} batches"


@dataclasses.dataclass
class BatchNormRecord:
    """When the statistics of a model last fitted exact evaluation, counted in batches that its layers have seen.

    Statistics gathered while sampling are those of the sampled network. They fit the exact one again after a
    recalibration, or after enough batches with sampling off.

    Attributes:
        averaged: The layers averaged plainly at the transform already, so that this is no sign of ``update_bn``.
        gathered: Statistics were gathered by exact forwards since the last change of mode.
        stale_from: :func:`fx_approx.runtime.batchnorm.batches_seen` when the statistics last fitted exact evaluation.
        exact_since: The same when sampling was switched off, None while it is on.
        warned: The warning was given.
    """

    averaged: bool = False
    gathered: bool = False
    stale_from: int = 0
    exact_since: int | None = None
    warned: bool = False

    def begin(self, model: nn.Module, samples: bool) -> None:
        """Starts with what the exact model has gathered; ``samples`` says whether some layer is sampled now."""
        self.averaged = averages(model)
        self.note_fresh(model, samples)

    def gathers(self, model: nn.Module) -> bool:
        """Whether a forward now is there to gather statistics, as ``update_bn`` of torch runs it.

        Its signs: training mode, no gradients, and plain averages where there were running ones at the transform. Grad
        mode alone says nothing: a reentrant activation checkpoint runs its forward without gradients, too.
        """
        return model.training and not torch.is_grad_enabled() and not self.averaged and averages(model)

    def note_switch(self, model: nn.Module, samples: bool) -> None:
        """Writes down when sampling of ``model`` went on or off; to be called after every such change."""
        if samples == (self.exact_since is None):
            return
        seen = batches_seen(model)
        if not samples:
            self.exact_since = seen
            return
        if not self._stale(model, seen):
            self.stale_from = seen
        self.exact_since = None

    def note_fresh(self, model: nn.Module, samples: bool) -> None:
        """Writes down that the statistics of ``model`` fit exact evaluation now."""
        self.stale_from = batches_seen(model)
        self.exact_since = None if samples else self.stale_from

    def before_mode(self, model: nn.Module, mode: bool, samples: bool) -> None:
        """To be called before ``model.train(mode)``.

        Warns:
            BatchNormWarning: The model goes into evaluation with statistics gathered while sampling; once.
        """
        if self.gathered:
            self.note_fresh(model, samples)
            self.gathered = False
        if not mode and model.training:
            self._warn_if_stale(model)

    def _stale(self, model: nn.Module, seen: int) -> bool:
        sampled_until = seen if self.exact_since is None else self.exact_since
        if sampled_until <= self.stale_from:
            return False
        enough = enough_exact_batches(tracked(model))
        return enough is None or seen - sampled_until < enough

    def _warn_if_stale(self, model: nn.Module) -> None:
        if self.warned or not tracked(model) or not self._stale(model, batches_seen(model)):
            return
        self.warned = True
        enough = enough_exact_batches(tracked(model))
        warnings.warn(
            "BatchNorm statistics were gathered while sampling and do not fit exact evaluation, which can cost many "
            "points of accuracy. Call fx_approx.recalibrate_batchnorm(model, batches) first (of an averaged model, "
            f"torch.optim.swa_utils.update_bn does the same){'' if enough is None else _TAIL.format(enough)}.",
            BatchNormWarning,
            stacklevel=5,
        )
