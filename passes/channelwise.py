"""What operations do to channels: the ones that treat each channel apart, and the layers where channels begin."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fx_approx.channelwise import CHANNELWISE, channels_of
from fx_approx.layers import layer_type
from fx_approx.modules import SAMPLED
from fx_approx.passes.annotate import attribute, why_not
from fx_approx.passes.flow import Flow, Handler, Link, Step, Values, first
from fx_approx.passes.in_place import changed_for_others, changes_in_place, is_changed
from fx_approx.passes.layouts import Layout, Restart, Segment
from fx_approx.passes.reshapes import RESHAPES, argument, fold, through
from fx_approx.tracer import is_hooked

__all__ = ["can_tap_relu", "changes_in_place", "combine", "find_flow", "handle", "is_changed", "weight_of"]

POINTWISE_MODULES: tuple[type[nn.Module], ...] = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Tanhshrink),
    *(nn.Softplus, nn.Softsign, nn.Softshrink, nn.Threshold, nn.Dropout, nn.AlphaDropout),
)
SPATIAL_MODULES: tuple[type[nn.Module], ...] = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool1d, nn.LPPool2d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    *(nn.AdaptiveMaxPool3d, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.ZeroPad1d, nn.ZeroPad2d),
    *(nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d),
    *(nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d),
    *(nn.CircularPad2d, nn.CircularPad3d, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout),
)
_POINTWISE = (
    "relu relu_ relu6 leaky_relu rrelu elu celu selu gelu silu mish hardswish hardsigmoid hardtanh hardshrink "
    "sigmoid logsigmoid tanh tanhshrink softplus softsign softshrink threshold dropout alpha_dropout"
)
_ELEMENTWISE = (
    "relu relu_ sigmoid tanh exp expm1 log log1p neg abs sqrt rsqrt square reciprocal erf sin cos clamp clamp_min "
    "clamp_max clone pow dropout sign round floor"
)
_METHODS = "contiguous float half double bfloat16 to type type_as detach requires_grad_ sigmoid_ tanh_"
_SPATIAL = (
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d interpolate "
    "upsample dropout1d dropout2d dropout3d feature_alpha_dropout"
)


def _pointwise(flow: Flow, node: fx.Node) -> Step | None:
    source = first(node)
    layout = flow.layout(source)
    if layout is None or flow.shape(source) != flow.shape(node):
        return None
    return through(source, layout)


def _bounded(flow: Flow, node: fx.Node) -> Step | None:
    """clamp, pow: their other arguments may be tensors with an entry for each channel."""
    tensors = [source for source in node.all_input_nodes if flow.shape(source) is not None]
    return _pointwise(flow, node) if tensors == [first(node)] else combine(flow, node, tensors, couples=False)


def _spatial(flow: Flow, node: fx.Node) -> Step | None:
    source = first(node)
    layout, shape, result = flow.layout(source), flow.shape(source), flow.shape(node)
    if layout is None or shape is None or result is None or len(shape) != len(result) or len(shape) < 3:
        return None
    module = flow.module(node)
    name = str(getattr(node.target if module is None else layer_type(module), "__name__", "")).lower()
    axes = _DIMENSIONS.search(name)
    if axes is not None and len(shape) != int(axes[1]) + 2:  # without a batch: the first axis is the channels'
        return None
    return through(source, layout) if layout.dim == 1 and shape[:2] == result[:2] else None


_DIMENSIONS = re.compile(r"(\d)d$")


def _pad(flow: Flow, node: fx.Node) -> Step | None:
    source = first(node)
    layout, shape, result = flow.layout(source), flow.shape(source), flow.shape(node)
    if layout is None or shape is None or result is None or shape[layout.dim] != result[layout.dim]:
        return None
    pads = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad")
    if not isinstance(pads, (list, tuple)):
        return None
    own = pads[2 * (len(shape) - 1 - layout.dim) :][:2]
    return through(source, layout) if all(isinstance(pad, int) and pad == 0 for pad in own) else None


def _apart(flow: Flow, node: fx.Node) -> Step | None:
    """Along one axis (softmax, normalize), which must not be that of the channels."""
    source = first(node)
    layout, shape = flow.layout(source), flow.shape(source)
    module = flow.module(node)
    default = 1 if node.target is F.normalize else None
    dim = getattr(module, "dim", None) if module is not None else argument(node, 1, "dim", default)
    if node.target is F.normalize:
        dim = argument(node, 2, "dim", 1)
    if layout is None or shape is None or shape != flow.shape(node) or not isinstance(dim, int):
        return None
    return through(source, layout) if dim % len(shape) != layout.dim else None


def _reduce(flow: Flow, node: fx.Node) -> Step | None:
    source = first(node)
    layout, shape, result = flow.layout(source), flow.shape(source), flow.shape(node)
    dims = argument(node, 1, "dim")
    dims = (dims,) if isinstance(dims, int) else dims
    if layout is None or shape is None or result is None or not isinstance(dims, (tuple, list)) or not dims:
        return None
    if not all(isinstance(dim, int) for dim in dims):
        return None
    gone = {dim % len(shape) for dim in dims}
    if layout.dim in gone:
        return None
    kept = len(result) == len(shape)
    return through(source, layout, layout.dim if kept else layout.dim - sum(dim < layout.dim for dim in gone))


def _binary(couples: bool) -> Handler:
    def handle(flow: Flow, node: fx.Node) -> Step | None:
        operands = [a for a in (*node.args[:2], *node.kwargs.values()) if isinstance(a, fx.Node)]
        return combine(flow, node, operands, couples)

    return handle


def combine(flow: Flow, node: fx.Node, operands: Sequence[fx.Node], couples: bool) -> Step | None:
    """An operation of several operands, element by element.

    Args:
        flow: The facts so far.
        node: The operation.
        operands: Its operands.
        couples: The result is a space of its own, coupled to theirs, as where a residual stream takes up a branch;
            otherwise all are one space.
    """
    result = flow.shape(node)
    if result is None:
        return None
    lead: tuple[Layout, int] | None = None
    links: list[Link] = []
    follow: list[tuple[fx.Node, int]] = []
    spaces = flow.spaces
    for operand in dict.fromkeys(operands):
        shape, layout = flow.shape(operand), flow.layout(operand)
        if shape is None or layout is None:
            continue
        dim = layout.dim + len(result) - len(shape)
        if result[dim] == layout.size:
            lead = layout, dim
            break
    if lead is None:
        return None
    layout, dim = lead
    channels = [o for o in dict.fromkeys(operands) if _lies(flow, o, node, dim)]
    own = spaces.new(node, dim, layout.size) if couples and len(channels) > 1 else layout
    if own is None:
        return None
    for operand in dict.fromkeys(operands):
        shape, found = flow.shape(operand), flow.layout(operand)
        if shape is None:
            continue
        axis = dim - (len(result) - len(shape))
        if axis < 0 or shape[axis] != result[dim]:
            continue  # the same for all channels
        if operand not in channels or found is None or not spaces.align(own.segments, found.segments):
            follow.append((operand, axis))
            continue
        if couples and len(channels) > 1:
            spaces.couple(node, own.segments, found.segments)
        else:
            spaces.merge(own.segments, found.segments)
        links.append(Link(operand, 0, 0, len(found.segments)))
    return Step(Layout(dim, own.segments), tuple(links), tuple(follow), "plain")


def _lies(flow: Flow, operand: fx.Node, node: fx.Node, dim: int) -> bool:
    layout, shape, result = flow.layout(operand), flow.shape(operand), flow.shape(node)
    if layout is None or shape is None or result is None:
        return False
    return layout.dim + len(result) - len(shape) == dim and layout.size == result[dim]


def _matmul(flow: Flow, node: fx.Node) -> Step | None:
    """Products of batches: channels (heads) along a leading axis stay apart."""
    operands = [a for a in (*node.args[:4], *node.kwargs.values()) if isinstance(a, fx.Node)]
    result = flow.shape(node)
    for operand in operands:
        layout, shape = flow.layout(operand), flow.shape(operand)
        if layout is None or shape is None or result is None:
            continue
        if len(shape) != len(result) or layout.dim >= len(shape) - 2 or shape[layout.dim] != result[layout.dim]:
            return _grouped(flow, node)
        for other in operands:
            sizes = flow.shape(other)
            place = layout.dim - len(result) + len(sizes) if sizes is not None else -1
            if sizes is not None and place >= 0 and sizes[place] not in (1, result[layout.dim]):
                return _grouped(flow, node)
    return combine(flow, node, operands, couples=False)


def _grouped(flow: Flow, node: fx.Node) -> Step | None:
    """Grouped-query attention: a unit is a head of the keys with all the heads of the queries that read it."""
    operands = [argument(node, place, name) for place, name in enumerate(("query", "key", "value"))]
    gqa = node.target is F.scaled_dot_product_attention and node.kwargs.get("enable_gqa") is True
    mask = argument(node, 3, "attn_mask")
    masks = None if mask is None else flow.shape(mask)
    if not gqa or not all(isinstance(one, fx.Node) for one in operands):
        return None
    layouts, shapes = [flow.layout(one) for one in operands], [flow.shape(one) for one in operands]
    query, result = layouts[0], flow.shape(node)
    if query is None or result is None or query.dim != len(result) - 3:
        return None
    if mask is not None and (masks is None or (1, *masks)[-3:][0] != 1):
        return None  # has an entry for each head of the queries
    links = [Link(operands[0], 0, 0, len(query.segments))]
    for operand, layout, shape in zip(operands[1:], layouts[1:], shapes[1:], strict=True):
        if layout is None or shape is None or layout.dim != query.dim or query.size % layout.size:
            return None
        times = query.size // layout.size
        scaled = [dataclasses.replace(segment, block=segment.block * times) for segment in layout.segments]
        if not flow.spaces.align(query.segments, scaled):
            return None
        flow.spaces.merge(query.segments, layout.segments)
        links.append(Link(operand, 0, 0, len(layout.segments)))
    return Step(query, tuple(links), action="plain")


def _layer(flow: Flow, node: fx.Node) -> Step | None:
    """A normalisation or activation with parameters for each channel."""
    module, source = flow.module(node), first(node)
    shape = flow.shape(source)
    if module is None or shape is None or len(shape) < 2 or len(node.args) + len(node.kwargs) != 1:
        return None
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return _pointwise(flow, node)
    layout = flow.ensure(source, 1)
    if layout is None or channels_of(module) != layout.size:
        return None
    return through(source, layout, action="layer")


def weight_of(flow: Flow, node: fx.Node) -> tuple[Any, int, int] | None:
    """Weight, groups and first axis of the result, of a linear or convolution layer whose weight may be sliced."""
    module = flow.module(node)
    if module is not None:
        if why_not(module, str(node.target)) is not None:
            return None
        return module.weight, getattr(module, "groups", 1), 1 if isinstance(module, _CONVOLUTIONS) else -1
    if node.op == "call_function" and node.target is F.linear:
        arguments = {**dict(zip(("input", "weight", "bias"), node.args, strict=False)), **node.kwargs}
        weight, bias = arguments.get("weight"), arguments.get("bias")
        if isinstance(weight, fx.Node) and (bias is None or isinstance(bias, fx.Node)):
            value = attribute(flow.root, weight)
            if isinstance(value, nn.Parameter) and (bias is None or attribute(flow.root, bias) is not None):
                return value, 1, -1
    return None


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _multiply(flow: Flow, node: fx.Node) -> Step | None:
    """A linear or convolution layer: reads one space and begins another."""
    found = weight_of(flow, node)
    source = first(node)
    shape, result = flow.shape(source), flow.shape(node)
    if found is None or shape is None or result is None:
        return None
    weight, groups, axis = found
    if axis == 1 and len(shape) != weight.dim():
        return None
    inputs = flow.ensure(source, axis)
    if groups > 1 and weight.shape[1] == 1:
        if inputs is None:
            return None
        times = weight.shape[0] // groups
        segments = tuple(Segment(s.space, s.count, s.block * times) for s in inputs.segments)
        return through(source, Layout(1, segments), action="depthwise")
    if inputs is not None and (groups == 1 or _stratified(flow, inputs, groups)):
        flow.readers[node] = source, inputs
    outputs = flow.spaces.new(node, axis % len(result), weight.shape[0])
    if outputs is not None and groups > 1 and not _stratified(flow, outputs, groups):
        return None
    return Step(outputs, action="produce")


def _stratified(flow: Flow, layout: Layout, groups: int) -> bool:
    return len(layout.segments) == 1 and flow.spaces.stratify(layout.segments[0], groups)


def _gated(flow: Flow, node: fx.Node) -> Step | None:
    """GLU: the two halves of the axis are one space."""
    source, result = first(node), flow.shape(node)
    layout, shape = flow.layout(source), flow.shape(source)
    module = flow.module(node)
    dim = getattr(module, "dim", -1) if module is not None else argument(node, 1, "dim", -1)
    if layout is None or shape is None or result is None or not isinstance(dim, int) or dim % len(shape) != layout.dim:
        return None
    return fold(flow, source, layout, 2, layout.dim)


def can_tap_relu(flow: Flow, node: fx.Node) -> bool:
    """Whether ``node`` is a ReLU whose value is read only: then it can give parts of it as well."""
    module = flow.module(node)
    is_relu = node.target in (F.relu, torch.relu, "relu") if module is None else layer_type(module) is nn.ReLU
    return is_relu and not is_changed(flow, node)


def _functions(module: Any, names: str) -> list[Any]:
    return [found for name in names.split() if (found := getattr(module, name, None)) is not None]


def _table() -> dict[Any, Handler]:
    table: dict[Any, Handler] = {}
    table.update(dict.fromkeys((*_functions(F, _POINTWISE), *_functions(torch, _ELEMENTWISE)), _pointwise))
    table.update(dict.fromkeys((*(_ELEMENTWISE + " " + _METHODS).split(), operator.neg), _pointwise))
    table.update(dict.fromkeys((*_functions(F, _SPATIAL), *_functions(torch, _SPATIAL)), _spatial))
    table.update({F.pad: _pad, F.softmax: _apart, torch.softmax: _apart, "softmax": _apart, F.normalize: _apart})
    sums = (torch.mean, torch.sum, torch.amax, torch.amin, "mean", "sum", "amax", "amin")
    table.update(dict.fromkeys(sums, _reduce))
    additions = (operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub)
    table.update(dict.fromkeys((*additions, "add", "add_", "sub", "sub_", "__add__", "__radd__"), _binary(True)))
    products = (operator.mul, operator.imul, operator.truediv, torch.mul, torch.div, torch.maximum, torch.minimum)
    table.update(dict.fromkeys((*products, "mul", "mul_", "div", "div_", "__mul__", "__rmul__"), _binary(False)))
    bounded = (operator.pow, torch.pow, torch.clamp, torch.clamp_min, torch.clamp_max)
    table.update(dict.fromkeys((*bounded, "pow", "clamp", "clamp_min", "clamp_max"), _bounded))
    batched = (torch.matmul, torch.bmm, operator.matmul, F.scaled_dot_product_attention)
    table.update(dict.fromkeys((*batched, "matmul", "bmm", "__matmul__"), _matmul))
    table.update({F.linear: _multiply, F.glu: _gated})
    return {**table, **RESHAPES}


_FUNCTIONS: dict[Any, Handler] = _table()
_BY_NAME: dict[str, Handler] = {"stochastic_depth": _pointwise}
_MODULES: tuple[tuple[tuple[type[nn.Module], ...], Handler], ...] = (
    (POINTWISE_MODULES, _pointwise),
    (SPATIAL_MODULES, _spatial),
    (tuple(CHANNELWISE), _layer),
    ((nn.Softmax, nn.LogSoftmax), _apart),
    ((nn.GLU,), _gated),
    ((nn.Flatten,), RESHAPES[torch.flatten]),
    ((nn.Unflatten,), RESHAPES[torch.reshape]),
    (tuple(SAMPLED), _multiply),
)


def handle(flow: Flow, node: fx.Node) -> Step | None:
    """What ``node`` does to the channels, None if that is not known."""
    if seen := changed_for_others(flow, node):
        flow.stopped[node] = f"{node.name} changes in place what others read"
        if not seen <= flow.spaces.dead:
            flow.spaces.dead |= seen
            raise Restart
    handler = None if node in flow.spaces.dead else _handler(flow, node)
    return None if handler is None else handler(flow, node)


def _handler(flow: Flow, node: fx.Node) -> Handler | None:
    if node.op == "call_module":
        module = flow.module(node)
        if module is None or is_hooked(module) or "forward" in vars(module):
            return None
        kind = layer_type(module)
        return next((handler for types, handler in _MODULES if kind in types), None)
    if node.op not in ("call_function", "call_method"):
        return None
    try:
        handler = _FUNCTIONS.get(node.target)
    except TypeError:
        return None
    if handler is None:
        handler = _BY_NAME.get(getattr(node.target, "__name__", "")) if node.op == "call_function" else None
    return handler


def find_flow(root: nn.Module, graph: fx.Graph, values: Values) -> Flow:
    """Which values of ``graph`` hold the same channels."""
    return Flow(root, graph, values, handle)
