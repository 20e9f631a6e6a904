"""What ``isinstance`` says of a traced value, and that torch's own functions are not told the same."""

from __future__ import annotations

import collections.abc

import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Uniform


class Asks(nn.Module):
    """Takes a branch by the class of a value, as many forwards do that take tensors or containers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x).relu()
        if isinstance(y, (list, tuple, collections.abc.Mapping, nn.Parameter)):
            return x
        if not (isinstance(y, Tensor) and torch.is_tensor(y)):
            return x * 2
        if not isinstance(y.chunk(2, 1), tuple) or not isinstance(y.shape, torch.Size):
            return x * 3
        # Overloads that try a number first: a value that says in C++ that it is a tensor ends the process there.
        y = torch.remainder(y, 0.9) + torch.remainder(2.0, y + 3) + torch.pow(2.0, y) + torch.where(y > 0, 1.0, y)
        return self.leave(y)


def test_the_class_of_a_traced_value_is_told_to_the_model_only() -> None:
    torch.manual_seed(0)
    model, x = Asks().double(), torch.randn(4, 6, dtype=torch.float64)
    approx = fx_approx.transform(model, Uniform(1.0), x)
    assert approx._fx_approx.program.graph is not None
    assert torch.equal(approx(x), model(x))


def test_isinstance_is_what_it_was() -> None:
    before = isinstance
    fx_approx.transform(Asks(), Uniform(0.5), torch.randn(4, 6))
    assert isinstance is before
