"""Products over chosen slices of both operands, which are read where they lie."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_approx.kernels.table import REFERENCE, operator


def gathered_k_matmul(
    x: Tensor,
    w: Tensor,
    index: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    count: Tensor | None = None,
    *,
    kernel: str = REFERENCE,
) -> Tensor:
    """``x[:, index] @ (w[:, index] * scale).T + bias``: a linear layer over chosen in-features.

    Gradients of ``x`` and ``w`` are zero outside ``index``, and can be differentiated again.

    Args:
        x: ``[m, K]``, any strides.
        w: ``[n, K]``, any strides, type and device of ``x``.
        index: ``[k]`` integers, unique, in ``[0, K)``: that is not checked on the device.
        scale: ``[k]`` or None for ones.
        bias: ``[n]`` or None.
        count: One integer on the device: only so many entries of ``index`` count. It is read on the device, so that a
            random number of pairs needs no host sync; no gradient is defined then.
        kernel: ``"reference"``, or the Triton kernel's name from :func:`fx_approx.kernels.choose`. Sums are in float32;
            float32 operands are rounded to TF32 where torch's own products are.

    Returns:
        ``[m, n]`` of the type of ``x``.

    Raises:
        ValueError: Shapes or types do not fit, or no such kernel.
    """
    _check(x, w, index, scale, count, "w", 1)
    if bias is not None and bias.shape != (w.shape[0],):
        raise ValueError(f"bias: expected shape ({w.shape[0]},), got {tuple(bias.shape)}")
    if kernel == REFERENCE:
        index, counts = _counted(index, count)
        left, right = x.index_select(1, index), w.index_select(1, index)
        if scale is not None:
            right = (right * scale).to(w.dtype)
        if counts is not None:
            left, right = left.where(counts, 0), right.where(counts, 0)
        return F.linear(left, right, bias)
    result: Tensor = operator("gathered_k_matmul", kernel, x.dtype)(x, w, index, scale, bias, count)
    return result


def gathered_rows_matmul(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    scale: Tensor | None = None,
    count: Tensor | None = None,
    *,
    kept: bool = False,
    kernel: str = REFERENCE,
) -> Tensor:
    """``grad[index].T @ (x[index] * scale)``: the weight gradient of a linear layer from chosen rows.

    For use inside backward functions: the Triton kernel has no gradient of its own.

    Args:
        grad: ``[m, n]``, any strides.
        x: ``[m, K]``, any strides, type and device of ``grad``.
        index: ``[r]`` integers in ``[0, m)``: that is not checked on the device.
        scale: ``[r]`` or None for ones.
        count: As in :func:`gathered_k_matmul`.
        kept: ``x`` is ``[r, K]``, the chosen rows only.
        kernel: As there.

    Returns:
        ``[n, K]`` of the type of ``grad``.

    Raises:
        ValueError: Shapes or types do not fit, or no such kernel.
    """
    _check(grad, x, index, scale, count, "x", 0, kept)
    if kernel == REFERENCE:
        index, counts = _counted(index, count)
        left, right = grad.index_select(0, index), x if kept else x.index_select(0, index)
        if scale is not None:
            right = (right * scale.unsqueeze(1)).to(x.dtype)
        if counts is not None:
            left, right = left.where(counts.unsqueeze(1), 0), right.where(counts.unsqueeze(1), 0)
        return left.T @ right
    result: Tensor = operator("gathered_rows_matmul", kernel, grad.dtype)(grad, x, index, scale, count, kept)
    return result


def _check(
    left: Tensor,
    right: Tensor,
    index: Tensor,
    scale: Tensor | None,
    count: Tensor | None,
    name: str,
    axis: int,
    kept: bool = False,
) -> None:
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"index: expected a vector of int32 or int64, got {index.dtype} {tuple(index.shape)}")
    length = index.shape[0] if kept else left.shape[axis] if left.dim() == 2 else -1
    if left.dim() != 2 or right.dim() != 2 or right.shape[axis] != length:
        raise ValueError(
            f"{name}: expected a matrix with {max(length, 0)} entries along axis {axis}, got {tuple(right.shape)} "
            f"beside {tuple(left.shape)}"
        )
    if left.dtype is not right.dtype:
        raise ValueError(f"{name}: expected the type of the other operand, {left.dtype}, got {right.dtype}")
    if scale is not None and scale.shape != index.shape:
        raise ValueError(f"scale: expected shape {tuple(index.shape)}, got {tuple(scale.shape)}")
    if count is not None and (count.numel() != 1 or count.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"count: expected one int32 or int64, got {count.dtype} {tuple(count.shape)}")


def _counted(index: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The reference computes all entries, and which of them count; the others may hold anything."""
    if count is None:
        return index, None
    counts = torch.arange(index.shape[0], device=index.device) < count.reshape(())
    return torch.where(counts, index, 0), counts
