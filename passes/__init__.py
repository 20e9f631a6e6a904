"""Passes: graph to facts, or graph to graph; none of them both decides and rewrites."""

from fx_approx.core.plan_effects import Effects, tied
from fx_approx.passes.apply_policy import check_policy, decide
from fx_approx.passes.channel_flow import Flow
from fx_approx.passes.channel_liveness import Facts, find_facts
from fx_approx.passes.channel_rules import find_flow
from fx_approx.passes.decompose_attention import unfuse
from fx_approx.passes.find_candidates import Found, annotate
from fx_approx.passes.plan_effects import find_effects
from fx_approx.passes.rewrite import rewrite
from fx_approx.passes.shape_prop import Shapes, propagate

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
