"""The layers of benchmarks/ops.py, and their products: exact, sampled, and in float64 to check them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _models import torchvision_models, wide_resnet
from torch import Tensor, nn

from fx_approx.ops import conv2d, linear, slice_weights, sliced_linear
from fx_approx.ops.conv import output_positions
from fx_approx.ops.conv_gradients import ConvGeometry, _grad_input, _grad_weight
from fx_approx.ops.matmul_gradients import _contract
from fx_approx.sampling import SamplerConfig, Selection, get_sampler

ROLES = ("OUTPUT", "GRAD_INPUT", "GRAD_WEIGHT", "hoisted")
"""The three products of a training step, and the forward product with the weight sliced on both sides of an input that
already is."""
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet50": (lambda: torchvision_models().resnet50(), 224),
    "wrn_16_4": (lambda: wide_resnet(16, 4), 32),
    "wrn_28_10": (lambda: wide_resnet(28, 10), 32),
    "convnext_tiny": (lambda: torchvision_models().convnext_tiny(), 224),
}
"""By name: the network, and the side of its images."""
FEWEST = 16
"""Layers with fewer input channels or features (the first of a network, and depthwise ones) are left out."""

Exact = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution without bias.

    Attributes:
        network: Where it comes from.
        input: ``[rows, features]`` or ``[N, C, H, W]``.
        weight: ``[out, features]`` or ``[O, C, h, w]``.
        stride: Of a convolution, on both axes.
        padding: Likewise.
    """

    network: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    @property
    def is_conv(self) -> bool:
        """Whether it is a convolution."""
        return len(self.weight) == 4

    @property
    def label(self) -> str:
        """For tables."""
        if not self.is_conv:
            return f"linear {self.input[0]}x{self.weight[1]}x{self.weight[0]}"
        kernel = "x".join(map(str, self.weight[2:])) + ("" if self.stride == (1, 1) else f"/{self.stride[0]}")
        return f"conv {kernel} {self.weight[1]}>{self.weight[0]} on {self.input[0]}x{self.input[2]}x{self.input[3]}"

    @property
    def output(self) -> tuple[int, ...]:
        """Shape of the output."""
        if not self.is_conv:
            return self.input[0], self.weight[0]
        op_kwargs = {"stride": self.stride, "padding": self.padding, "dilation": 1}
        positions = output_positions(torch.Size(self.input), torch.Size(self.weight), op_kwargs)
        return self.input[0], self.weight[0], *positions

    @property
    def flops(self) -> int:
        """Of each of its three exact products; a multiply-add is two."""
        return 2 * math.prod(self.output) * math.prod(self.weight[1:])


@dataclasses.dataclass(frozen=True)
class StepWorkload:
    """One product to time.

    Attributes:
        function: Of ``arguments``.
        arguments: Its operands.
        flops: What it executes.
        entries: Of the product that it executes, operands and result; those moved by gathers do not count.
        rows: A few rows of the result ...
        oracle: ... in float64, from operands with zeros in place of what is left out.
    """

    function: Callable[..., Tensor]
    arguments: tuple[Tensor, ...]
    flops: float
    entries: float
    rows: slice
    oracle: Callable[[], Tensor]


def square_layers(sizes: list[int]) -> list[Layer]:
    """Linear layers with as many rows as features."""
    return [Layer("square", (size, size), (size, size)) for size in sizes]


