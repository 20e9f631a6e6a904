"""Norms of columns in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_approx.kernels.gathered import _operator
from fx_approx.kernels.table import REFERENCE


def column_norms(x: Tensor, *, kernel: str = REFERENCE) -> Tensor:
    """Euclidean norms of the columns of a matrix, summed in float32.

    Args:
        x: ``[m, K]``, any strides.
        kernel: ``"reference"``, or the Triton kernel's name from :func:`fx_approx.kernels.choose`.

    Returns:
        float32 ``[K]``.

    Raises:
        ValueError: ``x`` is no matrix.
    """
    if x.dim() != 2:
        raise ValueError(f"x: expected a matrix, got shape {tuple(x.shape)}")
    if kernel == REFERENCE:
        result: Tensor = torch.linalg.vector_norm(x, dim=0, dtype=torch.float32)
        return result
    norms: Tensor = _operator("column_norms")(x)
    return norms
