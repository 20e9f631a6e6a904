"""The variance formulas against samples."""

from __future__ import annotations

import pytest
import torch

from fx_approx import SamplerConfig
from fx_approx.policies.error_model import predicted_error
from fx_approx.sampling import get_sampler


def measured(norms: torch.Tensor, spec: SamplerConfig, draws: int) -> float:
    """E‖Ĉ - C‖² / ‖C‖² for pairs that are orthogonal and as long as ``norms``: then only the draws matter."""
    sampler, pairs = get_sampler(spec.name), norms.shape[1]
    k, norms = spec.count(pairs), norms.expand(draws, -1)
    scores = torch.ones_like(norms) if spec.scores == "uniform" else norms
    count = sampler.uniforms(pairs, k)
    chosen = sampler.draw(scores, k, torch.rand(draws, count) if count else None, epsilon=spec.effective_epsilon)
    scale = torch.ones(chosen.indices.shape) if chosen.scale is None else chosen.scale
    factors = torch.zeros(draws, pairs, dtype=torch.float64).scatter(1, chosen.indices, scale.double())
    return float(((factors - 1) * norms).square().sum() / norms.square().sum())


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("name", ["topk", "bernoulli", "systematic"])
def test_formula_agrees_with_draws(name: str, ratio: float) -> None:
    norms = torch.rand(1, 40).double() + 0.1
    spec = SamplerConfig(name, ratio, scores="weight")
    assert predicted_error(norms, spec, 40) == pytest.approx(measured(norms, spec, 4000), rel=0.06)


def test_special_cases() -> None:
    norms = torch.rand(1, 40).double() + 0.1
    uniform = SamplerConfig("systematic", 0.5, scores="uniform")
    assert (
        predicted_error(norms, uniform, 40)
        == pytest.approx(1.0)
        == pytest.approx(measured(norms, uniform, 4000), rel=0.06)
    )
    # All pairs have no error, and fewer have more.
    specs = [SamplerConfig("topk", ratio, scores="weight") for ratio in (1, 0.75, 0.5, 0.25)]
    errors = [predicted_error(torch.rand(2, 32) + 0.1, spec, 32) for spec in specs]
    assert errors[0] == 0 and errors == sorted(errors)
    for nothing in (None, torch.zeros(1, 8)):  # nothing known is all alike
        assert predicted_error(nothing, SamplerConfig("topk", 0.25), 8) == pytest.approx(0.75)
