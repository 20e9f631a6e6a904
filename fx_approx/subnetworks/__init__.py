"""Subnetworks: a selection that is kept is a narrower network, which trains with any tool and is written back."""

from fx_approx.subnetworks.extract import Subnetwork, extract, next_selections, record_of
from fx_approx.subnetworks.merge import merge, reselect
from fx_approx.subnetworks.optimizers import narrow_optimizer, widen_optimizer

__all__ = [
    "Subnetwork",
    "extract",
    "merge",
    "narrow_optimizer",
    "next_selections",
    "record_of",
    "reselect",
    "widen_optimizer",
]
