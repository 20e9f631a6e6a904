"""Other selections of the same sizes come into the tensors of a subnetwork."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fx_approx.runtime.approx_module import ApproxModule, find
from fx_approx.runtime.sharding import fill
from fx_approx.runtime.upcoming import use_up
from fx_approx.sampling.base import Selection
from fx_approx.subnetworks.extract import extract
from fx_approx.subnetworks.record import (
    Subnetwork,
    check_origin,
    record_of,
    subnetwork_in,
    tensors_of,
    versions_of,
)
from fx_approx.subnetworks.selections import Selections, selections_of


def reselect(
    sub: nn.Module,
    model: nn.Module,
    selections: Sequence[Selection | None] | None = None,
    *,
    process_group: Any = None,
) -> Selections:
    """Cuts ``sub`` out of ``model`` anew, by other selections of the same sizes, into the same tensors.

    Parameters stay the same objects, so that optimisers, compiled code and the buckets of data-parallel training go on.
    It costs little more than the copies. Write ``sub`` back first: what it holds is overwritten.

    Args:
        sub: What :func:`fx_approx.subnetworks.extract` returned, or what wraps it.
        model: The model that it was cut out of.
        selections: As in ``extract``. By default the model's next ones: its random state goes on to the next
            selection, as by the steps that ``sub`` has taken in its place.
        process_group: As in ``extract``.

    Returns:
        The selections.

    Raises:
        ValueError: ``sub`` is of another model, has not been written back, or the sizes differ. Nothing is changed
            then, but for the random state.
        UnsupportedError: Two selections of one layer, which were equal, differ now; the same holds.
        DistributedMismatchError: The selections differ between the ranks of ``process_group``, on every rank; the same
            holds.
    """
    record, approx = record_of(sub), find(model)
    check_origin(record, approx)
    if not record.merged:
        raise ValueError("sub: what it has learnt would be lost; call fx_approx.subnetworks.merge(sub, model) first")
    if selections is None:
        use_up(approx, record.selections)
    chosen = selections_of(approx, selections, process_group)
    cut_anew(subnetwork_in(sub), record, approx, chosen)
    return chosen


def cut_anew(sub: nn.Module, record: Subnetwork, approx: ApproxModule, chosen: Selections) -> None:
    """Cuts ``sub`` out of ``approx`` by selections that were checked; errors as :func:`reselect`."""
    _check_sizes(record.selections, chosen)
    full = tensors_of(approx)
    if record.recipe is not None:
        recipe, (cuts, buffers) = record.recipe, record.recipe.follow(chosen)
    else:  # it was rebuilt from a description
        fresh = extract(approx, chosen)
        recipe, cuts = record_of(fresh).recipe, dict(record_of(fresh).cuts)
        buffers = {name: tensor for name, tensor in tensors_of(fresh).items() if name not in full}
    with torch.no_grad():
        for name, tensor in _each_once(tensors_of(sub)):
            if name in buffers:
                fill(tensor, buffers[name])
            elif name in full:  # else it is a constant of the forward
                fill(tensor, cuts[name].part(full[name]) if name in cuts else full[name].detach())
    record.cuts, record.selections, record.merged, record.recipe = cuts, chosen, False, recipe
    record.versions = versions_of(approx)


def _each_once(tensors: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Of those with several names the first."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found.setdefault(id(tensor), (name, tensor))
    return list(found.values())


def fits(record: Subnetwork, chosen: Selections) -> bool:
    """Whether the subnetwork of ``record`` has the sizes of other selections."""
    return all(_size(old) == _size(new) for old, new in zip(record.selections, chosen, strict=True))


def _check_sizes(before: Selections, chosen: Selections) -> None:
    for place, (old, new) in enumerate(zip(before, chosen, strict=True)):
        mine, its = _size(old), _size(new)
        if mine != its:
            raise ValueError(
                f"selections[{place}]: expected {mine}, as sub has it, got {its}: another ratio needs another "
                "subnetwork; call fx_approx.subnetworks.extract"
            )


def _size(one: Selection | None) -> str:
    if one is None:
        return "all units"
    groups, units = one.indices.shape
    return f"{units} units in each of {groups} groups{'' if one.scale is None else ', scaled'}"
