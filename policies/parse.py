"""Policies as text, for the command line."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from fx_approx.core.plan import Policy
from fx_approx.core.policy_names import split_policy
from fx_approx.policies.auto import Auto
from fx_approx.policies.budget import FlopBudget, MemoryBudget, TimeBudget
from fx_approx.policies.hidden_units import HiddenUnits
from fx_approx.policies.paper import Paper
from fx_approx.policies.per_gradient import GradientSampling
from fx_approx.policies.tokens import Tokens
from fx_approx.policies.uniform import Exact, Uniform


def _hidden_units(ratio: float | None = None) -> HiddenUnits:
    return HiddenUnits() if ratio is None else HiddenUnits(Uniform(ratio, min_k=16, round_to=8))


_MAKE: Mapping[str, Callable[..., Policy]] = {
    "exact": Exact,
    "paper": Paper,
    "backward": GradientSampling.backward,
    "weight-gradient": GradientSampling.weight_gradient,
    "straight-through": GradientSampling.straight,
    "auto": functools.partial(Auto, check=False),
    "hidden-units": _hidden_units,
    "tokens": Tokens,
    "flops": FlopBudget,
    "memory": MemoryBudget,
    "time": TimeBudget,
}


def parse_policy(text: str) -> Policy:
    """A policy by its name, with its numbers behind colons; ``<sampler>[:ratio[:scores[:scope]]]`` for every layer.

    ``paper``, ``auto``, ``hidden-units``, ``tokens`` and the modes of :class:`fx_approx.policies.GradientSampling`
    (``backward``, ``weight-gradient``, ``straight-through``) take a ratio; ``flops``, ``memory`` and ``time`` need a
    budget. ``auto`` decides as its cost model predicts, without timing.
    :data:`fx_approx.core.policy_names.POLICIES` says what each does.

    Examples: ``topk:0.5``, ``systematic:0.25:weight``, ``topk:0.5:weight:group``, ``paper:0.3``, ``flops:0.5``.

    Raises:
        ValueError: Names the text and what would be right.
    """
    name, number, fields = split_policy(text)
    given = () if number is None else (number,)
    if name in _MAKE:
        return _MAKE[name](*given)
    options: dict[str, Any] = dict(fields)
    return Uniform(0.5 if number is None else number, name, **options)
