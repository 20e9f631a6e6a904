"""Subnetworks: a selection that is kept is a narrower network, which trains with any tool and is written back."""

from fx_approx.subnetworks.extract import extract
from fx_approx.subnetworks.merge import merge
from fx_approx.subnetworks.optimizers import narrow_optimizer, widen_optimizer
from fx_approx.subnetworks.phases import Phases
from fx_approx.subnetworks.record import Subnetwork, record_of
from fx_approx.subnetworks.reselect import reselect

__all__ = [
    "Phases",
    "Subnetwork",
    "extract",
    "merge",
    "narrow_optimizer",
    "record_of",
    "reselect",
    "widen_optimizer",
]
