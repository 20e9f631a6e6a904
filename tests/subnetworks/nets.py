"""What the tests of subnetworks share: transformed networks of the demand tests, a small MLP, and steps of training."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Exact, Override, Uniform
from fx_approx.runtime.approx_module import find
from fx_approx.sampling import Selection
from fx_approx.subnetworks import record_of
from fx_approx.subnetworks.record import tensors_of
from tests.helpers.demand_nets import NETS
from tests.helpers.hoisting import Layers, loss_of, perturbed

TWICE = "plain-residual"  # a layer that is called with two selections
HIDDEN = Override({"0": Exact()}, Uniform(0.5))
X, Y = torch.randn(32, 20, generator=torch.Generator().manual_seed(1)).double(), torch.arange(32) % 5


def transformed(
    name: str, scope: str = "value", sampler: str = "topk", ratio: float = 0.5, scores: str = "weight"
) -> tuple[nn.Module, Tensor]:
    """A network of the demand tests in float64, with an input: a copy of one that is transformed once a process."""
    made = copy.deepcopy(_transformed(name, scope, sampler, ratio, scores))
    torch.manual_seed(0)
    return made


@functools.cache
def _transformed(name: str, scope: str, sampler: str, ratio: float, scores: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = NETS[name]
    x = torch.randn(*shape).double()
    return fx_approx.transform(perturbed(build().double()), Layers(sampler, ratio, scores, scope), x), x


def mlp() -> nn.Module:
    """With BatchNorm."""
    return nn.Sequential(
        nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
    )


def hidden(policy: fx_approx.Policy = HIDDEN, **options: int) -> nn.Module:
    """The MLP, of which the hidden units are sampled."""
    torch.manual_seed(0)
    return fx_approx.transform(mlp().double(), policy, X, **options)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, count: int = 5) -> None:
    """Some steps of training."""
    for step in range(count):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()


def largest(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of parameters and buffers."""
    pairs = zip((*one.parameters(), *one.buffers()), (*other.parameters(), *other.buffers()), strict=True)
    return max(float((a.detach() - b.detach()).abs().nan_to_num().max()) for a, b in pairs)


def placed(sub: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """Which entries of a full parameter ``sub`` has."""
    mask = torch.zeros(parameter.numel(), dtype=torch.bool)
    mask[record_of(sub).cut_of(name).places(parameter).flatten()] = True
    return mask.view(parameter.shape)


def other_selections(sub: nn.Module, approx: nn.Module, scaled: bool) -> list[Selection | None]:
    """Of the sizes of those of ``sub``, drawn at random."""
    found: list[Selection | None] = []
    shared = find(approx)._fx_approx.resample.each()
    for one, selection in zip(shared, record_of(sub).selections, strict=True):
        if selection is None:
            found.append(None)
            continue
        groups, count = selection.indices.shape
        index = torch.stack([torch.randperm(one.pairs)[:count].sort().values for _ in range(groups)])
        found.append(Selection(index, torch.rand(groups, count).double() + 0.5 if scaled else None))
    return found


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether all tensors are equal, bitwise."""
    mine, its = tensors_of(one), tensors_of(other)
    return mine.keys() == its.keys() and all(torch.equal(tensor, its[name]) for name, tensor in mine.items())