def network_layers(name: str, batch: int) -> list[Layer]:
    """The different convolutions and, in ConvNeXt's blocks, linear layers of a network, in order."""
    build, side = NETWORKS[name]
    with torch.device("meta"):
        network, images = build(), torch.empty(batch, 3, side, side)
    found: dict[Layer, None] = {}

    def remember(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        x, weight = given[0], module.get_parameter("weight")
        if isinstance(module, nn.Conv2d):
            assert not isinstance(module.padding, str)
            layer = Layer(name, tuple(x.shape), tuple(weight.shape), module.stride, module.padding)
        else:
            layer = Layer(name, (x[..., 0].numel(), x.shape[-1]), tuple(weight.shape))
        if min(weight.shape[:2]) >= FEWEST and getattr(module, "groups", 1) == 1 and x.dim() == 4:
            found[layer] = None

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(remember)
    network(images)
    return list(found)


def operands(layer: Layer, device: str, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Random input, weight and gradient of the output."""
    form = torch.channels_last if layer.is_conv and channels_last else torch.contiguous_format
    x, w, grad = (
        torch.randn(shape, device=device).to(dtype=dtype, memory_format=form)
        for shape in (layer.input, layer.weight, layer.output)
    )
    return x, w, grad


def exact_product(layer: Layer, role: str) -> Exact:
    """``(x, w, grad) -> result`` of torch's own kernels."""
    if not layer.is_conv:
        return {
            "GRAD_INPUT": lambda x, w, grad: grad @ w,
            "GRAD_WEIGHT": lambda x, w, grad: grad.mT @ x,
        }.get(role, lambda x, w, grad: F.linear(x, w))
    if role in ("OUTPUT", "hoisted"):
        return lambda x, w, grad: F.conv2d(x, w, None, layer.stride, layer.padding)
    wanted = [role == "GRAD_INPUT", role == "GRAD_WEIGHT", False]

    def backward(x: Tensor, w: Tensor, grad: Tensor) -> Tensor:
        found = torch.ops.aten.convolution_backward(
            grad, x, w, None, layer.stride, layer.padding, (1, 1), False, (0, 0), 1, wanted
        )
        result: Tensor = found[wanted.index(True)]
        return result

    return backward


def _sampled_product(layer: Layer, role: str) -> Callable[..., Tensor]:
    """``(x, w, grad, index, outputs) -> result`` of the package's code; ``x`` is sliced beforehand where hoisted."""
    geometry = ConvGeometry(layer.stride, layer.padding, (1, 1), 1)

    def output(x: Tensor, w: Tensor, grad: Tensor, index: Tensor, outputs: Tensor) -> Tensor:
        chosen = Selection(index, None)
        if layer.is_conv:
            return conv2d(x, w, None, layer.stride, layer.padding, selection=chosen)
        return linear(x, w, selection=chosen)

    def grad_input(x: Tensor, w: Tensor, grad: Tensor, index: Tensor, outputs: Tensor) -> Tensor:
        if layer.is_conv:
            return _grad_input(grad, w, Selection(index, None), geometry, x.shape)
        left, right = _contract(grad, -1, w, Selection(index, None), False)
        return left @ right

    def grad_weight(x: Tensor, w: Tensor, grad: Tensor, index: Tensor, outputs: Tensor) -> Tensor:
        if layer.is_conv:
            return _grad_weight(grad, x, w, geometry, Selection(index, None), False)
        left, right = _contract(grad, -2, x, Selection(index, None), False)
        return left.mT @ right

    def hoisted(x: Tensor, w: Tensor, grad: Tensor, index: Tensor, outputs: Tensor) -> Tensor:
        slices = slice_weights(w, None, Selection(index, None), Selection(outputs, None))
        if layer.is_conv:
            return F.conv2d(x, w if slices is None else slices.weight, None, layer.stride, layer.padding)
        return sliced_linear(x, w, None, slices)

    return dict(zip(ROLES, (output, grad_input, grad_weight, hoisted), strict=True))[role]


def work(layer: Layer, role: str, ratio: float | None, x: Tensor, w: Tensor, grad: Tensor) -> StepWorkload:
    """A product of ``layer``, exact without a ratio.

    The selection is given, and random: what scoring and drawing cost is in ``roles.py`` and ``train_step.py``.
    """
    axis = 0 if role == "GRAD_WEIGHT" else 1
    pairs = {"GRAD_INPUT": w.shape[0], "GRAD_WEIGHT": x.shape[0]}.get(role, w.shape[1])
    sizes = {"x": x.numel(), "w": w.numel(), "grad": grad.numel()}
    result = {"GRAD_INPUT": "x", "GRAD_WEIGHT": "w"}.get(role, "grad")
    index = _choose(pairs, 1.0 if ratio is None else ratio, x.device)
    outputs = _choose(w.shape[0], ratio if ratio is not None and role == "hoisted" else 1.0, x.device)
    share, rest = index.shape[1] / pairs, outputs.shape[1] / w.shape[0]
    few = slice(0, 1 if layer.is_conv else 32)
    exact = exact_product(layer, role)

    def oracle() -> Tensor:
        if role == "GRAD_WEIGHT":
            return exact(x.double(), w[few].double(), _masked(grad, axis, index)[:, few].double())
        if role == "GRAD_INPUT":
            return exact(x[few].double(), w.double(), _masked(grad[few], axis, index).double())
        found = exact(_masked(x[few], axis, index).double(), w.double(), grad[few].double())
        return found.index_select(1, outputs[0])

    entries = sum(
        count * (1 if name == result else share) * (1 if name == "x" else rest) for name, count in sizes.items()
    )
    if ratio is None:
        function, arguments = exact, (x, w, grad)
    else:
        given = x.index_select(1, index[0]) if role == "hoisted" else x
        if layer.is_conv and x.is_contiguous(memory_format=torch.channels_last):
            given = given.contiguous(memory_format=torch.channels_last)
        function, arguments = _sampled_product(layer, role), (given, w, grad, index, outputs)
    return StepWorkload(function, arguments, layer.flops * share * rest, entries, few, oracle)


def _choose(pairs: int, ratio: float, device: torch.device) -> Tensor:
    """``[1, k]``, as the package's TopK gives them."""
    spec = SamplerConfig("topk", ratio)
    scores = torch.rand(1, pairs, device=device)
    return get_sampler("topk").draw(scores, spec.count(pairs), None, epsilon=0.0).indices


def _masked(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    kept = torch.zeros(tensor.shape[axis], device=tensor.device, dtype=tensor.dtype)
    kept[index[0]] = 1
    return tensor * kept.view(-1, *[1] * (tensor.dim() - axis - 1))


def tolerance(dtype: torch.dtype, tf32: bool) -> float:
    """Largest difference that is rounding, relative to the largest value."""
    return 1e-4 if dtype is torch.float32 and not tf32 else 2e-2


def check(name: str, function: Callable[..., Tensor], one: StepWorkload, most: float) -> None:
    """The result is that of the oracle.

    Raises:
        AssertionError: It is not.
    """
    found, wanted = function(*one.arguments)[one.rows].double(), one.oracle()
    apart = float((found - wanted).abs().max() / wanted.abs().max())
    if found.shape != wanted.shape or not apart <= most:
        raise AssertionError(f"{name}: {apart:.1e} from the product in float64, more than {most:g}")
