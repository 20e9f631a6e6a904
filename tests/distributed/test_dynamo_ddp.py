"""The Dynamo frontend below DistributedDataParallel: two ranks train as one process with all the data does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fx_approx
from fx_approx.policies import Uniform

POLICY = Uniform(0.5)


class _Net(nn.Module):  # Dynamo does not look into a Sequential that is called from torch's own code
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(384, 384) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def _model() -> nn.Module:
    torch.manual_seed(0)
    return _Net().double()


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 384, generator=generator, dtype=torch.float64) for _ in range(3)]


def _train(model: nn.Module, rank: int | None) -> tuple[list[Tensor], int, int]:
    """Parameters after three steps, how many graphs were rewritten, and how many layers sampled."""
    parameters = list(model.parameters())
    backend = fx_approx.backend(POLICY, inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for x in _batches():
        optimizer.zero_grad()
        compiled(x if rank is None else x[4 * rank : 4 * rank + 4]).square().mean().backward()
        optimizer.step()
    rows = backend.report().rows
    return [p.detach() for p in parameters], len(backend.pieces), sum(1 for row in rows if row.samples)


def _rank(rank: int, folder: str, optimize: str) -> None:
    torch._dynamo.config.optimize_ddp = optimize == "buckets"
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    # A bucket is full with one layer, so that Dynamo cuts the graph.
    wrapped = DistributedDataParallel(_model(), bucket_cap_mb=1)
    torch.save(_train(wrapped, rank), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    # Now and then gloo hangs when a process group that DistributedDataParallel still holds is taken down.
    os._exit(0)


@pytest.mark.parametrize(("optimize", "pieces"), [("buckets", 4), ("whole", 1)])
def test_two_ranks_train_as_one(tmp_path: Path, optimize: str, pieces: int) -> None:
    arguments = [str(tmp_path), optimize]
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), *arguments]) for rank in range(2)]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    torch._dynamo.reset()
    alone, _, sampled = _train(_model(), None)
    assert sampled == 4
    for rank in range(2):
        parameters, found, layers = torch.load(tmp_path / f"{rank}.pt")
        assert (found, layers) == (pieces, sampled)
        torch.testing.assert_close(parameters, alone, rtol=0, atol=1e-12)


if __name__ == "__main__":
    _rank(int(sys.argv[1]), sys.argv[2], sys.argv[3])
