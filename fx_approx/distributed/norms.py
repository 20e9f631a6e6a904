"""Selections from sharded weights: norms of what each rank has, added up by one small all-reduce."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from fx_approx._compat import in_backward
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.controls import synchronize_scores
from fx_approx.runtime.selector import Selector
from fx_approx.runtime.sharding import is_shard
from fx_approx.runtime.shared_selection import SharedSelection, SharedSelections
from fx_approx.runtime.weight_scores import Scored, weight_scores
from fx_approx.sampling.scores import get_score

Groups = tuple[dist.ProcessGroup, ...]


class ShardNorms(nn.Module):
    """Stands before the selections: in place of each sharded weight it gives what the weight scores.

    A pair's norm is the root of a sum of squares, and shards divide the summands: each rank adds up those it has, and
    one all-reduce over all sharded weights (of a mesh and dtype) adds up the sums. So all ranks choose from the same
    numbers, which are those of the whole weights to rounding, and no weight is gathered. Weights that are whole at the
    head of the graph, such as those of the root's own group, pass as they are.
    """

    def __init__(self, resample: SharedSelections) -> None:
        super().__init__()
        self.resample = (resample,)

    def forward(self, *weights: Tensor) -> tuple[Any, ...]:
        """``weights`` as the shared selections take them; those that no one will score as they are."""
        resample = self.resample[0]
        result: list[Any] = list(weights)
        if not resample.known or (in_backward() and resample.remembers):
            return tuple(result)
        buckets: dict[Any, list[tuple[Selector, Tensor]]] = {}
        scored: dict[Selector, Tensor] = {}
        wanted: dict[int, Selector] = {}
        place = 0
        with torch.no_grad(), torch.autocast(result[0].device.type, enabled=False):
            for one in resample.each():
                for member in one.members:
                    weight, selector = weights[place], member.selector
                    if is_shard(weight) and (one.active or resample.held):
                        wanted[place] = selector
                        if selector not in scored:
                            squares = self._squares(one, selector, weight)
                            scored[selector] = squares
                            if one.learns or selector.score.reads:
                                buckets.setdefault((_groups(weight), squares.dtype), []).append((selector, squares))
                    place += 1
            for (groups, _), own in buckets.items():
                sums = torch.cat([squares for _, squares in own])
                for group in groups:
                    dist.all_reduce(sums, group=group)
                parts = sums.sqrt().split([squares.shape[0] for _, squares in own])
                scored.update({selector: part for (selector, _), part in zip(own, parts, strict=True)})
        for place, selector in wanted.items():
            result[place] = Scored(scored[selector])
        return tuple(result)

    @staticmethod
    def _squares(one: SharedSelection, selector: Selector, weight: Tensor) -> Tensor:
        """``[groups * pairs]``: what this rank's part adds to each squared score; or the scores that read nothing."""
        assert isinstance(weight, DTensor) and selector.pairs is not None
        kind = get_score("weight") if one.learns else selector.score
        local = weight.to_local()
        dtype = torch.float64 if local.dtype == torch.float64 else torch.float32
        count = selector.groups * selector.pairs
        if not kind.reads:
            return local.new_ones(count, dtype=dtype)
        if local.numel() == 0:
            return local.new_zeros(count, dtype=dtype)
        summed = any(isinstance(one, Shard) and one.dim == 0 for one in weight.placements)
        if not summed or selector.groups > 1 or not selector.kind.startswith(("linear", "conv")):
            local = _in_place(weight, local)
        return weight_scores(selector.kind, local, kind, selector.op_kwargs).square()


def _in_place(weight: DTensor, local: Tensor) -> Tensor:
    """The part where it stands in the whole weight, with zeros around it; for pairs that lie along what is divided."""
    result = local.new_zeros(weight.shape)
    part = result
    for mesh_dim, placement in enumerate(weight.placements):
        if isinstance(placement, Shard):
            size, ranks = weight.shape[placement.dim], weight.device_mesh.size(mesh_dim)
            chunk = -(-size // ranks)
            start = min(size, chunk * weight.device_mesh.get_local_rank(mesh_dim))
            part = part.narrow(placement.dim, start, local.shape[placement.dim])
    part.copy_(local)
    return result


def _groups(weight: Tensor) -> Groups:
    """The process groups over which a weight is divided."""
    assert isinstance(weight, DTensor)
    mesh = weight.device_mesh
    return tuple(mesh.get_group(dim) for dim, one in enumerate(weight.placements) if isinstance(one, Shard))


def check_placements(name: str, parameter: Tensor) -> None:
    """A parameter is divided along one dimension by ``fully_shard`` alone.

    Raises:
        ValueError: It is divided in another way, by tensor parallelism for one.
    """
    if not isinstance(parameter, DTensor):
        return
    placements = parameter.placements
    if any(type(one) not in (Shard, Replicate) for one in placements) or sum(map(_divides, placements)) != 1:
        raise ValueError(
            f"model: {name} is placed as {placements}; expected one Shard, beside Replicate, as fully_shard alone "
            "makes it. Sampling under tensor parallelism is not supported"
        )


def _divides(placement: Any) -> bool:
    return isinstance(placement, Shard)


class ScoreAgreement(nn.Module):
    """Stands at the end of the graph: averages the running norms that this step has moved over the ranks."""

    def __init__(self, model: ApproxModule, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.model, self.group = (model,), group

    def forward(self) -> None:
        """Nothing where nothing was learnt: in evaluation, and in a recomputation."""
        resample = self.model[0]._fx_approx.resample
        assert resample is not None
        owners = [selector.owner[0] for one in resample.each() for selector in one.selectors]
        if any([owner.training for owner in owners]) and not in_backward():
            synchronize_scores(self.model[0], self.group)
