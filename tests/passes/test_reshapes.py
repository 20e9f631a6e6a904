"""Reshapes between layers of which channels are left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.core.plan_effects import FULL
from fx_approx.policies import Uniform

AHEAD = Uniform(0.5)


class Reshaping(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first = nn.Linear(8, 16)
        self.view = nn.Flatten() if how == "flatten_named_view" else nn.Unflatten(1, (16, 1, 1))
        self.heads = nn.Unflatten(1, (-1, 4))
        self.second = nn.Linear(16, 4) if how in ("flatten_named_view", "heads") else nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if self.how == "sizes":
            x = x.unflatten(1, (16, 1, 1))
        elif self.how == "inferred":
            x = x.unflatten(1, (-1, 1, 1))
        elif self.how == "heads":
            x = self.heads(x).relu().flatten(1)
        else:
            x = self.view(x)
        return self.second(x)


@pytest.mark.parametrize(
    ("how", "narrowed"),
    [("module", False), ("sizes", False), ("inferred", True), ("heads", True), ("flatten_named_view", True)],
)
def test_an_unflatten_that_names_the_number_of_channels_keeps_them_all(how: str, narrowed: bool) -> None:
    model, x = Reshaping(how).double(), torch.randn(5, 8, dtype=torch.float64)
    approx = fx_approx.transform(model, AHEAD, x)
    have = {node.name: classes for node, classes in approx._fx_approx.record.analysis.demand.have.items()}
    assert (FULL not in have["first"]) == narrowed
    assert approx(x).isfinite().all() and fx_approx.analysis.verify(approx, x).passed
