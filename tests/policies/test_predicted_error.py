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
    k, total = spec.count(pairs), 0.0
    scores = torch.ones_like(norms) if spec.scores == "uniform" else norms
    for _ in range(draws):
        count = sampler.uniforms(pairs, k)
        chosen = sampler.draw(scores, k, torch.rand(1, count) if count else None, epsilon=spec.effective_epsilon)
        factors = torch.zeros(pairs, dtype=torch.float64)
        scale = torch.ones(chosen.indices.shape) if chosen.scale is None else chosen.scale
        factors.index_add_(0, chosen.indices[0], scale[0].double())
        total += float(((factors - 1) * norms[0]).square().sum() / norms.square().sum())
    return total / draws


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize(("name", "scores"), [("topk", "weight"), ("bernoulli", "weight"), ("systematic", "weight")])
def test_formula_agrees_with_draws(name: str, scores: str, ratio: float) -> None:
    torch.manual_seed(0)
    norms = torch.rand(1, 40).double() + 0.1
    spec = SamplerConfig(name, ratio, scores=scores)
    assert predicted_error(norms, spec, 40) == pytest.approx(
        measured(norms, spec, 4000 if name != "topk" else 1), rel=0.06
    )


def test_uniform_scores() -> None:
    torch.manual_seed(0)
    norms = torch.rand(1, 40).double() + 0.1
    spec = SamplerConfig("systematic", 0.5, scores="uniform")
    assert (
        predicted_error(norms, spec, 40) == pytest.approx(1.0) == pytest.approx(measured(norms, spec, 4000), rel=0.06)
    )


def test_all_pairs_have_no_error_and_fewer_have_more() -> None:
    norms = torch.rand(2, 32) + 0.1
    errors = [
        predicted_error(norms, SamplerConfig("topk", ratio, scores="weight"), 32) for ratio in (1, 0.75, 0.5, 0.25)
    ]
    assert errors[0] == 0 and errors == sorted(errors)


@pytest.mark.parametrize("norms", [None, torch.zeros(1, 8)])
def test_nothing_known_is_all_alike(norms: torch.Tensor | None) -> None:
    assert predicted_error(norms, SamplerConfig("topk", 0.25), 8) == pytest.approx(0.75)
