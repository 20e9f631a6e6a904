"""What two or more ranks do that hold a whole model each."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from ranks import INNER, MODELS, batch, failing, made, resumed, train
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import fx_approx
from fx_approx import distributed
from fx_approx.policies import Tokens, Uniform
from fx_approx.schedules import ExactWarmup, NoiseController, PlanRatios, RatioScheduler


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
    plain = train(dense, rank, micro=micro, after=lambda: distributed.synchronize_scores(model))
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


def sparse(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """In parallel, by slices."""
    wrapped = DistributedDataParallel(model)
    distributed.enable_sparse_allreduce(wrapped, **options)
    return wrapped


def other_plan(rank: int) -> str:
    """The second rank samples more."""
    model = made("mlp")
    if rank == 1:
        fx_approx.set_sampling(model, {"3": 0.75})
    return failing(lambda: sparse(model))


def other_weights(rank: int) -> str:
    """The second rank resumes other weights behind DistributedDataParallel's back."""
    model = made("mlp")
    wrapped = sparse(model, check_every=2)
    train(wrapped, rank, 2)
    if rank == 1:
        with torch.no_grad():
            next(iter(model.parameters())).copy_(torch.randn(48, 192))
            model[3].weight.copy_(torch.randn(48, 48))  # type: ignore[index, union-attr, operator]
    return failing(lambda: train(wrapped, rank, 4))


def older_step(rank: int) -> str:
    """The second rank resumes an older random state."""
    model = made("mlp", "systematic")
    old = fx_approx.sampler_state_dict(model)
    wrapped = sparse(model, check_every=2)
    train(wrapped, rank, 2)
    if rank == 1:
        fx_approx.load_sampler_state_dict(model, old)
    return failing(lambda: train(wrapped, rank, 4))


def micro_batches(rank: int) -> dict[str, Any]:
    """Stale scores in no_sync."""
    model = made("cnn", scores="ema")
    wrapped = sparse(model, check_every=1)
    message = failing(lambda: train(wrapped, rank, 1, micro=2))
    with fx_approx.reuse_selection(model):
        train(wrapped, rank, 2, micro=2)
    return {"message": message, "parameters": parameters(model)}


def scaled(rank: int) -> dict[str, Any]:
    """Mixed precision with a scaler, one step of which overflows on one rank."""
    model = made("cnn")
    wrapped = sparse(model, check_every=1)
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


def resumes(rank: int, folder: str) -> Any:
    """Weights, momenta and the state of sampling."""

    def fresh() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
        model = made("cnn", "systematic", scores="ema")
        return model, sparse(model), torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    def load(model: nn.Module, optimizer: torch.optim.Optimizer, weights: Any, moments: Any) -> None:
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)

    return resumed(rank, folder, fresh, lambda model, optimizer: (model.state_dict(), optimizer.state_dict()), load)


def killed(rank: int) -> str:
    """The second rank dies within a step."""
    wrapped = sparse(made("mlp"))
    train(wrapped, rank, 1)
    if rank == 1:
        os._exit(0)
    return failing(lambda: train(wrapped, rank, 2))


def compiled(call: nn.Module, backend: str = "aot_eager") -> nn.Module:
    """Around DistributedDataParallel, or in it."""
    return torch.compile(call, backend=backend)  # type: ignore[return-value]


# ---- what sets ratios, learns scores, and compiles


def controlled(rank: int) -> dict[str, Any]:
    """A scheduler and a controller of the noise, on different data."""
    model = made("mlp", scope="layer")
    parallel = DistributedDataParallel(model)
    scheduler = RatioScheduler(parallel, ExactWarmup(PlanRatios(), 1))
    ratios = [scheduler.get_last_ratio()]
    scheduler.step()
    ratios.append(scheduler.get_last_ratio())
    optimizer = torch.optim.SGD(parallel.parameters(), 0.05)
    controller = NoiseController(
        parallel, lambda model, given: F.cross_entropy(model(given[0]), given[1]), target=0.01, every=3, overhead=1.0
    )
    weights: dict[str, Tensor] = {}
    for step in range(12):
        controller.step(batch(rank, step))
        if step == 2:
            weights = copy.deepcopy(model.state_dict())
        train(parallel, rank, 1, first=step, optimizer=optimizer)
    return {"state": controller.state_dict(), "ratios": ratios, "measured": weights}


