"""Which selections a subnetwork is cut out by: those of the model's next step, or given ones, equal on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fx_approx.distributed.agreement import check_chosen
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.upcoming import next_selections
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
        DistributedMismatchError: They differ between the ranks, on every rank.
    """
    if given is None:
        chosen = next_selections(approx)
    else:
        chosen = tuple(given)
        check_selections(approx, chosen)
    if process_group is not None:
        check_chosen(approx, chosen, process_group)
    return chosen


def check_selections(approx: ApproxModule, chosen: Sequence[Selection | None], before: int = 0) -> None:
    """ValueError unless ``chosen`` has one selection, or None, for each that ``approx`` makes ahead.

    ``before`` is how many were given for other graphs.
    """
    shared = list(approx._fx_approx.resample.each()) if approx._fx_approx.resample is not None else []
    if len(chosen) != len(shared):
        raise ValueError(f"selections: expected {len(shared)}, one for each that the model makes, got {len(chosen)}")
    for place, (one, given) in enumerate(zip(shared, chosen, strict=True), before):
        if given is None:
            continue
        index = given.indices
        if index.dim() != 2 or index.shape[0] != one.groups or int(index.max()) >= one.pairs or int(index.min()) < 0:
            raise ValueError(
                f"selections[{place}]: expected indices [{one.groups}, k] below {one.pairs}, got shape "
                f"{tuple(index.shape)} with values from {int(index.min())} to {int(index.max())}"
            )
        if any(len(row.unique()) != row.numel() for row in index):
            raise ValueError(f"selections[{place}]: expected units once each, got some of them twice")
