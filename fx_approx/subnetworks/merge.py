"""Writes a subnetwork back into the model that it was cut out of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fx_approx.runtime.approx_module import ApproxModule, find
from fx_approx.subnetworks.cuts import Cut
from fx_approx.subnetworks.record import Subnetwork, check_origin, record_of, tensors_of, versions_of


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
            if preserve:
                zero_unread(tensor, cut)
            cut.put(tensor, own[name])
    if preserve:  # the statistics of what is read were gathered by the network that the exact model is now
        approx._fx_approx.batchnorm.note_fresh(approx, approx._fx_approx.samples)
    record.merged = True
    record.versions = versions_of(approx)


def zero_unread(weight: Tensor, cut: Cut) -> None:
    """Sets the columns of ``weight`` to zero that a subnetwork does not read, in the rows that it has.

    Args:
        weight: The full one; changed in place.
        cut: What the subnetwork has of it.
    """
    if cut.inputs is None or weight.dim() < 2:
        return
    per_group = weight.shape[0] // cut.groups
    for group, index in enumerate(cut.inputs.indices):
        read = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
        read[index] = True
        weight[group * per_group : (group + 1) * per_group, ~read] = 0


def _check(record: Subnetwork, approx: ApproxModule) -> None:
    check_origin(record, approx)
    if record.merged:
        raise ValueError("sub: it was written back before; call reselect or extract to go on")
    now = versions_of(approx)
    changed = [name for name, version in record.versions.items() if now[name] != version]
    if changed:
        raise ValueError(f"model: {changed[0]} was changed since sub was cut out, and merging would overwrite that")