def synchronized(rank: int) -> dict[str, Any]:
    """Running norms that differ, averaged."""
    model = made("mlp", scores="ema", scope="layer")
    for step in range(3):
        model(batch(rank, step)[0] * torch.arange(1.0, 9.0) ** (2 * rank))
    shared = list(model._fx_approx.resample.each())  # type: ignore[union-attr, operator]
    before = [one.running.clone() for one in shared]
    distributed.synchronize_scores(model)
    return {"before": before, "after": [one.running for one in shared], "age": [one.age for one in shared]}


def tokens(rank: int) -> dict[str, Any]:
    """Tokens chosen by running norms of the gradient, averaged after each step; and what each rank learnt alone."""
    torch.manual_seed(0)
    policy = Tokens(0.5, scores="gradient", per_example=True)
    model = fx_approx.transform(MODELS["vit"](), policy, batch(0, 0)[0])
    (selection,) = model._fx_approx.tokens  # type: ignore[union-attr, misc]
    chosen: list[Tensor] = []
    alone: list[Tensor] = []
    selection.register_forward_hook(lambda module, args, found: chosen.append(found.indices))

    def synchronize() -> None:
        alone.append(selection.running.clone())
        distributed.synchronize_scores(model)

    train(DistributedDataParallel(model), rank, 6, after=synchronize)
    return {"chosen": chosen, "alone": alone, "state": selection.state()}


class Tanhs(nn.Module):  # Dynamo does not look into a Sequential that is called from torch's own code
    """Layers that fill a bucket each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(384, 384).double() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1).repeat(1, 2)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x[:, :5]


def frontend(rank: int, optimize: bool) -> tuple[list[Tensor], int, int]:
    """Below DistributedDataParallel, whose buckets cut the graph; and what one process does with all the data."""
    torch._dynamo.reset()
    torch._dynamo.config.optimize_ddp = optimize
    own = Tanhs()
    model: nn.Module = own if rank < 0 else DistributedDataParallel(own, bucket_cap_mb=1)
    backend = fx_approx.backend(Uniform(0.5), inner=INNER)
    call = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    for step in range(3):
        x = torch.cat([batch(one, step, torch.float64)[0] for one in ((0, 1) if rank < 0 else (rank,))])
        optimizer.zero_grad()
        call(x).square().mean().backward()
        optimizer.step()
    torch._dynamo.config.optimize_ddp = True
    return parameters(own), len(backend.pieces), sum(1 for row in backend.report().rows if row.samples)


def _both(name: str, **given: Any) -> Callable[[int, str], Any]:
    return lambda rank, folder: both(rank, name, **given)


SCENARIOS: dict[str, Callable[[int, str], Any]] = {
    **{f"{name} {s}": _both(name, scope=s) for name, s in (("mlp", "value"), ("cnn", "group"), ("vit", "value"))},
    "cnn stale": _both("cnn", scores="ema"),
    "mlp systematic": _both("mlp", sampler="systematic"),
    "cnn bernoulli": _both("cnn", sampler="bernoulli"),
    "mlp systematic, micro": _both("mlp", micro=3, sampler="systematic"),
    "cnn fp16": _both("cnn", inner=fp16_compress_hook),
    "cnn compiled": _both("cnn", wrap=compiled),
    "cnn compiled inside": _both("cnn", inside=partial(compiled, backend=INNER)),
    "cnn unused": _both("cnn", kept={"find_unused_parameters": True}),
    "cnn static": _both("cnn", kept={"static_graph": True}),
    "cnn views": _both("cnn", kept={"gradient_as_bucket_view": True}),
    "apart": _both("cnn", apart=allreduce_hook),
    "power": lambda rank, folder: power(rank),
    "scaled": lambda rank, folder: scaled(rank),
    "other seed": lambda rank, folder: failing(lambda: sparse(made("mlp", seed=rank))),
    "other plan": lambda rank, folder: other_plan(rank),
    "other weights": lambda rank, folder: other_weights(rank),
    "older step": lambda rank, folder: older_step(rank),
    "micro batches": lambda rank, folder: micro_batches(rank),
    "resumed": resumes,
    "controlled": lambda rank, folder: controlled(rank),
    "synchronized": lambda rank, folder: synchronized(rank),
    "tokens": lambda rank, folder: tokens(rank),
    "frontend": lambda rank, folder: [frontend(*how) for how in ((rank, True), (rank, False), (-1, False))],
    "killed": lambda rank, folder: killed(rank),
}
