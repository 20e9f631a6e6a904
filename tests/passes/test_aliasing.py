"""What may lie in the memory of its operand: torch itself is asked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fx_approx.compiler.transform import analysed
from fx_approx.passes.aliasing import same_memory

ARGUMENTS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("movedim", "moveaxis", "swapdims", "swapaxes", "transpose"), (0, 0)),
    **dict.fromkeys(("view", "reshape", "broadcast_to"), ((2, 4, 3),)),
    **dict.fromkeys(("to", "type"), (torch.float32,)),
    "unsqueeze": (0,),
    "as_strided": ((2, 4, 3), (12, 3, 1)),
    "expand": (2, 4, 3),
    "narrow": (1, 0, 4),
    "permute": ((0, 1, 2),),
    "select": (0, 0),
    "unflatten": (1, (2, 2)),
    "unfold": (0, 1, 1),
}
PLAIN = (
    *("adjoint", "conj", "conj_physical", "contiguous", "cpu", "dequantize", "detach", "diagonal", "flatten", "float"),
    *("positive", "ravel", "real", "requires_grad_", "resolve_conj", "resolve_neg", "squeeze", "to_dense"),
    *("abs", "clone", "cumsum", "neg", "round", "tile", "triu", "trunc"),
)


class Op(nn.Module):
    def __init__(self, op: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.op, self.fc = op, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(self.fc(x))


def cases() -> Iterator[tuple[str, str]]:
    for name in (*PLAIN, *ARGUMENTS):
        for where in ("function", "method"):
            with contextlib.suppress(AttributeError, TypeError):  # there is none, or it takes other arguments
                called(where, name)(torch.randn(2, 4, 3))
                yield where, name


def called(where: str, name: str) -> Callable[[Tensor], Tensor]:
    arguments = ARGUMENTS.get(name, ())
    if where == "method":
        return lambda value: getattr(value, name)(*arguments)
    function = getattr(torch, name)
    return lambda value: function(value, *arguments)


@pytest.mark.parametrize(("where", "name"), [*cases()])
def test_what_gives_its_operand_or_a_view_of_it_is_known_to(where: str, name: str) -> None:
    op, x = called(where, name), torch.randn(2, 4, 3)
    given = op(x)
    made = analysed(Op(op), x)
    flow = made.flow
    assert flow is not None
    layer, result = (node for node in flow.graph.nodes if node.op != "placeholder" and node.op != "output")
    shares = given.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert (result in set(same_memory(flow, layer))) == shares
