"""einops and torchvision's segmentation models are traced as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.capture.containers import tensors
from fx_approx.policies import Uniform
from tests.helpers.models import same, train_step
from tests.helpers.torchvision_compat import import_torchvision

VALUE = Uniform(0.5)


def tokens(batch: int = 4, length: int = 6) -> Tensor:
    return torch.randn(batch, length, 12, generator=torch.Generator().manual_seed(batch))


class Attention(nn.Module):
    """Heads, pooling and repetition by einops' functions."""

    def __init__(self, einops: Any) -> None:
        super().__init__()
        self.qkv, self.out, self.einops = nn.Linear(12, 48), nn.Linear(16, 8), einops.__name__

    def forward(self, x: Tensor) -> Tensor:
        import einops

        q, k, v = (einops.rearrange(one, "b t (h d) -> b h t d", h=4) for one in self.qkv(x).chunk(3, dim=-1))
        scores = einops.einsum(q, k, "b h i d, b h j d -> b h i j").softmax(-1)
        mixed = einops.rearrange(scores @ v, "b h t d -> b t (h d)")
        return einops.reduce(self.out(mixed), "b t c -> b c", "mean") + einops.repeat(
            x[:, 0, :2], "b c -> b (c r)", r=4
        )


def layered(einops: Any) -> nn.Module:
    from einops.layers.torch import Rearrange, Reduce

    return nn.Sequential(
        nn.Linear(12, 16),
        Rearrange("b t (h d) -> b h t d", h=4),
        nn.ReLU(),
        Rearrange("b h t d -> b t (h d)"),
        nn.Linear(16, 8),
        Reduce("b t c -> b c", "max"),
    )


@pytest.mark.parametrize("build", [Attention, layered], ids=["functions", "layers"])
def test_einops_is_traced_for_any_batch(build: Any) -> None:
    model = build(pytest.importorskip("einops"))
    approx = fx_approx.transform(model, VALUE, tokens())  # a CaptureWarning would be an error here
    fx_approx.set_sampling(approx, enabled=False)
    for batch, length in ((4, 6), (2, 6), (1, 6), (4, 5)):
        assert same(train_step(approx, tokens(batch, length)), train_step(model, tokens(batch, length)))
    assert same(approx.eval()(tokens(3)), model.eval()(tokens(3)))
    fx_approx.set_sampling(approx.train(), enabled=True)
    whole = fx_approx.transform(model.train(), VALUE, tokens(), prune_unread=False)
    torch.testing.assert_close(train_step(approx, tokens())[0], train_step(whole, tokens())[0])


@pytest.mark.parametrize(
    "name",
    [
        "lraspp_mobilenet_v3_large",
        *(pytest.param(f"{n}_resnet50", marks=pytest.mark.slow) for n in ("fcn", "deeplabv3")),
    ],
)
def test_segmentation_models_are_traced_as_a_whole(name: str) -> None:
    model = import_torchvision().models.get_model(name, weights=None, weights_backbone=None, num_classes=5)
    x = torch.randn(2, 3, 64, 64)
    approx = fx_approx.transform(model, VALUE, x)  # a CaptureWarning would be an error here
    total = fx_approx.report(approx).totals
    assert total.saved > 0.6
    found, expected = approx.eval()(x[:1]), model.eval()(x[:1])
    assert type(found) is type(expected) and list(found) == list(expected)
    assert same(tensors(found), tensors(expected))
