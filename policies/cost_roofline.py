"""Time from operations, bytes and launches, with constants of the device that a short calibration finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_approx.core.candidates import Candidate, GemmShape, Role
from fx_approx.core.flops import Kept, executed_flops
from fx_approx.core.plan import Cost
from fx_approx.core.step_cost import Model, ProductWork, StepWorkload
from fx_approx.ops.gather import gather
from fx_approx.policies.cost_update import update_seconds
from fx_approx.utils.disk_cache import DiskCache, cache_folder
from fx_approx.utils.timing import device_key, time_calls

_VERSION = 3
_PASSES = {False: 5.0, True: 3.0}
"""Times that a training step moves the output of an operation that multiplies nothing: forward it is read and written,
backward a gradient is read and written and something kept is read. Compiled, neighbours do it together."""


@dataclasses.dataclass(frozen=True)
class Device:
    """Constants of a device at one precision, all measured.

    Attributes:
        name: Of the device.
        dtype: Data type of the operands.
        peak: Operations a second of a large square matrix product.
        bandwidth: Bytes a second of an element-wise operation on a large tensor, read and written.
        slicing: Bytes a second of taking half of the columns of a large weight and writing its gradient back, as
            :func:`fx_approx.core.flops.slicing_bytes` counts them.
        launch: Seconds of the smallest operation.
        linear: Share of ``peak`` that forward and backward of a linear layer reach.
        conv: Share of ``peak`` of a 3 x 3 convolution of 64 channels, likewise.
        pointwise: Share of ``peak`` of a 1 x 1 convolution, likewise.
        depthwise: Share of ``peak`` of a depthwise convolution, likewise.
    """

    name: str
    dtype: str
    peak: float
    bandwidth: float
    slicing: float
    launch: float
    linear: float
    conv: float
    pointwise: float
    depthwise: float

    def __str__(self) -> str:
        shares = ", ".join(f"{n} {100 * getattr(self, n):.0f} %" for n in ("linear", "conv", "pointwise", "depthwise"))
        return (
            f"{self.name}, {self.dtype}: {self.peak / 1e12:.3g} TFLOP/s, {self.bandwidth / 1e9:.3g} GB/s, "
            f"{self.slicing / 1e9:.3g} GB/s in slices of weights, {1e6 * self.launch:.3g} us a launch; "
            f"reached of the peak: {shares}"
        )


def calibrate(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *, again: bool = False) -> Device:
    """The constants of a device, measured in a few seconds, or as they were kept on disk.

    Args:
        device: Which.
        dtype: Data type of the operands.
        again: Measure anew.

    Raises:
        TypeError: ``dtype`` is no floating-point type.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point torch.dtype, got {dtype!r}")
    device = torch.device(device)
    key = {"what": "calibration", "version": _VERSION, **device_key(device), "dtype": str(dtype)}
    cache = DiskCache(cache_folder())
    return Device(**cache.get(key, lambda: dataclasses.asdict(_measure(device, dtype, key["name"])), again=again))


def _measure(device: torch.device, dtype: torch.dtype, name: str) -> Device:
    large = device.type != "cpu"
    size, rows, batch = (4096, 16384, 64) if large else (1024, 1024, 8)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    square, big, small = random(size, size), random(2**28 if large else 2**24), random(16)
    products: dict[str, tuple[Callable[[], Any], int]] = {
        "linear": (_training(F.linear, random(rows, 768), random(768, 768)), 6 * rows * 768 * 768),
        "conv": (
            _training(lambda x, w: F.conv2d(x, w, padding=1), _last(random(batch, 64, 32, 32)), random(64, 64, 3, 3)),
            6 * batch * 32 * 32 * 64 * 64 * 9,
        ),
        "pointwise": (
            _training(F.conv2d, _last(random(batch, 256, 28, 28)), random(256, 256, 1, 1)),
            6 * batch * 28 * 28 * 256 * 256,
        ),
        "depthwise": (
            _training(
                lambda x, w: F.conv2d(x, w, padding=1, groups=128),
                _last(random(batch, 128, 28, 28)),
                random(128, 1, 3, 3),
            ),
            6 * batch * 28 * 28 * 128 * 9,
        ),
    }
    weight, half = random(4096, 4096), torch.arange(0, 4096, 2, device=device)
    sliced = _training(lambda w, _: gather(w, 1, half), weight, small)
    plain = [lambda: square @ square, lambda: big * 1.5, lambda: small * 1.5, sliced]
    times = [one.seconds for one in time_calls([*plain, *(call for call, _ in products.values())], device)]
    peak = 2 * size**3 / times[0]
    reached = {
        kind: flops / spent / peak for (kind, (_, flops)), spent in zip(products.items(), times[4:], strict=True)
    }
    return Device(name, str(dtype), peak, 2 * big.nbytes / times[1], 2 * weight.nbytes / times[3], times[2], **reached)


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _training(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor) -> Callable[[], Any]:
    """Forward and both gradients."""
    x.requires_grad_(), w.requires_grad_()
    grad = torch.ones_like(function(x, w))
    return lambda: torch.autograd.grad(function(x, w), (x, w), grad, allow_unused=True)


