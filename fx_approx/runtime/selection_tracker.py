"""Which channels the forwards since the last reduction selected: what a communication hook reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fx_approx.sampling.base import Selection

if TYPE_CHECKING:
    from fx_approx.runtime.shared_selection import SharedSelection, SharedSelections


class SelectionTracker(nn.Module):
    """The union of the selections of all forwards with gradients since the last :meth:`clear`, unit by unit.

    A part of the resample node, so that it is right in compiled code, too. A forward in which a selection is not made
    (a switch, a flag, an exact step) selects all of its units. Not synchronised with the host.

    Attributes:
        mask: ``[units of all selections]``, bool; those of selection i are ``slices[i]``.
        slices: One for each selection that is made ahead.
    """

    mask: Tensor

    def __init__(self, resample: SharedSelections) -> None:
        """Room for the selections of ``resample``."""
        super().__init__()
        self.slices, start = [], 0
        for one in resample.each():
            self.slices.append(slice(start, start + one.units))
            start += one.units
        self.register_buffer(
            "mask", torch.zeros(start, dtype=torch.bool, device=resample.held_key.device), persistent=False
        )

    def forward(self, chosen: Sequence[Selection | None], shared: Sequence[SharedSelection]) -> None:
        """Adds the selections of one forward."""
        if not torch.is_grad_enabled():
            return
        for own, selection, one in zip(self.slices, chosen, shared, strict=True):
            if selection is None:
                self.mask[own] = True
                continue
            starts = torch.arange(one.groups, device=self.mask.device).unsqueeze(1) * one.pairs
            self.mask.index_fill_(0, (selection.indices + starts).flatten() + own.start, True)

    def fill(self) -> None:
        """A forward that made no selection, outside the graph."""
        self.mask.fill_(True)

    def clear(self) -> None:
        """Nothing has been selected."""
        self.mask.zero_()
