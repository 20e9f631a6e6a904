"""Policies as text, for the command line."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from fx_approx.core.plan import Policy
from fx_approx.policies.auto import Auto
from fx_approx.policies.budget import FlopBudget, MemoryBudget, TimeBudget
from fx_approx.policies.paper import Paper
from fx_approx.policies.per_gradient import GradientSampling
from fx_approx.policies.uniform import Exact, Uniform
from fx_approx.sampling.base import SAMPLERS

_WITH_RATIO: Mapping[str, Callable[..., Policy]] = {
    "paper": Paper,
    "backward": GradientSampling.backward,
    "weight-gradient": GradientSampling.weight_gradient,
    "straight-through": GradientSampling.straight,
    "auto": functools.partial(Auto, check=False),
}
_BUDGETS: Mapping[str, Callable[[float], Policy]] = {"flops": FlopBudget, "memory": MemoryBudget, "time": TimeBudget}


def parse_policy(text: str) -> Policy:
    """``exact``, ``paper[:ratio]``, or ``<sampler>[:ratio[:scores[:scope]]]`` for the same on every layer.

    ``backward[:ratio]``, ``weight-gradient[:ratio]`` and ``straight-through[:ratio]`` are the modes of
    :class:`fx_approx.policies.GradientSampling` with their default samplers. ``auto[:ratio]`` is
    :class:`fx_approx.policies.Auto` as its cost model predicts it, without timing; ``flops:budget``, ``memory:budget``
    and ``time:budget`` are the budgets.

    Examples: ``topk:0.5``, ``systematic:0.25:weight``, ``topk:0.5:weight:group``, ``paper:0.3``, ``flops:0.5``.

    Raises:
        ValueError: Names the text and what would be right.
    """
    name, *rest = text.split(":")
    modes, samplers, budgets = ", ".join(_WITH_RATIO), ", ".join(sorted(SAMPLERS)), ", ".join(_BUDGETS)
    known = f"exact, {modes} with [:ratio], {budgets} with :budget, or one of {samplers} with [:ratio[:scores[:scope]]]"
    most = 0 if name == "exact" else 1 if name in (*_WITH_RATIO, *_BUDGETS) else 3
    if name not in ("exact", *_WITH_RATIO, *_BUDGETS, *SAMPLERS) or len(rest) > most or (name in _BUDGETS and not rest):
        raise ValueError(f"policy: expected {known}, got {text!r}")
    try:
        ratio = float(rest[0]) if rest else None
    except ValueError:
        raise ValueError(f"policy: expected a number for the ratio in {text!r}, got {rest[0]!r}") from None
    if name == "exact":
        return Exact()
    if name in _BUDGETS and ratio is not None:
        return _BUDGETS[name](ratio)
    if name in _WITH_RATIO:
        return _WITH_RATIO[name]() if ratio is None else _WITH_RATIO[name](ratio)
    options: dict[str, Any] = dict(zip(("scores", "scope"), rest[1:], strict=False))
    return Uniform(0.5 if ratio is None else ratio, name, **options)
