"""What two or more ranks do in tests/distributed/test_distributed.py, one process each."""

from __future__ import annotations

import copy
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import fx_approx
from fx_approx import distributed
from fx_approx.policies import Uniform

STEPS = 50


class Block(nn.Module):
    """A transformer block, of which an MLP is the larger part."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.outer(F.gelu(self.inner(self.norm(x))))


class Vit(nn.Module):
    """A small vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Conv2d(3, 32, 4, 4), nn.Sequential(Block(), Block())
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


def _conv(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(
        *(nn.Flatten(), nn.Linear(192, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 5))
    ),
    "cnn": lambda: nn.Sequential(
        *(*_conv(3, 16), *_conv(16, 16), *_conv(16, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    ),
    "vit": Vit,
}


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Of one rank, 8 images."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(5, (8,), generator=generator)


def made(name: str, sampler: str = "topk", scores: str = "weight", scope: str = "value", **options: Any) -> nn.Module:
    """A transformed model at ratio 1/2."""
    torch.manual_seed(0)
    policy = Uniform(0.5, sampler, min_k=4, scores=scores, scope=scope)
    return fx_approx.transform(MODELS[name](), policy, batch(0, 0)[0], **options)


def train(model: nn.Module, rank: int, steps: int = STEPS, first: int = 0, micro: int = 1, **given: Any) -> list[float]:
    """Losses of plain SGD with momentum."""
    after, optimizer = given.get("after"), given.get("optimizer")
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9) if optimizer is None else optimizer
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        for place in range(micro):
            x, y = batch(rank, step * micro + place)
            if place < micro - 1:
                with model.no_sync():  # type: ignore[operator]
                    F.cross_entropy(model(x), y).backward()
            else:
                loss = F.cross_entropy(model(x), y)
                loss.backward()
        losses.append(loss.item())
        optimizer.step()
        if after is not None:
            after()
    return losses


def parameters(model: nn.Module) -> list[Tensor]:
    """Detached copies."""
    return [p.detach().clone() for p in model.parameters()]


def both(
    rank: int,
    name: str,
    micro: int = 1,
    inner: Any = None,
    wrap: Any = None,
    inside: Any = None,
    kept: Any = None,
    apart: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Trained with dense reduction and with slices; ``apart`` reduces what never has any."""
    model = made(name, **options)
    other = copy.deepcopy(model)
    dense = DistributedDataParallel(model)
    if inner is not None:
        dense.register_comm_hook(None, inner)
    plain = train(dense, rank, micro=micro, after=lambda: fx_approx.distributed.synchronize_scores(model))
    inner_model = other if inside is None else inside(other)
    small = {} if wrap or inside else {"bucket_cap_mb": 0.01}  # several buckets; Dynamo refuses so small ones
    ours = DistributedDataParallel(inner_model, **small, **(kept or {}))
    hook = None if apart is None else (None, apart)
    traffic = distributed.enable_sparse_allreduce(
        ours, check_every=5, dense=hook, **({} if inner is None else {"inner": inner})
    )
    sliced = train(ours if wrap is None else wrap(ours), rank, micro=micro)
    return {
        "losses": (plain, sliced),
        "parameters": (parameters(model), parameters(other)),
        "bytes": (traffic.dense, traffic.predicted, traffic.sent),
        "text": str(traffic),
    }


def power(rank: int) -> dict[str, Any]:
    """PowerSGD for what has no slice: the second convolution, of which neither inputs nor outputs are chosen."""
    torch.manual_seed(0)
    policy = Uniform(0.5, min_k=20)
    model = fx_approx.transform(MODELS["cnn"](), policy, batch(0, 0)[0])
    plain = train(DistributedDataParallel(copy.deepcopy(model)), rank)
    wrapped = DistributedDataParallel(model)
    group = torch.distributed.new_group()  # callbacks of the one must not wait behind those of the other
    state = PowerSGDState(group, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=1)
    traffic = distributed.enable_sparse_allreduce(wrapped, dense=(state, powerSGD_hook), check_every=5)
    losses = plain, train(wrapped, rank)
    errors = sum(error.count_nonzero().item() for error in state.error_dict.values())
    sent = (traffic.dense, traffic.predicted, traffic.sent)
    return {"losses": losses, "parameters": parameters(model), "errors": errors, "steps": state.iter, "bytes": sent}


def failing(call: Callable[[], Any]) -> str:
    """The message of the error that ``call`` must end with."""
    try:
        call()
    except (fx_approx.errors.DistributedMismatchError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def other_seed(rank: int) -> str:
    """Ranks with different seeds."""
    wrapped = DistributedDataParallel(made("mlp", seed=rank))
    return failing(lambda: distributed.enable_sparse_allreduce(wrapped))


def other_plan(rank: int) -> str:
    """The second rank samples more."""
    model = made("mlp")
    if rank == 1:
        fx_approx.set_sampling(model, {"3": 0.75})
    return failing(lambda: distributed.enable_sparse_allreduce(DistributedDataParallel(model)))


def other_weights(rank: int) -> str:
    """The second rank resumes other weights behind DistributedDataParallel's back."""
    model = made("mlp")
    wrapped = DistributedDataParallel(model)
    distributed.enable_sparse_allreduce(wrapped, check_every=2)
    train(wrapped, rank, 2)
    if rank == 1:
        with torch.no_grad():
            next(iter(model.parameters())).copy_(torch.randn(48, 192))
            model[3].weight.copy_(torch.randn(48, 48))  # type: ignore[index, union-attr, operator]
    return failing(lambda: train(wrapped, rank, 4))


def older_step(rank: int) -> str:
    """The second rank resumes an older random state."""
    model = made("mlp", "systematic")
    wrapped = DistributedDataParallel(model)
    old = fx_approx.sampler_state_dict(model)
    distributed.enable_sparse_allreduce(wrapped, check_every=2)
    train(wrapped, rank, 2)
    if rank == 1:
        fx_approx.load_sampler_state_dict(model, old)
    return failing(lambda: train(wrapped, rank, 4))


def micro_batches(rank: int) -> dict[str, Any]:
    """Stale scores in no_sync."""
    model = made("cnn", scores="ema")
    wrapped = DistributedDataParallel(model)
    distributed.enable_sparse_allreduce(wrapped, check_every=1)
    message = failing(lambda: train(wrapped, rank, 1, micro=2))
    with fx_approx.reuse_selection(model):
        train(wrapped, rank, 2, micro=2)
    return {"message": message, "parameters": parameters(model)}


def scaled(rank: int) -> dict[str, Any]:
    """Mixed precision with a scaler, one step of which overflows on one rank."""
    model = made("cnn")
    wrapped = DistributedDataParallel(model)
    distributed.enable_sparse_allreduce(wrapped, check_every=1)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.05), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scales = []
    for step in range(4):
        x, y = batch(rank, step)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(wrapped(x), y)
        if step == 1 and rank == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        before = parameters(model)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        skipped = all(torch.equal(a, b) for a, b in zip(before, parameters(model), strict=True))
        assert skipped == (step == 1), step
    return {"scales": scales, "parameters": parameters(model)}


def resumed(rank: int, folder: str) -> dict[str, Any]:
    """Six steps at once, and three, a checkpoint, and three by new objects."""
    model = made("cnn", "systematic", scores="ema")
    wrapped = DistributedDataParallel(model)
    distributed.enable_sparse_allreduce(wrapped)
    whole = train(wrapped, rank, 6)
    model = made("cnn", "systematic", scores="ema")
    wrapped = DistributedDataParallel(model)
    distributed.enable_sparse_allreduce(wrapped)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    train(wrapped, rank, 3, optimizer=optimizer)
    if rank == 0:
        state = model.state_dict(), optimizer.state_dict(), fx_approx.sampler_state_dict(model)
        torch.save(state, f"{folder}/checkpoint")
    torch.distributed.barrier()
    weights, moments, sampling = torch.load(f"{folder}/checkpoint")
    model = made("cnn", "systematic", scores="ema")
    model.load_state_dict(weights)
    fx_approx.load_sampler_state_dict(model, sampling)
    wrapped = DistributedDataParallel(model)
    distributed.enable_sparse_allreduce(wrapped)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    optimizer.load_state_dict(moments)
    return {"losses": (whole[3:], train(wrapped, rank, 3, 3, optimizer=optimizer)), "parameters": parameters(model)}


def killed(rank: int) -> str:
    """The second rank dies within a step."""
    model = made("mlp")
    wrapped = DistributedDataParallel(model)
    distributed.enable_sparse_allreduce(wrapped)
    train(wrapped, rank, 1)
    if rank == 1:
        os._exit(0)
    return failing(lambda: train(wrapped, rank, 2))


def compiled(call: nn.Module) -> nn.Module:
    """Around DistributedDataParallel."""
    return torch.compile(call, backend="aot_eager")  # type: ignore[return-value]


SCENARIOS: dict[str, Callable[[int], Any]] = {
    **{
        f"{name} {s}": lambda rank, name=name, s=s: both(rank, name, scope=s)
        for name in MODELS
        for s in ("value", "group")
    },
    "cnn stale": lambda rank: both(rank, "cnn", scores="ema"),
    "mlp systematic": lambda rank: both(rank, "mlp", sampler="systematic"),
    "cnn bernoulli": lambda rank: both(rank, "cnn", sampler="bernoulli"),
    "mlp systematic, micro": lambda rank: both(rank, "mlp", micro=3, sampler="systematic"),
    "cnn fp16": lambda rank: both(rank, "cnn", inner=fp16_compress_hook),
    "cnn compiled": lambda rank: both(rank, "cnn", wrap=compiled),
    "cnn compiled inside": lambda rank: both(rank, "cnn", inside=compiled),
    "cnn unused": lambda rank: both(rank, "cnn", kept={"find_unused_parameters": True}),
    "cnn static": lambda rank: both(rank, "cnn", kept={"static_graph": True}),
    "cnn views": lambda rank: both(rank, "cnn", kept={"gradient_as_bucket_view": True}),
    "apart": lambda rank: both(rank, "cnn", apart=allreduce_hook),
    "power": power,
    "scaled": scaled,
    "other seed": other_seed,
    "other plan": other_plan,
    "other weights": other_weights,
    "older step": older_step,
    "micro batches": micro_batches,
    "killed": killed,
}


def main(rank: int, size: int, folder: str, names: list[str]) -> None:
    """Runs the scenarios and leaves their results."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    for name in names:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            result = resumed(rank, folder) if name == "resumed" else SCENARIOS[name](rank)
        torch.save((result, [str(one.message) for one in warned]), f"{folder}/{name}.{rank}.pt")
        if name != "killed":
            torch.distributed.barrier()


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
    except BaseException:
        traceback.print_exc()
        Path(sys.argv[3], f"failed.{sys.argv[1]}").write_text(traceback.format_exc(), encoding="utf-8")
        os._exit(1)
    # Now and then gloo hangs when a process group that DistributedDataParallel still holds is taken down.
    os._exit(0)
