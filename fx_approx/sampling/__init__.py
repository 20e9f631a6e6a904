"""Samplers: from scores to a Selection of column-row pairs. Imports nothing else of fx_approx."""

from fx_approx.sampling.base import SAMPLERS, Sampler, Selection, get_sampler, register_sampler
from fx_approx.sampling.bernoulli import Bernoulli, capacity
from fx_approx.sampling.crs import Crs
from fx_approx.sampling.probabilities import draw_probabilities, guard_nonfinite, inclusion_probabilities
from fx_approx.sampling.scores import SCORES, ScoreKind, get_score
from fx_approx.sampling.spec import SamplerConfig
from fx_approx.sampling.systematic import Systematic
from fx_approx.sampling.topk import TopK
from fx_approx.sampling.uniforms import derive_key, lane_uniforms, mix, site_lanes, site_uniforms, uniforms
from fx_approx.sampling.wta import Wta, WtaUnique

__all__ = [
    "SAMPLERS",
    "SCORES",
    "Bernoulli",
    "Crs",
    "Sampler",
    "SamplerConfig",
    "ScoreKind",
    "Selection",
    "Systematic",
    "TopK",
    "Wta",
    "WtaUnique",
    "capacity",
    "derive_key",
    "draw_probabilities",
    "get_sampler",
    "get_score",
    "guard_nonfinite",
    "inclusion_probabilities",
    "lane_uniforms",
    "mix",
    "register_sampler",
    "site_lanes",
    "site_uniforms",
    "uniforms",
]
