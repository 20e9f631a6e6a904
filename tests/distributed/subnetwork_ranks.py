"""What two ranks do with a subnetwork that they train together; run as a script, one process each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import batch, failing, made
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fx_approx
from fx_approx.sampling import Selection
from fx_approx.schedules import ExactTail, ExactWarmup, PlanRatios
from fx_approx.subnetworks import Phases, extract, merge, narrow_optimizer, record_of, reselect
from fx_approx.subnetworks.record import tensors_of

DOUBLE = torch.float64
STEPS = 6


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """With momentum."""
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def joint(step: int) -> tuple[Tensor, Tensor]:
    """The batches of both ranks."""
    (x, y), (other, its) = batch(0, step, DOUBLE), batch(1, step, DOUBLE)
    return torch.cat((x, other)), torch.cat((y, its))


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, given: tuple[Tensor, Tensor]) -> None:
    """Mean loss of a batch."""
    optimizer.zero_grad()
    F.cross_entropy(model(given[0]), given[1]).backward()
    optimizer.step()


def numbers(model: nn.Module) -> list[Tensor]:
    """Parameters, detached."""
    return [p.detach().clone() for p in model.parameters()]


def train(run: nn.Module, model: nn.Module, alone: nn.Module, single: nn.Module, rank: int) -> None:
    """Ranks train ``run``, a subnetwork of ``model``, and one process ``single``; selected anew once, and merged."""
    optimizer, other = sgd(run), sgd(single)
    for step in range(STEPS):
        one_step(run, optimizer, batch(rank, step, DOUBLE))
        one_step(single, other, joint(step))
        if step in (STEPS // 2 - 1, STEPS - 1):
            merge(run, model)
            merge(single, alone)
        if step == STEPS // 2 - 1:
            reselect(run, model, process_group=dist.group.WORLD)
            reselect(single, alone)


def parallel(rank: int, name: str, scope: str = "value") -> dict[str, Any]:
    """Plain DistributedDataParallel of a subnetwork, selected anew once, and one process on the joint batch."""
    model = made(name, scope=scope, dtype=DOUBLE)
    alone = copy.deepcopy(model)
    sub, single = extract(model, process_group=dist.group.WORLD), extract(alone)
    wrapped, sent = DistributedDataParallel(sub), []

    def count(state: Any, bucket: Any) -> Any:
        sent.append(bucket.buffer().numel())
        return allreduce_hook(state, bucket)

    wrapped.register_comm_hook(None, lambda state, bucket: count(state, bucket))
    tensors = [id(tensor) for tensor in tensors_of(sub).values()]
    train(wrapped, model, alone, single, rank)
    return {
        "parameters": (numbers(model), numbers(alone)),
        "sent": sum(sent) / STEPS,
        "narrow": sum(p.numel() for p in sub.parameters()),
        "full": sum(p.numel() for p in model.parameters()),
        "same": tensors == [id(tensor) for tensor in tensors_of(sub).values()],
    }


def phases(rank: int) -> dict[str, Any]:
    """Phases of a model in parallel, and of one process on the joint batch."""
    model = made("mlp", dtype=DOUBLE)
    alone = copy.deepcopy(model)
    schedule = ExactTail(ExactWarmup(PlanRatios(), 2), total=10, steps=2)
    wrapped: list[str] = []

    def wrap(module: nn.Module) -> nn.Module:
        wrapped.append(type(module).__name__)
        return DistributedDataParallel(module)

    optimizer, other = sgd(model), sgd(alone)
    together = Phases(model, optimizer, schedule, interval=3, wrap=wrap)
    single = Phases(alone, other, schedule, interval=3)
    for step in range(10):
        one_step(together.model, optimizer, batch(rank, step, DOUBLE))
        one_step(single.model, other, joint(step))
        together.step()
        single.step()
    return {"parameters": (numbers(together.finish()), numbers(single.finish())), "wrapped": wrapped}


def sharded(rank: int) -> dict[str, Any]:
    """``fully_shard`` of a subnetwork, and one process on the joint batch."""
    model = made("mlp", dtype=DOUBLE)
    alone = copy.deepcopy(model)
    sub, single = extract(model, process_group=dist.group.WORLD), extract(alone)
    fully_shard(sub)
    refused = failing(lambda: narrow_optimizer(sgd(model), sub, model))
    train(sub, model, alone, single, rank)
    return {"parameters": (numbers(model), numbers(alone)), "refused": refused}


def differing(rank: int) -> dict[str, Any]:
    """The second rank has other selections, then another model."""
    model = made("mlp", dtype=DOUBLE)
    sub = extract(model, process_group=dist.group.WORLD)
    merge(sub, model)
    before = {name: tensor.clone() for name, tensor in tensors_of(sub).items()}
    given = [None if one is None else Selection(one.indices.clone(), None) for one in record_of(sub).selections]
    assert given[-1] is not None
    if rank == 1:
        given[-1] = Selection(given[-1].indices.flip(1), None)  # the same units in another order
    errors = {
        "extract": failing(lambda: extract(model, given, process_group=dist.group.WORLD)),
        "reselect": failing(lambda: reselect(sub, model, given, process_group=dist.group.WORLD)),
    }
    same = all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(sub).items())
    if rank == 1:
        with torch.no_grad():
            model[3].weight.copy_(torch.randn(48, 48))  # type: ignore[index, union-attr, operator]
    optimizer = sgd(model)
    wrap: Callable[[nn.Module], nn.Module] = DistributedDataParallel
    errors["Phases"] = failing(lambda: Phases(model, optimizer, PlanRatios(), wrap=wrap))
    with_model = {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    return {"errors": errors, "same": same and record_of(sub).merged and with_model}


def alone(rank: int) -> bool:
    """One rank does what asks no other one, under a process group."""
    if rank == 0:
        model = made("mlp", "systematic", dtype=DOUBLE)
        fx_approx.set_sampling(model, 0.5)
        sub = extract(model)
        merge(sub, model)
        reselect(sub, model)
        merge(sub, model)
        phases = Phases(model, optimizer := sgd(model), PlanRatios(), interval=1, preserve=False)
        one_step(phases.model, optimizer, batch(0, 0, DOUBLE))
        phases.step()
        phases.finish()
    return True


SCENARIOS: dict[str, Callable[[int, str], Any]] = {
    "mlp": lambda rank, folder: parallel(rank, "mlp"),
    "vit": lambda rank, folder: parallel(rank, "vit", "group"),
    **{
        scenario.__name__: lambda rank, folder, scenario=scenario: scenario(rank)
        for scenario in (phases, sharded, differing, alone)
    },
}
