"""Normalisations in a class of the user's own, which call functions: counted, exported, copied, pickled."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx.errors import BatchNormWarning
from fx_approx.runtime.approx_module import find
from fx_approx.subnetworks import extract
from tests.helpers.hoisting import Layers, perturbed

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
WIDE = Layers("topk", 0.5, "weight", "value")


class NormAct(nn.BatchNorm2d):
    """As ``BatchNormAct2d`` of timm: it counts batches in training only, and has an activation of its own."""

    def __init__(self, channels: int, act: bool = True) -> None:
        super().__init__(channels)
        self.act = nn.SiLU() if act else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        mean, var = self.running_mean, self.running_var
        made = F.batch_norm(input, mean, var, self.weight, self.bias, self.training, self.momentum or 0.0, self.eps)
        result: Tensor = self.act(made)
        return result


class Block(nn.Module):
    """A residual block, as of a RegNet."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), NormAct(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), NormAct(outputs, act=False)
        self.down, self.bn3 = nn.Conv2d(inputs, outputs, 1, bias=False), NormAct(outputs, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + self.bn3(self.down(x)))


def network() -> nn.Module:
    """Its residual streams are wide at scope ``value``; what the last block makes is narrow."""
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 8, 3, padding=1), NormAct(8)
    return perturbed(
        nn.Sequential(*stem, Block(8, 12), Block(12, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    ).double()


def test_a_count_of_batches_does_not_keep_a_graph_from_evaluation() -> None:
    model = network()
    approx = fx_approx.transform(copy.deepcopy(model), WIDE, X)
    assert find(approx)._fx_approx.program.capture.branching == ()
    approx(X)
    assert int(approx[1].num_batches_tracked) == int(approx[3].bn2.num_batches_tracked) == 1
    model.load_state_dict(approx.state_dict())
    with pytest.warns(BatchNormWarning):
        assert torch.allclose(approx.eval()(X), model.eval()(X), rtol=1e-12)
    assert int(approx[1].num_batches_tracked) == 1


def test_its_graph_is_exported_for_evaluation() -> None:
    sub = extract(fx_approx.transform(network(), WIDE, X))
    sub(X)
    expected = sub.eval()(X)
    counts = [name for name in sub.state_dict() if name.endswith("num_batches_tracked")]
    assert len(counts) == 7 and all(int(sub.state_dict()[name]) == 1 for name in counts)
    assert torch.allclose(torch.export.export(sub, (X,), strict=False).module()(X), expected, rtol=1e-12)


class Dropping(nn.Module):
    """Its Python hands the flag to a function."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.b(F.relu(self.a(x)))), 0.5, self.training)
        result: Tensor = self.c(x)
        return result


@pytest.mark.parametrize("training", [True, False])
def test_a_pickled_graph_follows_its_flag(training: bool) -> None:
    """``torch.fx`` builds it from its code, of which flags would be constants."""
    x = torch.randn(4, 8)
    for sub, given in (
        (extract(fx_approx.transform(Dropping(), WIDE, x)), x),
        (extract(fx_approx.transform(network(), WIDE, X)), X),
    ):
        again = pickle.loads(pickle.dumps(sub.train(not training)))
        assert again.training is not training
        results = []
        for one in (sub, again):
            torch.manual_seed(0)
            results.append(one.train(training)(given))
        assert torch.equal(*results)
        assert all(torch.equal(a, b) for a, b in zip(sub.buffers(), again.buffers(), strict=True))
