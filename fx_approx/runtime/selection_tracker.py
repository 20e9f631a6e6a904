"""Which channels the forwards since the last reduction selected: what a communication hook reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fx_approx.sampling.base import Selection


class SelectionTracker(nn.Module):
    """The union of the selections of all forwards with gradients since the last :meth:`clear`, unit by unit.

    A part of the resample node, so that it is right in compiled code, too. A forward in which a selection is not made
    (a switch, a flag, an exact step) selects all of its units. Not synchronised with the host.

    Attributes:
        mask: ``[units of all selections]``, bool; those of selection i are ``slices[i]``.
        slices: One for each selection that is made ahead.
    """

    mask: Tensor

    def __init__(self, groups: Sequence[tuple[int, int]], device: torch.device) -> None:
        """Room for selections that are made ahead.

        Args:
            groups: Of each selection, how many groups of units it chooses from, and the units of one group.
            device: Of the selections.
        """
        super().__init__()
        self.groups, self.slices, start = tuple(groups), [], 0
        for count, units in groups:
            self.slices.append(slice(start, start + count * units))
            start += count * units
        self.register_buffer("mask", torch.zeros(start, dtype=torch.bool, device=device), persistent=False)

    def forward(self, chosen: Sequence[Selection | None]) -> None:
        """Adds the selections of one forward."""
        if not torch.is_grad_enabled():
            return
        for own, selection, (count, units) in zip(self.slices, chosen, self.groups, strict=True):
            if selection is None:
                self.mask[own] = True
                continue
            starts = torch.arange(count, device=self.mask.device).unsqueeze(1) * units
            self.mask.index_fill_(0, (selection.indices + starts).flatten() + own.start, True)

    def fill(self) -> None:
        """A forward that made no selection, outside the graph."""
        self.mask.fill_(True)

    def clear(self) -> None:
        """Nothing has been selected."""
        self.mask.zero_()
