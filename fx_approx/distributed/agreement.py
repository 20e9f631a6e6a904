"""Ranks make sure that they hold the same selections, before they add up gradients by them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fx_approx.errors import DistributedMismatchError
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.selection_tracker import SelectionTracker
from fx_approx.sampling.base import Selection

_STATE = ("step", "increment", "selection_interval", "seed")


def check_plans(model: ApproxModule, group: dist.ProcessGroup | None) -> None:
    """All ranks sample the same layers in the same way, from the same seed, at the same step.

    Raises:
        DistributedMismatchError: On every rank; names ranks and the first layer or setting that differs.
    """
    own = _described(model)
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, digest, group)
    if len(set(gathered)) == 1:
        return
    whole: list[Any] = [None] * len(gathered)
    dist.all_gather_object(whole, own, group)
    for key in sorted({key for one in whole for key in one}):
        values = [one.get(key) for one in whole]
        usual, odd = _odd(values)
        if odd:
            raise DistributedMismatchError(
                f"{_ranks(odd)}: {key} is {values[odd[0]]!r}, and {usual!r} on the others; all ranks must "
                "transform the same model by the same plan with the same seed, and resume from the same checkpoint"
            )


def _described(model: ApproxModule) -> dict[str, str]:
    runtime = model._fx_approx
    plan = runtime.record.plan
    found = {f"layer {one.name}": repr((dict(one.roles), one.scope, one.straight_through)) for one in plan}
    for (name, role), selector in runtime.selectors.items():
        found[f"layer {name}, {role.value}"] = repr((selector.spec, selector.enabled))
    found.update({f"tokens {place}": repr((one.spec, one.enabled)) for place, one in enumerate(runtime.tokens)})
    found.update({name: repr(value) for name, value in zip(_STATE, runtime.state.tolist(), strict=True)})
    found["demand"] = repr(runtime.record.prunes)
    return found


def digest_of(published: SelectionTracker | None, state: Tensor) -> Tensor:
    """``[4 + selections]`` int64: the random state, and a hash of each selection's units."""
    if published is None:
        return state
    units = torch.arange(1, published.mask.shape[0] + 1, device=published.mask.device)
    mixed = (units * 0x5851F42D4C957F2D) ^ (units << 17)
    hashes = [(mixed[own] * published.mask[own]).sum() for own in published.slices]
    return torch.cat((state.to(published.mask.device), torch.stack(hashes)))


def check_selections(digest: Tensor, layers: Sequence[str], group: dist.ProcessGroup | None) -> None:
    """The random state and every selection are the same on all ranks; one small all-gather.

    Raises:
        DistributedMismatchError: On every rank; names ranks and layer.
    """
    size = dist.get_world_size(group)
    gathered = [torch.empty_like(digest) for _ in range(size)]
    dist.all_gather(gathered, digest, group)
    for place, values in enumerate(torch.stack(gathered).t().tolist()):
        usual, odd = _odd(values)
        if not odd:
            continue
        if place < len(_STATE):
            what = f"{_STATE[place]} is {values[odd[0]]}, and {usual} on the others"
            hint = "resume all ranks from the same checkpoint"
        else:
            what = f"the selection of layer {layers[place - len(_STATE)]} is another one than on the others"
            hint = "weights, running norms or training flags differ between the ranks"
        raise DistributedMismatchError(f"{_ranks(odd)}: {what}; {hint}")


def readers_of(model: ApproxModule) -> list[str]:
    """Of each selection that is made ahead, the layers that read by it."""
    classes = model._fx_approx.record.effects.classes
    return [", ".join(dict.fromkeys(reading.name for reading in one.readings)) for one in classes]


def check_indices(
    model: ApproxModule, chosen: Sequence[Selection | None], further: Sequence[str], group: dist.ProcessGroup | None
) -> None:
    """The random state of ``model`` and the indices of ``chosen`` are the same on all ranks of ``group``.

    Args:
        model: A transformed model.
        chosen: First those that are made ahead, then those of the layers ``further``.
        further: Names of layers.
        group: None for all ranks.

    Raises:
        DistributedMismatchError: On every rank; names ranks and the layer that reads the selection.
    """
    state = model._fx_approx.state
    hashes = [state.new_zeros(()) if one is None else _ordered_hash(one.indices.flatten()) for one in chosen]
    check_selections(torch.cat((state, torch.stack(hashes))), [*readers_of(model), *further], group)


def _ordered_hash(indices: Tensor) -> Tensor:
    """int64, of units in their order."""
    places = torch.arange(1, indices.shape[0] + 1, device=indices.device)
    return (((indices + 1) * 0x5851F42D4C957F2D) ^ (places * 0x14057B7EF767814F)).sum() + places.shape[0]


def _odd(values: Sequence[Any]) -> tuple[Any, list[int]]:
    """The most frequent value, and the ranks with another one."""
    usual = Counter(values).most_common(1)[0][0]
    return usual, [rank for rank, value in enumerate(values) if value != usual]


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
