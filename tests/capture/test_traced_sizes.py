"""Tensors of the model and of the forward itself take sizes that are traced, wherever those stand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Uniform

Use = Callable[[Tensor, int, int], Tensor]

# Of a parameter [1, 1, 8]; n and t are sizes of the input.
USES: dict[str, Use] = {
    "expand": lambda token, n, t: token.expand(n, -1, -1),
    "expand, second": lambda token, n, t: token.expand(2, t, -1),
    "expand to a tuple": lambda token, n, t: token.expand((n, -1, -1)),
    "expand to numbers": lambda token, n, t: token.expand(2, 1, 8),
    "repeat": lambda token, n, t: token.repeat(n, 1, 1),
    "view": lambda token, n, t: token.view(-1, 1, 8).expand(n, t, 8),
    "new_ones": lambda token, n, t: token.new_ones(n, t, 8) * token,
    "new_zeros": lambda token, n, t: token.new_zeros(n, 1, 8) + token,
    "new_empty": lambda token, n, t: token.new_empty(n, 1, 8).fill_(2.0) * token,
    "made here": lambda token, n, t: torch.arange(8.0, dtype=torch.float64).view(1, 1, 8).expand(n, -1, -1) + token,
}


class Prompted(nn.Module):
    """Puts what ``use`` makes of a parameter before its input."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        self.use = (use,)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[0], x.size(1)
        made: Tensor = self.layer(torch.cat((self.use[0](self.token, n, t), x), 1))
        return made


@pytest.mark.parametrize("name", USES)
def test_sizes_are_traced(name: str) -> None:
    model = Prompted(USES[name]).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    approx = fx_approx.transform(model, Uniform(1.0, scores="online"), x)
    assert approx._fx_approx.program.graph is not None
    batches = [x] if "numbers" in name or "second" in name else [x, torch.randn(5, 3, 8, dtype=torch.float64)]
    for batch in batches:
        result, expected = approx(batch), model(batch)
        assert torch.equal(result, expected)
        grads = torch.autograd.grad(result.square().sum(), list(approx.parameters()))
        others = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
        assert all(map(torch.equal, grads, others))


def test_the_methods_of_tensors_are_left_as_they_were() -> None:
    methods = {name: getattr(Tensor, name) for name in ("expand", "new_empty", "new_ones", "new_zeros")}
    fx_approx.transform(Prompted(USES["expand"]).double(), Uniform(0.5, scores="online"), torch.randn(2, 3, 8).double())
    assert all(getattr(Tensor, name) is method for name, method in methods.items())
    assert not set(methods) & set(vars(Tensor))
