"""Uniforms and draws trace as one graph, and give the same numbers compiled as eager."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fx_approx.sampling import SAMPLERS, Selection, derive_key, uniforms


def test_compiled_uniforms_equal_eager() -> None:
    def draw(seed: Tensor, step: Tensor) -> Tensor:
        return uniforms(derive_key(seed, step), 9, 3, 40)

    compiled = torch.compile(draw, fullgraph=True, backend="inductor")
    for seed, step in [(0, 0), (-5, 2**40 + 3), (2**62 + 11, 17)]:
        arguments = (torch.tensor(seed), torch.tensor(step))
        assert torch.equal(compiled(*arguments), draw(*arguments))


# Inductor spends half a minute on the C++ of a random sampler, so it gets two: the unbiased default, and the one in
# which the number of draws differs by group.
COMPILED = [
    *[pytest.param(name, "inductor", marks=pytest.mark.slow) for name in ("systematic", "wta")],
    *[(name, "aot_eager") for name in sorted(SAMPLERS)],
]


@pytest.mark.parametrize(("name", "backend"), COMPILED)
def test_compiled_draw_equals_eager(name: str, backend: str) -> None:
    sampler, k = SAMPLERS[name], 20

    def step_selection(seed: Tensor, step: Tensor, scores: Tensor) -> Selection:
        u = uniforms(derive_key(seed, step), 7, 2, sampler.uniforms(scores.shape[1], k))
        return sampler.draw(scores, k, u, epsilon=sampler.default_epsilon, fixed_shape=True)

    torch._dynamo.reset()
    compiled = torch.compile(step_selection, fullgraph=True, backend=backend)
    generator = torch.Generator().manual_seed(4)
    for step in range(5):
        scores = torch.rand(2, 100, generator=generator) ** 3
        if step == 3:
            scores[0] = 0.0
            scores[1, 50] = float("nan")
        arguments = (torch.tensor(2**62 + 5), torch.tensor(step), scores)
        eager, other = step_selection(*arguments), compiled(*arguments)
        assert torch.equal(eager.indices, other.indices)
        if eager.scale is None:
            assert other.scale is None
        else:
            torch.testing.assert_close(eager.scale, other.scale, rtol=1e-6, atol=0)
