"""fx_approx: train with fewer operations, by sampled matrix products and convolutions, as a pass over torch.fx.

approx = fx_approx.transform(model, policy)   # same parameters, same state_dict, exact in eval()
approx = torch.compile(approx)
print(fx_approx.report(approx))               # what each layer saves, and why the others were left exact
"""

from pathlib import Path

# In a source checkout passes/ and policies/ stand beside this folder; an installed package has them inside.
if not (Path(__file__).parent / "passes").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

from fx_approx import distributed
from fx_approx.analysis.channel_groups import coupling_graph, coupling_text, draw_coupling
from fx_approx.analysis.layer_sensitivity import measure_sensitivity
from fx_approx.analysis.noise import measure_error
from fx_approx.analysis.noise_report import NoiseReport
from fx_approx.analysis.scalar_logger import ScalarLogger
from fx_approx.analysis.selection_timing import measure_selection
from fx_approx.analysis.time_prediction import Prediction, predict
from fx_approx.analysis.verification import Verification, verify
from fx_approx.compiler.transform import explain, report, restore, transform
from fx_approx.core.candidates import Candidate, GemmShape, Role
from fx_approx.core.plan import Decision, Plan
from fx_approx.dynamo.backend import backend
from fx_approx.errors import (
    AlreadyTransformedError,
    CacheWarning,
    CaptureError,
    CaptureWarning,
    DisagreementError,
    NoEffectWarning,
    PlanMismatchError,
    RecompilationWarning,
    RecomputationError,
    ShapesNeededError,
    StaleStatisticsWarning,
    UnsupportedTransformError,
)
from fx_approx.runtime.controls import (
    hold,
    load_sampler_state,
    recalibrate,
    sampler_state,
    set_enabled,
    set_ratio,
    synchronize_scores,
)
from fx_approx.sampling.base import Selection
from fx_approx.sampling.spec import SamplerSpec
from fx_approx.savings.report import Explanation, SavingsReport, SelectionTime
from fx_approx.schedules.noise_controller import AdaptiveRatios, NoiseRecord
from fx_approx.schedules.preserve import preserve_function
from fx_approx.schedules.ratio_scheduler import RatioScheduler

__version__ = "0.1.0"

__all__ = [
    "AdaptiveRatios",
    "AlreadyTransformedError",
    "CacheWarning",
    "Candidate",
    "CaptureError",
    "CaptureWarning",
    "Decision",
    "DisagreementError",
    "Explanation",
    "GemmShape",
    "NoEffectWarning",
    "NoiseRecord",
    "NoiseReport",
    "Plan",
    "PlanMismatchError",
    "Prediction",
    "RatioScheduler",
    "RecompilationWarning",
    "RecomputationError",
    "Role",
    "SamplerSpec",
    "SavingsReport",
    "ScalarLogger",
    "Selection",
    "SelectionTime",
    "ShapesNeededError",
    "StaleStatisticsWarning",
    "UnsupportedTransformError",
    "Verification",
    "backend",
    "coupling_graph",
    "coupling_text",
    "distributed",
    "draw_coupling",
    "explain",
    "hold",
    "load_sampler_state",
    "measure_error",
    "measure_selection",
    "measure_sensitivity",
    "predict",
    "preserve_function",
    "recalibrate",
    "report",
    "restore",
    "sampler_state",
    "set_enabled",
    "set_ratio",
    "synchronize_scores",
    "transform",
    "verify",
]
