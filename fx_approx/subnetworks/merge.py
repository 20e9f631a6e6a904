"""Writes a subnetwork back into the model that it was cut out of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.handle import GraphHandle
from fx_approx.subnetworks.record import Subnetwork, check_origin, full_model, record_of, tensors_of, versions_of


def merge(sub: nn.Module, model: nn.Module | GraphHandle, *, preserve: bool = False) -> None:
    """Writes the weights and running statistics of ``sub`` to their places in ``model``; nothing else changes.

    Args:
        sub: What :func:`fx_approx.subnetworks.extract` returned, trained since. It stays as it is.
        model: The model that it was cut out of; of a backend's, the model itself or the backend.
        preserve: Set the weights to zero by which the full model reads what ``sub`` does not have, so that the exact
            model computes what ``sub`` does; see :func:`fx_approx.schedules.zero_unread_weights`.

    Raises:
        ValueError: ``sub`` is of another model, was written back before, or ``model`` was changed since it was cut out.
            Nothing is changed then.
    """
    record = record_of(sub)
    full = full_model(record, model)
    _check(record, full)
    own = tensors_of(sub)
    tensors = dict(full.named_parameters()) | dict(full.named_buffers())
    missing = sorted(name for name in tensors if name not in own)
    if missing:
        raise ValueError(f"sub: it has no {missing[0]}, so that it is not what extract returned")
    with torch.no_grad():
        for name, tensor in tensors.items():
            cut = record.cut_of(name)
            if preserve and cut.inputs is not None and tensor.dim() > 1:
                _zero_unread(tensor, record, name)
            cut.put(tensor, own[name])
    if preserve:  # the statistics of what is read were gathered by the network that the exact model is now
        pieces = model.pieces if isinstance(model, GraphHandle) else (full,)
        for one in pieces:
            if isinstance(one, ApproxModule):
                one._fx_approx.batchnorm.note_fresh(one, one._fx_approx.samples)
    record.merged = True
    record.versions = versions_of(full)


def _zero_unread(weight: Tensor, record: Subnetwork, name: str) -> None:
    """Sets the columns of ``weight`` to zero that the subnetwork does not read, in the rows that it has."""
    cut = record.cut_of(name)
    assert cut.inputs is not None
    weight = weight.t() if cut.transposed else weight
    per_group = weight.shape[0] // cut.groups
    for group, index in enumerate(cut.inputs.indices):
        read = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
        read[index] = True
        weight[group * per_group : (group + 1) * per_group, ~read] = 0


def _check(record: Subnetwork, full: nn.Module) -> None:
    check_origin(record, full)
    if record.merged:
        raise ValueError("sub: it was written back before; call reselect or extract to go on")
    now = versions_of(full)
    changed = [name for name, version in record.versions.items() if now[name] != version]
    if changed:
        raise ValueError(f"model: {changed[0]} was changed since sub was cut out, and merging would overwrite that")