@dataclasses.dataclass(frozen=True)
class RooflineModel:
    """Each product takes the longer of its operations at the device's rate and its bytes at its bandwidth.

    The rate is the share of the peak that a layer of the kind reached in the calibration (:func:`calibrate`); all else
    is bytes at the bandwidth, and a launch for each operation. What demand spares of the neighbours is in the work that
    it is given, so that a decision changes their cost. Source: the roofline model, Williams et al. 2009.

    Not modelled: how the rate depends on the sizes of a layer, caches, overlap of operations, allocation, and what the
    compiler fuses beyond a constant.

    Attributes:
        compiled: The step is to be compiled: element-wise operations are fused, and cost fewer passes and launches.
        device: Constants to use; None for those of the model's device, calibrated on first use.
    """

    compiled: bool = True
    device: Device | None = None

    @property
    def omits(self) -> str:
        """What it does not model."""
        return "sizes of layers beyond operations and bytes, caches, overlap, allocation, an optimiser if none is given"

    def step(self, work: StepWorkload, model: Model) -> Cost:
        """Operations, bytes, launches and seconds of a training step."""
        device = self.device_of(work)
        seconds, moved, launches = 0.0, 0.0, 0
        for product in work.products:
            seconds += self.product(product, device)
            launches += 3 * (product.candidate.facts is not None)
        moved += _PASSES[self.compiled] * work.moved
        moved += 4 * work.gathered + 2 * work.selection_flops
        seconds += slicing_seconds(work, device) + update_seconds(work.update)
        others = max(0, work.operations - len(work.products))
        launches += (1 if self.compiled else 3) * others
        seconds += moved / device.bandwidth + launches * device.launch
        moved += work.slicing
        return Cost(flops=work.flops + work.selection_flops, bytes=int(moved), seconds=seconds, launches=launches)

    def device_of(self, work: StepWorkload) -> Device:
        """The constants of the device that ``work`` is for."""
        if self.device is not None:
            return self.device
        facts = next((p.candidate.facts for p in work.products if p.candidate.facts is not None), None)
        if facts is None:
            return calibrate()
        return _calibrated(facts.device, facts.dtype)

    def product(self, product: ProductWork, device: Device) -> float:
        """Seconds of one product, forward and backward, without launches."""
        facts = product.candidate.facts
        if facts is None:
            return 0.0
        flops = executed_flops(facts, product.kept).total
        share: float = getattr(device, _kind(product.candidate))
        return max(flops / (device.peak * share), _bytes(product) / device.bandwidth)


def slicing_seconds(work: StepWorkload, device: Device) -> float:
    """Slices of weights."""
    return (work.slicing + work.resliced) / device.slicing


_devices: dict[tuple[str, str], Device] = {}


def _calibrated(device: str, dtype: str) -> Device:
    key = device, dtype
    if key not in _devices:
        _devices[key] = calibrate(device, getattr(torch, dtype.removeprefix("torch.")))
    return _devices[key]


def _kind(candidate: Candidate) -> str:
    shape = None if candidate.facts is None else candidate.facts.shape
    if not candidate.kind.startswith("conv") or shape is None:
        return "linear"
    if shape.groups > 1 and shape.pairs * shape.n <= 4:
        return "depthwise"
    return "pointwise" if shape.block == 1 else "conv"


def _bytes(product: ProductWork) -> float:
    """Operands and result of all three products, each read or written once."""
    facts = product.candidate.facts
    assert facts is not None
    shape = facts.shape
    if shape is None:
        return 0.0
    left, right, result = _parts(shape, product.kept, facts.rhs_is_parameter)
    out = facts.rhs_bytes / max(1, shape.k) * shape.m
    gradients = sum(bool(getattr(facts.flops, role.value)) for role in (Role.GRAD_INPUT, Role.GRAD_WEIGHT))
    return (1 + gradients) * (facts.lhs_bytes * left + facts.rhs_bytes * right + out * result)


def _parts(shape: GemmShape, kept: Kept, is_layer: bool) -> tuple[float, float, float]:
    """Shares of left operand, right operand and result that are touched."""
    pairs = 1.0 if kept.output is None else kept.output / shape.pairs
    columns = 1.0 if kept.columns is None else kept.columns / shape.n
    some, tokens = kept.share[0] / kept.share[1], kept.tokens[0] / kept.tokens[1]
    return pairs * some * tokens, pairs * columns * some * (1 if is_layer else tokens), columns * some * tokens
