"""What two or four ranks do with shards of a model; run as a script, all that ranks do, one process each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ranks
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

import fx_approx
from fx_approx import distributed
from fx_approx.distributed import norms, segments
from fx_approx.policies import Exact, Override, Uniform

STEPS = 6
DOUBLE = torch.float64
"""So that norms which are added up in another order choose the same."""
made = partial(ranks.made, dtype=DOUBLE)
train = partial(ranks.train, clip=1.0)


class Grouped(nn.Module):
    """Grouped convolutions, whose pairs lie along the rows that are divided; and a weight of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.third, self.head = nn.Conv2d(16, 16, 3, padding=1, groups=2), nn.Parameter(torch.randn(16, 5) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.third(F.relu(self.second(F.relu(self.first(x))))))
        return x.mean((2, 3)) @ self.head


class Turns(nn.Module):
    """Two blocks that are called by turns."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Sequential(nn.Linear(192, 192), nn.ReLU(), nn.Linear(192, 192)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.two(self.one(self.two(self.one(x))))[:, :5]


class Pair(nn.Module):
    """What Dynamo compiles by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(192, 48), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.relu(self.inner(x.flatten(1))))


ranks.MODELS.update({"grouped": Grouped, "turns": Turns})

LAYERS = nn.Linear, nn.Conv2d, nn.BatchNorm2d
SHARDED: dict[str, tuple[type[nn.Module], ...]] = {
    "root": (),
    "layers": LAYERS,
    "blocks": (ranks.Block,),
    "nested": (ranks.Block, nn.MultiheadAttention),
}


def shard(model: nn.Module, how: str, mesh: Any = None, **options: Any) -> nn.Module:
    """``fully_shard`` on parts of the model, the innermost first, and on the root."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),)) if mesh is None else mesh
    for module in reversed(list(model.modules())):
        if isinstance(module, SHARDED[how]):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of it."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def state(model: nn.Module) -> dict[str, Tensor]:
    """Gathered parameters and own buffers."""
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def both(
    rank: int,
    name: str,
    how: str,
    steps: int = STEPS,
    micro: int = 1,
    mesh: Any = None,
    placed: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Trained whole, by DistributedDataParallel, and sharded: steps, an exact tail, an evaluation."""
    found: dict[str, Any] = {"losses": [], "state": [], "output": []}
    for sharded in (False, True):
        model = made(name, **options)
        if sharded:
            outer = shard(model, how, mesh() if mesh is not None else None, shard_placement_fn=placed)
            distributed.enable_fsdp(model)
            after = None
        else:
            outer, after = (
                DistributedDataParallel(model),
                lambda model=model: fx_approx.distributed.synchronize_scores(model),
            )
        losses = train(outer, rank, steps, micro=micro, after=after)
        fx_approx.set_sampling(model, enabled=False)
        losses += train(outer, rank, 2, first=steps, after=after)
        fx_approx.set_sampling(model, enabled=True)
        found["losses"].append(losses)
        found["state"].append(state(model))
        model.eval()
        with torch.no_grad():
            found["output"].append(model(ranks.batch(0, 0, DOUBLE)[0]))
    return found


def gradients(rank: int) -> dict[str, Any]:
    """Columns of a weight that get a gradient, sampled and exact; and what is gathered meanwhile."""
    gathered, reduced = [], []
    run, all_reduce = segments._run, torch.distributed.all_reduce
    found: dict[str, Any] = {"gathered": gathered, "reduced": reduced}
    for sampled in (True, False):
        model = made("vit")
        fx_approx.set_sampling(model, enabled=sampled)
        blocks = list(shard(model, "blocks").blocks)  # type: ignore[arg-type]

        def spy(*given: Any, blocks: Any = blocks) -> Any:
            gathered.append([not isinstance(block.inner.weight, DTensor) for block in blocks])
            return run(*given)

        segments._run = spy  # type: ignore[assignment]
        distributed.enable_fsdp(model)
        norms.dist.all_reduce = lambda tensor, **given: (reduced.append(tensor.numel()), all_reduce(tensor, **given))
        x, y = ranks.batch(rank, 0, DOUBLE)
        loss = F.cross_entropy(model(x), y)
        norms.dist.all_reduce = all_reduce
        loss.backward()
        grad = whole(blocks[0].outer.weight.grad)
        found[f"columns {sampled}"] = int((grad != 0).any(0).sum()), grad.shape[1]
    segments._run = run
    return found


