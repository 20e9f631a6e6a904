"""The registry: every operation that demand knows, and what it does to channels. ``docs/operations.md`` is its table.

Adding an operation is a line here and a row in ``tests/sandwich_rows.py``. What is not here mixes channels as far as
anyone knows: its operands are needed whole.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fx_approx.core.layer_types import PRODUCT_LAYERS
from fx_approx.passes import layer_rules
from fx_approx.passes.channel_flow import Handler
from fx_approx.passes.elementwise_rules import (
    along,
    coupled,
    elementwise,
    extreme,
    functions,
    last_axes,
    matmul,
    matrices,
    pointwise,
    repeat,
    spatial,
    unpool,
)
from fx_approx.passes.reshape_rules import REGROUPINGS, RESHAPES


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a family of operations does to channels.

    Attributes:
        name: Of the family.
        handle: Says what a call does; None for a family that always stops demand.
        modules: Layers.
        calls: Functions, and names of methods.
        passes: When a demand behind it becomes a demand before it; empty for never.
        begins: What it computes less of where demand ends at it; empty if demand does not end there.
        stops: When it needs all channels; empty for never.
    """

    name: str
    handle: Handler | None
    modules: tuple[type[nn.Module], ...] = ()
    calls: tuple[Any, ...] = ()
    passes: str = ""
    begins: str = ""
    stops: str = ""


def _reshaping(name: str, call: Any, modules: tuple[type[nn.Module], ...] = (), **words: str) -> Rule:
    """The rule of all calls that are handled as ``call`` is."""
    table = {**RESHAPES, **REGROUPINGS}
    handle = table[call]
    return Rule(name, handle, modules, tuple(other for other, found in table.items() if found is handle), **words)


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_CHANNEL_AXIS = "along the axis of the channels"
_OTHER_AXES = "along other axes"

