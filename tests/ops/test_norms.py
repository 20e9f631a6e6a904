"""Norms of columns, eager and compiled, against torch's own in float64."""

from __future__ import annotations

import pytest
import torch

from fx_approx.ops.base import norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 5), (100, 6), (2, 32, 7), (1, 64), (64, 1), (0, 3)])
@pytest.mark.parametrize("compiled", [False, True])
def test_norms_of_columns(shape: tuple[int, ...], dtype: torch.dtype, compiled: bool) -> None:
    """64 rows and multiples of it are added up in two steps by compiled code."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    operand, dims = torch.randn(shape).to(dtype), tuple(range(len(shape) - 1))
    call = torch.compile(norm, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else norm
    expected = torch.linalg.vector_norm(operand.double(), dim=dims)
    found = call(operand, dims)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0)
