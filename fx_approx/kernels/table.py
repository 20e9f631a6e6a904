"""The lowering table: which kernel computes a sampled product of an op and role, on a device, for a data type."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tabulate import tabulate

from fx_approx.candidate import Role
from fx_approx.errors import KernelWarning

REFERENCE, TRITON = "reference", "triton"
_SHORT = (torch.float16, torch.bfloat16, torch.float32)
_LEAST = (3, 3)


@dataclasses.dataclass(frozen=True)
class Lowering:
    """One kernel that can stand in for the reference.

    Attributes:
        kind: Kind of op.
        role: Which product; None for the norms of scores.
        kernel: Its name.
        dtypes: Of the operands.
        instead: What the reference does.
        measured: Speed as a multiple of the reference's, on an H200 in bfloat16.
    """

    kind: str
    role: Role | None
    kernel: str
    dtypes: tuple[torch.dtype, ...]
    instead: str
    measured: str


LOWERINGS: tuple[Lowering, ...] = (
    Lowering("linear", Role.OUTPUT, "gathered_k_matmul", _SHORT, "gathers both operands, then F.linear", "0.1"),
    Lowering("linear", Role.GRAD_WEIGHT, "gathered_rows_matmul", _SHORT, "gathers both by rows, then matmul", "0.5"),
    Lowering("linear", None, "column_norms", _SHORT, "linalg.vector_norm", "0.4"),
)
"""All Triton kernels. None is chosen by itself, as none is faster than the reference (docs/kernels.md)."""

_preferred = REFERENCE
_interpreted = False
_named: set[torch.dtype] = set()  # the types that the reference computes, of which a warning was given


def prefer(kernels: str) -> bool:
    """Makes sampled products use these kernels from now on, where they can.

    Compiled code is guarded on it, and is compiled again.

    Args:
        kernels: ``"reference"`` or ``"triton"``.

    Returns:
        Whether they can be used at all; if not, the reference goes on, and a warning says why.

    Raises:
        ValueError: Another name.

    Warns:
        KernelWarning: Triton is absent or too old. Later, outside of compiled code, once for each type of
            operands that no kernel takes.
    """
    global _preferred, _interpreted
    if kernels not in (REFERENCE, TRITON):
        raise ValueError(f"kernels: expected 'reference' or 'triton', got {kernels!r}")
    problem = triton_problem() if kernels == TRITON else None
    if problem is not None:
        warnings.warn(f"{problem}: the reference kernels are used", KernelWarning, stacklevel=2)
        kernels = REFERENCE
    _interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    _preferred = kernels
    _named.clear()
    return problem is None


@contextlib.contextmanager
def preferring(kernels: str) -> Iterator[bool]:
    """:func:`prefer` for the block, then as before."""
    global _preferred
    before = _preferred
    try:
        yield prefer(kernels)
    finally:
        _preferred = before


def choose(kind: str, role: Role | None, device: str, dtype: torch.dtype) -> str:
    """The name of the kernel for a product, ``"reference"`` where no other can serve.

    Args:
        kind: Kind of op, such as ``"linear"``.
        role: Which product; None for the norms of scores.
        device: Type of the operands' device, ``"cuda"`` or ``"cpu"``.
        dtype: Of the operands.
    """
    if _preferred == REFERENCE or not (device == "cuda" or _interpreted):
        return REFERENCE
    rows = [row for row in LOWERINGS if row.kind == kind and row.role is role]
    for row in rows:
        if dtype in row.dtypes:
            return row.kernel
    # Norms go without: scores take some in float64 whatever the operands are.
    if rows and role is not None and not torch.compiler.is_compiling() and dtype not in _named:
        _named.add(dtype)
        warnings.warn(f"no Triton kernel takes {dtype}: the reference is used", KernelWarning, stacklevel=3)
    return REFERENCE


def operator(own: str, kernel: str, dtype: torch.dtype) -> Callable[..., Any]:
    """The operator of torch that runs a Triton kernel.

    Args:
        own: The kernel that computes what the caller does.
        kernel: The one that was asked for.
        dtype: Of the operands.

    Raises:
        ValueError: They are not the same, or it does not take the type.
        ImportError: Triton is not installed.
    """
    if kernel != own:
        raise ValueError(f"kernel: expected {REFERENCE!r} or {own!r}, got {kernel!r}")
    if all(dtype not in row.dtypes for row in LOWERINGS if row.kernel == own):
        raise ValueError(f"kernel: {own} does not take {dtype}")
    from fx_approx.kernels import triton_ops  # imports Triton, which need not be there

    return triton_ops.OPERATORS[own]


def table_text() -> str:
    """The table, and what is in use."""
    rows = [
        [
            row.kind,
            "scores" if row.role is None else row.role.value,
            row.kernel,
            ", ".join(str(dtype).removeprefix("torch.") for dtype in row.dtypes),
            row.instead,
            row.measured,
        ]
        for row in LOWERINGS
    ]
    headers = ["op", "product", "kernel", "types", "the reference", "its speed"]
    return f"{tabulate(rows, headers, disable_numparse=True)}\n\nIn use: {_preferred}."


def triton_problem() -> str | None:
    """Why Triton cannot be used, or None."""
    try:
        triton = importlib.import_module("triton")
    except ImportError:
        return "Triton is not installed"
    version = tuple(int(part) for part in str(triton.__version__).split(".")[:2])
    if version < _LEAST:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, _LEAST))}"
    return None
