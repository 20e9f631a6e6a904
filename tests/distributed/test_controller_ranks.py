"""Two processes with different data measure the noise of their common step, and decide alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Uniform
from fx_approx.schedules import ExactWarmup, NoiseController, PlanRatios, RatioScheduler

STEPS = 12


def _transformed() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    return fx_approx.transform(model, Uniform(0.5, min_k=1, scope="layer"), torch.randn(8, 16))


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(8, 16, generator=generator), torch.randint(4, (8,), generator=generator)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = _transformed()
    parallel = nn.parallel.DistributedDataParallel(model)
    scheduler = RatioScheduler(parallel, ExactWarmup(PlanRatios(), 1))
    ratios = [scheduler.get_last_ratio()]
    scheduler.step()
    ratios.append(scheduler.get_last_ratio())
    optimizer = torch.optim.SGD(parallel.parameters(), 0.05)
    controller = NoiseController(parallel, _loss, target=0.01, every=3, overhead=1.0)
    for step in range(STEPS):
        batch = _batch(rank, step)
        controller.step(batch)
        if step == 2:
            torch.save(model.state_dict(), f"{folder}/measured.{rank}.pt")
        optimizer.zero_grad()
        _loss(parallel, batch).backward()
        optimizer.step()
    result: dict[str, Any] = {"state": controller.state_dict(), "ratios": ratios}
    Path(folder, f"{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    torch.distributed.barrier()
    # Now and then gloo hangs when a process group that DistributedDataParallel still holds is taken down.
    os._exit(0)


def _gradient(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(_loss(model, batch), list(model.parameters()))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)]) for rank in range(2)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:  # those that wait for one that failed
            rank.kill()
            rank.wait()
    return folder


def test_ranks_decide_alike(folder: Path) -> None:
    one, other = (json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2))
    assert one == other
    history = one["state"]["history"]
    assert len(history) == STEPS // 3 and any(record["position"] != record["moved_to"] for record in history)


def test_the_noise_is_that_of_the_averaged_gradient(folder: Path) -> None:
    """Both kinds, from the gradients of both ranks' data in one process."""
    record = json.loads((folder / "0.json").read_text(encoding="utf-8"))["state"]["history"][0]
    model = _transformed()
    model.load_state_dict(torch.load(folder / "measured.0.pt"))
    NoiseController(model, _loss)  # the ratios to begin with
    exact = fx_approx.restore(_transformed())
    exact.load_state_dict(model.state_dict())
    batches = [_batch(rank, 2) for rank in range(2)]
    parts = [(x[half], y[half]) for x, y in batches for half in (slice(0, 4), slice(4, 8))]
    spread = torch.stack([_gradient(exact, part) for part in parts]).var(0).sum() / 4
    errors = [_gradient(model, batch) - _gradient(exact, batch) for batch in batches]
    assert record["sgd"] == pytest.approx(float(spread), rel=1e-4)
    assert record["sampling"] == pytest.approx(float((sum(errors) / 2).square().sum()), rel=1e-4)
    assert not torch.allclose(errors[0], errors[1])


def test_a_scheduler_drives_a_data_parallel_model(folder: Path) -> None:
    exact, planned = json.loads((folder / "0.json").read_text(encoding="utf-8"))["ratios"]
    assert set(exact.values()) == {1.0} and set(planned.values()) == {0.5} and len(planned) == 3


if __name__ == "__main__":
    _rank(int(sys.argv[1]), sys.argv[2])
