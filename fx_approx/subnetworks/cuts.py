"""How each tensor of a subnetwork is cut out of one of the full model, and put back."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fx_approx.ops.channel_slices import slice_weights
from fx_approx.sampling.base import Selection


@dataclasses.dataclass(frozen=True)
class Cut:
    """What a compact tensor holds of a full one.

    Attributes:
        source: Path of the full tensor in the full model.
        inputs: Of the inputs of each group that a weight reads, ``[groups, k]``; None for all. Its scale is multiplied
            into the compact weight.
        outputs: Of its first axis, ``[1, k]``; None for all.
        groups: Of the convolution.
        depthwise: Every group has one input, and goes with its outputs.
        transposed: The weight is stored ``[inputs, outputs]``.
    """

    source: str
    inputs: Selection | None = None
    outputs: Selection | None = None
    groups: int = 1
    depthwise: bool = False
    transposed: bool = False

    @property
    def whole(self) -> bool:
        """Whether nothing is cut off."""
        return self.inputs is None and self.outputs is None

    def inputs_of(self, full: Tensor) -> int:
        """How many inputs each group of the full weight reads."""
        return full.shape[0 if self.transposed else 1]

    def of(self, full: Tensor) -> Tensor:
        """The compact tensor, with the scale of the sample; a copy."""
        with torch.no_grad():
            part = self.part(full)
            return part.clone(memory_format=torch.preserve_format) if part.data_ptr() == full.data_ptr() else part

    def part(self, full: Tensor) -> Tensor:
        """As :meth:`of`; not copied where nothing is cut off."""
        return self._cut(full.detach(), self.inputs)

    def taken(self, full: Tensor) -> Tensor:
        """The entries of ``full`` that are there, without the scale: of a moment of an optimiser, say."""
        with torch.no_grad():
            part = self._cut(full.detach(), _unscaled(self.inputs))
            return part.clone() if part.data_ptr() == full.data_ptr() else part

    def put(self, full: Tensor, compact: Tensor, scaled: bool = True) -> None:
        """Writes ``compact`` to its places in ``full``; nothing else changes.

        Args:
            full: Changed in place.
            compact: What :meth:`of` gave, changed since; with ``scaled=False`` what :meth:`taken` gave.
            scaled: The scale of the sample is taken out again.
        """
        with torch.no_grad():
            if self.whole or full.dim() == 0:
                full.copy_(compact)
                return
            value = compact.detach()
            if scaled and self.scaled:
                value = value / self.scale(full)
            value = value.to(full.dtype)
            if self.transposed and full.dim() == 2:
                dataclasses.replace(self, transposed=False).put(full.t(), value.t(), scaled=False)
                return
            if self.outputs is None:
                self._put_inputs(full, value)
                return
            rows = self.outputs.indices[0].to(full.device)
            if self.inputs is not None and full.dim() > 1:
                inputs, value = value, full.index_select(0, rows)
                self._put_inputs(value, inputs)
            full.index_copy_(0, rows, value)

    def _put_inputs(self, rows: Tensor, value: Tensor) -> None:
        """Writes ``value``, which has the inputs that are there, into whole rows."""
        assert self.inputs is not None
        index = self.inputs.indices.to(rows.device)
        if self.groups == 1:
            rows.index_copy_(1, index[0], value)
            return
        parts, values = (one.reshape(self.groups, -1, *one.shape[1:]) for one in (rows, value))
        for part, own, places in zip(parts, values, index, strict=True):
            part.index_copy_(1, places, own)

    @property
    def scaled(self) -> bool:
        """Whether the compact weight is multiplied by the scale of a sample."""
        return self.inputs is not None and self.inputs.scale is not None

    def places(self, full: Tensor) -> Tensor:
        """Where the entries of the compact tensor stand in the flattened full one, in the compact one's shape."""
        numbers = torch.arange(full.numel(), device=full.device).view(full.shape)
        return self._cut(numbers, _unscaled(self.inputs))

    def scale(self, full: Tensor) -> Tensor:
        """What each entry of the compact tensor was multiplied by, in its shape."""
        return self._cut(torch.ones_like(full), self.inputs)

    def _cut(self, full: Tensor, inputs: Selection | None) -> Tensor:
        if self.transposed and not self.whole:
            return dataclasses.replace(self, transposed=False)._cut(full.t(), inputs).t().contiguous()
        outputs = _on(full.device, self.outputs)
        if full.dim() < 2 or inputs is None:
            return full if outputs is None or full.dim() == 0 else full.index_select(0, outputs.indices[0])
        slices = slice_weights(full, None, _on(full.device, inputs), outputs, self.groups, self.depthwise)
        return full if slices is None else slices.weight


def _on(device: torch.device, chosen: Selection | None) -> Selection | None:
    """The selection where the tensor is: models move, and descriptions are read anywhere."""
    if chosen is None or chosen.indices.device == device:
        return chosen
    return Selection(chosen.indices.to(device), None if chosen.scale is None else chosen.scale.to(device))


def _unscaled(chosen: Selection | None) -> Selection | None:
    return None if chosen is None else Selection(chosen.indices, None)


def same_cut(one: Cut, other: Cut) -> bool:
    """Whether two cuts take the same part of a tensor."""
    pairs = (one.inputs, other.inputs), (one.outputs, other.outputs)
    layouts = [(cut.groups, cut.depthwise, cut.transposed) for cut in (one, other)]
    return layouts[0] == layouts[1] and all(same_selection(*pair) for pair in pairs)


def same_selection(one: Selection | None, other: Selection | None) -> bool:
    """Whether two selections have the same indices, in the same order."""
    if one is None or other is None:
        return one is other
    return one is other or torch.equal(one.indices, other.indices)
