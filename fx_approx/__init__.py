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
from fx_approx.api import explain, report, restore, transform
from fx_approx.candidate import Candidate, GemmShape, Role
from fx_approx.controller import AdaptiveRatios, NoiseRecord
from fx_approx.controls import (
    hold,
    load_sampler_state,
    recalibrate,
    sampler_state,
    set_enabled,
    set_ratio,
    synchronize_scores,
)
from fx_approx.coupling import coupling_graph, coupling_text, draw_coupling
from fx_approx.dynamo_backend import backend
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
from fx_approx.growth import preserve_function
from fx_approx.noise import measure_error
from fx_approx.noise_report import NoiseReport
from fx_approx.overhead import measure_selection
from fx_approx.plan import Decision, Plan
from fx_approx.prediction import Prediction, predict
from fx_approx.report import Explanation, SavingsReport, SelectionTime
from fx_approx.sampling import SamplerSpec, Selection
from fx_approx.scalars import ScalarLogger
from fx_approx.scheduler import RatioScheduler
from fx_approx.sensitivity import measure_sensitivity
from fx_approx.sweep import sweep
from fx_approx.sweep_report import SweepResult, SweepRun, SweepTime
from fx_approx.verify import Verification, verify

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
    "SweepResult",
    "SweepRun",
    "SweepTime",
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
    "sweep",
    "synchronize_scores",
    "transform",
    "verify",
]
