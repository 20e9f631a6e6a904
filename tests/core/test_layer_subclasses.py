"""A subclass of a torch layer that overrides nothing of what the layer computes is that layer, everywhere."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.core.layer_types import layer_type
from fx_approx.policies import Uniform
from tests.helpers.torchvision_compat import import_torchvision


class Scaled(nn.Conv2d):
    """Other arguments, a method and an attribute."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=False)
        self.note = "mine"

    @staticmethod
    def step() -> tuple[int, int]:
        """Something that a model asks its layers."""
        return 1, 1


class Narrowing(Scaled):
    """A subclass of a subclass."""


class Dense(nn.Linear):
    """No difference at all."""


class Norm(nn.BatchNorm2d):
    def reset_parameters(self) -> None:
        """Starts at another value."""
        super().reset_parameters()
        nn.init.constant_(self.weight, 0.5)


class Rectified(nn.ReLU):
    """An activation."""


class Pool(nn.AdaptiveAvgPool2d):
    """A pooling layer."""


class Drop(nn.Dropout2d):
    """A dropout."""


class Slopes(nn.PReLU):
    """An activation with parameters."""


class Depthwise(nn.Conv2d):
    """A convolution of each channel apart."""


class Standardised(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Doubled(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = inputs, outputs
        self.raw = nn.Parameter(torch.randn(outputs, inputs))
        self.register_parameter("bias", None)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return 2 * self.raw


class Loud(nn.Linear):
    def __call__(self, *args: Tensor) -> Tensor:
        return 2 * super().__call__(*args)


class Mixin:
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)  # type: ignore[misc]


class Mixed(Mixin, nn.Linear):
    """Another forward from the side."""


def network(own: bool) -> nn.Sequential:
    """Every kind of layer that the passes know by its type, as torch's own or as a subclass."""
    torch.manual_seed(0)
    conv = (lambda i, o: Narrowing(i, o)) if own else (lambda i, o: nn.Conv2d(i, o, 3, padding=1, bias=False))
    kinds = (Norm, Rectified, Pool, Drop, Slopes, Depthwise, Dense)
    plain = (nn.BatchNorm2d, nn.ReLU, nn.AdaptiveAvgPool2d, nn.Dropout2d, nn.PReLU, nn.Conv2d, nn.Linear)
    norm, relu, pool, drop, slopes, depthwise, linear = kinds if own else plain
    layers = [conv(3, 8), norm(8), relu(), conv(8, 8), slopes(8), depthwise(8, 8, 3, groups=8), conv(8, 8), norm(8)]
    model = nn.Sequential(*layers, relu(), drop(0.0), pool(1), nn.Flatten(), linear(8, 12), relu(), linear(12, 5))
    for one in model:
        if isinstance(one, nn.BatchNorm2d):
            nn.init.constant_(one.weight, 0.5)
    return model


@pytest.mark.parametrize("scope", ["layer", "value", "group"])
def test_subclasses_are_sampled_and_hoisted_as_the_layers_that_they_are(scope: str) -> None:
    x = torch.randn(4, 3, 8, 8)
    results = []
    for own in (False, True):
        torch.manual_seed(0)
        exact = network(own)
        approx = fx_approx.transform(exact, Uniform(0.5, scope=scope), x)
        loss = approx(x).square().sum()
        gradients = torch.autograd.grad(loss, list(approx.parameters()))
        results.append((fx_approx.report(approx).totals, loss, gradients))
    (totals, loss, gradients), (own_totals, own_loss, own_gradients) = results
    assert own_totals == totals
    torch.testing.assert_close(own_loss, loss)
    torch.testing.assert_close(own_gradients, gradients)


def test_a_swapped_layer_keeps_what_its_class_adds() -> None:
    x = torch.randn(4, 3, 8, 8)
    exact = network(True)
    approx = fx_approx.transform(exact, Uniform(0.5), x)
    copies = {"itself": approx, "deepcopy": copy.deepcopy(approx), "pickle": pickle.loads(pickle.dumps(approx))}
    torch.manual_seed(1)
    expected = approx(x)
    for name, model in copies.items():
        for one, kind in zip(model, exact, strict=True):
            assert isinstance(one, type(kind)), name
            assert layer_type(one) is layer_type(kind)
        assert model[3].step() == (1, 1) and model[3].note == "mine", name
        assert {type(one) for one in fx_approx.restore(model)} == {type(one) for one in exact}
    fresh = fx_approx.transform(exact, Uniform(0.5), x)
    torch.testing.assert_close(copy.deepcopy(fresh)(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(fresh))(x), expected)


@pytest.mark.parametrize(
    ("kind", "layer"),
    [(Standardised, nn.Conv2d), (Doubled, nn.Linear), (Loud, nn.Linear), (Mixed, nn.Linear), (nn.Sequential, None)],
)
def test_a_subclass_that_may_compute_something_else_is_none(kind: type[nn.Module], layer: type | None) -> None:
    made = kind() if layer is None else kind(4, 4, *((1,) if layer is nn.Conv2d else ()))
    assert layer_type(made) is (nn.Sequential if layer is None else None)


@pytest.mark.parametrize("kind", [Standardised, Doubled, Loud, Mixed])
def test_what_a_subclass_computes_otherwise_is_computed(kind: type[nn.Module]) -> None:
    """With all pairs kept, the transformed model is the exact one, whatever became of the layer."""
    if kind is Standardised:
        model: nn.Module = nn.Sequential(nn.Conv2d(3, 4, 1), kind(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        x = torch.randn(2, 3, 5, 5)
    else:
        model, x = nn.Sequential(nn.Linear(6, 4), kind(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
        approx = fx_approx.transform(model, Uniform(1.0), x)
    torch.testing.assert_close(approx(x), model(x))


def test_a_method_replaced_on_the_layer_itself_makes_it_another() -> None:
    conv = nn.Conv2d(4, 4, 1)
    assert layer_type(conv) is nn.Conv2d
    conv._conv_forward = lambda input, weight, bias: input  # type: ignore[method-assign]
    assert layer_type(conv) is None


@pytest.mark.slow
def test_video_network_of_subclasses_is_hoisted() -> None:
    import_torchvision()
    from torchvision.models.video import r3d_18

    model, x = r3d_18(weights=None), torch.randn(2, 3, 2, 16, 16)
    approx = fx_approx.transform(model, Uniform(0.5, scope="group"), x)
    assert all(row.samples for row in fx_approx.report(approx).rows)
    assert fx_approx.analysis.verify(approx, x).passed
    block = approx.layer2[0]
    assert isinstance(block.conv1[0], type(model.layer2[0].conv1[0]))
    assert block.conv1[0].get_downsample_stride(2) == (2, 2, 2)
    narrowed = [node for node in approx._fx_approx.program.graph.nodes if "slice_weights" in str(node.target)]
    assert len(narrowed) >= 20
