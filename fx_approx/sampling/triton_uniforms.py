"""The uniforms of a step in one launch. Importing this module needs Triton.

The same numbers, bit for bit, as :mod:`fx_approx.sampling.uniforms`, which takes some hundred operations: on a GPU a
launch each, which the host needs milliseconds for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 512


@triton.jit
def _mix(x):
    """lowbias32; unsigned products wrap."""
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _absorb(lane, number):
    return _mix(_mix(lane ^ number.to(tl.uint32)) ^ (number >> 32).to(tl.uint32))


@triton.jit
def _uniforms(key, sites, places, elements, out, count, BLOCK: tl.constexpr):
    lane_low, lane_high = tl.full((), 0x9E3779B9, tl.uint32), tl.full((), 0x243F6A88, tl.uint32)
    seed, step = tl.load(key), tl.load(key + 1)
    low = _absorb(_absorb(lane_low, seed), step)
    high = _absorb(_absorb(lane_high, seed), step) >> 1
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    site = tl.load(sites + tl.load(places + place, mask=inside, other=0))
    first, second = site.to(tl.uint32), (site >> 32).to(tl.uint32)
    low = _mix(_mix(low ^ first ^ lane_low) ^ second ^ lane_low)
    high = _mix(_mix(high ^ first ^ lane_high) ^ second ^ lane_high)
    element = tl.load(elements + place, mask=inside, other=0).to(tl.uint32)
    hashed = _mix(_mix(element + low) ^ high)
    tl.store(out + place, ((hashed >> 9).to(tl.float32) + 0.5) * (2.0**-23), mask=inside)


def uniforms(key: Tensor, sites: Tensor, places: Tensor, elements: Tensor) -> Tensor:
    """See :func:`fx_approx.sampling.device_uniforms.uniforms`."""
    count = elements.shape[0]
    out = torch.empty(count, dtype=torch.float32, device=key.device)
    if count:
        with torch.cuda.device_of(key):  # Triton launches on the current device
            _uniforms[triton.cdiv(count, _BLOCK),](key, sites, places, elements, out, count, BLOCK=_BLOCK)
    return out
