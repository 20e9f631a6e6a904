"""Policies: what is sampled, how, and why."""

from fx_approx.plan import CostModel, Policy
from fx_approx.policies.cost_model import FlopModel
from fx_approx.policies.fixed import Exact, Uniform
from fx_approx.policies.override import Override
from fx_approx.policies.paper import Paper
from fx_approx.policies.parse import parse_policy
from fx_approx.policies.roles import Roles

__all__ = ["CostModel", "Exact", "FlopModel", "Override", "Paper", "Policy", "Roles", "Uniform", "parse_policy"]