RULES: tuple[Rule, ...] = (
    Rule(
        "linear and convolution layers",
        layer_rules.multiply,
        (*PRODUCT_LAYERS,),
        (F.linear, *layer_rules.CONVOLUTIONS),
        passes="depthwise: each channel with its kernels",
        begins="computes the demanded outputs; a grouped convolution as many of each group",
        stops="a functional one whose weight is no parameter or buffer; one that stays exact needs all of its inputs",
    ),
    Rule(
        "transposed convolutions",
        layer_rules.channelwise_layer,
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        passes="depthwise, one kernel for each channel",
        stops="otherwise",
    ),
    Rule(
        "functional transposed convolutions",
        layer_rules.transposed_call,
        calls=layer_rules.TRANSPOSED,
        passes="depthwise, one kernel for each channel",
        stops="otherwise",
    ),
    Rule("BatchNorm", layer_rules.channelwise_layer, _BATCH_NORMS, passes="with parameters and statistics sliced"),
    Rule(
        "InstanceNorm",
        layer_rules.channelwise_layer,
        (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        passes="with parameters and statistics sliced",
        stops="an input without a batch",
    ),
    Rule(
        "functional BatchNorm and InstanceNorm",
        layer_rules.norm_call,
        calls=(F.batch_norm, F.instance_norm),
        passes="with parameters and statistics sliced",
        stops="statistics that are no buffers of the model",
    ),
    Rule(
        "GroupNorm",
        layer_rules.by_groups,
        (nn.GroupNorm,),
        (F.group_norm,),
        passes="by whole groups: the layers behind it choose groups of channels",
        stops="one group",
    ),
    Rule(
        "LayerNorm and RMSNorm",
        last_axes,
        (nn.LayerNorm, nn.RMSNorm),
        (F.layer_norm, F.rms_norm),
        passes="over positions only",
        stops="over the channels",
    ),
    Rule(
        "normalisation across channels",
        None,
        (nn.LocalResponseNorm, nn.CrossMapLRN2d, nn.Softmax2d),
        (F.local_response_norm,),
        stops="always",
    ),
    Rule("PReLU", layer_rules.channelwise_layer, (nn.PReLU,), passes="with its slopes sliced"),
    Rule("functional PReLU", layer_rules.prelu_call, calls=(F.prelu, torch.prelu), passes="with its slopes sliced"),
    Rule(
        "activations",
        pointwise,
        (
            *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU),
            *(nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Sigmoid, nn.LogSigmoid, nn.Tanh),
            *(nn.Tanhshrink, nn.Softplus, nn.Softsign, nn.Softshrink, nn.Threshold),
        ),
        tuple(
            functions(
                "relu relu6 leaky_relu rrelu elu celu selu gelu silu mish hardswish hardsigmoid hardtanh hardshrink "
                "sigmoid logsigmoid tanh tanhshrink softplus softsign softshrink threshold"
            )
        ),
        passes="always",
    ),
    Rule(
        "dropout",
        pointwise,
        _DROPOUTS,
        tuple(functions("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout")),
        passes="always; the masks are other random numbers",
    ),
    Rule(
        "gated linear units",
        layer_rules.gated,
        (nn.GLU,),
        (F.glu,),
        passes="the halves are chosen together",
        stops=_OTHER_AXES,
    ),
    Rule(
        "functions of one value",
        pointwise,
        calls=(
            *functions(
                "abs absolute acos acosh asin asinh atan atanh ceil cos cosh deg2rad digamma erf erfc erfinv exp exp2 "
                "expm1 fix floor frac lgamma log log10 log1p log2 logical_not bitwise_not logit nan_to_num neg "
                "negative rad2deg reciprocal round rsqrt sgn sign sin sinc sinh sqrt square tan trunc i0 isnan isinf "
                "isfinite clone expit entr ndtr log_ndtr erfcx i0e i1 i1e arccos arccosh arcsin arcsinh arctan arctanh "
                "gammaln ndtri psi signbit isneginf isposinf positive",
                torch.special,
            ),
            *(operator.neg, operator.pos, operator.abs, operator.invert),
        ),
        passes="always",
    ),
    Rule(
        "types and copies",
        pointwise,
        calls=(
            *[
                "contiguous",
                "float",
                "half",
                "double",
                "bfloat16",
                "bool",
                "int",
                "long",
                "to",
                "type",
                "type_as",
                "detach",
                "requires_grad_",
            ],
        ),
        passes="always",
    ),
    Rule(
        "values of the same shape",
        pointwise,
        calls=(torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like),
        passes="always",
        stops="random values (`randn_like`), which would be other numbers",
    ),
    Rule(
        "additions",
        coupled,
        calls=(
            *(operator.add, operator.iadd, operator.sub, operator.isub),
            *functions("add sub subtract rsub lerp addcmul addcdiv"),
            *("__add__", "__radd__", "__sub__", "__rsub__"),
        ),
        passes="always, with the entries of a parameter for each channel; scope `group` shares over it",
    ),
    Rule(
        "products, powers and bounds",
        elementwise,
        calls=(
            *(operator.mul, operator.imul, operator.truediv, operator.itruediv, operator.floordiv, operator.mod),
            *(operator.pow, operator.ipow),
            *functions(
                "mul multiply div divide true_divide floor_divide remainder fmod pow float_power clamp clamp_min "
                "clamp_max clip maximum minimum fmax fmin atan2 arctan2 hypot copysign logaddexp logaddexp2 xlogy "
                "heaviside nextafter ldexp xlog1py",
                torch.special,
            ),
            *("__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__pow__", "__rpow__"),
        ),
        passes="always, with the entries of a parameter for each channel",
    ),
    Rule(
        "comparisons, masks and choices",
        elementwise,
        calls=(
            *(operator.gt, operator.ge, operator.lt, operator.le, operator.eq, operator.ne),
            *(operator.and_, operator.or_, operator.xor),
            *functions(
                "gt greater ge greater_equal lt less le less_equal eq ne not_equal logical_and logical_or logical_xor "
                "bitwise_and bitwise_or bitwise_xor where masked_fill isclose"
            ),
        ),
        passes="always",
    ),
    Rule(
        "max and min",
        extreme,
        calls=(torch.max, torch.min, "max", "min"),
        passes=f"of two tensors; {_OTHER_AXES}",
        stops=f"{_CHANNEL_AXIS}; of everything",
    ),
    Rule(
        "pooling and resampling",
        spatial,
        (
            *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
            *(nn.LPPool1d, nn.LPPool2d, nn.LPPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
            *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
            *(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
        ),
        (
            *functions(
                "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d lp_pool3d "
                "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
                "adaptive_max_pool3d interpolate upsample grid_sample max_pool1d_with_indices max_pool2d_with_indices "
                "max_pool3d_with_indices"
            ),
        ),
        passes="always",
        stops="an input without a batch",
    ),
    Rule(
        "unpooling",
        unpool,
        (nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d),
        (F.max_unpool1d, F.max_unpool2d, F.max_unpool3d),
        passes="always",
        stops="an input without a batch",
    ),
    Rule(
        "padding layers",
        spatial,
        (
            *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
            *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d),
            *(nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
        ),
        passes="always",
        stops="an input without a batch",
    ),
    Rule(
        "softmax",
        along(1),
        (nn.Softmax, nn.LogSoftmax, nn.Softmin),
        tuple(functions("softmax log_softmax softmin", torch.special)),
        passes=_OTHER_AXES,
        stops=_CHANNEL_AXIS,
    ),
    Rule("F.normalize", along(2, 1), calls=(F.normalize,), passes=_OTHER_AXES, stops=_CHANNEL_AXIS),
    Rule(
        "reductions",
        along(1),
        calls=tuple(
            functions(
                "mean sum prod amax amin aminmax std var std_mean var_mean logsumexp any all argmax argmin "
                "count_nonzero nansum nanmean median nanmedian mode",
                torch.special,
            )
        ),
        passes=_OTHER_AXES,
        stops=f"{_CHANNEL_AXIS}; of everything",
    ),
    Rule(
        "norms",
        along(2),
        calls=(torch.norm, "norm", torch.linalg.norm, torch.linalg.vector_norm),
        passes=_OTHER_AXES,
        stops=f"{_CHANNEL_AXIS}; of everything",
    ),
    Rule(
        "running sums and orders",
        along(1),
        calls=tuple(functions("cumsum cumprod cummax cummin logcumsumexp")),
        passes=_OTHER_AXES,
        stops=_CHANNEL_AXIS,
    ),
    Rule(
        "sorting and differences",
        along(1, -1),
        calls=tuple(functions("sort argsort")),
        passes=_OTHER_AXES,
        stops=_CHANNEL_AXIS,
    ),
    Rule("differences", along(2, -1), calls=tuple(functions("diff")), passes=_OTHER_AXES, stops=_CHANNEL_AXIS),
    Rule(
        "flips and picks",
        along(1),
        calls=tuple(functions("flip index_select select")),
        passes=_OTHER_AXES,
        stops=_CHANNEL_AXIS,
    ),
    Rule(
        "rolls, turns and repetitions",
        along(2),
        calls=tuple(functions("roll rot90 repeat_interleave")),
        passes=_OTHER_AXES,
        stops=_CHANNEL_AXIS,
    ),
    Rule("repeat", repeat, calls=("repeat",), passes=_OTHER_AXES, stops=_CHANNEL_AXIS),
    Rule("triangles", matrices, calls=tuple(functions("tril triu")), passes=_OTHER_AXES, stops=_CHANNEL_AXIS),
    Rule(
        "products of activations",
        matmul,
        calls=(torch.matmul, torch.bmm, operator.matmul, F.scaled_dot_product_attention, "matmul", "bmm", "__matmul__"),
        passes="whole heads, along a leading axis",
        stops="channels that are multiplied along",
    ),
    _reshaping(
        "reshapes",
        torch.reshape,
        (nn.Flatten, nn.Unflatten),
        passes="channels, heads and whole blocks that stay together; sizes may be read of the value",
        stops="what mixes channels with others (a channel shuffle); `unflatten` that names their number",
    ),
    _reshaping("as another tensor", "view_as", passes="as reshapes", stops="as reshapes"),
    _reshaping("expand", "expand", passes=_OTHER_AXES, stops=_CHANNEL_AXIS),
    _reshaping("permutations", torch.permute, passes="always"),
    _reshaping("attributes", getattr, passes="`x.mT`, `x.T`, `values` and `indices` of a named tuple"),
    _reshaping(
        "concatenation",
        torch.cat,
        passes="each value is asked for its own part; scope `value` or `group`",
        stops="the same value twice; scope `layer` along the channels",
    ),
    _reshaping("stacking", torch.stack, passes="always"),
    _reshaping(
        "splits",
        torch.chunk,
        passes="each part its own selection; parts that are combined later share one",
        stops="parts that do not fall on whole heads or blocks",
    ),
    _reshaping("unbind", torch.unbind, passes=_OTHER_AXES, stops=_CHANNEL_AXIS),
    _reshaping("narrow", torch.narrow, passes="a stretch of the channels; along other axes"),
    _reshaping(
        "indexing",
        operator.getitem,
        passes="by numbers and slices; a stretch of the channels",
        stops="one channel, every other channel, tensors as indices",
    ),
    _reshaping(
        "padding",
        F.pad,
        passes="of positions; of channels with a constant, which are channels of their own then",
        stops="of channels by reflection; negative padding of channels",
    ),
    _reshaping(
        "pixels and windows",
        F.unfold,
        (nn.PixelShuffle, nn.PixelUnshuffle, nn.Unfold, nn.Fold),
        passes="whole blocks of channels, chosen together",
        stops="an input without a batch",
    ),
    Rule("channel shuffle", None, (nn.ChannelShuffle,), (torch.channel_shuffle,), stops="always"),
    Rule("stochastic depth", pointwise, calls=("torchvision.ops.stochastic_depth",), passes="always; by its name"),
)

FUNCTIONS: dict[Any, Handler] = {call: rule.handle for rule in RULES if rule.handle for call in rule.calls}
"""By function, or name of a method."""

MODULES: dict[type[nn.Module], Handler] = {kind: rule.handle for rule in RULES if rule.handle for kind in rule.modules}
"""By type of a layer."""

BY_NAME: dict[str, Handler] = {"stochastic_depth": pointwise}
"""By the name of a function that is not torch's."""


def labels(rule: Rule) -> list[str]:
    """The names of its operations: ``nn.ReLU`` for a layer, ``relu`` for functions and methods, once."""
    names = [f"nn.{kind.__name__}" for kind in rule.modules]
    for call in rule.calls:
        name = call if isinstance(call, str) else str(call.__name__)
        name = name.removeprefix("special_").removeprefix("linalg_")
        names.append(name if name.startswith("__") else name.strip("_"))
    return list(dict.fromkeys(names))
