"""Subnetworks: a selection that is kept is a narrower network, which trains with any tool and is written back."""

from fx_approx.subnetworks.description import description
from fx_approx.subnetworks.extract import extract
from fx_approx.subnetworks.merge import merge
from fx_approx.subnetworks.optimizers import narrow_optimizer, widen_optimizer
from fx_approx.subnetworks.phases import Phases
from fx_approx.subnetworks.rebuild import rebuild, restore
from fx_approx.subnetworks.record import Subnetwork, record_of
from fx_approx.subnetworks.reselect import reselect
from fx_approx.subnetworks.storage import load, save
from fx_approx.subnetworks.summary import Costs, Latency, Summary, summary

__all__ = [
    "Costs",
    "Latency",
    "Phases",
    "Subnetwork",
    "Summary",
    "description",
    "extract",
    "load",
    "merge",
    "narrow_optimizer",
    "rebuild",
    "record_of",
    "reselect",
    "restore",
    "save",
    "summary",
    "widen_optimizer",
]
