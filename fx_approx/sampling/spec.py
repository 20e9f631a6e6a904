"""SamplerConfig: how one product is to be sampled, as a validated, frozen record."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fx_approx.sampling.base import get_sampler
from fx_approx.sampling.scores import get_score

__all__ = ["SamplerConfig"]


def _require_name(field: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{field}: expected a name (str), got {value!r}")


def _require_count(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{field}: expected an integer >= 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{field}: expected an integer >= 1, got {value!r}")


def _require_real(field: str, value: object, right: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{field}: expected {right}, got {value!r}")
    return float(value)


@dataclass(frozen=True)
class SamplerConfig:
    """How many pairs to draw, with which sampler, from which scores.

    Attributes:
        name: the sampler, a key of ``SAMPLERS``.
        ratio: the share of the K pairs to keep, in (0, 1]; 1 means exact.
        min_k: never keep fewer pairs than this (or K, if that is less).
        scores: what the sampler draws from, a key of ``SCORES``.
        round_to: round the count to a multiple of this, for the device's matrix units.
        epsilon: share of uniform probability mixed in, in [0, 1); None means the sampler's own default.
        positions: sample the weight gradient of a convolution over all output positions of all examples, one by
            one, rather than over whole examples. Says nothing of other products.
        per_batch: let each product of a batched one (bmm) choose its own pairs, rather than all the same. Says
            nothing of products without a batch.

    Raises:
        TypeError, ValueError: naming the field, the value and what would be right.
    """

    name: str = "topk"
    ratio: float = 0.5
    min_k: int = 1
    scores: str = "online"
    round_to: int = 1
    epsilon: float | None = None
    positions: bool = False
    per_batch: bool = False

    def __post_init__(self) -> None:
        _require_name("name", self.name)
        sampler = get_sampler(self.name)
        _require_name("scores", self.scores)
        get_score(self.scores)
        # `not` around the range, so that NaN fails too.
        if not 0 < _require_real("ratio", self.ratio, "a number in (0, 1]") <= 1:
            raise ValueError(f"ratio: expected a number in (0, 1], got {self.ratio!r}")
        _require_count("min_k", self.min_k)
        _require_count("round_to", self.round_to)
        for field in ("positions", "per_batch"):
            if not isinstance(getattr(self, field), bool):
                raise TypeError(f"{field}: expected True or False, got {getattr(self, field)!r}")
        if self.epsilon is not None:
            if not 0 <= _require_real("epsilon", self.epsilon, "a number in [0, 1) or None") < 1:
                raise ValueError(f"epsilon: expected a number in [0, 1) or None, got {self.epsilon!r}")
            if self.epsilon > 0 and not sampler.random:
                raise ValueError(
                    f"epsilon: {self.name} draws nothing at random, expected 0 or None, got {self.epsilon!r}"
                )

    @property
    def effective_epsilon(self) -> float:
        """The share of uniform probability that is used: ``epsilon``, or the sampler's default."""
        return get_sampler(self.name).default_epsilon if self.epsilon is None else self.epsilon

    def count(self, pairs: int) -> int:
        """Return k for K = ``pairs``: min(K, max(min_k, align(floor(ratio K + 1/2)))).

        ``align`` takes the nearest multiple of ``round_to``, the upper one half way, but at least one.
        A ratio of 1 gives K whatever the round_to.

        Raises:
            ValueError: ``pairs`` is negative.
        """
        if pairs < 0:
            raise ValueError(f"pairs: expected a number of column-row pairs >= 0, got {pairs}")
        return self._counted(pairs, self.min_k, self.round_to)

    def _counted(self, pairs: int, min_k: int, round_to: int) -> int:
        if self.ratio == 1:
            return pairs
        # Halves round up also where floating point falls just short: 0.29 * 50 is 14.499999999999998.
        rounded = math.floor(self.ratio * pairs + 0.5 + 1e-9)
        multiple = max(1, (2 * rounded + round_to) // (2 * round_to))
        return min(pairs, max(min_k, multiple * round_to))

    def count_units(self, units: int, block: int, groups: int, reader_groups: int) -> int:
        """Units to keep of each group's ``units``, where this counts single pairs of a reader.

        Args:
            units: To choose from, in one group.
            block: Pairs of the reader that make up one unit.
            groups: Groups that the selection is drawn in.
            reader_groups: Groups of the reader, of each of which this counts.
        """
        together = block * max(1, groups // reader_groups)
        round_to = self.round_to // math.gcd(self.round_to, together)
        return self._counted(units, max(1, -(-self.min_k // together)), round_to)

    @property
    def ahead(self) -> bool:
        """Whether the selection of an output can be made before its input exists."""
        return get_score(self.scores).ahead and not self.per_batch

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dictionary, ready for JSON."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplerConfig:
        """Build a spec from ``to_dict``'s output; absent fields take their defaults.

        Raises:
            ValueError: a key is not a field; the message names it.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise ValueError(f"unknown field(s) {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**values)

    def replace(self, **changes: Any) -> SamplerConfig:
        """Return a copy with the given fields changed, checked like a new one."""
        return self.from_dict({**self.to_dict(), **changes})
