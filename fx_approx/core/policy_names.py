"""The names of policies as text, a line for each; knows nothing of torch, so that a command line can list them fast."""

from __future__ import annotations

from collections.abc import Mapping

SAMPLERS: Mapping[str, str] = {
    "topk": "the pairs of the largest scores",
    "systematic": "one draw, evenly spread: unbiased",
    "bernoulli": "each pair by a coin of its own: unbiased, a random number of them",
    "crs": "pairs drawn with replacement: unbiased, the paper's column-row sampling",
    "wta": "the largest pairs, and some of the others drawn: unbiased",
    "wta_unique": "the same, none of them twice",
}
"""Samplers, each with what it keeps; for every layer that can be sampled."""

POLICIES: Mapping[str, tuple[str, str]] = {
    "exact": ("", "samples nothing"),
    "paper": ("ratio", "top-k of every layer by the activations of the step, as the paper does"),
    "backward": ("ratio", "both gradients are sampled, the forward pass is exact"),
    "weight-gradient": ("ratio", "the gradient of the weight alone is sampled: less is kept for backward"),
    "straight-through": ("ratio", "the output is sampled, gradients are those of the exact layer"),
    "auto": ("ratio", "the layers and the scope that a cost model finds fastest"),
    "hidden-units": ("ratio", "layers that read hidden units; residual streams stay whole"),
    "tokens": ("ratio", "blocks of a transformer compute a share of the tokens"),
    "flops": ("budget", "at most this share of the operations"),
    "memory": ("budget", "at most this share of the memory kept for backward"),
    "time": ("budget", "at most this share of the predicted time"),
}
"""Policies by name: what number they take, and what they do."""

_FIELDS = ("ratio", "scores", "scope")


def form(name: str) -> str:
    """How one of :data:`POLICIES` is written, such as ``paper[:ratio]``."""
    number, _ = POLICIES[name]
    return name if not number else f"{name}:{number}" if number == "budget" else f"{name}[:{number}]"


def split_policy(text: str) -> tuple[str, float | None, dict[str, str]]:
    """Name, number and further fields of a policy as text.

    Raises:
        ValueError: Names the text and what would be right.
    """
    name, *rest = text.split(":")
    budgets = [one for one, (number, _) in POLICIES.items() if number == "budget"]
    ratios = [one for one, (number, _) in POLICIES.items() if number == "ratio"]
    fields = {"": 0, "ratio": 1, "budget": 1}[POLICIES[name][0]] if name in POLICIES else len(_FIELDS)
    missing = name in budgets and not rest
    if (name not in POLICIES and name not in SAMPLERS) or len(rest) > fields or missing:
        known = (
            f"exact, {', '.join(ratios)} with [:ratio], {', '.join(budgets)} with :budget, or one of "
            f"{', '.join(sorted(SAMPLERS))} with [:ratio[:scores[:scope]]]"
        )
        raise ValueError(f"policy: expected {known}, got {text!r}")
    try:
        number = float(rest[0]) if rest else None
    except ValueError:
        raise ValueError(f"policy: expected a number for the ratio in {text!r}, got {rest[0]!r}") from None
    return name, number, dict(zip(_FIELDS[1:], rest[1:], strict=False))
