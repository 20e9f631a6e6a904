"""Single operations for :mod:`tests.sandwich`: what each does to channels where mathematics has its way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.sandwich import WIDTH, Fn, Row


def _fn(name: str, call: Callable[..., Any], goes: str = "passes", **options: Any) -> Row:
    """A row of a function of the value alone."""
    return Row(name, lambda: Fn(call), goes, **options)


def _module(make: Callable[[], nn.Module], goes: str = "passes", name: str = "", **options: Any) -> Row:
    made = make()
    return Row(name or type(made).__name__, make, goes, **options)


def _with(name: str, call: Callable[..., Any], goes: str = "passes", *, tensors: Any = None, **options: Any) -> Row:
    """A row of a function of the value and of parameters, buffers and layers that ``tensors()`` makes."""
    return Row(name, lambda: Fn(call, **tensors()), goes, **options)


def _channel(*shape: int) -> Tensor:
    return 1 + 0.3 * torch.randn(shape or (WIDTH,))


def _running() -> dict[str, Tensor]:
    return {"mean": torch.zeros(WIDTH), "var": torch.ones(WIDTH)}


ACTIVATIONS: tuple[Row, ...] = (
    *(
        _module(make)
        for make in (
            *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
            *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Sigmoid, nn.LogSigmoid, nn.Tanh),
            *(nn.Tanhshrink, nn.Softplus, nn.Softsign, nn.Softshrink),
        )
    ),
    _module(lambda: nn.RReLU(0.2, 0.2)),
    _module(lambda: nn.Threshold(0.1, 0.2)),
    _module(nn.PReLU, name="PReLU of one slope"),
    _module(lambda: nn.PReLU(WIDTH), name="PReLU of a slope for each channel"),
    _module(lambda: nn.Dropout(0.0)),
    _module(lambda: nn.Dropout2d(0.0)),
    _module(lambda: nn.AlphaDropout(0.0)),
    _module(lambda: nn.GLU(1), reads=8),
    _module(lambda: nn.Softmax(1), "stops", name="Softmax over channels"),
    _module(nn.Softmax2d, "stops"),
    _module(lambda: nn.Softmax(-1), name="Softmax over positions"),
    _module(lambda: nn.LogSoftmax(2), name="LogSoftmax over positions"),
    _module(lambda: nn.Softmin(3), name="Softmin over positions"),
    _fn("F.relu in place", lambda x: F.relu(x, inplace=True)),
    _fn("F.leaky_relu_", lambda x: F.leaky_relu_(x, 0.1)),
    _fn("F.gelu of tanh", lambda x: F.gelu(x, approximate="tanh")),
    _fn("Tensor.sigmoid_", lambda x: x.sigmoid_()),
    _fn("Tensor.clamp_", lambda x: x.clamp_(-1, 1)),
    _fn("F.hardtanh_", lambda x: F.hardtanh_(x)),
    _with("F.prelu", lambda self, x: F.prelu(x, self.slope), tensors=lambda: {"slope": _channel()}),
    _with("F.prelu of one slope", lambda self, x: F.prelu(x, self.slope), tensors=lambda: {"slope": _channel(1)}),
    _fn("F.softmax over positions", lambda x: F.softmax(x.flatten(2), -1), dims=1),
    _fn("F.log_softmax over positions", lambda x: F.log_softmax(x, dim=-1)),
    _fn("torch.special.softmax over positions", lambda x: torch.special.softmax(x, 2)),
    _fn("torch.special.softmax over channels", lambda x: torch.special.softmax(x, 1), "stops"),
    _fn("torch.special.log_softmax over positions", lambda x: torch.special.log_softmax(x, -1)),
    _fn("F.normalize over positions", lambda x: F.normalize(x, dim=2)),
    _fn("F.normalize over channels", lambda x: F.normalize(x, dim=1), "stops"),
    _fn("F.glu", lambda x: F.glu(x, 1), reads=8),
)


def _arcs(x: Tensor) -> Tensor:
    return torch.arcsin(x) * torch.arccos(x) + torch.arctanh(x)


MATHEMATICS: tuple[Row, ...] = (
    *(
        _fn(f"torch.{call.__name__}", call)
        for call in (
            *(torch.abs, torch.exp, torch.sin, torch.cos, torch.atan, torch.asinh, torch.erf, torch.expm1),
            *(torch.neg, torch.square, torch.sinc, torch.nan_to_num, torch.clone, torch.tanh, torch.arctan),
            torch.arcsinh,
        )
    ),
    _fn("torch.log1p", lambda x: torch.log1p(x.abs())),
    _fn("Tensor.rsqrt", lambda x: (x * x + 1).rsqrt()),
    _fn("torch.special.expit", lambda x: torch.special.expit(x)),
    _fn("operator +", lambda x: +x),
    _fn("Tensor.positive", lambda x: x.positive()),
    _fn("torch.special.erfcx", lambda x: torch.special.erfcx(x.abs())),
    _fn("torch.special.i0e", torch.special.i0e),
    _fn("torch.special.i1", torch.special.i1),
    _fn("torch.special.i1e", torch.special.i1e),
    _fn("torch.arcsin and others of a bounded value", lambda x: _arcs(0.9 * x.tanh())),
    _fn("torch.arccosh", lambda x: torch.arccosh(x.square() + 2)),
    _fn("torch.special.gammaln and psi", lambda x: torch.special.gammaln(x.abs() + 1) + torch.special.psi(x.abs() + 1)),
    _fn("torch.special.ndtri", lambda x: torch.special.ndtri(x.sigmoid())),
    _fn("torch.signbit and infinities as masks", lambda x: x * (~(x.signbit() | x.isneginf() | x.isposinf())).double()),
    _fn("torch.sign as a factor", lambda x: torch.sign(x) * x),
    _fn("Tensor.pow", lambda x: x.pow(2)),
    _fn("operator **", lambda x: x**3),
    _fn("scalar arithmetic", lambda x: 1 - 2 * x / 3 + 0.5),
    _fn("torch.mul by a number", lambda x: torch.mul(x, 0.7)),
    _fn("torch.rsub", lambda x: torch.rsub(x, 1.0)),
    _fn("Tensor.subtract", lambda x: x.subtract(0.3).multiply(2).divide(3)),
    _fn("in-place arithmetic", lambda x: x.mul_(0.7).add_(0.1).sub_(0.2).div_(1.1)),
    _fn("torch.remainder", lambda x: torch.remainder(x, 0.9)),
    _fn("torch.fmod", lambda x: torch.fmod(x, 0.9)),
    _fn("torch.round as a factor", lambda x: x * torch.round(x.detach())),
    _fn("torch.clamp", lambda x: torch.clamp(x, -0.5, 0.5)),
    _fn("Tensor.clip", lambda x: x.clip(min=-0.5)),
    _fn("comparison as a factor", lambda x: x * (x > 0)),
    _fn("torch.ge as a mask", lambda x: x * torch.ge(x, 0.1).to(x.dtype)),
    _fn("logical operators", lambda x: x * ((x > 0) & ~(x > 1) | (x < -1)).double()),
    _fn("torch.where of one stream", lambda x: torch.where(x > 0, x, 0.1 * x)),
    _fn("Tensor.masked_fill", lambda x: x.masked_fill(x < -0.5, 0.0)),
    _fn("torch.maximum with a number's tensor", lambda x: torch.maximum(x, x * 0.5)),
    _fn("torch.max of two tensors", lambda x: torch.max(x, 0.5 * x)),
    _fn("Tensor.minimum", lambda x: x.minimum(x * 0.5)),
    _fn("torch.atan2", lambda x: torch.atan2(x, x * x + 1)),
    _fn("torch.hypot", lambda x: torch.hypot(x, x + 1)),
    _fn("torch.logaddexp", lambda x: torch.logaddexp(x, -x)),
    _fn("torch.addcmul", lambda x: torch.addcmul(x, x, x, value=0.5)),
    _fn("Tensor.addcdiv", lambda x: x.addcdiv(x, x * x + 1, value=0.5)),
    _fn("torch.lerp", lambda x: torch.lerp(x, x * 2, 0.3)),
    _fn("noise", lambda x: x + 0.0 * torch.randn_like(x), "stops"),
    _fn("torch.zeros_like", lambda x: x + torch.zeros_like(x) + torch.full_like(x, 0.1)),
    _with("a scale for each channel", lambda self, x: x * self.w, tensors=lambda: {"w": _channel(WIDTH, 1, 1)}),
    _with("a shift for each channel", lambda self, x: x + self.w.view(1, -1, 1, 1), tensors=lambda: {"w": _channel()}),
    _with(
        "a bound for each channel", lambda self, x: torch.minimum(x, self.w), tensors=lambda: {"w": _channel(16, 1, 1)}
    ),
    _with("a scale for each position", lambda self, x: x * self.w, tensors=lambda: {"w": _channel(8, 6)}),
    _with(
        "a scale for each position of one channel", lambda self, x: x * self.w, tensors=lambda: {"w": _channel(1, 8, 6)}
    ),
    _with(
        "torch.where by a mask of channels",
        lambda self, x: torch.where(self.w > 1, x, -x),
        tensors=lambda: {"w": _channel(WIDTH, 1, 1)},
    ),
    _with(
        "torch.addcmul by channels",
        lambda self, x: torch.addcmul(self.w, x, self.w),
        tensors=lambda: {"w": _channel(WIDTH, 1, 1)},
    ),
    _with(
        "torch.lerp by channels",
        lambda self, x: torch.lerp(x, x.tanh(), self.w),
        tensors=lambda: {"w": _channel(16, 1, 1)},
    ),
    _fn("float and double", lambda x: x.to(torch.float64).double().contiguous()),
)

STREAMS: tuple[Row, ...] = (
    *(
        _fn(name, call, streams=2)
        for name, call in (
            ("a + b", lambda a, b: a + b),
            ("torch.add(a, b, alpha=2)", lambda a, b: torch.add(a, b, alpha=2)),
            ("a - b", lambda a, b: a - b),
            ("a * b", lambda a, b: a * b),
            ("a / b", lambda a, b: a / (2 + b.sigmoid())),
            ("torch.maximum(a, b)", torch.maximum),
            ("torch.minimum(a, b)", torch.minimum),
            ("torch.max(a, b)", torch.max),
            ("Tensor.fmax", lambda a, b: a.fmax(b)),
            ("torch.where(c, a, b)", lambda a, b: torch.where(a > 0.1, a, b)),
            ("torch.lerp(a, b, 0.3)", lambda a, b: torch.lerp(a, b, 0.3)),
            ("torch.addcmul(a, a, b)", lambda a, b: torch.addcmul(a, a, b)),
            ("torch.atan2(a, b)", torch.atan2),
            ("a += b", lambda a, b: a.add_(b)),
            ("a *= gate", lambda a, b: a.mul_(torch.sigmoid(b))),
            ("torch.stack, summed", lambda a, b: torch.stack([a, b], 1).sum(1)),
            ("torch.stack, largest", lambda a, b: torch.stack((a, b)).amax(0)),
            ("a gate of the same channels", lambda a, b: a * b.mean((2, 3), keepdim=True).sigmoid()),
            ("a gate expanded", lambda a, b: a * b.amax((2, 3), keepdim=True).sigmoid().expand_as(a)),
            ("attention of positions", lambda a, b: a * b.flatten(2).softmax(-1).view_as(a)),
        )
    ),
    _fn("torch.cat of channels", lambda a, b: torch.cat([a, b], 1), streams=2, reads=2 * WIDTH),
    _fn("torch.cat of positions", lambda a, b: torch.cat([a, b], 2), streams=2),
    _fn("torch.hstack", lambda a, b: torch.hstack([a, b]), "open", streams=2, reads=2 * WIDTH),
)

NORMALISATIONS: tuple[Row, ...] = (
    _module(lambda: nn.BatchNorm1d(WIDTH), dims=1),
    _module(lambda: nn.BatchNorm2d(WIDTH)),
    _module(lambda: nn.BatchNorm3d(WIDTH), dims=3),
    _module(lambda: nn.BatchNorm2d(WIDTH, affine=False), name="BatchNorm2d without parameters"),
    _module(lambda: nn.BatchNorm2d(WIDTH, track_running_stats=False), name="BatchNorm2d without statistics"),
    _module(lambda: nn.BatchNorm2d(WIDTH).eval(), name="BatchNorm2d frozen"),
    _module(lambda: nn.InstanceNorm1d(WIDTH), dims=1),
    _module(lambda: nn.InstanceNorm2d(WIDTH)),
    _module(lambda: nn.InstanceNorm3d(WIDTH, affine=True), dims=3),
    _module(lambda: nn.InstanceNorm2d(WIDTH, affine=True), name="InstanceNorm2d with parameters"),
    _module(
        lambda: nn.InstanceNorm2d(WIDTH, affine=True, track_running_stats=True), name="InstanceNorm2d with statistics"
    ),
    _module(
        lambda: nn.InstanceNorm2d(WIDTH, track_running_stats=True).eval(), name="InstanceNorm2d with frozen statistics"
    ),
    _module(lambda: nn.GroupNorm(8, WIDTH), "blocks"),
    _module(lambda: nn.GroupNorm(4, WIDTH, affine=False), "blocks", name="GroupNorm without parameters"),
    _module(lambda: nn.GroupNorm(WIDTH, WIDTH), name="GroupNorm of single channels"),
    _module(lambda: nn.GroupNorm(1, WIDTH), "stops", name="GroupNorm of one group"),
    _module(lambda: nn.LayerNorm(WIDTH), "stops", dims=0),
    _module(lambda: nn.LayerNorm((8, 6)), name="LayerNorm over positions"),
    _module(lambda: nn.RMSNorm(WIDTH), "stops", dims=0),
    _module(lambda: nn.LocalResponseNorm(3), "stops"),
    _with(
        "F.batch_norm with statistics",
        lambda self, x: F.batch_norm(x, self.mean, self.var, self.w, self.b, training=True),
        tensors=lambda: {"w": _channel(), "b": _channel(), "buffers": _running()},
    ),
    _with(
        "F.batch_norm by fixed statistics",
        lambda self, x: F.batch_norm(x, self.mean, self.var, self.w, self.b),
        tensors=lambda: {"w": _channel(), "b": _channel(), "buffers": _running()},
    ),
    _fn("F.batch_norm of the batch alone", lambda x: F.batch_norm(x, None, None, training=True)),
    _with(
        "F.instance_norm",
        lambda self, x: F.instance_norm(x, weight=self.w, bias=self.b, eps=1e-3),
        tensors=lambda: {"w": _channel(), "b": _channel()},
    ),
    _with(
        "F.instance_norm with statistics",
        lambda self, x: F.instance_norm(x, self.mean, self.var, self.w, self.b),
        tensors=lambda: {"w": _channel(), "b": _channel(), "buffers": _running()},
    ),
    _with(
        "F.group_norm",
        lambda self, x: F.group_norm(x, 8, self.w, self.b),
        "blocks",
        tensors=lambda: {"w": _channel(), "b": _channel()},
    ),
    _with(
        "F.layer_norm",
        lambda self, x: F.layer_norm(x, (WIDTH,), self.w),
        "stops",
        dims=0,
        tensors=lambda: {"w": _channel()},
    ),
    _fn("F.local_response_norm", lambda x: F.local_response_norm(x, 3), "stops"),
    _fn("standardised by hand", lambda x: (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True)),
    _fn("root mean square by hand", lambda x: x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + 1e-5)),
)

_POOLS: tuple[Row, ...] = (
    _module(lambda: nn.MaxPool1d(2), dims=1),
    _module(lambda: nn.MaxPool2d(2)),
    _module(lambda: nn.MaxPool3d(2), dims=3),
    _module(lambda: nn.AvgPool1d(2), dims=1),
    _module(lambda: nn.AvgPool2d(3, 1, 1)),
    _module(lambda: nn.AvgPool3d(2), dims=3),
    _module(lambda: nn.LPPool2d(2, 2)),
    _module(lambda: nn.LPPool3d(2, 2), dims=3),
    _module(lambda: nn.AdaptiveAvgPool1d(2), dims=1),
    _module(lambda: nn.AdaptiveAvgPool2d((2, None))),
    _module(lambda: nn.AdaptiveMaxPool2d(2)),
    _fn("F.max_pool2d", lambda x: F.max_pool2d(x, 2)),
    _fn("F.adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, 1)),
    _fn("max_pool2d with indices, unpooled", lambda x: _unpooled(x)),
    _fn("F.avg_pool3d over channels", lambda x: F.avg_pool3d(x, (2, 1, 1)), "stops", reads=8),
)


def _first_two(parts: tuple[Tensor, ...]) -> Tensor:
    return (parts[0] * parts[1]).mean(-1)


def _unpooled(x: Tensor) -> Tensor:
    values, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(values, places, 2)


POSITIONS: tuple[Row, ...] = (
    *_POOLS,
    _module(lambda: nn.ZeroPad1d(1), dims=1),
    _module(lambda: nn.ZeroPad2d(1)),
    _module(lambda: nn.ConstantPad2d(1, 0.5)),
    _module(lambda: nn.ReflectionPad2d(1)),
    _module(lambda: nn.ReplicationPad2d(2)),
    _module(lambda: nn.CircularPad2d(1)),
    _fn("F.pad of positions", lambda x: F.pad(x, (1, 2, 0, 1))),
    _fn("F.pad by reflection", lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect")),
    _fn("F.pad of channels with zeros", lambda x: F.pad(x, (0, 0, 0, 0, 4, 8)), reads=28),
    _module(lambda: nn.Upsample(scale_factor=2)),
    _module(lambda: nn.UpsamplingBilinear2d(scale_factor=2)),
    _fn("F.interpolate", lambda x: F.interpolate(x, size=(5, 5), mode="bilinear", align_corners=False)),
    _fn("F.interpolate to the size of itself", lambda x: F.interpolate(x.relu(), size=x.shape[2:])),
    _with(
        "F.grid_sample",
        lambda self, x: F.grid_sample(x, self.grid, align_corners=False),
        tensors=lambda: {"buffers": {"grid": torch.rand(3, 4, 4, 2) - 0.5}},
    ),
    _fn("mean over positions", lambda x: x.mean((2, 3)), flat=True),
    _fn("sum over an axis", lambda x: torch.sum(x, -1), flat=True, dims=1),
    _fn("amax over positions", lambda x: torch.amax(x, dim=(2, 3)), flat=True),
    _fn("max over an axis", lambda x: x.max(dim=3)[0].max(dim=2).values, flat=True),
    _fn("std over positions", lambda x: torch.std(x, dim=(2, 3)), flat=True),
    _fn("var without correction", lambda x: x.var((2, 3), unbiased=False), flat=True),
    _fn("torch.var_mean", lambda x: torch.var_mean(x, (2, 3))[0] + torch.var_mean(x, (2, 3))[1], flat=True),
    _fn("norm over positions", lambda x: x.norm(dim=(2, 3)), flat=True),
    _fn("torch.linalg.vector_norm", lambda x: torch.linalg.vector_norm(x, dim=(2, 3)), flat=True),
    _fn("logsumexp over positions", lambda x: torch.logsumexp(x, (2, 3)), flat=True),
    _fn("torch.special.logsumexp over positions", lambda x: torch.special.logsumexp(x, (2, 3)), flat=True),
    _fn("prod over an axis", lambda x: x.prod(-1).mean(-1), flat=True),
    _fn("median over an axis", lambda x: x.flatten(2).median(dim=-1)[0], flat=True),
    _fn("mean over channels", lambda x: x + x.mean(1, keepdim=True), "stops"),
    _fn("std of everything", lambda x: x / x.std(), "stops"),
    _fn("torch.cumsum over positions", lambda x: torch.cumsum(x, 2)),
    _fn("torch.cumsum over channels", lambda x: torch.cumsum(x, 1), "stops"),
    _fn("torch.sort of positions", lambda x: torch.sort(x, dim=-1)[0]),
    _fn("torch.flip of positions", lambda x: torch.flip(x, (2, 3))),
    _fn("torch.flip of channels", lambda x: torch.flip(x, (1,)), "open"),
    _fn("torch.roll of positions", lambda x: torch.roll(x, (1, 2), (2, 3))),
    _fn("torch.roll of channels", lambda x: torch.roll(x, 3, 1), "open"),
    _fn("torch.rot90", lambda x: torch.rot90(x, 1, (2, 3))),
    _fn("repeat of positions", lambda x: x.repeat(1, 1, 2, 2)),
    _fn("repeat of channels", lambda x: x.repeat(1, 2, 1, 1), "open", reads=2 * WIDTH),
    _fn("repeat_interleave of positions", lambda x: torch.repeat_interleave(x, 2, dim=3)),
    _fn("torch.diff of positions", lambda x: torch.diff(x, dim=-1)),
    _fn("torch.tril of positions", lambda x: torch.tril(x)),
    _fn("index_select of positions", lambda x: torch.index_select(x, 2, torch.tensor([0, 2, 4]))),
    _fn("narrow of positions", lambda x: x.narrow(2, 1, 4)),
    _fn("select of a position", lambda x: x.select(3, 0).select(2, 1), flat=True),
    _fn("torch.unbind of positions", lambda x: _first_two(x.unbind(3)), flat=True),
    _fn("attention within channels", lambda x: F.scaled_dot_product_attention(x, x, x)),
    _fn("stride over positions", lambda x: x[:, :, ::2, ::2]),
)

CHANNELS: tuple[Row, ...] = (
    _module(nn.Flatten, flat=True, reads=WIDTH * 48),
    _module(
        lambda: nn.Sequential(nn.Unflatten(1, (WIDTH, 1)), nn.Flatten(1, 2)), "open", name="Unflatten that names 16"
    ),
    _module(lambda: nn.PixelShuffle(2), "blocks", reads=4),
    _fn("F.pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), "blocks", reads=4),
    _module(lambda: nn.PixelUnshuffle(2), reads=4 * WIDTH),
    _module(lambda: nn.ChannelShuffle(4), "open"),
    _fn(
        "channel shuffle by views",
        lambda x: x.view(x.shape[0], 4, 4, 8, 6).transpose(1, 2).reshape(x.shape[0], WIDTH, 8, 6),
        "open",
    ),
    _fn("F.unfold", lambda x: F.unfold(x, 3).sum(-1), flat=True, reads=9 * WIDTH),
    _fn("flatten, then back", lambda x: x.flatten(2).unflatten(2, (8, 6))),
    _fn("view to one batch", lambda x: x.view(x.size(0), -1), flat=True, reads=WIDTH * 48),
    _fn("view(b, c)", lambda x: F.adaptive_avg_pool2d(x, 1).view(x.size(0), x.size(1)), flat=True),
    _fn("view of the whole shape", lambda x: x.flatten(2).view(x.shape)),
    _fn("reshape as another", lambda x: x.flatten(2).reshape_as(x)),
    _fn("unpacked sizes", lambda x: _unpacked(x), flat=True),
    _fn("permute to tokens", lambda x: x.flatten(2).permute(0, 2, 1), flat=True),
    _fn("transpose of positions", lambda x: x.transpose(2, 3)),
    _fn("movedim", lambda x: x.movedim(1, -1), flat=True),
    _fn("squeeze", lambda x: x.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1), flat=True),
    _fn("unsqueeze, then index", lambda x: x.unsqueeze(2)[:, :, 0]),
    _fn("torch.cat with itself changed", lambda x: torch.cat([x, -x], 1), reads=2 * WIDTH),
    _fn("torch.cat with its mean", lambda x: torch.cat([x, x.mean((2, 3), True).expand(-1, -1, 8, 6)], 1), reads=32),
    _fn("torch.chunk, one half used", lambda x: x.chunk(2, 1)[0], reads=8),
    _fn("torch.chunk, multiplied", lambda x: _multiplied(x.chunk(2, 1)), reads=8),
    _fn("halves of two chunks, multiplied", lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1], "open", reads=8),
    _fn("torch.split, joined again", lambda x: torch.cat(torch.split(x, [4, 12], 1)[::-1], 1), "open"),
    _fn("torch.tensor_split", lambda x: torch.tensor_split(x, 2, dim=1)[1].relu(), reads=8),
    _fn("a slice of channels", lambda x: x[:, 4:12], reads=8),
    _fn("narrow of channels", lambda x: x.narrow(1, 2, 12), reads=12),
    _fn("every other channel", lambda x: x[:, ::2], "open", reads=8),
    _fn("index_select of channels", lambda x: x.index_select(1, torch.arange(15, -1, -1)), "open"),
    _fn("two slices, added", lambda x: x[:, :8] + x[:, 8:], reads=8),
    _fn("the largest of pairs of channels", lambda x: x.unflatten(1, (-1, 2)).amax(2), "blocks", reads=8),
)


def _multiplied(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] * parts[1]


def _unpacked(x: Tensor) -> Tensor:
    b, c, h, w = x.size()
    return x.view(b, c, h * w).mean(-1).view(b, c)


def _squeeze() -> dict[str, Any]:
    return {"layers": {"down": nn.Linear(WIDTH, 4), "up": nn.Linear(4, WIDTH)}}


def _convolutions() -> dict[str, Any]:
    return {"layers": {"down": nn.Conv2d(WIDTH, 4, 1), "up": nn.Conv2d(4, WIDTH, 1)}}


def _gate_by_view(self: Any, x: Tensor) -> Tensor:
    b, c, _, _ = x.size()
    y = F.adaptive_avg_pool2d(x, 1).view(b, c)
    y = torch.sigmoid(self.up(F.relu(self.down(y)))).view(b, c, 1, 1)
    return x * y.expand_as(x)


def _gate_by_mean(self: Any, x: Tensor) -> Tensor:
    return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))[:, :, None, None]


def _gate_by_convolution(self: Any, x: Tensor) -> Tensor:
    return x * F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


def _gate_in_place(self: Any, x: Tensor) -> Tensor:
    return torch.mul(x, F.hardsigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True))))))


LAYERS: tuple[Row, ...] = (
    _module(lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), name="depthwise Conv2d"),
    _module(lambda: nn.Conv2d(WIDTH, 32, 3, groups=WIDTH), name="depthwise Conv2d of two each", reads=32),
    _module(lambda: nn.Conv2d(WIDTH, WIDTH, 1), name="Conv2d"),
    _module(lambda: nn.Conv2d(WIDTH, WIDTH, 1, groups=4), name="grouped Conv2d"),
    _module(lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2, groups=WIDTH), name="depthwise ConvTranspose2d"),
    _module(lambda: nn.ConvTranspose1d(WIDTH, WIDTH, 2, groups=WIDTH), name="depthwise ConvTranspose1d", dims=1),
    _module(lambda: nn.ConvTranspose2d(WIDTH, 8, 2, 2), "stops", name="ConvTranspose2d", reads=8),
    _module(lambda: nn.Linear(WIDTH, WIDTH), name="Linear", dims=0),
    _module(lambda: nn.Linear(6, 5), "stops", name="Linear over positions"),
    _with(
        "depthwise F.conv2d",
        lambda self, x: F.conv2d(x, self.w, self.b, padding=1, groups=WIDTH),
        tensors=lambda: {"w": torch.randn(WIDTH, 1, 3, 3), "b": _channel()},
    ),
    _with(
        "depthwise F.conv_transpose2d",
        lambda self, x: F.conv_transpose2d(x, self.w, stride=2, groups=WIDTH),
        tensors=lambda: {"w": torch.randn(WIDTH, 1, 2, 2)},
    ),
    _with(
        "blur by a fixed kernel",
        lambda self, x: F.conv2d(x, self.kernel, stride=2, groups=WIDTH),
        tensors=lambda: {"buffers": {"kernel": torch.rand(1, 1, 3, 3).repeat(WIDTH, 1, 1, 1)}},
    ),
    *(
        _with(
            f"F.conv{dims}d",
            call,
            dims=dims,
            tensors=lambda dims=dims: {"w": 0.3 * torch.randn(WIDTH, WIDTH, *[3] * dims), "b": _channel()},
        )
        for dims, call in (
            (1, lambda self, x: F.conv1d(x, self.w, self.b, padding=1)),
            (2, lambda self, x: F.conv2d(x, weight=self.w, bias=self.b, stride=2)),
            (3, lambda self, x: torch.conv3d(x, self.w, None, 1, 1)),
        )
    ),
    _with(
        "grouped F.conv2d",
        lambda self, x: F.conv2d(x, self.w, groups=4),
        tensors=lambda: {"w": torch.randn(WIDTH, 4, 1, 1), "groups": 4},
    ),
    _with(
        "F.conv2d on the weight of a layer",
        lambda self, x: F.conv2d(x, self.inner.weight, self.inner.bias),
        tensors=lambda: {"layers": {"inner": nn.Conv2d(WIDTH, WIDTH, 1)}},
    ),
    _with(
        "F.linear",
        lambda self, x: F.linear(x, self.w, self.b),
        dims=0,
        tensors=lambda: {"w": torch.randn(WIDTH, WIDTH), "b": _channel()},
    ),
    _with("squeeze-excite by view(b, c)", _gate_by_view, tensors=_squeeze),
    _with("squeeze-excite by mean and index", _gate_by_mean, tensors=_squeeze),
    _with("squeeze-excite by convolutions", _gate_by_convolution, tensors=_convolutions),
    _with("squeeze-excite by torch.mul", _gate_in_place, tensors=_convolutions),
    _with(
        "LSTM",
        lambda self, x: self.cell(x)[0],
        "stops",
        dims=0,
        reads=4,
        tensors=lambda: {"layers": {"cell": nn.LSTM(WIDTH, 4)}},
    ),
)

ROWS: tuple[Row, ...] = (
    *(*ACTIVATIONS, *MATHEMATICS, *STREAMS, *NORMALISATIONS),
    *(*POSITIONS, *CHANNELS, *LAYERS),
)


class Bottleneck(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.b(F.silu(self.a(x))))


class C2f(nn.Module):
    """As in YOLOv8: halves of one convolution, a chain behind one of them, all of it joined."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.enter, self.norm = nn.Conv2d(WIDTH, 2 * hidden, 1, bias=False), nn.BatchNorm2d(2 * hidden)
        self.inner = nn.ModuleList(Bottleneck(hidden) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = list(F.silu(self.norm(self.enter(x.relu()))).chunk(2, 1))
        y.extend(block(y[-1]) for block in self.inner)
        return torch.cat(y, 1)


class Sppf(nn.Module):
    """As in YOLOv8: a pool of a pool of a pool, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.pool = nn.Conv2d(WIDTH, 8, 1), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = [F.silu(self.enter(x.relu()))]
        for _ in range(3):
            y.append(self.pool(y[-1]))
        return torch.cat(y, 1)


class UNet(nn.Module):
    """A level below, and what skips it."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(WIDTH, 20, 3, padding=1), nn.Conv2d(20, 20, 3, padding=1)
        self.norm, self.up = nn.GroupNorm(10, 20), nn.Conv2d(20, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        y = F.relu(self.norm(self.deep(F.relu(self.down(F.max_pool2d(x, 2))))))
        y = F.interpolate(self.up(y), size=x.shape[2:], mode="nearest")
        return torch.cat([y, x], 1)


NETWORKS: tuple[Row, ...] = (
    Row("C2f", C2f, reads=32),
    Row("SPPF", Sppf, reads=32),
    Row("U-Net", UNet, reads=32),
)
