"""Weights that are held in shards: how they are told, and norms that stand in for them where they are scored."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fx_approx.ops.base import OPS
from fx_approx.sampling.scores import ScoreKind

UNREGISTERED = (
    "is sharded by fully_shard, and the transformed model was not told: call "
    "fx_approx.distributed.enable_fsdp(model) after the last fully_shard"
)


class Scored(NamedTuple):
    """What a sharded weight scores, in place of the weight.

    Attributes:
        values: ``[groups * pairs]``, as :attr:`fx_approx.ops.ProductOp.scores` of the whole weight would be.
    """

    values: Tensor

    @property
    def device(self) -> torch.device:
        """Of the values."""
        return self.values.device


def is_shard(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, of which a rank has a part only."""
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes long, and who has one has imported it
    return module is not None and isinstance(tensor, module.DTensor)


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


def weight_scores(op: str, weight: Tensor | Scored, kind: ScoreKind, op_kwargs: Mapping[str, Any]) -> Tensor:
    """``[groups * pairs]``: scores that read the weight only, or nothing.

    Args:
        op: Which product.
        weight: Its weight, or what stands in for it.
        kind: The scores.
        op_kwargs: The product's plain arguments.

    Raises:
        RuntimeError: The weight is a DTensor.
    """
    if isinstance(weight, Scored):
        return weight.values
    refuse_shard(weight)
    return OPS[op].scores(None, weight, kind, op_kwargs).flatten()
