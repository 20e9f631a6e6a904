"""What torch counts and keeps in a training step of a row of the table, and the facts that a plan has of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fx_approx.core.candidates import GemmShape, ProductFacts
from fx_approx.core.flops import role_flops
from tests.families import OpCase, Operands, gradients


def operands_of(case: OpCase, grads: tuple[bool, bool], dtype: torch.dtype = torch.float32) -> Operands:
    """Operands, the right one a parameter; what is added to the product needs no gradient."""
    operands = case.operands(dtype=dtype)
    operands[case.op.lhs].requires_grad_(grads[0])
    operands[case.op.rhs] = nn.Parameter(operands[case.op.rhs], requires_grad=grads[1])
    return operands


def shape_of(case: OpCase) -> GemmShape:
    return case.op.geometry(torch.Size(case.shapes[case.op.lhs]), torch.Size(case.shapes[case.op.rhs]), case.plain)


def facts_of(case: OpCase, operands: Operands, parameter: bool = True) -> ProductFacts:
    lhs, rhs = operands[case.op.lhs], operands[case.op.rhs]
    return ProductFacts(
        shape=shape_of(case),
        flops=role_flops(shape_of(case), lhs.requires_grad, rhs.requires_grad),
        dtype=str(lhs.dtype),
        device="cpu",
        lhs_bytes=lhs.numel() * lhs.itemsize,
        rhs_bytes=rhs.numel() * rhs.itemsize,
        lhs_kept=rhs.requires_grad or (case.op.keeps_both and lhs.requires_grad),
        rhs_kept=lhs.requires_grad or (case.op.keeps_both and rhs.requires_grad),
        rhs_is_parameter=parameter,
    )


def counted(case: OpCase, operands: Operands, **how: Any) -> tuple[int, int]:
    """Operations of forward and backward, as torch counts them; ``how`` are the op's sampling arguments."""
    with FlopCounterMode(display=False) as forward:
        output = case.call(case.op.function, operands, **how)
    with FlopCounterMode(display=False) as backward:
        gradients(output, operands)
    return forward.get_total_flops(), backward.get_total_flops()


class Keeping:
    """The bytes that autograd keeps while it is open, each piece of memory once, parameters left out."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.pieces: dict[int, Tensor] = {}
        self.ignored = {p.untyped_storage().data_ptr() for p in parameters}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in self.ignored:
            self.pieces[address] = tensor  # alive, so that its address is not used again
        return tensor

    def __enter__(self) -> Keeping:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.pieces.values())


def kept(case: OpCase, operands: Operands, parameter: bool = True, **how: Any) -> int:
    """Bytes kept for backward; ``how`` are the op's sampling arguments."""
    with Keeping([operands[case.op.rhs]] if parameter else []) as measured:
        output = case.call(case.op.function, operands, **how)
    del output
    return measured.bytes
