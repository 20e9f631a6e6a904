"""A model on paper of a data-parallel training step: when each bucket is ready, and how long the network takes for it.

An all-reduce of B bytes over n workers takes, on links of β bytes a second where a message takes α seconds,

    ring               2 (n - 1) α + 2 (n - 1) / n · B / β
    halving-doubling   2 ⌈log2 n⌉ α + 2 (n - 1) / n · B / β

(Patarasuk and Yuan 2009; Thakur, Rabenseifner and Gropp 2005). Buckets are reduced one after the other, each when its
gradients are computed and packed and the one before is through; the backward pass goes on meanwhile. Packing is done by
who computes, so it delays the buckets after it; what is left after the last bucket (unpacking) is added at the end.
Small all-reduces, of running norms, follow the last bucket, one by one. Not modelled: stragglers, congestion, the
optimiser, compute that communication slows down.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

ALGORITHMS = ("ring", "halving-doubling")


@dataclasses.dataclass(frozen=True)
class Link:
    """``alpha`` seconds for a message, ``beta`` bytes a second."""

    alpha: float
    beta: float

    def __post_init__(self) -> None:
        """Refuses what no link has."""
        if self.alpha < 0 or not self.beta > 0:
            raise ValueError(f"alpha, beta: expected alpha >= 0 and beta > 0, not {self.alpha}, {self.beta}")


@dataclasses.dataclass(frozen=True)
class Bucket:
    """When its gradients are there, seconds after the step began; bytes that are sent; all-reduces that send them."""

    ready: float
    nbytes: float
    calls: int = 1


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of a variant beside the network: seconds to pack all buckets and to unpack the last, and small all-reduces."""

    pack: float = 0.0
    unpack: float = 0.0
    small: int = 0


def factor(workers: int) -> float:
    """Bytes that each worker sends in an all-reduce, for each byte of the buffer."""
    return 2 * (workers - 1) / workers


def messages(workers: int, algorithm: str) -> int:
    """One after the other, in an all-reduce."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: expected one of {', '.join(ALGORITHMS)}, not {algorithm!r}")
    if workers < 1:
        raise ValueError(f"workers: expected 1 or more, not {workers}")
    return 2 * (workers - 1) if algorithm == "ring" else 2 * math.ceil(math.log2(workers))


def all_reduce_seconds(nbytes: float, workers: int, link: Link, algorithm: str) -> float:
    """Of one all-reduce."""
    return messages(workers, algorithm) * link.alpha + factor(workers) * nbytes / link.beta


def step_seconds(
    compute: float, buckets: Sequence[Bucket], workers: int, link: Link, algorithm: str, costs: Costs | None = None
) -> float:
    """Of a step whose forward and backward pass take ``compute`` seconds by themselves."""
    costs = Costs() if costs is None else costs
    whole = sum(one.nbytes for one in buckets)
    packed = network = 0.0
    for one in buckets:
        packed += costs.pack * one.nbytes / whole if whole else 0.0
        start = max(one.ready + packed, network)
        network = start + all_reduce_seconds(one.nbytes, workers, link, algorithm)
        network += (one.calls - 1) * messages(workers, algorithm) * link.alpha
    network += costs.small * messages(workers, algorithm) * link.alpha
    return max(compute + costs.pack, network) + costs.unpack


def ready_times(sizes: Sequence[float], layers: Sequence[tuple[float, float]], forward: float) -> list[float]:
    """When the gradients of buckets of ``sizes`` bytes are there, seconds after the step began.

    ``layers`` are (bytes, seconds of the backward pass) in backward order, and fill the buckets in this order;
    ``forward`` is when the backward pass begins.
    """
    times, place, produced, now = [], 0, 0.0, forward
    wanted = 0.0
    for size in sizes:
        wanted += size
        while produced < wanted - 0.5 and place < len(layers):
            produced += layers[place][0]
            now += layers[place][1]
            place += 1
        times.append(now)
    return times
