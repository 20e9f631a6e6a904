"""The random numbers of a step, by Triton on GPUs."""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

from fx_approx.sampling.uniforms import derive_key, site_uniforms

_OLDEST_TRITON = (3, 3)


def uniforms(key: Tensor, sites: Tensor, places: Tensor | None, elements: Tensor) -> Tensor:
    """Uniforms of many sites in one step; the same bits on every device, with and without Triton.

    Args:
        key: int64 ``[2]``: seed and step.
        sites: int64 ``[s]``, numbers of the sites.
        places: int64 ``[n]``, the place in ``sites`` of the site of each uniform; None if there is one site.
        elements: int64 ``[n]``, its position within the site.

    Returns:
        float32 ``[n]`` in (0, 1).
    """
    if key.device.type == "cuda" and _has_triton():
        from fx_approx.sampling import triton_uniforms  # imports Triton, which need not be there

        return triton_uniforms.uniforms(key, sites, torch.zeros_like(elements) if places is None else places, elements)
    return site_uniforms(derive_key(key[0], key[1]), sites, places, elements)


@functools.cache
def _has_triton() -> bool:
    """Whether a Triton is installed that compiles the kernel."""
    try:
        triton = importlib.import_module("triton")
    except ImportError:
        return False
    return tuple(int(part) for part in str(triton.__version__).split(".")[:2]) >= _OLDEST_TRITON