def mixed(rank: int) -> dict[str, Any]:
    """Parameters are gathered in bfloat16, and chosen by in float32."""
    found: dict[str, Any] = {}
    for sampler in ("topk", "systematic"):
        model = ranks.made("vit", sampler)
        plain = ranks.made("vit", sampler)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        shard(model, "blocks", mp_policy=policy)
        distributed.enable_fsdp(model)
        losses = ranks.train(model, rank, STEPS)
        expected = ranks.train(DistributedDataParallel(plain), rank, STEPS)
        found[sampler] = losses, expected, state(model)
    return found


def resumed(rank: int, folder: str) -> Any:
    """Weights and momenta are gathered, and divided again."""

    def fresh() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
        model = made("vit", sampler="systematic", scores="ema")
        shard(model, "blocks")
        distributed.enable_fsdp(model)
        return model, model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    def load(model: nn.Module, optimizer: torch.optim.Optimizer, weights: Any, moments: Any) -> None:
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)

    options = StateDictOptions(full_state_dict=True)
    return ranks.resumed(rank, folder, fresh, partial(get_state_dict, options=options), load)


def compiled(rank: int) -> dict[str, Any]:
    """Around the whole model; the hooks break the graph."""
    plain, model = made("mlp"), made("mlp")
    shard(model, "layers")
    distributed.enable_fsdp(model)
    expected = train(DistributedDataParallel(plain), rank, 3)
    losses = train(torch.compile(model, backend=ranks.INNER), rank, 3)
    return {"losses": (expected, losses), "state": (state(plain), state(model))}


def frontend(rank: int) -> dict[str, Any]:
    """Blocks that Dynamo compiles, each inside the hooks of its own; nothing is registered."""
    found: dict[str, Any] = {"losses": [], "state": []}
    for sharded in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = nn.Sequential(Pair(), nn.Linear(5, 5)).double()
        backend = fx_approx.backend(Uniform(0.5), inner="eager")
        model[0].compile(backend=backend)
        if sharded:
            fully_shard(model[0])
        outer = fully_shard(model) if sharded else DistributedDataParallel(model)
        found["losses"].append(train(outer, rank, STEPS))
        found["state"].append(state(model))
        found["columns"] = int((whole(model[0].outer.weight.grad) != 0).any(0).sum())
    return found


def python(rank: int) -> dict[str, Any]:
    """A hook on a block after registration: the model's own Python runs, by the hooks of its blocks."""
    model = made("vit", scores="uniform")
    shard(model, "blocks")
    distributed.enable_fsdp(model)
    train(model, rank, 1)
    model.blocks[0].register_forward_hook(lambda *given: None)  # type: ignore[index, union-attr, operator]
    return {"losses": train(model, rank, 2), "state": state(model)}


