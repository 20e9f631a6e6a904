"""Passes: graph to facts, or graph to graph; none of them both decides and rewrites."""

from fx_approx.passes.annotate import Found, annotate
from fx_approx.passes.channelwise import find_flow
from fx_approx.passes.decide import check_policy, decide
from fx_approx.passes.effects import Effects, find_effects, tied
from fx_approx.passes.flow import Flow
from fx_approx.passes.rewrite import Facts, find_facts, rewrite
from fx_approx.passes.shapes import Shapes, propagate
from fx_approx.passes.unfuse import unfuse

__all__ = [
    "Effects",
    "Facts",
    "Flow",
    "Found",
    "Shapes",
    "annotate",
    "check_policy",
    "decide",
    "find_effects",
    "find_facts",
    "find_flow",
    "propagate",
    "rewrite",
    "tied",
    "unfuse",
]
