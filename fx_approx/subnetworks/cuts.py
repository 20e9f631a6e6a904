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
            part = self._cut(full.detach(), self.inputs)
            return part.clone(memory_format=torch.preserve_format) if part.data_ptr() == full.data_ptr() else part

    def taken(self, full: Tensor) -> Tensor:
        """The entries of ``full`` that are there, without the scale: of a moment of an optimiser, say."""
        with torch.no_grad():
            return self._cut(full.detach(), _unscaled(self.inputs)).clone()

    def put(self, full: Tensor, compact: Tensor, scaled: bool = True) -> None:
        """Writes ``compact`` to its places in ``full``; nothing else changes.

        Args:
            full: Changed in place.
            compact: What :meth:`of` gave, changed since; with ``scaled=False`` what :meth:`taken` gave.
            scaled: The scale of the sample is taken out again.
        """
        with torch.no_grad():
            if self.whole:
                full.copy_(compact)
                return
            value = compact.detach()
            if scaled and self.inputs is not None and self.inputs.scale is not None:
                value = value / self.scale(full)
            places = self.places(full)
            flat = full.reshape(-1)  # a copy where the memory is laid out otherwise
            flat.index_copy_(0, places.flatten(), value.to(full.dtype).reshape(-1))
            if flat.data_ptr() != full.data_ptr():
                full.copy_(flat.view(full.shape))

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
        if full.dim() < 2 or inputs is None:
            return full if self.outputs is None or full.dim() == 0 else full.index_select(0, self.outputs.indices[0])
        slices = slice_weights(full, None, inputs, self.outputs, self.groups, self.depthwise)
        return full if slices is None else slices.weight


def _unscaled(chosen: Selection | None) -> Selection | None:
    return None if chosen is None else Selection(chosen.indices, None)


def same_cut(one: Cut, other: Cut) -> bool:
    """Whether two cuts take the same part of a tensor."""
    pairs = (one.inputs, other.inputs), (one.outputs, other.outputs)
    return (one.groups, one.depthwise) == (other.groups, other.depthwise) and all(_equal(*pair) for pair in pairs)


def _equal(one: Selection | None, other: Selection | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or torch.equal(one.indices, other.indices)
