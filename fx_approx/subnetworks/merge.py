"""Writes a subnetwork back into the model that it was cut out of."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fx_approx.errors import NoEffectWarning
from fx_approx.ops.channel_slices import keep_columns
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.handle import GraphHandle
from fx_approx.runtime.sharding import whole_tensor
from fx_approx.schedules.preserve import left_whole
from fx_approx.subnetworks.cuts import Cut
from fx_approx.subnetworks.full_model import full_model
from fx_approx.subnetworks.record import (
    Subnetwork,
    check_origin,
    record_of,
    subnetwork_in,
    tensors_of,
    versions_of,
)


def merge(sub: nn.Module, model: nn.Module | GraphHandle, *, preserve: bool = False) -> None:
    """Writes the weights and running statistics of ``sub`` to their places in ``model``; nothing else changes.

    Args:
        sub: What :func:`fx_approx.subnetworks.extract` returned, trained since, or what wraps it, such as
            ``torch.optim.swa_utils.AveragedModel``. It stays as it is.
        model: The model that it was cut out of, or a copy of that; of a backend's, the model itself or the backend.
        preserve: Set the weights to zero by which the full model reads what ``sub`` does not have, so that the exact
            model computes what ``sub`` does; see :func:`fx_approx.schedules.zero_unread_weights`. Those that are not
            trained (``requires_grad`` False) are left whole.

    Raises:
        ValueError: ``sub`` is of another model, was written back before, or ``model`` was changed since it was cut out;
            or, with ``preserve``, a sampler scales what it reads, so that no exact model computes the same. Nothing is
            changed then.

    Warns:
        NoEffectWarning: With ``preserve``: ``sub`` reads a part of a tensor that it holds whole, multiplies chosen
            pairs of two activations, or reads a part of a weight that is not trained, so that the exact model computes
            something else.
    """
    write_back(sub, model, preserve, lambda parameter: parameter.requires_grad)


def write_back(
    sub: nn.Module, model: nn.Module | GraphHandle, preserve: bool, is_trained: Callable[[nn.Parameter], bool]
) -> None:
    """What :func:`merge` does.

    Args:
        sub: As there.
        model: As there.
        preserve: As there.
        is_trained: Asked of parameters of ``sub``; those of others are left whole.
    """
    record = record_of(sub)
    approx = full_model(record, model)
    _check(record, approx, preserve)
    own, full = tensors_of(subnetwork_in(sub)), tensors_of(approx)
    missing = sorted(name for name in record.cuts if name not in own)
    if missing:
        raise ValueError(f"sub: it has no {missing[0]}, so that it is not what extract returned")
    done: set[int] = set()
    frozen: list[str] = []
    with torch.no_grad():
        for name, tensor in full.items():
            if id(tensor) in done or name not in own:  # it has several names, or the graph of sub never reads it
                continue
            done.add(id(tensor))
            cut = record.cut_of(name)
            part = own[name]
            if preserve and isinstance(part, nn.Parameter) and not is_trained(part):
                if cut.inputs is not None and tensor.dim() >= 2:
                    frozen.append(name)
            elif preserve:
                zero_unread(tensor, cut)
            cut.put(tensor, whole_tensor(part))
    if frozen:
        warnings.warn(f"{left_whole(frozen)}: the exact model computes something else", NoEffectWarning, stacklevel=3)
    if preserve and record.sliced:
        warnings.warn(f"{record.why_inexact()}: the exact model computes something else", NoEffectWarning, stacklevel=3)
    if preserve:  # the statistics of what is read were gathered by the network that the exact model is now
        for one in model.pieces if isinstance(model, GraphHandle) else (approx,):
            if isinstance(one, ApproxModule):
                one._fx_approx.batchnorm.note_fresh(one, one._fx_approx.samples)
    record.merged = True
    record.versions = versions_of(approx)


def zero_unread(weight: Tensor, cut: Cut) -> None:
    """Sets the columns of ``weight`` to zero that a subnetwork does not read.

    Args:
        weight: The full one; changed in place.
        cut: What the subnetwork has of it.
    """
    if cut.inputs is None or weight.dim() < 2:
        return
    weight = weight.t() if cut.transposed else weight
    index = cut.inputs.indices.to(weight.device)
    read = torch.zeros(index.shape[0], weight.shape[1], dtype=torch.bool, device=weight.device).scatter_(1, index, True)
    keep_columns(weight, read)


def _check(record: Subnetwork, approx: nn.Module, preserve: bool) -> None:
    check_origin(record, approx)
    if record.merged:
        raise ValueError("sub: it was written back before; call reselect or extract to go on")
    if record.model.means(approx):
        now = versions_of(approx)
        changed = [name for name, version in record.versions.items() if now.get(name) != version]
        if changed:
            raise ValueError(f"model: {changed[0]} was changed since sub was cut out, and merging would overwrite that")
    scaled = [name for name, cut in record.cuts.items() if cut.scaled]
    if preserve and scaled:
        raise ValueError(
            f"preserve: {scaled[0]} is read by a sampler that scales what it reads, so that no exact network computes "
            "the same; expected preserve=False, or a sampler without scaling, such as topk"
        )
