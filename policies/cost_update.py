"""The time of an optimiser's step, from two steps that are timed: a time for each tensor, and one for each byte."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import nn

from fx_approx.core.step_cost import MakeOptimizer, Update, at_rest
from fx_approx.utils.timing import time_calls

_FEW, _TENSORS = 16, 32  # numbers in each of so many tensors: what is left of the step is the calls
_LARGEST = 2**24  # numbers: 64 MB in single precision, which is beyond caches


def update_seconds(update: Update | None) -> float:
    """Seconds of the optimiser's step; 0 without one.

    One large parameter tells what a byte takes, and many small ones what a tensor takes. The large one has as many
    bytes as all of the step together, to a factor of 2, since what fits into caches is updated faster. Each is timed
    once for an optimiser, device and dtype. Caches that the rest of the step leaves cold are not modelled.
    """
    if update is None:
        return 0.0
    itemsize = getattr(torch, update.dtype.removeprefix("torch.")).itemsize
    numbers = min(_LARGEST, 2 ** round(math.log2(max(_FEW, update.bytes // itemsize))))
    each, byte = _constants(update.optimizer, update.dtype, update.device, numbers)
    return update.tensors * each + update.bytes * byte


@functools.cache
def _constants(make: MakeOptimizer, dtype: str, device: str, numbers: int) -> tuple[float, float]:
    """Seconds for each tensor, and for each byte of ``numbers`` numbers."""
    place, kind = torch.device(device), getattr(torch, dtype.removeprefix("torch."))
    steps = [_step(make, [count] * tensors, kind, place) for count, tensors in ((_FEW, _TENSORS), (numbers, 1))]
    few, large = (one.seconds for one in time_calls(steps, place))
    each = few / _TENSORS
    return each, max(0.0, large - each) / (numbers * kind.itemsize)


def _step(make: MakeOptimizer, sizes: list[int], dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """A step over parameters of ``sizes``, two-dimensional ones, since some optimisers take no others."""
    parameters = [nn.Parameter(torch.randn(count // 4, 4, dtype=dtype, device=device)) for count in sizes]
    for one in parameters:
        one.grad = torch.randn_like(one)
    return at_rest(make, parameters).step
