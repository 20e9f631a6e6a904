"""What ranks share: networks, batches, a training loop, how they are started, and where they leave their results."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fx_approx
from fx_approx.policies import Uniform

STEPS = 12
INNER = os.environ.get("FX_APPROX_TEST_INNER", "eager")
"""The backend of most compiled scenarios."""


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


def batch(rank: int, step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Of one rank, 8 images."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    images, labels = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(5, (8,), generator=generator)
    return images.to(dtype), labels


def made(
    name: str,
    sampler: str = "topk",
    scores: str = "weight",
    scope: str = "value",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> nn.Module:
    """A transformed model at ratio 1/2."""
    torch.manual_seed(0)
    policy = Uniform(0.5, sampler, min_k=4, scores=scores, scope=scope)
    return fx_approx.transform(MODELS[name]().to(dtype), policy, batch(0, 0, dtype)[0], **options)


def train(
    model: Any,
    rank: int,
    steps: int = STEPS,
    first: int = 0,
    micro: int = 1,
    optimizer: Any = None,
    after: Any = None,
    clip: float | None = None,
) -> list[float]:
    """Losses of plain SGD with momentum; gradients are reduced with the last of ``micro`` batches."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9) if optimizer is None else optimizer
    dtype = next(model.parameters()).dtype
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        for place in range(micro):
            x, y = batch(rank, step * micro + place, dtype)
            last = place == micro - 1
            if micro > 1 and not isinstance(model, DistributedDataParallel):
                model.set_requires_gradient_sync(last)
            waits = not last and isinstance(model, DistributedDataParallel)
            with model.no_sync() if waits else contextlib.nullcontext():
                loss = F.cross_entropy(model(x), y)
                loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        losses.append(loss.item())
        optimizer.step()
        if after is not None:
            after()
    return losses


Fresh = Callable[[], tuple[nn.Module, nn.Module, torch.optim.Optimizer]]


def resumed(rank: int, folder: str, fresh: Fresh, save: Callable[..., Any], load: Callable[..., None]) -> Any:
    """Six steps at once, and three, a checkpoint, and three by new objects: the losses of the last three."""
    _, outer, optimizer = fresh()
    at_once = train(outer, rank, 6, optimizer=optimizer)
    model, outer, optimizer = fresh()
    train(outer, rank, 3, optimizer=optimizer)
    states = save(model, optimizer)
    if rank == 0:
        torch.save((states, fx_approx.sampler_state_dict(model)), f"{folder}/checkpoint")
    torch.distributed.barrier()
    states, sampling = torch.load(f"{folder}/checkpoint")
    torch.distributed.barrier()
    model, outer, optimizer = fresh()
    load(model, optimizer, *states)
    fx_approx.load_sampler_state_dict(model, sampling)
    return at_once[3:], train(outer, rank, 3, first=3, optimizer=optimizer)


def failing(call: Callable[[], Any]) -> str:
    """The error that ``call`` must end with."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main(scenarios: dict[str, Callable[[int, str], Any]]) -> None:
    """Runs the scenarios that the command names and leaves their results, with what was warned of."""
    rank, size, folder, names = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:]
    try:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
        for name in names:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                result = scenarios[name](rank, folder)
            torch.save((result, [str(one.message) for one in warned]), f"{folder}/{name}.{rank}.pt")
            if name != "killed":
                torch.distributed.barrier()
    except BaseException:
        traceback.print_exc()
        Path(folder, f"failed.{rank}").write_text(traceback.format_exc(), encoding="utf-8")
        os._exit(1)
    # Now and then gloo hangs when a process group that DistributedDataParallel still holds is taken down.
    os._exit(0)


def run(folder: Path, size: int, names: list[str], inner: str = "eager") -> Path:
    """``size`` processes go through scenarios, and leave their results in ``folder``."""
    command = [sys.executable, str(Path(__file__).with_name("all_ranks.py"))]
    environment = {**os.environ, "FX_APPROX_TEST_INNER": inner}
    ranks = [
        subprocess.Popen([*command, str(rank), str(size), str(folder), *names], cwd=folder, env=environment)
        for rank in range(size)
    ]
    try:
        ended = [rank.wait(timeout=400) for rank in ranks]
    finally:
        for rank in ranks:  # those that wait for one that failed
            rank.kill()
            rank.wait()
    failed = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("failed.*"))]
    assert ended == [0] * size, "\n".join(failed)
    return folder


def left(folder: Path, name: str, size: int = 2) -> list[tuple[Any, list[str]]]:
    """Results and warnings of each rank."""
    return [torch.load(folder / f"{name}.{rank}.pt") for rank in range(size)]
