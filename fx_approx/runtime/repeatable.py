"""Runs of a model that can be repeated with fewer channels: dropout is off, and what else is drawn is noted."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fx_approx._compat import tree_leaves

_SHARES: dict[Any, tuple[int, str, Any]] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), (1, "p", 0.0)),
    **dict.fromkeys((F.alpha_dropout, F.feature_alpha_dropout, torch.native_dropout), (1, "p", 0.0)),
    **dict.fromkeys((torch.dropout, torch.dropout_, torch.alpha_dropout, torch.alpha_dropout_), (1, "p", 0.0)),
    **dict.fromkeys((torch.feature_dropout, torch.feature_dropout_), (1, "p", 0.0)),
    **dict.fromkeys((torch.feature_alpha_dropout, torch.feature_alpha_dropout_), (1, "p", 0.0)),
    F.scaled_dot_product_attention: (4, "dropout_p", 0.0),
    F.multi_head_attention_forward: (10, "dropout_p", 0.0),
    **dict.fromkeys((F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_), (3, "training", False)),
}
"""Function -> place and name of the argument that says how much is dropped at random, and its value for nothing."""

_DRAWS = frozenset(
    (
        *("rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "randperm", "normal", "bernoulli"),
        *("poisson", "multinomial", "binomial", "uniform_", "normal_", "bernoulli_", "exponential_", "geometric_"),
        *("cauchy_", "log_normal_", "random_", "gumbel_softmax", "fractional_max_pool2d", "fractional_max_pool3d"),
    )
)
"""Names of functions and methods that draw random numbers."""


class Randomness(TorchFunctionMode):
    """Inside, nothing is dropped at random; other random numbers are drawn, and noted.

    Attributes:
        draws: Name, shape of the result, and place of each draw.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[tuple[str, tuple[int, ...], str]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The call, without dropout."""
        given = dict(kwargs or {})
        found = _SHARES.get(func) if callable(func) and getattr(func, "__hash__", None) else None
        if found is not None:
            place, name, off = found
            if len(args) > place:
                args = (*args[:place], off, *args[place + 1 :])
            else:
                given[name] = off
        result = func(*args, **given)
        name = getattr(func, "__name__", "")
        if name in _DRAWS:
            shapes = [tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.draws.append((name, shapes[0] if shapes else (), _caller()))
        return result

    def differs_from(self, other: Randomness) -> str | None:
        """The first draw that has another shape than in ``other``, and where; None if all are alike."""
        for (name, shape, place), (other_name, other_shape, _) in zip(self.draws, other.draws, strict=False):
            if (name, shape) != (other_name, other_shape):
                return f"{name} of shape {shape} without demand, {other_name} of {other_shape} with it, at {place}"
        if len(self.draws) == len(other.draws):
            return None
        longer = max(self.draws, other.draws, key=len)
        name, shape, place = longer[min(len(self.draws), len(other.draws))]
        return f"{name} of shape {shape} in one of the two graphs only, at {place}"


def _caller() -> str:
    """File, line and text of the first caller that is no part of torch."""
    frame = sys._getframe(2)
    inside: Callable[[str], bool] = lambda module: module == "torch" or module.startswith("torch.")  # noqa: E731
    while frame.f_back is not None and inside(str(frame.f_globals.get("__name__", ""))):
        frame = frame.f_back
    file, line = frame.f_code.co_filename, frame.f_lineno
    return f"{file}:{line}: {linecache.getline(file, line).strip()}"
