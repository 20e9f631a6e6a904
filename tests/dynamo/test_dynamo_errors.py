"""What the Dynamo frontend refuses, and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

import fx_approx
from fx_approx.policies import Override, Uniform

VALUE = Uniform(0.5)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))
        return result


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"inner": "inductr"}, ValueError, "inner: no backend 'inductr'; there are: .*inductor"),
        ({"inner": 3}, TypeError, "inner: expected the name of a backend or a callable, got 3"),
        ({"policy": 0.5}, TypeError, "policy: expected a policy such as"),
        ({"prune_unread": "yes"}, TypeError, "prune_unread: expected True or False, got 'yes'"),
        ({"seed": 0.5}, TypeError, "seed: expected an integer"),
        ({"selection_interval": 0}, ValueError, "selection_interval: expected an integer from 1"),
        ({"mode": "fastest"}, RuntimeError, "mode"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        fx_approx.backend(**arguments)


def test_a_call_by_hand_is_a_clear_error() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    gm.graph.call_function(torch.nn.functional.linear)
    with pytest.raises(
        fx_approx.errors.CaptureError, match=r"torch\.compile\(model, backend=fx_approx\.backend\(policy\)\)"
    ):
        fx_approx.backend(VALUE)(gm, [])


def test_a_rule_that_no_graph_has_a_layer_for_is_in_the_report() -> None:
    model = Block()
    backend = fx_approx.backend(
        Override({"nowhere": VALUE, "fc2": Uniform(0.25, scores="online")}, VALUE), inner="aot_eager"
    )
    torch.compile(model, backend=backend)(torch.randn(4, 32))
    notes = backend.report().notes
    assert any("'nowhere'" in note for note in notes) and not any("'fc2'" in note for note in notes)
