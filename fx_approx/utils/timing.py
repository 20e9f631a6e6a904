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
    taken: list[list[float]] = [[] for _ in calls]
    while True:
        for call, count, own in zip(calls, counts, taken, strict=True):
            own.append(seconds(call, device, count))
        if len(taken[0]) >= _FEW:
            found = [_timing(own) for own in taken]
            if len(taken[0]) >= _MANY or all(one.spread < _SPREAD for one in found):
                return found


def _timing(values: Sequence[float]) -> Timing:
    low, middle, high = statistics.quantiles(values, n=4)
    return Timing(middle, (high - low) / (2 * middle))


def seconds(call: Callable[[], Any], device: torch.device, count: int = 1) -> float:
    """How long ``call`` takes, on ``device`` to its end; the mean of ``count`` calls in a row."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return (time.perf_counter() - start) / count


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
