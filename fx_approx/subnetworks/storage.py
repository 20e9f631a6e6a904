"""A subnetwork in a file: its tensors, and the description from which the full model's code makes it again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import IO, Any

import torch
from torch import Tensor, nn

from fx_approx.subnetworks.description import description, record_from
from fx_approx.subnetworks.rebuild import check_example, compact_shape, narrowed, plain, told, traced, widened
from fx_approx.subnetworks.record import Subnetwork, subnetwork_in, tensors_of

File = str | os.PathLike[str] | IO[bytes]


def save(sub: nn.Module, path: File) -> None:
    """Writes a subnetwork to a file that ``torch.load(path, weights_only=True)`` reads: tensors and plain data.

    Args:
        sub: What :func:`fx_approx.subnetworks.extract` returned, or what wraps it.
        path: Where to, or a file that is open for writing.

    Raises:
        ValueError: ``sub`` is no subnetwork.
        UnsupportedError: See :func:`fx_approx.subnetworks.description`.
    """
    tensors = {name: tensor.detach() for name, tensor in tensors_of(subnetwork_in(sub)).items()}
    torch.save({"description": description(sub), "tensors": tensors}, path)


def load(path: File, model: nn.Module, *, example_inputs: Any = None, device: Any = None) -> nn.Module:
    """The subnetwork that :func:`save` wrote, made from the full model's code.

    Its tensors are bitwise those that were written, with their data types. It can be trained on, and written back with
    :func:`fx_approx.subnetworks.merge`: into any model of these names and shapes, since nothing is known of what the
    model holds.

    Args:
        path: What was written, or a file that is open for reading.
        model: The plain full model: any weights, or none (on the meta device). It is not changed.
        example_inputs: A batch as the model is called with it, where the model must be traced anew: the subnetwork is a
            graph, say (``rebuilt_by`` of :func:`fx_approx.subnetworks.description`).
        device: Where the subnetwork is to be; by default where the model is, and the CPU for one on the meta device.

    Raises:
        ValueError: It is no such file, or one of another format or of another model, tensors are missing, or of other
            shapes, or there are no example inputs to trace the model with. Names what is wrong.
        PlanMismatchError: The layers of the model are not those that the plan is of.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping) or not {"description", "tensors"} <= set(content):
        keys = sorted(map(str, content))[:5] if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"path: expected what fx_approx.subnetworks.save writes, got {keys}")
    full = plain(model)
    record = record_from(content["description"], full)
    check_example(record, example_inputs)
    where = torch.device("cpu" if _place(full).type == "meta" else _place(full)) if device is None else device
    tensors = {name: tensor.to(where) for name, tensor in content["tensors"].items()}
    _check(record, full, tensors)
    if not told(record).beyond:
        sub = narrowed(full, record, lambda name, _: tensors[name])
    else:
        sub = traced(widened(full, record, tensors, preserve=False), record, example_inputs)
        _fill(sub, tensors)
    for path, module in sub.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise ValueError(
                    f"model: {path}.{name} is a tensor on the meta device and neither parameter nor buffer, so that it "
                    "is not in the file; build the model with weights"
                )
    return sub


def _place(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in tensors_of(model).values()), torch.device("cpu"))


def _check(record: Subnetwork, full: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """ValueError that names the first tensor of the file that does not fit the model, or is missing."""
    there = tensors_of(full)
    if not told(record).beyond:
        _same_names(tensors, there)
    for name in there.keys() & tensors.keys():
        _same_shape(name, tensors[name], compact_shape(record.cut_of(name), there[name]))


def _fill(sub: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    own = tensors_of(sub)
    _same_names(tensors, own)
    with torch.no_grad():
        for name, tensor in own.items():
            _same_shape(name, tensors[name], tuple(tensor.shape))
            tensor.copy_(tensors[name])


def _same_names(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    missing, more = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or more:
        told = f"it has no {missing[0]}" if missing else f"it has {more[0]}, which the model has not"
        raise ValueError(f"path: expected a tensor for each of the model, but {told} ({len(missing + more)} differ)")


def _same_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"path: expected {name} of shape {shape}, got {tuple(tensor.shape)}")
