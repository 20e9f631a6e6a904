"""Ratios that change over a training: schedules, and what follows them."""

from fx_approx.runtime.token_losses import note_token_losses
from fx_approx.schedules.noise_controller import NoiseController, NoiseRecord
from fx_approx.schedules.preserve import zero_unread_weights
from fx_approx.schedules.ratio_scheduler import RatioScheduler
from fx_approx.schedules.schedule import (
    Constant,
    Cosine,
    ExactTail,
    ExactWarmup,
    Linear,
    PeriodicExact,
    PiecewiseConstant,
    PlanRatios,
    Schedule,
)

__all__ = [
    "Constant",
    "Cosine",
    "ExactTail",
    "ExactWarmup",
    "Linear",
    "NoiseController",
    "NoiseRecord",
    "PeriodicExact",
    "PiecewiseConstant",
    "PlanRatios",
    "RatioScheduler",
    "Schedule",
    "note_token_losses",
    "zero_unread_weights",
]
