"""Selections that a caller gives: whether they are some that the model could have made."""

from __future__ import annotations

from collections.abc import Sequence

from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.selector import Selector
from fx_approx.runtime.shared_selection import SharedSelection
from fx_approx.runtime.upcoming import further_selectors
from fx_approx.sampling.base import Selection


def check_selections(approx: ApproxModule, chosen: Sequence[Selection | None]) -> None:
    """ValueError unless ``chosen`` has one selection, or None, for each that ``approx`` makes ahead."""
    shared = list(approx._fx_approx.resample.each()) if approx._fx_approx.resample is not None else []
    outside, inside = further_selectors(approx)
    made: list[SharedSelection | Selector] = [*shared, *outside.values(), *inside.values()]
    if len(chosen) != len(made):
        raise ValueError(f"selections: expected {len(made)}, one for each that the model makes, got {len(chosen)}")
    for place, (one, given) in enumerate(zip(made, chosen, strict=True)):
        if given is None:
            continue
        index, most = given.indices, one.pairs or 0
        if index.dim() != 2 or index.shape[0] != one.groups or int(index.max()) >= most or int(index.min()) < 0:
            raise ValueError(
                f"selections[{place}]: expected indices [{one.groups}, k] below {most}, got shape "
                f"{tuple(index.shape)} with values from {int(index.min())} to {int(index.max())}"
            )
        if any(len(row.unique()) != row.numel() for row in index):
            raise ValueError(f"selections[{place}]: expected units once each, got some of them twice")
