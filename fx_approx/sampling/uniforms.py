"""Counter-based random numbers: a hash of (seed, step, site, element) in plain int64 tensor operations.

There is no generator object and no hidden state, so the numbers are the same in eager and compiled
runs, on CPU and GPU, on every rank, and when a checkpointed block is computed a second time.
All arithmetic is on 32-bit words held in int64 tensors: torch has no unsigned 32-bit multiply on
every device, and Inductor 2.13 crashes on a large 64-bit constant times an ``arange``.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["derive_key", "lane_uniforms", "mix", "site_lanes", "site_uniforms", "uniforms"]

# What holds for tensors holds for Python integers, which are far quicker where there is one number only.
_Integer = TypeVar("_Integer", Tensor, int)

_WORD = 0xFFFFFFFF

# Where the two 32-bit lanes of a key start: fractional bits of the golden ratio and of pi. They only have
# to differ (two lanes with one start would be equal) and not be 0 (0 is a fixed point of ``mix``).
_LANE_LOW = 0x9E3779B9
_LANE_HIGH = 0x243F6A88


def _multiply(x: _Integer, factor: int) -> _Integer:
    """Return ``x * factor`` modulo 2**32, for ``x`` in [0, 2**32).

    The factor is taken between -2**31 and 2**31, which is the same modulo 2**32, so that no product reaches 2**63.
    """
    return (x * (factor - (factor >> 31 << 32))) & _WORD


def mix(x: _Integer) -> _Integer:
    """Hash the low 32 bits of every element: a bijection of [0, 2**32).

    Args:
        x: int64, any shape, or a Python integer. Bits above the low 32 are ignored.

    Returns:
        int64 of the same shape, values in [0, 2**32). 0 maps to 0.

    Source: the ``lowbias32`` finaliser of C. Wellons, "Prospecting for Hash Functions", 2018
    (bias 0.17, below murmur3's ``fmix32``).
    """
    x = x & _WORD
    x = _multiply(x ^ (x >> 16), 0x7FEB352D)
    x = _multiply(x ^ (x >> 15), 0x846CA68B)
    return x ^ (x >> 16)


def _absorb(lane: _Integer, number: _Integer) -> _Integer:
    """Hash both 32-bit words of ``number`` into a lane."""
    return mix(mix(lane ^ (number & _WORD)) ^ ((number >> 32) & _WORD))


def derive_key(seed: _Integer, step: _Integer) -> _Integer:
    """Combine a seed and a step number into the key of one step's random numbers.

    Args:
        seed: int64 scalar tensor (any shape works, element by element) or Python integer, any value.
        step: int64, any value, of the shape and on the device of ``seed``; a Python integer if that is one.

    Returns:
        int64 of the same shape, or a Python integer, in [0, 2**63). It depends on every bit of both arguments; two
        lanes are hashed separately, so a collision needs about 2**31.5 different (seed, step) pairs.
    """
    low, high = (_absorb(_absorb(seed * 0 + start, seed), step) for start in (_LANE_LOW, _LANE_HIGH))
    return ((high >> 1) << 32) | low


def uniforms(key: Tensor, site: int, groups: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the uniforms of one site in one step, a pure function of the arguments.

    Args:
        key: int64 scalar tensor from ``derive_key``; the result lies on its device.
        site: number of the place that draws. Different sites get independent numbers.
        groups: rows wanted.
        count: uniforms wanted per row.
        dtype: float32 or float64; both give the same values.

    Returns:
        ``[groups, count]`` in the open interval (0, 1): odd multiples of 2**-24. With 23 bits and a
        half the value is exact in float32, so rounding can never produce 0 or 1.

    Raises:
        ValueError: ``dtype`` cannot hold the values exactly.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: uniforms are exact in torch.float32 or torch.float64 only, got {dtype}")
    element = torch.arange(groups * count, dtype=torch.int64, device=key.device)
    sites = torch.full_like(key, site).unsqueeze(0)
    return site_uniforms(key, sites, None, element).view(groups, count).to(dtype)


def site_uniforms(key: Tensor, sites: Tensor, places: Tensor | None, elements: Tensor) -> Tensor:
    """Return the uniforms of many sites at once: what ``uniforms`` gives each of them.

    Args:
        key: int64 scalar tensor from ``derive_key``.
        sites: int64 ``[s]``, numbers of the sites.
        places: int64 ``[n]``, the place in ``sites`` of the site of each uniform; None if there is one site.
        elements: int64 ``[n]``, its position within the site.

    Returns:
        float32 ``[n]`` in (0, 1), see ``uniforms``.
    """
    low, high = site_lanes(key, sites)
    if places is not None:
        low, high = low[places], high[places]
    return lane_uniforms(low, high, elements)


def site_lanes(key: _Integer, sites: _Integer) -> tuple[_Integer, _Integer]:
    """Hash sites into the two lanes of a key; int64 tensors ``key []``, ``sites [s]``, or both Python integers."""
    low, high = key & _WORD, (key >> 32) & _WORD
    for word in (sites & _WORD, (sites >> 32) & _WORD):
        # Each lane also takes a constant of its own: with equal lanes the site could cancel out below.
        low, high = mix(low ^ word ^ _LANE_LOW), mix(high ^ word ^ _LANE_HIGH)
    return low, high


def lane_uniforms(low: Tensor | int, high: Tensor | int, elements: Tensor) -> Tensor:
    """The uniforms, float32 ``[n]``, of ``elements [n]`` in the lanes that :func:`site_lanes` gave."""
    # Two rounds: after the first alone, two keys close to each other would give shifted copies of one stream.
    hashed = mix(mix(elements + low) ^ high)
    return ((hashed >> 9).to(torch.float32) + 0.5) * 2.0**-23
