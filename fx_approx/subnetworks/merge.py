"""Writes a subnetwork back into the model that it was cut out of, and cuts it out anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fx_approx.runtime.approx_module import ApproxModule, find
from fx_approx.sampling.base import Selection
from fx_approx.subnetworks.extract import Subnetwork, extract, identity_of, record_of, versions_of


def merge(sub: nn.Module, model: nn.Module, *, preserve: bool = False) -> None:
    """Writes the weights and running statistics of ``sub`` to their places in ``model``; nothing else changes.

    Args:
        sub: What :func:`fx_approx.subnetworks.extract` returned, trained since. It stays as it is.
        model: The model that it was cut out of.
        preserve: Set the weights to zero by which the full model reads what ``sub`` does not have, so that the exact
            model computes what ``sub`` does; see :func:`fx_approx.schedules.zero_unread_weights`.

    Raises:
        ValueError: ``sub`` is of another model, was written back before, or ``model`` was changed since it was cut out.
            Nothing is changed then.
    """
    record, approx = record_of(sub), find(model)
    _check(record, approx)
    own = tensors_of(sub)
    full = dict(approx.named_parameters()) | dict(approx.named_buffers())
    missing = sorted(name for name in full if name not in own)
    if missing:
        raise ValueError(f"sub: it has no {missing[0]}, so that it is not what extract returned")
    with torch.no_grad():
        for name, tensor in full.items():
            cut = record.cut_of(name)
            if preserve and cut.inputs is not None and tensor.dim() > 1:
                _zero_unread(tensor, record, name)
            cut.put(tensor, own[name])
    record.merged = True
    record.versions = versions_of(approx)


def _zero_unread(weight: Tensor, record: Subnetwork, name: str) -> None:
    """Sets the columns of ``weight`` to zero that the subnetwork does not read, in the rows that it has."""
    cut = record.cut_of(name)
    assert cut.inputs is not None
    per_group = weight.shape[0] // cut.groups
    for group, index in enumerate(cut.inputs.indices):
        read = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
        read[index] = True
        weight[group * per_group : (group + 1) * per_group, ~read] = 0


def reselect(
    sub: nn.Module, model: nn.Module, selections: Sequence[Selection | None] | None = None
) -> tuple[Selection | None, ...]:
    """Cuts ``sub`` out of ``model`` anew, by other selections of the same sizes, into the same tensors.

    Parameters stay the same objects, so that optimisers, compiled code and the buckets of data-parallel training go on.
    Write it back first: what ``sub`` holds is overwritten.

    Args:
        sub: What :func:`fx_approx.subnetworks.extract` returned.
        model: The model that it was cut out of.
        selections: As in ``extract``; by default those of the model's next step.

    Returns:
        The selections.

    Raises:
        ValueError: ``sub`` is of another model, has not been written back, or the sizes differ. Nothing is changed
            then.
    """
    record, approx = record_of(sub), find(model)
    if record.identity != identity_of(approx):
        raise ValueError("sub: it was cut out of another model: names or shapes of the parameters differ")
    if not record.merged:
        raise ValueError("sub: what it has learnt would be lost; call fx_approx.subnetworks.merge(sub, model) first")
    fresh = extract(approx, selections)
    new, old = tensors_of(fresh), tensors_of(sub)
    for name in dict.fromkeys((*old, *new)):
        mine, other = (None if name not in one else tuple(one[name].shape) for one in (old, new))
        if mine != other:
            raise ValueError(
                f"selections: {name} would have the shape {other}, expected {mine}, which it has in sub: another ratio "
                "needs another subnetwork"
            )
    with torch.no_grad():
        for name, tensor in old.items():
            tensor.copy_(new[name])
    again = record_of(fresh)
    record.cuts, record.selections, record.versions, record.merged = again.cuts, again.selections, again.versions, False
    return record.selections


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, those of several names under each."""
    found = dict(module.named_parameters(remove_duplicate=False))
    return found | dict(module.named_buffers(remove_duplicate=False))


def _check(record: Subnetwork, approx: ApproxModule) -> None:
    if record.identity != identity_of(approx):
        raise ValueError("sub: it was cut out of another model: names or shapes of the parameters differ")
    if record.merged:
        raise ValueError("sub: it was written back before; call reselect or extract to go on")
    now = versions_of(approx)
    changed = [name for name, version in record.versions.items() if now[name] != version]
    if changed:
        raise ValueError(f"model: {changed[0]} was changed since sub was cut out, and merging would overwrite that")
