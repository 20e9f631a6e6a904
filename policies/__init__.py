"""Policies: what is sampled, how, and why."""

from fx_approx.core.plan import CostModel, Policy
from fx_approx.policies.auto import Auto
from fx_approx.policies.budget import ErrorBudget, FlopBudget, MemoryBudget, TimeBudget
from fx_approx.policies.cost_flops import FlopModel
from fx_approx.policies.cost_measured import MeasuredModel
from fx_approx.policies.cost_roofline import Device, RooflineModel, calibrate
from fx_approx.policies.hidden_units import HiddenUnits
from fx_approx.policies.override import Override
from fx_approx.policies.paper import Paper
from fx_approx.policies.parse import parse_policy
from fx_approx.policies.per_gradient import GradientSampling
from fx_approx.policies.sensitivity import Sensitivity
from fx_approx.policies.tokens import Tokens
from fx_approx.policies.uniform import DEFAULT_POLICY, Exact, Uniform

__all__ = [
    "DEFAULT_POLICY",
    "Auto",
    "CostModel",
    "Device",
    "ErrorBudget",
    "Exact",
    "FlopBudget",
    "FlopModel",
    "GradientSampling",
    "HiddenUnits",
    "MeasuredModel",
    "MemoryBudget",
    "Override",
    "Paper",
    "Policy",
    "RooflineModel",
    "Sensitivity",
    "TimeBudget",
    "Tokens",
    "Uniform",
    "calibrate",
    "parse_policy",
]
