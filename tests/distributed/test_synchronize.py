"""Running norms of scores averaged over ranks: two processes with different data choose the same channels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fx_approx
from fx_approx.policies import Uniform


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    approx = fx_approx.transform(_model(), Uniform(0.5, scores="ema", scope="layer"), torch.randn(4, 6))
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        approx(torch.randn(8, 6, generator=generator) * torch.arange(1.0, 7.0) ** (2 * rank))
    resample = approx._fx_approx.resample
    before = [one.running.clone() for one in resample.each()]
    fx_approx.distributed.synchronize_scores(approx)
    after = [one.running.clone() for one in resample.each()]
    torch.save({"before": before, "after": after, "age": [one.age for one in resample.each()]}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_agree_after_synchronizing(tmp_path: Path) -> None:
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert not all(torch.equal(a, b) for a, b in zip(one["before"], other["before"], strict=True))
    for mine, theirs, a, b in zip(one["before"], other["before"], one["after"], other["after"], strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, (mine + theirs) / 2)
    assert all(torch.equal(a, b) for a, b in zip(one["age"], other["age"], strict=True))


def test_without_a_process_group_it_says_so() -> None:
    approx = fx_approx.transform(_model(), Uniform(0.5, scores="ema", scope="layer"), torch.randn(4, 6))
    with pytest.raises(RuntimeError, match="init_process_group"):
        fx_approx.distributed.synchronize_scores(approx)


if __name__ == "__main__":
    _rank(int(sys.argv[1]), sys.argv[2])
