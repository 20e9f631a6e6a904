"""A small model whose layers share selections, and what its forwards draw."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.runtime.approx_module import find
from fx_approx.runtime.shared_selection import SharedSelection
from fx_approx.sampling import Selection
from tests.helpers.hoisting import Layers


class Readers(nn.Module):
    """Two layers read what ``first`` makes, and a third what the addition makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.left, self.right, self.last = nn.Linear(16, 16), nn.Linear(16, 5), nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        y = x + self.left(x)
        return torch.cat([self.right(x), self.last(y)], 1)


def batch(seed: int = 0, rows: int = 4) -> Tensor:
    return torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def readers(policy: Layers, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return fx_approx.transform(Readers().double(), policy, batch(), **options)


def selections(model: nn.Module, x: Any) -> list[Selection | None]:
    """What one training forward draws, in order."""
    found: list[tuple[Selection | None, ...]] = []
    handle = find(model)._fx_approx.resample.register_forward_hook(lambda m, a, output: found.append(output))
    try:
        model(x)
    finally:
        handle.remove()
    assert len(found) == 1
    return list(found[0])


def indices(model: nn.Module, x: Any) -> list[list[int] | None]:
    return [None if one is None else one.indices.flatten().tolist() for one in selections(model, x)]


def shared(model: nn.Module) -> list[SharedSelection]:
    return list(find(model)._fx_approx.resample.each())


def names(model: nn.Module) -> list[list[str]]:
    return [[r.name for r in one.readings] for one in find(model)._fx_approx.record.analysis.sharing.classes]


def shuffle(model: nn.Module) -> None:
    """Other weights, so that other channels have the largest norms."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(torch.rand(p.shape[-1], dtype=p.dtype) + 0.1)


def same(one: list[Selection | None], other: list[Selection | None]) -> bool:
    def equal(a: Selection | None, b: Selection | None) -> bool:
        if a is None or b is None:
            return a is b
        return torch.equal(a.indices, b.indices) and (a.scale is b.scale or torch.equal(a.scale, b.scale))

    return all(map(equal, one, other))
