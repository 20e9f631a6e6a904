"""What a transformed model does, measured: noise, time, sensitivity, and whether every number is right."""

from fx_approx.analysis.channel_groups import coupling_graph, coupling_text, draw_coupling
from fx_approx.analysis.layer_sensitivity import sensitivity
from fx_approx.analysis.noise import gradient_noise
from fx_approx.analysis.noise_report import NoiseReport
from fx_approx.analysis.scalar_logger import ScalarLogger
from fx_approx.analysis.selection_timing import selection_time
from fx_approx.analysis.time_prediction import estimate_step_time
from fx_approx.analysis.token_axis import TokenAnalysis, token_axis
from fx_approx.analysis.verification import Verification, verify
from fx_approx.core.step_cost import StepTimeEstimate
from fx_approx.savings.report import Explanation, SavingsReport, SelectionTime

__all__ = [
    "Explanation",
    "NoiseReport",
    "SavingsReport",
    "ScalarLogger",
    "SelectionTime",
    "StepTimeEstimate",
    "TokenAnalysis",
    "Verification",
    "coupling_graph",
    "coupling_text",
    "draw_coupling",
    "estimate_step_time",
    "gradient_noise",
    "selection_time",
    "sensitivity",
    "token_axis",
    "verify",
]
