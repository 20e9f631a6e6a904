"""Layers in parts of a model that cannot be traced draw as the graph's do, and each call for itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fx_approx
from tests.helpers.models import same
from tests.helpers.modes import MODES, steps, transformed

modes = pytest.mark.parametrize("mode", MODES)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.conv = nn.Linear(16, 16), nn.Linear(16, 16), nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.fc2(self.fc1(x).tanh()).tanh())


class UntracedPart(Part):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() == x.sum() else x


@modes
def test_a_part_that_is_not_traced_gives_what_the_graph_gives(mode: str) -> None:
    torch.manual_seed(0)
    untraced = nn.Sequential(nn.Linear(8, 16), UntracedPart(), nn.Linear(16, 4))
    traced = nn.Sequential(nn.Linear(8, 16), Part(), nn.Linear(16, 4))
    traced.load_state_dict(untraced.state_dict())
    x = torch.randn(6, 4, 8)
    with pytest.warns(fx_approx.errors.CaptureWarning, match="not traced"):
        swapped = fx_approx.transform(untraced, MODES[mode](0.5))
    assert same(steps(swapped, 3, x), steps(fx_approx.transform(traced, MODES[mode](0.5)), 3, x))


class Several(nn.Module):
    """Calls a layer on each of several inputs, in Python that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [self.fc(x) for x in inputs] if inputs[0].sum() == inputs[0].sum() else []


@pytest.mark.filterwarnings("ignore::fx_approx.errors.CaptureWarning")
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_each_call_of_a_layer_that_is_not_traced_draws_for_itself(mode: str) -> None:
    """A sample shared by two calls is biased where one follows the other."""
    approx = transformed(Several(), MODES[mode](0.25), seed=3)
    x = torch.randn(4, 32)

    def run() -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for _ in range(5)]
        outputs = approx(*inputs)
        sum(outputs).sum().backward()
        return list(outputs) if mode == "forward" else [one.grad for one in inputs if one.grad is not None]

    with fx_approx.reuse_selection(approx):
        found, again = run(), run()
    assert len(found) == 5 and same(found, again)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found, 2))


def test_a_recomputed_part_that_calls_a_layer_several_times_is_refused() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Several()

        def forward(self, x: Tensor) -> Tensor:
            return sum(checkpoint(self.inner, x, x + 1, use_reentrant=False))  # type: ignore[return-value]

    with pytest.warns(fx_approx.errors.CaptureWarning, match="not traced"):
        approx = fx_approx.transform(Outer(), MODES["forward"](0.25))
    output = approx(torch.randn(4, 32))
    with pytest.raises(fx_approx.errors.RecomputationError, match="several times"):
        output.sum().backward()
