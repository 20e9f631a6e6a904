"""From a description and the full model's code to the subnetwork, and from a subnetwork to the full model's size."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fx_approx._compat import buffers_of, parameters_of
from fx_approx.capture.trace import skeleton
from fx_approx.compiler.transform import transform
from fx_approx.core.plan import Plan
from fx_approx.errors import UnsupportedError
from fx_approx.runtime.approx_module import ApproxModule, find
from fx_approx.runtime.exact import exact_copy
from fx_approx.subnetworks.cuts import Cut
from fx_approx.subnetworks.description import description, record_from
from fx_approx.subnetworks.extract import extract
from fx_approx.subnetworks.merge import zero_unread
from fx_approx.subnetworks.record import RECORD, Origin, Subnetwork, check_origin, record_of, subnetwork_in, tensors_of


def rebuild(model: nn.Module, described: Mapping[str, Any], *, example_inputs: Any = None) -> nn.Module:
    """The subnetwork that ``described`` tells of, cut out of ``model`` anew.

    Load its trained tensors with ``load_state_dict``, or have :func:`fx_approx.subnetworks.load` do both.

    Args:
        model: The plain full model, with any weights, or a transformed one; it is not changed. It may be on the meta
            device where the description says ``rebuilt_by`` narrowing. The result is there, too, then, to be filled by
            ``load_state_dict(state, assign=True)``.
        described: What :func:`fx_approx.subnetworks.description` gave.
        example_inputs: A batch as the model is called with it, where the description says ``rebuilt_by`` tracing.

    Raises:
        ValueError: No description, or one of another format or another model; a model to be traced without example
            inputs, or on the meta device. Names what is wrong; nothing is changed.
        PlanMismatchError: The layers of the model are not those of the plan.
    """
    full = plain(model)
    record = record_from(described, full)
    if not told(record).beyond:
        return narrowed(full, record, lambda name, tensor: record.cut_of(name).of(tensor))
    check_example(record, example_inputs)
    if any(tensor.is_meta for tensor in tensors_of(full).values()):
        raise ValueError(
            "model: expected one with weights, any, got one on the meta device: the subnetwork is made by tracing "
            "the model; fx_approx.subnetworks.load takes it, with the weights of the file"
        )
    return traced(full, record, example_inputs)


def restore(sub: nn.Module, model: nn.Module) -> nn.Module:
    """An exact model of full size that computes what ``sub`` computes, in training and in evaluation.

    It is what :func:`fx_approx.subnetworks.merge` with ``preserve=True`` makes of the full model, as a copy, and of
    unbiased samplers, too: the scale stays in the weights.

    Args:
        sub: What :func:`fx_approx.subnetworks.extract` or :func:`fx_approx.subnetworks.load` returned, or its wrapper.
        model: The plain full model, or a transformed one; it is not changed. What ``sub`` does not have is taken from
            it, and is zero where it is on the meta device.

    Returns:
        An instance of the model's own class, in the mode of ``sub``.

    Raises:
        ValueError: ``sub`` is no subnetwork, or one of another model.
        UnsupportedError: It reads a part of a tensor that it holds whole, so that no exact model computes the same.
    """
    record, full = record_of(sub), plain(model)
    check_origin(record, full)
    if record.sliced:
        raise UnsupportedError(f"sub: {record.why_inexact()}, so that no exact model computes the same")
    return widened(full, record, tensors_of(subnetwork_in(sub)), preserve=True).train(sub.training)


def plain(model: nn.Module) -> nn.Module:
    """The exact model: of a transformed one, its structure with exact layers on the same parameters."""
    if any(isinstance(module, ApproxModule) for module in model.modules()):
        return exact_copy(find(model))
    return model


def narrowed(full: nn.Module, record: Subnetwork, make: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """A subnetwork of the model's own class: its structure with narrow layers.

    Args:
        full: The plain full model.
        record: What the subnetwork is.
        make: From the name of a parameter or buffer, and the full one, the compact one.
    """
    root = _remade(full, make)
    there = dict(root.named_modules(remove_duplicate=False))
    for path, values in told(record).attributes.items():
        for name, value in values.items():
            try:
                holder = functools.reduce(getattr, name.split(".")[:-1], there[path])
                before = getattr(holder, name.rpartition(".")[2])
            except (KeyError, AttributeError):
                raise ValueError(
                    f"model: expected {path or 'the model'} with an attribute {name}, as in the {told(record).model} "
                    "that was cut; there is none"
                ) from None
            setattr(holder, name.rpartition(".")[2], tuple(value) if isinstance(before, tuple) else value)
    vars(root)[RECORD] = record
    return root


def traced(full: nn.Module, record: Subnetwork, example_inputs: Any) -> nn.Module:
    """A subnetwork for which the model is transformed by the same plan and cut at the same selections.

    Raises:
        ValueError: The result is another one.
    """
    origin = told(record)
    assert origin.plan is not None  # else there would be no description
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said at the first transform
        approx = transform(full, Plan.from_dict(origin.plan), example_inputs, prune_unread=origin.prunes)
    sub = extract(approx, record.selections, example_inputs=example_inputs)
    if record_of(sub).forms != record.forms and not any(form is not None for form in record.forms.values()):
        # It was made without example inputs.
        sub = extract(approx, record.selections)
    found = description(sub)
    was = record_of(sub)
    vars(sub)[RECORD] = dataclasses.replace(record, sliced=was.sliced)
    wanted = description(sub)
    if any(found[key] != wanted[key] for key in ("form", "forms", "cuts", "chosen", "selections")):
        raise ValueError(
            "model: its graph is another one than that which was cut, other parts of its weights would be read; "
            f"expected the same code, called with inputs of the same form ({was.reason})"
        )
    return sub


def widened(full: nn.Module, record: Subnetwork, own: Mapping[str, Tensor], *, preserve: bool) -> nn.Module:
    """A copy of the full model with the tensors of a subnetwork at their places.

    Args:
        full: The plain full model. Of one on the meta device, what the subnetwork does not have is zero.
        record: Of the subnetwork.
        own: Tensors of the subnetwork by name.
        preserve: Set the weights to zero that read what the subnetwork does not have.

    Returns:
        The model on the device of the subnetwork, in its data types.
    """
    device = next(iter(own.values())).device

    def make(name: str, tensor: Tensor) -> Tensor:
        compact = own.get(name)
        kind = {"device": device} if compact is None else {"device": compact.device, "dtype": compact.dtype}
        made = torch.zeros_like(tensor, **kind) if tensor.is_meta else tensor.detach().to(**kind, copy=True)
        if compact is not None:
            if preserve:
                zero_unread(made, record.cut_of(name))
            record.cut_of(name).put(made, compact, scaled=False)
        return made

    return _remade(full, make)


def compact_shape(cut: Cut, full: Tensor) -> tuple[int, ...]:
    """The shape of what ``cut`` holds of ``full``."""
    return tuple(cut.of(torch.empty_like(full, device="meta")).shape)


def _remade(full: nn.Module, make: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """The structure of a model with other tensors; what is one tensor there is one here."""
    root = skeleton(full)
    made: dict[int, Tensor] = {}
    for path, module in root.named_modules():
        for held in (parameters_of(module), buffers_of(module)):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = make(f"{path}.{name}" if path else name, tensor)
                    parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if parameter else new
                held[name] = made[id(tensor)]
    return root


def check_example(record: Subnetwork, example_inputs: Any) -> None:
    """ValueError where the model is to be traced, and there is nothing to call it with."""
    if told(record).beyond and example_inputs is None:
        why = f"{told(record).beyond}: {record.reason}" if record.reason else told(record).beyond
        raise ValueError(
            "example_inputs: expected a batch as the model is called with it, got None: the subnetwork is made by "
            f"tracing the model anew ({why})"
        )


def told(record: Subnetwork) -> Origin:
    """The origin in a record that comes from a description."""
    assert record.origin is not None
    return record.origin
