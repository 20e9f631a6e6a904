"""What two ranks do with a recipe, each on data of its own; run as a script, one process each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import ranks
import torch
import torch.nn.functional as F
from ranks import MODELS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fx_approx
from fx_approx import recipes
from fx_approx.recipes import calls
from fx_approx.recipes.gain import Gain

STEPS = 30  # 10 exact ones, 17 that sample, 3 exact ones
DOUBLE = torch.float64


class Untraced(nn.Module):
    """Asks for what a graph does not know, so that a backend serves it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = MODELS["mlp"]()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * (1.0 if torch.is_grad_enabled() else 2.0)


def own_batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Each rank sees one half of the pixels only, so that its norms are its own."""
    x, y = ranks.batch(rank, step, DOUBLE)
    x[:, :, slice(4 * rank, 4 * rank + 4)] = 0
    return x, y


def trained(rank: int, make: Callable[[], nn.Module]) -> dict[str, Any]:
    """The recipe to its end; what each rank had learnt when it began to sample, and what was set to zero."""
    torch.manual_seed(0)
    model = make().to(DOUBLE)
    recipe = recipes.finetune(model, own_batch(rank, 0)[0], STEPS, check=False)
    parallel = DistributedDataParallel(recipe.model)
    optimizer = torch.optim.SGD(recipe.model.parameters(), 0.05, momentum=0.9)
    learnt, zeros = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = own_batch(rank, step)
        F.cross_entropy(parallel(x), y).backward()
        optimizer.step()
        if step == 9:
            learnt.append(copy.deepcopy(recipe.state_dict(model=False)["sampler"]))
        recipe.step()
        if step in (9, 26):
            learnt.append(copy.deepcopy(recipe.state_dict(model=False)["sampler"]))
            zeros.append([(p == 0).all(0) for p in model.parameters() if p.dim() > 1])
    return {
        "learnt": learnt,
        "zeros": zeros,
        "parameters": [p.detach().clone() for p in recipe.finish().parameters()],
        "text": str(recipe),
    }


def agreed(rank: int, folder: str) -> str:
    """One rank finds that it pays, the other that it does not."""
    calls.timed = lambda *_: Gain((1.5, 1.04)[rank], 1.0)
    return str(recipes.finetune(MODELS["mlp"](), torch.randn(8, 3, 8, 8), STEPS))


def synchronized(rank: int, folder: str) -> list[float]:
    """A backend's graphs, of which each rank has fed other numbers."""
    torch.manual_seed(0)
    policy = fx_approx.policies.Uniform(0.5, min_k=4, scores="ema")
    handle, model = fx_approx.backend(policy, inner="eager"), Untraced()
    model.compile(backend=handle)
    model(ranks.batch(rank, 0)[0])
    fx_approx.distributed.synchronize_scores(handle)
    (graph,) = fx_approx.sampler_state_dict(handle)["graphs"]
    return [number for row in graph["state"]["resample"]["running"] for number in torch.tensor(row).flatten().tolist()]


SCENARIOS: dict[str, Callable[[int, str], Any]] = {
    "graph": lambda rank, folder: trained(rank, MODELS["mlp"]),
    "backend": lambda rank, folder: trained(rank, Untraced),
    "agreed": agreed,
    "synchronized": synchronized,
}
