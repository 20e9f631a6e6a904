"""Parameters that are held in shards: how they are told, and what is refused."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

UNREGISTERED = (
    "is sharded by fully_shard, and the transformed model was not told: call "
    "fx_approx.distributed.enable_fsdp(model) after the last fully_shard"
)


def is_shard(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, of which a rank has a part only."""
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes long, and who has one has imported it
    return module is not None and isinstance(tensor, module.DTensor)


def whole_tensor(tensor: Tensor) -> Tensor:
    """``tensor``, gathered from all ranks if it is held in shards; all ranks are to call this alike then."""
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def fill(tensor: Tensor, whole: Tensor) -> None:
    """Copies ``whole`` into ``tensor``, or of it the part that this rank has, without communication."""
    if is_shard(tensor):
        from torch.distributed.tensor import distribute_tensor

        whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)  # type: ignore[attr-defined]
    tensor.copy_(whole)


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on ``module`` itself."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def refuse_shard(tensor: Tensor) -> None:
    """Refuses to make a selection from a part of a weight.

    Raises:
        RuntimeError: ``tensor`` is a DTensor; says what to do.
    """
    if not torch.compiler.is_compiling() and is_shard(tensor):
        raise RuntimeError(f"a weight of shape {list(tensor.shape)} {UNREGISTERED}")
