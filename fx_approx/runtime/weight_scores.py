"""Scores that read weights only, and norms that stand in for weights that are held in shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fx_approx.ops.base import OPS
from fx_approx.runtime.sharding import refuse_shard
from fx_approx.sampling.scores import ScoreKind


class Scored(NamedTuple):
    """What a sharded weight scores, in place of the weight.

    Attributes:
        values: ``[groups * pairs]``, as :attr:`fx_approx.ops.ProductOp.scores` of the whole weight would be.
    """

    values: Tensor

    @property
    def device(self) -> torch.device:
        """The device of the scores."""
        return self.values.device


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
