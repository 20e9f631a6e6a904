"""The Triton kernels, as operators of torch. Importing this module needs Triton.

One kernel serves both products: ``out[i, j] = sum_r a[i, r] * scale[r] * b[r, j]`` over chosen r, for operands given by
their strides. Over in-features, r is a column of both; over rows, a row of both, read along the other axis.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _gathered(
    a, b, out, index, scale, bias, count,
    m, n, k, size_m, size_n, size_k, stride_am, stride_ar, stride_br, stride_bn, stride_om, stride_on,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_COUNT: tl.constexpr, KEPT: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # Blocks of GROUP rows of tiles go together, so that their operands stay in the cache.
    tile = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    first = tile // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - first, GROUP)
    row = (first + tile % (GROUP * tiles_n) % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile % (GROUP * tiles_n) // height * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = row < m, column < n
    total = k
    if HAS_COUNT:
        total = min(tl.load(count).to(tl.int64), k).to(tl.int32)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, total, BLOCK_K):
        places = start + tl.arange(0, BLOCK_K)
        inside = places < total
        chosen = tl.load(index + places, mask=inside, other=0).to(tl.int64)
        left = tl.load(
            a + row[:, None].to(tl.int64) * stride_am + chosen[None, :] * stride_ar,
            mask=in_m[:, None] & inside[None, :],
            other=0.0,
        )
        right = tl.load(
            b
            + (places.to(tl.int64) if KEPT else chosen)[:, None] * stride_br
            + column[None, :].to(tl.int64) * stride_bn,
            mask=inside[:, None] & in_n[None, :],
            other=0.0,
        )
        if HAS_SCALE:
            factor = tl.load(scale + places, mask=inside, other=0.0).to(tl.float32)
            right = (right.to(tl.float32) * factor[:, None]).to(left.dtype)
        if WIDEN:  # the interpreter multiplies bfloat16 as if it were integers
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    if HAS_BIAS:
        sums += tl.load(bias + column, mask=in_n, other=0.0).to(tl.float32)[None, :]
    target = out + row[:, None].to(tl.int64) * stride_om + column[None, :].to(tl.int64) * stride_on
    tl.store(target, sums.to(out.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit
def _squares(x, out, m, k, stride_m, stride_k, rows, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.program_id(1) * rows
    sums = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for start in range(first, min(first + rows, m), BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = (row < min(first + rows, m))[:, None] & (column < k)[None, :]
        place = x + row[:, None].to(tl.int64) * stride_m + column[None, :].to(tl.int64) * stride_k
        values = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        sums += tl.sum(values * values, axis=0)
    tl.store(out + tl.program_id(1) * k + column, sums, mask=column < k)


def _configuration(m: int, n: int, k: int, warps: int, stages: int) -> triton.Config:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


_CONFIGURATIONS = (
    [_configuration(16, 16, 16, 4, 1)]
    if INTERPRETED
    else [
        _configuration(128, 256, 64, 8, 3),
        _configuration(256, 128, 64, 8, 3),
        _configuration(128, 128, 64, 8, 3),
        _configuration(128, 128, 32, 4, 4),
        _configuration(128, 64, 32, 4, 4),
        _configuration(64, 128, 32, 4, 4),
        _configuration(64, 64, 64, 4, 4),
        _configuration(64, 32, 64, 2, 5),
    ]
)
_KEY = ["size_m", "size_n", "size_k", "stride_ar", "stride_bn", "HAS_COUNT", "KEPT", "PRECISION"]
_tuned = _gathered if INTERPRETED else triton.autotune(_CONFIGURATIONS, key=_KEY)(_gathered)


def uses_tf32() -> bool:
    """Whether torch rounds the operands of float32 products on GPUs to TF32."""
    # `get_float32_matmul_precision` is an error once this was set by the newer interface; either sets this.
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def _size(extent: int) -> int:
    """The next power of two: what was tuned for one number of pairs serves those near it, as the number may be random.

    A symbolic extent stands for itself: compiled code is tuned once, whatever the key.
    """
    size: int = extent if isinstance(extent, torch.SymInt) else triton.next_power_of_2(extent)
    return size


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return (
        torch.cuda.device(tensor.device) if tensor.is_cuda and torch.cuda.is_available() else contextlib.nullcontext()
    )


def _traceable(kernel: Any) -> Any:
    return kernel if INTERPRETED else wrap_triton(kernel)


def _multiply(
    a: Tensor,
    b: Tensor,
    index: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    count: Tensor | None,
    kept: bool,
) -> Tensor:
    """``a[:, index] @ (scale * b[index])``, ``[m, n]``, for ``a`` and ``b`` of any strides; ``kept``: b holds these."""
    m, n, k = a.shape[0], b.shape[1], index.shape[0]
    out = torch.empty((m, n), dtype=a.dtype, device=a.device)
    if out.numel() == 0:
        return out

    def grid(blocks: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(m, blocks["BLOCK_M"]) * triton.cdiv(n, blocks["BLOCK_N"]),)

    # The kernel reads vectors as if they were contiguous.
    index, scale, bias = index.contiguous(), _contiguous(scale), _contiguous(bias)
    given: dict[str, Any] = {
        "HAS_SCALE": scale is not None,
        "HAS_BIAS": bias is not None,
        "HAS_COUNT": count is not None,
        "KEPT": kept,
        "PRECISION": "tf32" if uses_tf32() else "ieee",
        "WIDEN": INTERPRETED,
    }
    if INTERPRETED:
        given.update(_CONFIGURATIONS[0].kwargs)
    with _on_device_of(a):
        _traceable(_tuned)[grid](
            a, b, out, index,
            index if scale is None else scale, out if bias is None else bias, index if count is None else count,
            m, n, k, _size(m), _size(n), _size(k),
            a.stride(0), a.stride(1), b.stride(0), b.stride(1), out.stride(0), out.stride(1), **given,
        )  # fmt: skip
    return out


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


@triton_op("fx_approx::gathered_k_matmul", mutates_args={})
def gathered_k_matmul(
    x: Tensor, w: Tensor, index: Tensor, scale: Tensor | None, bias: Tensor | None, count: Tensor | None
) -> Tensor:
    """See :func:`fx_approx.kernels.gathered_k_matmul`."""
    return _multiply(x, w.T, index, scale, bias, count, False)


@triton_op("fx_approx::gathered_rows_matmul", mutates_args={})
def gathered_rows_matmul(
    grad: Tensor, x: Tensor, index: Tensor, scale: Tensor | None, count: Tensor | None, kept: bool
) -> Tensor:
    """See :func:`fx_approx.kernels.gathered_rows_matmul`."""
    return _multiply(grad.T, x, index, scale, None, count, kept)


@triton_op("fx_approx::column_norms", mutates_args={})
def column_norms(x: Tensor) -> Tensor:
    """See :func:`fx_approx.kernels.column_norms`."""
    m, k = x.shape
    block_m, block_k = (16, 16) if INTERPRETED else (64, 64)
    # Parts of the rows by themselves, summed afterwards: in a fixed order, and with enough programs for a tall matrix.
    parts = max(1, min(triton.cdiv(m, block_m), triton.cdiv(1024, triton.cdiv(max(k, 1), block_k))))
    rows = triton.cdiv(triton.cdiv(m, parts), block_m) * block_m
    sums = torch.zeros((parts, k), dtype=torch.float32, device=x.device)
    if x.numel():
        grid = (triton.cdiv(k, block_k), parts)
        with _on_device_of(x):
            _traceable(_squares)[grid](
                x, sums, m, k, x.stride(0), x.stride(1), max(rows, 1), BLOCK_M=block_m, BLOCK_K=block_k
            )
    return sums.sum(0).sqrt()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, index, scale, _, count = inputs
    if count is not None and any(ctx.needs_input_grad):
        raise NotImplementedError("gathered_k_matmul: no gradient is defined with a count on the device")
    ctx.save_for_backward(x, w, index, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """In plain torch, so that it can be differentiated again."""
    x, w, index, scale = ctx.saved_tensors
    needs_x, needs_w, _, _, needs_bias, _ = ctx.needs_input_grad
    grad_x = grad_w = grad_bias = None
    if needs_x:
        columns = w.index_select(1, index)
        part = grad @ (columns if scale is None else (columns * scale).to(w.dtype))
        grad_x = torch.zeros_like(x).index_copy(1, index.long(), part)
    if needs_w:
        part = grad.T @ x.index_select(1, index)
        part = part if scale is None else (part * scale).to(w.dtype)
        grad_w = torch.zeros_like(w).index_copy(1, index.long(), part)
    if needs_bias:
        grad_bias = grad.sum(0)
    return grad_x, grad_w, None, None, grad_bias, None


gathered_k_matmul.register_autograd(_backward, setup_context=_setup)

OPERATORS: dict[str, Callable[..., Any]] = {
    "gathered_k_matmul": gathered_k_matmul,
    "gathered_rows_matmul": gathered_rows_matmul,
    "column_norms": column_norms,
}
"""By the name of the kernel in the table."""
