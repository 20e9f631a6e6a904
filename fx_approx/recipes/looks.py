"""What kind of model a recipe has before it, and by which frontend it can be sampled."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from fx_approx.capture.size_guards import SizeGuard
from fx_approx.compiler.transform import analysed
from fx_approx.core.layer_types import layer_type
from fx_approx.core.plan import Plan
from fx_approx.core.token_axis import TokenStack
from fx_approx.runtime.batchnorm import enough_exact_batches, tracked

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclasses.dataclass(frozen=True)
class Look:
    """What a recipe decides by.

    Attributes:
        traced: ``torch.fx`` sees all of the forward, as it is called here; else a backend of ``torch.compile`` has to.
        kind: ``convolutions``, ``transformer`` or ``other``.
        stacks: Its blocks of which some may compute a part of the tokens, where it is traced.
        notes: Why there are no more.
        statistics: Exact batches that its running statistics need at the end; 0 if it has none, None if none suffice.
    """

    traced: bool
    kind: str
    stacks: tuple[TokenStack, ...]
    notes: tuple[str, ...]
    statistics: int | None


def look(model: nn.Module, batch: Any) -> Look:
    """Looks at a model without changing it.

    Raises:
        CaptureError: ``model`` is compiled, wrapped, transformed or the like.
        ValueError: ``batch`` does not fit.
    """
    made = analysed(model, batch)
    traced = not made.captured.opaque and not _hindered(model, made.captured.guard)
    found = [layer for layer in tracked(model) if layer.training or not model.training]
    statistics = enough_exact_batches(found) if found else 0
    stacks, notes = (made.token_stacks(Plan((), {})), made.token_streams()[1]) if traced else ((), ())
    return Look(traced, _kind(model, bool(stacks)), stacks, notes, statistics)


def _hindered(model: nn.Module, guard: SizeGuard | None) -> bool:
    """Whether autocast is active here, and keeps a graph from serving: the Python around it asks for data types."""
    if guard is None or guard.dtypes is None:
        return False
    return any(torch.is_autocast_enabled(device.type) for device in {one.device for one in model.parameters()})


def _kind(model: nn.Module, has_tokens: bool) -> str:
    layers = list(model.modules())
    convolutions = sum(layer_type(layer) in _CONVOLUTIONS for layer in layers)
    linears = sum(layer_type(layer) is nn.Linear for layer in layers)
    if has_tokens or (any("attention" in type(layer).__name__.lower() for layer in layers) and linears > convolutions):
        return "transformer"
    return "convolutions" if convolutions else "other"
