"""Working on the demanded channels only: what a graph calls after the demand pass (docs/how-it-works.md).

A *part* describes one stretch of a tensor's axis: ``(selection, count, block)``. The stretch holds ``count`` units of
``block`` neighbouring entries each (a unit is a channel, or a whole attention head); the selection of units is
``[groups, k]``, or None if all are there. An axis is one part behind the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_approx.errors import WidthError
from fx_approx.ops.gather import flat_indices, gather, select_weight, tap
from fx_approx.ops.tapped_relu import tap_relu
from fx_approx.sampling.base import Selection

Part = tuple[Selection | None, int, int]


class Slices(NamedTuple):
    """The part of a layer's weight and bias that a step reads; gradients flow back to the whole.

    Attributes:
        weight: ``[outputs, inputs / groups, ...]``, the scale of the sample multiplied in.
        bias: ``[outputs]`` or None.
        groups: Of the convolution that is left; 1 for a linear layer.
        inputs: What the weight has been sliced by along its inputs, see :func:`slice_weights`.
        outputs: The same along its outputs.
    """

    weight: Tensor
    bias: Tensor | None
    groups: int
    inputs: Selection | None
    outputs: Selection | None


def width(parts: Sequence[Part]) -> int:
    """Entries of an axis of which only the selected units are there."""
    return sum((count if chosen is None else chosen.indices.numel()) * block for chosen, count, block in parts)


def positions(parts: Sequence[Part], groups: int = 1) -> Selection | None:
    """The selected entries of an axis, from the selections of its parts.

    Args:
        parts: The axis, see above.
        groups: Groups of the convolution that reads the axis; each must have as many selected entries.

    Returns:
        Indices and scale ``[groups, k]``, counted within each group; None if every unit is there.
    """
    if all(chosen is None for chosen, _, _ in parts):
        return None
    places, scales, offset = [], [], 0
    scaling = any(chosen is not None and chosen.scale is not None for chosen, _, _ in parts)
    device = next(chosen.indices.device for chosen, _, _ in parts if chosen is not None)
    for chosen, count, block in parts:
        if chosen is None:
            units = torch.arange(count, device=device)
        else:
            units = flat_indices(chosen.indices, count // chosen.indices.shape[0])
        if scaling:
            scale = None if chosen is None else chosen.scale
            flat = torch.ones(units.shape[0], device=device) if scale is None else scale.reshape(-1)
            scales.append(flat if block == 1 else flat.repeat_interleave(block))
        if block > 1:
            units = (units.unsqueeze(1) * block + torch.arange(block, device=device)).flatten()
        places.append(units + offset if offset else units)
        offset += count * block
    index = places[0] if len(places) == 1 else torch.cat(places)
    factors = None
    if scaling:
        factors = (scales[0] if len(scales) == 1 else torch.cat(scales)).view(groups, -1)
    if groups == 1:
        return Selection(index.unsqueeze(0), factors)
    starts = torch.arange(groups, device=device).unsqueeze(1) * (offset // groups)
    return Selection(index.view(groups, -1) - starts, factors)


def narrow(input: Tensor, dim: int, chosen: Selection | None, size: int | None = None) -> Tensor:
    """The chosen entries of ``input`` along ``dim``; all without a selection. Keeps channels_last.

    Args:
        input: Any shape.
        dim: The axis that ``chosen``, ``[1, k]``, counts; its scale is not applied.
        chosen: As :func:`positions` gave it.
        size: Entries that ``input`` must have, where another operation does not see to it.

    Raises:
        WidthError: It has more or fewer.
    """
    if chosen is not None:
        check_width(input, dim, size)
    return input if chosen is None else gather(input, dim, chosen.indices[0])


def check_width(input: Tensor, dim: int, size: int | None) -> None:
    """Nothing if ``input`` has ``size`` entries along ``dim``, or if that is None; else :class:`WidthError`."""
    if size is not None and (not -input.dim() <= dim < input.dim() or input.shape[dim] != size):
        raise WidthError(f"expected {size} entries along axis {dim}, got a tensor of shape {list(input.shape)}")


def tapped(input: Tensor, dim: int, chosen: Selection | None, size: int | None = None) -> tuple[Tensor, Tensor]:
    """``input`` and what :func:`narrow` makes of it, for a value that is read both ways; see :func:`gather.tap`."""
    if chosen is not None:
        check_width(input, dim, size)
    return (input, input) if chosen is None else tap(input, dim, chosen.indices[0])


def tapped_relu(input: Tensor, dim: int, chosen: Selection | None, inplace: bool = False) -> tuple[Tensor, Tensor]:
    """:func:`tapped` of ``F.relu(input, inplace)``, which keeps less for backward; see :func:`tapped_relu.tap_relu`."""
    if chosen is None:
        whole = F.relu(input, inplace)
        return whole, whole
    return tap_relu(input, dim, chosen.indices[0], inplace)


def slice_weights(
    weight: Tensor,
    bias: Tensor | None,
    inputs: Selection | None,
    outputs: Selection | None,
    groups: int = 1,
    depthwise: bool = False,
) -> Slices | None:
    """The part of a layer that computes the outputs ``outputs`` from the inputs ``inputs``; None if that is all.

    Args:
        weight: ``[O, I / groups, ...]``.
        bias: ``[O]`` or None.
        inputs: Of the ``I / groups`` inputs of each group, ``[groups, k]``; its scale is multiplied into the weight.
        outputs: Of the O outputs, ``[1, k]``, in a grouped layer as many of each group; its scale is not applied.
        groups: Groups of the convolution.
        depthwise: Every group has one input, and goes with its outputs.
    """
    if inputs is None and outputs is None:
        return None
    if outputs is not None:
        index = outputs.indices[0]
        if depthwise:
            groups = index.shape[0] * groups // weight.shape[0]
        weight = gather(weight, 0, index)
        bias = None if bias is None else gather(bias, 0, index)
    if inputs is not None and not depthwise:
        weight = select_weight(weight, groups, inputs)
    return Slices(weight, bias, groups, inputs, outputs)


def keep_columns(weight: Tensor, read: Tensor) -> None:
    """Sets the columns of ``weight`` to zero, in place, that its groups do not read.

    Args:
        weight: ``[O, I / groups, ...]``.
        read: ``[groups, I / groups]``, bool: what the outputs of each group read.
    """
    rows = read.repeat_interleave(weight.shape[0] // read.shape[0], 0)
    with torch.no_grad():
        weight.masked_fill_(~rows.view(*rows.shape, *(1,) * (weight.dim() - 2)), 0.0)


def resize(input: Tensor, shape: Sequence[int], axis: int, parts: Sequence[Part], method: str) -> Tensor:
    """``input.reshape(shape)`` or alike, where entry ``axis`` of ``shape`` counts the units that are there.

    Args:
        input: Any shape.
        shape: For whole channels; -1 anywhere stays -1.
        axis: Position in ``shape``.
        parts: What stands along that axis of the result.
        method: ``"reshape"``, ``"view"`` or ``"expand"``.
    """
    sizes = list(shape) if isinstance(shape, (tuple, list)) else [shape]
    if sizes[axis] != -1 and any(chosen is not None for chosen, _, _ in parts):
        sizes[axis] = width(parts)
    result: Tensor = getattr(input, method)(sizes)
    return result


def whole_size(input: Tensor, dim: int, size: int, which: int | None = None) -> Any:
    """The size of a value of which only some entries along ``dim`` are there, as if all ``size`` of them were.

    Args:
        input: Any shape.
        dim: The axis.
        size: Its length where all are there.
        which: The axis that is asked for; None for all.
    """
    sizes = [*input.shape[:dim], size, *input.shape[dim + 1 :]]
    if which is not None:
        return sizes[which]
    return torch.Size(sizes) if all(isinstance(one, int) for one in sizes) else tuple(sizes)  # else they are traced


def take_parts(input: Tensor, dim: int, before: Sequence[Part], parts: Sequence[Part]) -> Tensor:
    """The stretch ``parts`` of an axis, of which ``before`` stands before it, as far as the units are there."""
    return input.narrow(dim, width(before), width(parts))


def pad_parts(
    input: Tensor,
    pad: Sequence[int],
    value: float | None,
    dim: int,
    ends: Sequence[Sequence[Part]],
) -> Tensor:
    """``F.pad`` with a constant, of channels too, of which only the selected ones are made.

    Args:
        input: Any shape.
        pad: As ``F.pad`` takes it.
        value: What the new entries are filled with; None for zeros.
        dim: The axis of the channels.
        ends: What stands before and behind those of ``input`` along that axis.
    """
    place = 2 * (input.dim() - 1 - dim)
    sizes = [*pad[:place], *(width(parts) for parts in ends), *pad[place + 2 :]]
    return F.pad(input, sizes, "constant", value)


def split_parts(input: Tensor, sections: Sequence[Sequence[Part]], dim: int) -> tuple[Tensor, ...]:
    """``torch.split`` into sections of which only the selected units are there."""
    return torch.split(input, [width(parts) for parts in sections], dim)


def remaining(have: Sequence[Part], wanted: Sequence[Part]) -> Selection | None:
    """What is wanted of an axis, as positions in an axis that holds only ``have``; None if it is all that it holds.

    Args:
        have: The axis as it is: of each part all units, or the selected ones.
        wanted: The same parts; each as in ``have``, or with a selection where ``have`` has all.
    """
    places, offset, fewer = [], 0, False
    device = next(chosen.indices.device for chosen, _, _ in (*have, *wanted) if chosen is not None)
    for there, want in zip(have, wanted, strict=True):
        size = width((there,))
        if want[0] is None or there[0] is not None:
            own = torch.arange(size, device=device)
        else:
            found = positions((want,))
            assert found is not None
            own, fewer = found.indices[0], True
        places.append(own + offset)
        offset += size
    return Selection(torch.cat(places).unsqueeze(0), None) if fewer else None


def spread(chosen: Selection | None, pairs: int) -> Selection | None:
    """A selection ``[groups, k]`` within each group's ``pairs`` as one of all channels, ``[1, groups * k]``."""
    return None if chosen is None else Selection(flat_indices(chosen.indices, pairs).unsqueeze(0), None)