def refused(rank: int) -> dict[str, str]:
    """Wrong uses."""
    x = ranks.batch(rank, 0, DOUBLE)[0]
    found = {"not sharded": ranks.failing(lambda: distributed.enable_fsdp(made("vit")))}
    found["no module"] = ranks.failing(lambda: distributed.enable_fsdp("vit"))
    found["not transformed"] = ranks.failing(lambda: distributed.enable_fsdp(shard(ranks.Vit(), "blocks")))
    for how, name, scores in (("blocks", "vit", "weight"), ("layers", "mlp", "weight"), ("layers", "mlp", "online")):
        model = shard(made(name, scores=scores, scope="layer" if scores == "online" else "value"), how)
        found[f"unregistered {how} {scores}"] = ranks.failing(lambda model=model: model(x))
    turns = made("turns")
    for part in (turns.one, turns.two, turns):
        fully_shard(part)  # type: ignore[arg-type]
    found["turns"] = ranks.failing(lambda: distributed.enable_fsdp(turns))
    hooked = shard(made("vit"), "blocks")
    hooked.blocks[1].register_forward_hook(lambda *given: None)  # type: ignore[index, union-attr, operator]
    found["hooked"] = ranks.failing(lambda: distributed.enable_fsdp(hooked))
    odd = shard(made("vit", seed=rank), "blocks")
    found["other seed"] = ranks.failing(lambda: distributed.enable_fsdp(odd))
    divided = made("mlp")
    weight = divided.get_parameter("3.weight")
    mesh = init_device_mesh("cpu", (2,))
    divided[3].weight = nn.Parameter(torch.distributed.tensor.distribute_tensor(weight, mesh))  # type: ignore[index]
    divided[5] = fully_shard(divided[5])  # type: ignore[index, operator]
    found["placed"] = ranks.failing(lambda: distributed.enable_fsdp(divided))
    late = shard(ranks.Vit(), "blocks")
    found["late"] = ranks.failing(lambda: fx_approx.transform(late, Uniform(0.5, scores="online")))
    model = shard(made("vit"), "blocks")
    distributed.enable_fsdp(model)
    found["verify"] = ranks.failing(lambda: fx_approx.analysis.verify(model, x))
    found["restore"] = ranks.failing(lambda: fx_approx.restore(model))
    return found


def partly(rank: int) -> dict[str, Any]:
    """One block stays exact, and registration is repeated."""
    torch.manual_seed(0)
    sampled = Uniform(0.5, min_k=4)
    policy = Override({"blocks.0.*": Exact()}, base=sampled)
    found: dict[str, Any] = {"losses": [], "state": []}
    for sharded in (False, True):
        torch.manual_seed(0)
        model = fx_approx.transform(ranks.Vit().double(), policy, ranks.batch(0, 0, DOUBLE)[0])
        outer = shard(model, "nested") if sharded else DistributedDataParallel(model)
        for _ in range(2 * sharded):
            distributed.enable_fsdp(model)
        found["losses"].append(train(outer, rank, STEPS))
        found["state"].append(state(model))
    return found


def columns(parameter: nn.Parameter) -> Shard:
    """Divides weights by their columns."""
    return Shard(parameter.dim() - 1)


def copies(count: int) -> Any:
    """A mesh whose shards are there so many times, two of each."""
    return init_device_mesh("cpu", (count, 2), mesh_dim_names=("copies", "shards"))


def _both(*given: Any, **options: Any) -> Callable[[int, str], Any]:
    return lambda rank, folder: both(rank, *given, **options)


SCENARIOS: dict[str, Callable[[int, str], Any]] = {
    "vit blocks weight value": _both("vit", "blocks", 12),
    "vit nested stale group": _both("vit", "nested", scores="ema", scope="group"),
    "vit root weight value": _both("vit", "root"),
    "vit blocks online": _both("vit", "blocks", scores="online", scope="layer"),
    "vit blocks weight micro": _both("vit", "blocks", 3, micro=2),
    "cnn layers stale group": _both("cnn", "layers", scores="ema", scope="group"),
    "cnn layers uniform bernoulli": _both("cnn", "layers", scores="uniform", sampler="bernoulli"),
    "mlp layers weight systematic": _both("mlp", "layers", sampler="systematic"),
    "grouped layers weight value": _both("grouped", "layers"),
    "mlp layers weight columns": _both("mlp", "layers", placed=columns),
    "mlp layers weight copies": _both("mlp", "layers", mesh=lambda: copies(1)),
    **{
        scenario.__name__: lambda rank, folder, scenario=scenario: scenario(rank)
        for scenario in (partly, gradients, mixed, compiled, frontend, python, refused)
    },
    "resumed": resumed,
    "four copies": _both("mlp", "layers", mesh=lambda: copies(2)),
    "four shards": _both("cnn", "layers"),
}
