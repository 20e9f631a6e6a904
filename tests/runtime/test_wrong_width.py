"""An input with the wrong number of features or channels raises what the exact model raises, in training too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Uniform


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.first.weight, self.first.bias).relu()
        return F.linear(hidden, self.second.weight, self.second.bias)


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...], list[tuple[int, ...]]]]:
    """Model, shape of its inputs, wrong shapes."""
    tail = (nn.ReLU(), nn.Linear(16, 3))
    last = (nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))
    wide, deep = [(4, 9), (4, 5)], [(2, 6, 9, 9), (2, 2, 9, 9)]
    return {
        "linear": (nn.Sequential(nn.Linear(6, 16), *tail), (4, 6), wide),
        "behind an activation": (nn.Sequential(nn.Tanh(), nn.Linear(6, 16), *tail), (4, 6), wide),
        "normalised": (nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 16), *tail), (4, 6), wide),
        "functional": (Functional(), (4, 6), wide),
        "convolution": (nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), *last), (2, 4, 9, 9), deep),
        "grouped": (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), *last), (2, 4, 9, 9), deep),
        "flattened": (
            nn.Sequential(nn.Flatten(), nn.Linear(64, 16), *tail),
            (2, 1, 8, 8),
            [(2, 1, 9, 9), (2, 1, 7, 7)],
        ),
        "features": (
            nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)),
            (2, 4, 5, 5),
            [(2, 4, 6, 6), (2, 4, 4, 4)],
        ),
    }


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize(("scores", "scope"), [("online", "layer"), ("weight", "layer"), ("weight", "value")])
def test_the_error_is_that_of_the_exact_model(name: str, scores: str, scope: str) -> None:
    model, right, wrong = networks()[name]
    for demand in (True, False):
        policy = Uniform(0.5, scores=scores, scope=scope)
        approx = fx_approx.transform(model, policy, torch.randn(right), prune_unread=demand)
        for shape in wrong:
            x = torch.randn(shape)
            with pytest.raises(RuntimeError) as expected:
                model(x)
            with pytest.raises(type(expected.value)) as found:
                approx(x)
            assert str(found.value) == str(expected.value)
        assert approx(torch.randn(right)).shape == model(torch.randn(right)).shape


@pytest.mark.slow
def test_compiled_code_raises_an_error_too() -> None:
    approx = fx_approx.transform(networks()["linear"][0], Uniform(0.5), torch.randn(4, 6))
    compiled = torch.compile(approx, fullgraph=True, backend="eager")
    compiled(torch.randn(4, 6))
    for width in (9, 5):
        with pytest.raises(RuntimeError):
            compiled(torch.randn(4, width))
