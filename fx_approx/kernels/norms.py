"""Norms of columns in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_approx.kernels.table import REFERENCE, operator


def column_norms(x: Tensor, *, kernel: str = REFERENCE) -> Tensor:
    """Euclidean norms of the columns of a matrix, summed in float32, or in float64 for float64.

    Args:
        x: ``[m, K]``, any strides.
        kernel: ``"reference"``, or the Triton kernel's name from :func:`fx_approx.kernels.choose`.

    Returns:
        float32 ``[K]``, or float64 for float64.

    Raises:
        ValueError: ``x`` is no matrix, or no such kernel.
    """
    if x.dim() != 2:
        raise ValueError(f"x: expected a matrix, got shape {tuple(x.shape)}")
    if kernel == REFERENCE:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        result: Tensor = torch.linalg.vector_norm(x, dim=0, dtype=dtype)
        return result
    norms: Tensor = operator("column_norms", kernel, x.dtype)(x)
    return norms
