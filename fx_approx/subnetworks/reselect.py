"""Other selections of the same sizes come into the tensors of a subnetwork."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fx_approx.errors import UnsupportedError
from fx_approx.runtime.approx_module import ApproxModule, find
from fx_approx.runtime.exact import exact_copy
from fx_approx.runtime.handle import GraphHandle
from fx_approx.runtime.sharding import fill
from fx_approx.runtime.upcoming import use_up
from fx_approx.sampling.base import Selection
from fx_approx.subnetworks.assemble import index_tensors
from fx_approx.subnetworks.from_backend import MisfitError, recut_from_backend
from fx_approx.subnetworks.full_model import full_model
from fx_approx.subnetworks.narrowing import Narrowing
from fx_approx.subnetworks.record import (
    Subnetwork,
    check_origin,
    record_of,
    subnetwork_in,
    tensors_of,
    versions_of,
)
from fx_approx.subnetworks.sections import parts_of
from fx_approx.subnetworks.selections import Selections, selections_of


def reselect(
    sub: nn.Module,
    model: nn.Module | GraphHandle,
    selections: Sequence[Selection | None] | None = None,
    *,
    process_group: Any = None,
) -> Selections:
    """Cuts ``sub`` out of ``model`` anew, by other selections of the same sizes, into the same tensors.

    Parameters stay the same objects, so that optimisers, compiled code and the buckets of data-parallel training go on.
    It costs little more than the copies. Write ``sub`` back first: what it holds is overwritten.

    Args:
        sub: What :func:`fx_approx.subnetworks.extract` returned, or what wraps it.
        model: The model that it was cut out of; of a backend's, the backend, which must have run since it was changed.
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
    record = record_of(sub)
    check_origin(record, full_model(record, model))
    if not record.merged:
        raise ValueError("sub: what it has learnt would be lost; call fx_approx.subnetworks.merge(sub, model) first")
    if record.graphs:
        if not isinstance(model, GraphHandle):
            raise ValueError("model: expected the backend that compiles it, whose graphs make the selections")
        return reselect_graphs(subnetwork_in(sub), record, model, selections, process_group)
    approx = find(model)  # type: ignore[arg-type]
    if selections is None:
        use_up(approx, record.selections)
    chosen = selections_of(approx, selections, process_group)
    cut_anew(subnetwork_in(sub), record, approx, chosen)
    return chosen


def reselect_graphs(
    sub: nn.Module,
    record: Subnetwork,
    handle: GraphHandle,
    selections: Sequence[Selection | None] | None,
    process_group: Any = None,
) -> Selections:
    """The same for the model of a backend, all checked; errors as :func:`reselect`.

    Raises:
        MisfitError: The sizes differ, or graphs are no longer there.
    """
    new, again = recut_from_backend(sub, handle, selections, process_group)
    old = tensors_of(sub)
    for name in dict.fromkeys((*old, *new)):
        mine, other = (None if name not in one else tuple(one[name].shape) for one in (old, new))
        if mine != other:
            raise MisfitError(
                f"selections: {name} would have the shape {other}, expected {mine}, which it has in sub: another ratio "
                "needs another subnetwork; call fx_approx.subnetworks.extract"
            )
    with torch.no_grad():
        for name, tensor in _each_once(old):
            fill(tensor, new[name])
    record.cuts, record.selections, record.versions, record.merged = again.cuts, again.selections, again.versions, False
    return record.selections


def cut_anew(sub: nn.Module, record: Subnetwork, approx: ApproxModule, chosen: Selections) -> None:
    """Cuts ``sub`` out of ``approx`` by selections that were checked; errors as :func:`reselect`."""
    _check_sizes(record.selections, chosen)
    narrowing = Narrowing(exact_copy(approx), approx)
    parts = parts_of(approx, narrowing, chosen)
    cuts = narrowing.cuts
    if cuts.keys() != record.cuts.keys():
        odd = sorted(cuts.keys() ^ record.cuts.keys())[0]
        raise UnsupportedError(
            f"model: {odd} is read with several selections, or no longer is, so that it has another shape: call "
            "fx_approx.subnetworks.extract"
        )
    indices = index_tensors(sub, parts, narrowing, record.forms)
    full = tensors_of(approx)
    with torch.no_grad():
        for name, tensor in _each_once(tensors_of(sub)):
            if name in indices:
                fill(tensor, indices[name])
            elif name in full:  # else it is a constant of the forward
                fill(tensor, cuts[name].part(full[name]) if name in cuts else full[name].detach())
    record.cuts, record.selections, record.merged = cuts, chosen, False
    record.sliced = tuple(narrowing.sliced)
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
