"""Which selections a subnetwork is cut out by: those of the model's next step, or given ones, equal on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fx_approx.distributed.agreement import check_indices
from fx_approx.errors import UnsupportedError
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.selector import Selector
from fx_approx.runtime.shared_selection import SharedSelection
from fx_approx.runtime.upcoming import further_selections, further_selectors, next_selections
from fx_approx.sampling.base import Selection

Selections = tuple[Selection | None, ...]


def selections_of(
    approx: ApproxModule, given: Sequence[Selection | None] | None, process_group: Any = None
) -> Selections:
    """The selections by which ``approx`` is to be cut.

    Args:
        approx: The model.
        given: One for each selection that it makes; None for those of its next step.
        process_group: Over whose ranks they are compared; None for no comparison.

    Raises:
        ValueError: ``given`` are of another model.
        UnsupportedError: The model samples tokens.
        DistributedMismatchError: They differ between the ranks, on every rank.
    """
    if approx._fx_approx.tokens:
        raise UnsupportedError(
            "model: it samples tokens, which a subnetwork does not; transform it with the policy of the layers alone"
        )
    if given is None:
        chosen = (*next_selections(approx), *further_selections(approx))
    else:
        chosen = tuple(given)
        check_selections(approx, chosen)
    if process_group is not None:
        check_chosen(approx, chosen, process_group)
    return chosen


def check_selections(approx: ApproxModule, chosen: Sequence[Selection | None], before: int = 0) -> None:
    """Nothing if ``chosen`` has one selection, or None, for each that ``approx`` makes ahead.

    Args:
        approx: The model.
        chosen: Its selections.
        before: How many others the caller gave before these.

    Raises:
        TypeError: One is no selection.
        ValueError: They are of another model. Both name the place.
    """
    shared = list(approx._fx_approx.resample.each()) if approx._fx_approx.resample is not None else []
    outside, inside = further_selectors(approx)
    made: list[SharedSelection | Selector] = [*shared, *outside.values(), *inside.values()]
    if len(chosen) != len(made):
        raise ValueError(
            f"selections: expected {len(made) + before}, one for each that the model makes, got {len(chosen) + before}"
        )
    for place, (one, given) in enumerate(zip(made, chosen, strict=True), before):
        if given is None:
            continue
        if not isinstance(given, Selection):
            raise TypeError(f"selections[{place}]: expected a Selection or None, got a {type(given).__name__}")
        index, most = given.indices, one.pairs or 0
        if index.dim() != 2 or index.shape[0] != one.groups or not index.numel() or index.dtype != torch.int64:
            raise ValueError(
                f"selections[{place}]: expected int64 indices [{one.groups}, k], k at least 1, got {index.dtype} of "
                f"shape {tuple(index.shape)}"
            )
        if int(index.max()) >= most or int(index.min()) < 0:
            raise ValueError(
                f"selections[{place}]: expected indices from 0 and below {most}, got values from {int(index.min())} to "
                f"{int(index.max())}"
            )
        if given.scale is not None and given.scale.shape != index.shape:
            raise ValueError(
                f"selections[{place}]: expected a scale of shape {tuple(index.shape)}, as the indices, got "
                f"{tuple(given.scale.shape)}"
            )
        if any(len(row.unique()) != row.numel() for row in index):
            raise ValueError(f"selections[{place}]: expected units once each, got some of them twice")


def first_selections(approx: ApproxModule) -> list[Selection | None]:
    """The first units for every selection: sizes without scores, which may have learnt nothing yet."""
    resample, device = approx._fx_approx.resample, approx._fx_approx.state.device
    ahead = [
        None if one.exact else Selection(torch.arange(one.k, device=device).repeat(one.groups, 1), None)
        for one in (() if resample is None else resample.each())
    ]
    return [*ahead, *further_selections(approx)]


def check_chosen(approx: ApproxModule, chosen: Sequence[Selection | None], group: Any) -> None:
    """The random state of ``approx`` and selections of it, in their order, are the same on all ranks of ``group``.

    Raises:
        DistributedMismatchError: On every rank; names ranks and the layer that reads the selection.
    """
    names = {id(selector): name for (name, _), selector in approx._fx_approx.selectors.items()}
    further = [names[id(selector)] for found in further_selectors(approx) for selector in found.values()]
    check_indices(approx, chosen, further, group)
