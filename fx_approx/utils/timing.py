"""Times small pieces of work on a device until the clock is sure of them."""

from __future__ import annotations

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

_BLOCK = 2e-3  # seconds: shorter calls are repeated within a measurement
_FEW, _MANY = 5, 25
_SPREAD = 0.05


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        seconds: Median.
        spread: Half the distance of the quartiles, as a share of the median.
    """

    seconds: float
    spread: float


def time_calls(calls: Sequence[Callable[[], Any]], device: torch.device) -> list[Timing]:
    """Times ``calls`` in turn, so that all have the same neighbours.

    It begins with five rounds and goes on, to 25 at most, until the spread of each is below 5 per cent.
    """
    counts = []
    for call in calls:
        call()
        once = min(seconds(call, device) for _ in range(2))
        counts.append(max(1, min(1000, int(_BLOCK / max(once, 1e-7)))))
    taken = in_turn(calls, device, _FEW, counts=counts)
    while True:
        found = [_timing(own) for own in taken]
        if len(taken[0]) >= _MANY or all(one.spread < _SPREAD for one in found):
            return found
        for own, (more,) in zip(taken, in_turn(calls, device, 1, counts=counts), strict=True):
            own.append(more)


def _timing(values: Sequence[float]) -> Timing:
    low, middle, high = statistics.quantiles(values, n=4)
    return Timing(middle, (high - low) / (2 * middle))


def in_turn(
    calls: Sequence[Callable[[], Any]],
    device: torch.device,
    rounds: int,
    *,
    warmup: int = 0,
    counts: Sequence[int] | None = None,
    before: int = 0,
    back_and_forth: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Times ``calls`` in turn, round by round, so that all have the same neighbours.

    Args:
        calls: What is timed.
        device: What they run on.
        rounds: How many count.
        warmup: Rounds before these.
        counts: How often each call is repeated within a measurement, which is then the mean; once by default.
        before: Calls in each turn before the measurement. They bring back what the others have driven out of caches.
        back_and_forth: Every second round goes backwards.
        clock: Reads the seconds.

    Returns:
        For each of ``calls`` its seconds, one for each round.
    """
    counts = [1] * len(calls) if counts is None else counts
    taken: list[list[float]] = [[] for _ in calls]
    turns = list(zip(calls, counts, taken, strict=True))
    for number in range(warmup + rounds):
        for call, count, own in reversed(turns) if back_and_forth and number % 2 else turns:
            for _ in range(before):
                call()
            spent = seconds(call, device, count, clock)
            if number >= warmup:
                own.append(spent)
    return taken


def seconds(
    call: Callable[[], Any], device: torch.device, count: int = 1, clock: Callable[[], float] = time.perf_counter
) -> float:
    """How long ``call`` takes, on ``device`` to its end; the mean of ``count`` calls in a row."""
    synchronise(device)
    start = clock()
    for _ in range(count):
        call()
    synchronise(device)
    return (clock() - start) / count


def synchronise(device: torch.device) -> None:
    """Waits for what ``device`` was told to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def device_key(device: torch.device) -> dict[str, Any]:
    """What times on a device depend on, beside the work: the hardware and how torch uses it."""
    key = {"device": device.type, "torch": torch.__version__}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return {**key, "name": name, "tf32": torch.backends.cuda.matmul.allow_tf32, "cuda": torch.version.cuda}
    return {**key, "name": _processor(), "threads": torch.get_num_threads()}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor()} ({platform.machine()})"
