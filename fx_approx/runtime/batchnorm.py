"""BatchNorm statistics: gathered while sampling, they do not fit the exact evaluation (docs/how-it-works.md)."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from fx_approx._compat import BatchNormBase
from fx_approx.capture.module_snapshot import TensorSnapshot, kept_training_flags
from fx_approx.errors import BatchNormWarning

EXACT_SHARE = 0.88
"""Share of exact values from which running statistics fit exact evaluation: 20 batches at the default momentum, 0.1."""


def tracked(model: nn.Module) -> list[BatchNormBase]:
    """The BatchNorm layers of ``model`` that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, BatchNormBase) and m.running_mean is not None]


def averages(model: nn.Module) -> bool:
    """Whether all BatchNorm layers of ``model`` that keep statistics average plainly over the batches since a reset.

    That is what ``torch.optim.swa_utils.update_bn`` makes of them while it gathers statistics.
    """
    layers = tracked(model)
    return bool(layers) and all([layer.momentum is None for layer in layers])


def batches_seen(model: nn.Module) -> int:
    """Training batches that the BatchNorm layers have seen (the most of any layer)."""
    counts = [m.num_batches_tracked for m in tracked(model)]
    return max((int(count) for count in counts if count is not None), default=0)


def enough_exact_batches(layers: Iterable[BatchNormBase]) -> int | None:
    """Exact training batches until the running statistics of ``layers`` hold :data:`EXACT_SHARE` of exact values.

    After n batches at momentum m that share is 1 - (1 - m)^n; the slowest layer decides. None where one averages
    plainly over all batches (``momentum=None``), so that no number is enough.
    """
    most = 0
    for layer in layers:
        if layer.momentum is None:
            return None
        if 0 < layer.momentum < 1:
            # Rounded, so that 20 batches at 0.1, which give 0.878, are enough.
            most = max(most, round(math.log(1 - EXACT_SHARE) / math.log(1 - layer.momentum)))
        most = max(most, layer.momentum > 0)
    return most


def warn_of_short_tail(model: nn.Module, steps: int) -> None:
    """Warns where an exact tail of so many batches leaves the statistics of ``model`` unfit for exact evaluation."""
    layers = [layer for layer in tracked(model) if layer.training or not model.training]  # frozen ones stay so
    enough = enough_exact_batches(layers)
    if enough is not None and steps >= enough:
        return
    need = (
        f"need {enough} exact batches, so with a step for each batch steps={enough} would do"
        if enough is not None
        else "average plainly over all batches (momentum=None), so no tail is long enough"
    )
    warnings.warn(
        f"ExactTail: steps={steps} is too short for the BatchNorm statistics: they {need}; otherwise call "
        "fx_approx.recalibrate_batchnorm(model, batches) before an exact evaluation.",
        BatchNormWarning,
        stacklevel=4,
    )


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replaces the running statistics by the averages over ``batches``, everything else in evaluation mode.

    Args:
        model: Any module.
        batches: Each is the model's input, or a tuple or list that begins with it, or a dict of keyword arguments.

    Returns:
        How many batches were used.

    Raises:
        ValueError: ``batches`` is empty. The statistics are then as before, as after any other error.
    """
    layers = tracked(model)
    with _restored_on_error(layers), _only_training(model, layers):
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a plain average over all batches
        count = 0
        for batch in batches:
            if isinstance(batch, dict):
                model(**batch)
            else:
                model(batch[0] if isinstance(batch, (tuple, list)) else batch)
            count += 1
        if count == 0:
            raise ValueError("batches: expected at least one batch, got none (an iterator that is used up?)")
    return count


@contextlib.contextmanager
def _restored_on_error(layers: list[BatchNormBase]) -> Iterator[None]:
    before = TensorSnapshot(buffer for layer in layers for buffer in layer.buffers(recurse=False))
    try:
        yield
    except BaseException:
        before.restore()
        raise


@contextlib.contextmanager
def _only_training(model: nn.Module, layers: list[BatchNormBase]) -> Iterator[None]:
    """Training mode for ``layers`` alone; flags and momenta come back at the end."""
    momenta = [(layer, layer.momentum) for layer in layers]
    with kept_training_flags(model.modules()):
        for module in model.modules():
            module.training = False
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer, momentum in momenta:
                layer.momentum = momentum
