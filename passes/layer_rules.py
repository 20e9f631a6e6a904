"""What operations do to channels: layers with parameters, called as modules or as functions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fx_approx._compat import BatchNormBase, TransposedBase
from fx_approx.core.layer_types import channels_of
from fx_approx.passes.channel_flow import Flow, Step, argument, first, fold, through
from fx_approx.passes.channel_spaces import Layout, Segment
from fx_approx.passes.elementwise_rules import combine, has_batch, pointwise
from fx_approx.passes.find_candidates import attribute, why_not

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_CONVOLUTION_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def channelwise_layer(flow: Flow, node: fx.Node) -> Step | None:
    """A layer with parameters or statistics for each channel, axis 1."""
    module, source = flow.module(node), first(node)
    shape = flow.shape(source)
    if module is None or shape is None or len(shape) < 2 or len(node.args) + len(node.kwargs) != 1:
        return None
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return pointwise(flow, node)
    if isinstance(module, TransposedBase):
        weight: Any = module.weight
        if module.groups != module.in_channels or weight.shape[1] != 1 or module.padding_mode != "zeros":
            return None
    if not isinstance(module, BatchNormBase) and not has_batch(flow, node, len(shape)):
        return None
    layout = flow.ensure(source, 1)
    if layout is None or channels_of(module) != layout.size:
        return None
    return through(source, layout, action="layer")


def by_groups(flow: Flow, node: fx.Node) -> Step | None:
    """GroupNorm: whole groups of channels are selected, so that each normalises what it always does."""
    module, source = flow.module(node), first(node)
    groups = argument(node, 1, "num_groups") if module is None else getattr(module, "num_groups", None)
    layout = flow.ensure(source, 1)
    if layout is None or not isinstance(groups, int) or layout.size % groups:
        return None
    size = layout.size // groups
    units = [math.lcm(segment.block, size) for segment in layout.segments]
    # One group has nothing to choose from.
    if any(s.entries % unit or s.entries == unit for s, unit in zip(layout.segments, units, strict=True)):
        return None
    for segment, unit in zip(layout.segments, units, strict=True):
        if not flow.spaces.coarsen(segment, unit // segment.block):
            return None
    return through(source, layout, action="layer")


def norm_call(flow: Flow, node: fx.Node) -> Step | None:
    """``F.batch_norm`` and ``F.instance_norm``, whose statistics are kept in buffers of the model, or not at all."""
    layout = flow.ensure(first(node), 1)
    shape = flow.shape(first(node))
    if layout is None or shape is None:
        return None
    for place, name in enumerate(("running_mean", "running_var"), 1):
        running = argument(node, place, name)
        if running is not None and (not isinstance(running, fx.Node) or attribute(flow.root, running) is None):
            return None
    for place, name in enumerate(("running_mean", "running_var", "weight", "bias"), 1):
        given = argument(node, place, name)
        if given is not None and flow.shape(given) != (layout.size,):
            return None
    return through(first(node), layout, action="layer")


def prelu_call(flow: Flow, node: fx.Node) -> Step | None:
    """``F.prelu``, with one slope or one for each channel, axis 1."""
    source, slope = first(node), argument(node, 1, "weight")
    sizes = flow.shape(slope)
    if sizes is None:
        return None
    layout = flow.layout(source)
    if math.prod(sizes) == 1:
        return pointwise(flow, node)
    if layout is None or layout.dim != 1 or sizes != (layout.size,):
        return None
    step = combine(flow, node, [source], couples=False)
    return None if step is None else Step(step.layout, step.links, ((slope, 0),), "plain")


def transposed_call(flow: Flow, node: fx.Node) -> Step | None:
    """``F.conv_transpose2d`` and alike, with one kernel for each channel."""
    layout, weight = flow.layout(first(node)), flow.shape(argument(node, 1, "weight"))
    groups = argument(node, 6, "groups", 1)
    if layout is None or weight is None or layout.dim != 1 or len(flow.shape(first(node)) or ()) != len(weight):
        return None
    if groups != layout.size or weight[:2] != (layout.size, 1):
        return None
    return through(first(node), layout, action="layer")


def weight_of(flow: Flow, node: fx.Node) -> tuple[Tensor, int, int] | None:
    """Weight, groups and first axis of the result, of a linear or convolution layer whose weight may be sliced."""
    module = flow.module(node)
    if module is not None:
        if why_not(module, str(node.target)) is not None:
            return None
        weight: Any = module.weight
        return weight, getattr(module, "groups", 1), 1 if isinstance(module, _CONVOLUTION_LAYERS) else -1
    convolution = any(node.target is one for one in CONVOLUTIONS)
    given, bias = argument(node, 1, "weight"), argument(node, 2, "bias")
    groups = argument(node, 6, "groups", 1) if convolution else 1
    if not isinstance(given, fx.Node) or not isinstance(groups, int):
        return None
    value = attribute(flow.root, given)
    if value is None or not value.is_floating_point() or value.layout is not torch.strided:
        return None
    if bias is not None and (not isinstance(bias, fx.Node) or attribute(flow.root, bias) is None):
        return None
    return value, groups, 1 if convolution else -1


def multiply(flow: Flow, node: fx.Node) -> Step | None:
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
        return through(source, Layout(1, segments), action="depthwise", groups=groups)
    if inputs is not None and (groups == 1 or _stratified(flow, inputs, groups)):
        flow.readers[node] = source, inputs
    outputs = flow.spaces.new(node, axis % len(result), weight.shape[0])
    if outputs is not None and groups > 1 and not _stratified(flow, outputs, groups):
        return None
    return Step(outputs, action="produce", groups=groups)


def _stratified(flow: Flow, layout: Layout, groups: int) -> bool:
    return len(layout.segments) == 1 and flow.spaces.stratify(layout.segments[0], groups)


def gated(flow: Flow, node: fx.Node) -> Step | None:
    """GLU: the two halves of the axis are one space."""
    source, result = first(node), flow.shape(node)
    layout, shape = flow.layout(source), flow.shape(source)
    module = flow.module(node)
    dim = getattr(module, "dim", -1) if module is not None else argument(node, 1, "dim", -1)
    if layout is None or shape is None or result is None or not isinstance(dim, int) or dim % len(shape) != layout.dim:
        return None
    return fold(flow, source, layout, 2, layout.dim)
