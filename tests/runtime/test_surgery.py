"""Changes after the transform, fused roots, user hooks and overlapping globs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fx_approx
from fx_approx.policies import Uniform

HALF = Uniform(0.5, scores="online")


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8))


def test_a_layer_replaced_after_the_transform_is_used_and_the_others_stay_sampled() -> None:
    approx, x = fx_approx.transform(chain(), HALF), torch.randn(2, 8)
    approx[1][0] = new = nn.Linear(8, 8)
    with pytest.warns(fx_approx.errors.CaptureWarning, match="a child of a Sequential was changed"):
        approx(x).sum().backward()
    assert (new.weight.grad.abs().sum(0) > 0).all()
    assert (approx[2].weight.grad.abs().sum(0) == 0).sum() == 4
    approx(x)


def test_a_layer_replaced_after_restore_and_transformed_again_is_sampled() -> None:
    model = fx_approx.restore(fx_approx.transform(chain(), HALF))
    model[1][0] = nn.Linear(8, 8)
    again = fx_approx.transform(model, HALF)
    again(torch.randn(2, 8)).sum().backward()
    assert (model[1][0].weight.grad.abs().sum(0) == 0).sum() == 4


def test_a_type_error_of_the_users_own_is_not_hidden() -> None:
    approx = fx_approx.transform(chain(), HALF)
    with pytest.raises(TypeError, match="linear"):
        approx.eval()("no tensor")


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize(
    "layer",
    [nn.LSTM(16, 32), nn.LSTM(16, 32, 2, bidirectional=True), nn.LSTM(16, 32, 2, batch_first=True), nn.GRU(16, 32)],
    ids=["lstm", "stacked", "batch_first", "gru"],
)
def test_a_recurrent_layer_alone_is_reported_with_its_operations(layer: nn.RNNBase, needs_grad: bool) -> None:
    """Torch's counter sees them all in float64, but not the LSTM in float32."""
    counts = []
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(5, 3, 16, dtype=dtype, requires_grad=needs_grad)
        (row,) = fx_approx.explain(layer.to(dtype), HALF, x).report.rows
        assert "recurrent" in row.reason
        counts.append(row.exact)
    weights = sum(p.numel() for p in layer.parameters() if p.dim() > 1)
    assert counts[0] == counts[1] and counts[0].output == 2 * 5 * 3 * weights


def test_shape_propagation_runs_no_hook_of_the_user() -> None:
    seen: list[torch.Tensor] = []
    model = chain()
    model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    with pytest.warns(fx_approx.errors.CaptureWarning, match="has hooks"):
        approx = fx_approx.transform(model, HALF, torch.randn(2, 8))
    assert seen == []
    assert fx_approx.report(approx)["1.0"].exact is not None
    approx(torch.randn(2, 8))
    assert len(seen) == 1


def test_a_model_that_needs_its_hooks_to_run_has_unknown_shapes() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(16, 4))
    model[1].register_forward_pre_hook(lambda module, args: (torch.cat((args[0], args[0]), -1),))
    with pytest.warns(fx_approx.errors.CaptureWarning, match="without the hooks of 1"):
        approx = fx_approx.transform(model, HALF, torch.randn(2, 8))
    assert approx(torch.randn(2, 8)).shape == (2, 4)


def test_the_first_matching_glob_decides_the_ratio() -> None:
    approx = fx_approx.transform(chain(), HALF, torch.randn(2, 8))
    fx_approx.set_sampling(approx, {"0": 0.25, "*": 0.75})
    assert [row.sample().k for row in fx_approx.report(approx).rows] == [2, 6, 6]
    fx_approx.set_sampling(approx, {"*": 0.75, "0": 0.25})
    assert [row.sample().k for row in fx_approx.report(approx).rows] == [6, 6, 6]
