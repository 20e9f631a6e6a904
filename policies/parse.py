"""Policies as text, for the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fx_approx.plan import Policy
from fx_approx.policies.fixed import Exact, Uniform
from fx_approx.policies.paper import Paper
from fx_approx.policies.roles import Roles
from fx_approx.sampling import SAMPLERS

_WITH_RATIO: Mapping[str, Callable[..., Policy]] = {
    "paper": Paper,
    "backward": Roles.backward,
    "weight-gradient": Roles.weight_gradient,
    "straight-through": Roles.straight,
}


def parse_policy(text: str) -> Policy:
    """``exact``, ``paper[:ratio]``, or ``<sampler>[:ratio[:scores[:share]]]`` for the same on every layer.

    ``backward[:ratio]``, ``weight-gradient[:ratio]`` and ``straight-through[:ratio]`` are the modes of
    :class:`fx_approx.policies.Roles` with their default samplers.

    Examples: ``topk:0.5``, ``systematic:0.25:weight``, ``topk:0.5:weight:group``, ``paper:0.3``, ``backward:0.5``.

    Raises:
        ValueError: Names the text and what would be right.
    """
    name, *rest = text.split(":")
    modes, samplers = ", ".join(_WITH_RATIO), ", ".join(sorted(SAMPLERS))
    known = f"exact, {modes} with [:ratio], or one of {samplers} with [:ratio[:scores[:share]]]"
    most = 0 if name == "exact" else 1 if name in _WITH_RATIO else 3
    if name not in ("exact", *_WITH_RATIO, *SAMPLERS) or len(rest) > most:
        raise ValueError(f"policy: expected {known}, got {text!r}")
    try:
        ratio = float(rest[0]) if rest else None
    except ValueError:
        raise ValueError(f"policy: expected a number for the ratio in {text!r}, got {rest[0]!r}") from None
    if name == "exact":
        return Exact()
    if name in _WITH_RATIO:
        return _WITH_RATIO[name]() if ratio is None else _WITH_RATIO[name](ratio)
    options: dict[str, Any] = dict(zip(("scores", "share"), rest[1:], strict=False))
    return Uniform(name, 0.5 if ratio is None else ratio, **options)
