"""Uniforms and draws trace as one graph, and give the same numbers compiled as eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fx_approx.sampling import SAMPLERS, Selection, derive_key, uniforms


@pytest.mark.slow
def test_compiled_uniforms_equal_eager() -> None:
    def draw(seed: Tensor, step: Tensor) -> Tensor:
        return uniforms(derive_key(seed, step), 9, 3, 40)

    compiled = torch.compile(draw, fullgraph=True, backend="inductor")
    for seed, step in [(0, 0), (-5, 2**40 + 3), (2**62 + 11, 17)]:
        arguments = (torch.tensor(seed), torch.tensor(step))
        assert torch.equal(compiled(*arguments), draw(*arguments))


def draws(names: tuple[str, ...]) -> Callable[..., list[Selection]]:
    """A draw of each of these samplers."""

    def step_selections(seed: Tensor, step: Tensor, scores: Tensor) -> list[Selection]:
        found, k = [], 20
        for site, name in enumerate(names):
            sampler = SAMPLERS[name]
            u = uniforms(derive_key(seed, step), site, 2, sampler.uniforms(scores.shape[1], k))
            found.append(sampler.draw(scores, k, u, epsilon=sampler.default_epsilon, fixed_shape=True))
        return found

    return step_selections


# Inductor spends half a minute on the C++ of a random sampler, so it gets two: the unbiased default, and the one in
# which the number of draws differs by group. All share one graph.
@pytest.mark.parametrize(
    ("names", "backend"),
    [
        (tuple(sorted(SAMPLERS)), "aot_eager"),
        pytest.param(("systematic", "wta"), "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_draws_equal_eager(names: tuple[str, ...], backend: str) -> None:
    torch._dynamo.reset()
    function = draws(names)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    generator = torch.Generator().manual_seed(4)
    for step in range(5):
        scores = torch.rand(2, 100, generator=generator) ** 3
        if step == 3:
            scores[0] = 0.0
            scores[1, 50] = float("nan")
        arguments = (torch.tensor(2**62 + 5), torch.tensor(step), scores)
        for name, eager, other in zip(names, function(*arguments), compiled(*arguments), strict=True):
            assert torch.equal(eager.indices, other.indices), name
            assert (eager.scale is None) == (other.scale is None)
            if eager.scale is not None:
                torch.testing.assert_close(eager.scale, other.scale, rtol=1e-6, atol=0)
