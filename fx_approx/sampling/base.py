"""The sampler contract: scores in, a Selection out; a sampler knows nothing of matrices.

A sampler is a pure function of its scores and uniforms. Randomness comes in as numbers, so the same
inputs give the same Selection in eager and compiled runs, and a test can enumerate every outcome.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = ["SAMPLERS", "Sampler", "Selection", "get_sampler", "register_sampler", "select"]


class Selection(NamedTuple):
    """Which column-row pairs to multiply, and by what to scale each.

    Attributes:
        indices: int64 ``[G, k]``, G groups (1 unless a grouped convolution). Every row is ascending and
            without repeats, so that gradients can be written back without atomic additions.
        scale: ``[G, k]`` in the dtype of the scores, or None for unscaled. A padded entry, present only
            to keep the shape, has scale 0.
    """

    indices: Tensor
    scale: Tensor | None


class Sampler(ABC):
    """Draws k of K column-row pairs from their scores.

    Attributes:
        name: the key in ``SAMPLERS``.
        unbiased: whether the expectation of the sampled product is the exact product.
        fixed_size: whether the number of entries is known before the draw, without ``fixed_shape``.
        random: whether the draw reads uniforms; only then can probabilities be mixed with ``epsilon``.
        default_epsilon: the share of uniform probability mixed in unless the user says otherwise.
    """

    name: ClassVar[str]
    unbiased: ClassVar[bool]
    fixed_size: ClassVar[bool]
    random: ClassVar[bool]
    default_epsilon: ClassVar[float]

    @abstractmethod
    def uniforms(self, pairs: int, k: int) -> int:
        """Return how many uniforms per group a draw of ``k`` out of ``pairs`` reads."""

    @abstractmethod
    def _draw(self, scores: Tensor, k: int, uniforms: Tensor, epsilon: float, fixed_shape: bool) -> Selection:
        """Draw with checked arguments and 1 <= k < K."""

    def draw(
        self, scores: Tensor, k: int, uniforms: Tensor | None, *, epsilon: float, fixed_shape: bool = False
    ) -> Selection:
        """Draw a Selection. Deterministic given the arguments.

        Args:
            scores: ``[G, K]`` floating point, non-negative. NaN and Inf are legal: such a pair is always
                selected (as long as there are at most k of them), so sampling never hides it.
            k: target number of pairs per group. ``k >= K`` returns all pairs, unscaled: exact.
            uniforms: ``[G, self.uniforms(K, k)]`` in (0, 1), float32 or float64; not read, and may be
                None, if the sampler is not random or ``k >= K``.
            epsilon: share of uniform probability mixed in, in [0, 1); 0 for a sampler that is not random.
            fixed_shape: the shape of the result must depend on the shapes of the arguments only.

        Returns:
            Selection with ``indices`` and ``scale`` ``[G, k]``; a sampler with ``fixed_size`` False has
            another number of columns, see its docstring. No gradient flows to the scores.

        Raises:
            ValueError: an argument outside the ranges above.
        """
        if scores.dim() != 2 or scores.shape[1] == 0 or not scores.is_floating_point():
            raise ValueError(
                f"scores: floating point [groups, pairs] with at least one pair expected, "
                f"got {scores.dtype} of shape {tuple(scores.shape)}"
            )
        if k < 1:
            raise ValueError(f"k: at least 1 pair must be drawn, got {k}")
        if not 0 <= epsilon < 1:
            raise ValueError(f"epsilon: expected a number in [0, 1), got {epsilon}")
        if epsilon > 0 and not self.random:
            raise ValueError(f"epsilon: {self.name} draws nothing at random, must be 0, got {epsilon}")
        groups, pairs = scores.shape
        if k >= pairs:
            everything = torch.arange(pairs, device=scores.device).expand(groups, pairs)
            return Selection(everything.contiguous(), None)
        if not self.random:
            uniforms = scores.new_empty(groups, 0)
        wanted = (groups, self.uniforms(pairs, k))
        if uniforms is None or tuple(uniforms.shape) != wanted:
            got = None if uniforms is None else tuple(uniforms.shape)
            raise ValueError(f"uniforms: {self.name} needs shape {wanted}, got {got}")
        return self._draw(scores.detach(), k, uniforms, epsilon, fixed_shape)


_REGISTRY: dict[str, Sampler] = {}

#: The known samplers by name.
SAMPLERS: Mapping[str, Sampler] = MappingProxyType(_REGISTRY)

SamplerType = TypeVar("SamplerType", bound=type[Sampler])


def register_sampler(cls: SamplerType) -> SamplerType:
    """Add a sampler class, usable as a decorator, to ``SAMPLERS`` under its ``name``.

    Raises:
        ValueError: the name is taken.
    """
    if cls.name in _REGISTRY:
        raise ValueError(f"a sampler named {cls.name!r} exists already: {type(_REGISTRY[cls.name]).__name__}")
    _REGISTRY[cls.name] = cls()
    return cls


def get_sampler(name: str) -> Sampler:
    """Return the sampler called ``name``.

    Raises:
        ValueError: no such sampler; the message lists the known ones.
    """
    try:
        return _REGISTRY[name]
    except (KeyError, TypeError):
        raise ValueError(f"unknown sampler {name!r}; known: {', '.join(sorted(_REGISTRY))}") from None


def select(weights: Tensor, count: int, dtype: torch.dtype) -> Selection:
    """Turn per-pair weights into a Selection of exactly ``count`` entries per row.

    Rows with fewer chosen pairs are filled with their lowest pairs that are not chosen, at scale 0; of
    rows with more, the lowest ``count`` are kept.

    Args:
        weights: ``[G, K]``, the scale of every chosen pair, 0 for a pair that is not chosen.
        count: entries per row, 1 <= count <= K.
        dtype: dtype of the scale.

    Returns:
        Selection of shape ``[G, count]``.
    """
    chosen = weights > 0
    missing = count - chosen.sum(-1, keepdim=True)
    kept = chosen | (torch.cumsum(~chosen, -1) <= missing)
    # The i-th kept pair is where the running number of kept pairs first reaches i. This gives ascending
    # indices with neither a sort nor `nonzero`, whose shape would depend on the data.
    running = torch.cumsum(kept, -1)
    wanted = torch.arange(1, count + 1, device=weights.device).expand(weights.shape[0], count)
    indices = torch.searchsorted(running, wanted.contiguous())
    return Selection(indices, weights.gather(-1, indices).to(dtype))
