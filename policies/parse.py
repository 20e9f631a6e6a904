"""Policies as text, for the command line."""

from __future__ import annotations

from fx_approx.plan import Policy
from fx_approx.policies.fixed import Exact, Uniform
from fx_approx.policies.paper import Paper
from fx_approx.sampling import SAMPLERS


def parse_policy(text: str) -> Policy:
    """``exact``, ``paper[:ratio]``, or ``<sampler>[:ratio[:scores]]`` for the same on every layer.

    Examples: ``topk:0.5``, ``systematic:0.25:weight``, ``paper:0.3``.

    Raises:
        ValueError: Names the text and what would be right.
    """
    name, *rest = text.split(":")
    known = f"exact, paper[:ratio], or one of {', '.join(sorted(SAMPLERS))} with [:ratio[:scores]]"
    if name not in ("exact", "paper", *SAMPLERS) or len(rest) > {"exact": 0, "paper": 1}.get(name, 2):
        raise ValueError(f"policy: expected {known}, got {text!r}")
    try:
        ratio = float(rest[0]) if rest else 0.5
    except ValueError:
        raise ValueError(f"policy: expected a number for the ratio in {text!r}, got {rest[0]!r}") from None
    if name == "exact":
        return Exact()
    if name == "paper":
        return Paper(ratio)
    return Uniform(name, ratio, scores=rest[1] if len(rest) > 1 else "online")
