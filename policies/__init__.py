"""Policies: what is sampled, how, and why."""

from fx_approx.plan import CostModel, Policy
from fx_approx.policies.auto import Auto
from fx_approx.policies.budget import ErrorBudget, FlopBudget, MemoryBudget, TimeBudget
from fx_approx.policies.cost_model import FlopModel
from fx_approx.policies.fixed import Exact, Uniform
from fx_approx.policies.measured import MeasuredModel
from fx_approx.policies.override import Override
from fx_approx.policies.paper import Paper
from fx_approx.policies.parse import parse_policy
from fx_approx.policies.per_layer import PerLayer
from fx_approx.policies.roles import Roles
from fx_approx.policies.roofline import Device, RooflineModel, calibrate
from fx_approx.policies.sensitivity import Sensitivity

__all__ = [
    "Auto",
    "CostModel",
    "Device",
    "ErrorBudget",
    "Exact",
    "FlopBudget",
    "FlopModel",
    "MeasuredModel",
    "MemoryBudget",
    "Override",
    "Paper",
    "PerLayer",
    "Policy",
    "Roles",
    "RooflineModel",
    "Sensitivity",
    "TimeBudget",
    "Uniform",
    "calibrate",
    "parse_policy",
]
