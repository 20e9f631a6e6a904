"""What operations do to channels: element by element, over positions, and products of batches."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fx_approx.core.layer_types import layer_type
from fx_approx.passes.channel_flow import Flow, Handler, Link, Step, argument, first, through
from fx_approx.passes.channel_spaces import Layout


def pointwise(flow: Flow, node: fx.Node) -> Step | None:
    """Each entry apart; tensors among the other arguments say nothing of single entries, as in ``x.type_as(y)``."""
    source = first(node)
    layout = flow.layout(source)
    if layout is None or flow.shape(source) != flow.shape(node):
        return None
    return through(source, layout)


def elementwise(flow: Flow, node: fx.Node) -> Step | None:
    """Each entry apart; all tensors among the arguments have entries of their own, and hold the same channels."""
    tensors = _tensors(flow, node)
    return pointwise(flow, node) if tensors == [first(node)] else combine(flow, node, tensors, couples=False)


def coupled(flow: Flow, node: fx.Node) -> Step | None:
    """As :func:`elementwise`, where one stream takes up another: scope ``group`` shares over it."""
    return combine(flow, node, _tensors(flow, node), couples=True)


def _tensors(flow: Flow, node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if flow.shape(source) is not None]


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


_DIMENSIONS = re.compile(r"(\d)d(?:_with_indices)?$")


def has_batch(flow: Flow, node: fx.Node, dims: int) -> bool:
    """Whether an operand of ``dims`` axes has a batch, as far as the name of a layer or function tells (``conv2d``)."""
    module = flow.module(node)
    name = str(getattr(node.target if module is None else layer_type(module), "__name__", "")).lower()
    axes = _DIMENSIONS.search(name)
    return axes is None or dims == int(axes[1]) + 2  # else the first axis is the channels'


def spatial(flow: Flow, node: fx.Node) -> Step | None:
    """Pooling and resampling: batch and channels stay, other axes change; perhaps with the places as a second value."""
    source = first(node)
    layout, shape = flow.layout(source), flow.shape(source)
    results = _results(flow, node)
    if layout is None or shape is None or not results or len(shape) < 3 or layout.dim != 1:
        return None
    if not has_batch(flow, node, len(shape)):
        return None
    if any(len(result) != len(shape) or result[:2] != shape[:2] for result in results):
        return None
    return _tuple_of(flow, node, through(source, layout))


def unpool(flow: Flow, node: fx.Node) -> Step | None:
    """max_unpool: the values and their places hold the same channels."""
    operands, result = node.all_input_nodes[:2], flow.shape(node)
    layouts, shapes = [flow.layout(one) for one in operands], [flow.shape(one) for one in operands]
    if len(operands) < 2 or layouts[0] is None or layouts[1] is None or result is None or shapes[0] != shapes[1]:
        return None
    if layouts[0].dim != 1 or layouts[1].dim != 1 or not has_batch(flow, node, len(result)):
        return None
    if result[1] != layouts[0].size or not flow.spaces.align(layouts[0].segments, layouts[1].segments):
        return None
    flow.spaces.merge(layouts[0].segments, layouts[1].segments)
    count = len(layouts[0].segments)
    return Step(layouts[0], tuple(Link(one, 0, 0, count) for one in operands), action="plain")


def _results(flow: Flow, node: fx.Node) -> list[tuple[int, ...]]:
    """The shape of the value, or of each part of a tuple."""
    found = flow.values.shapes.get(node.name)
    if isinstance(found, list):
        return found
    return [] if found is None else [found]


def _tuple_of(flow: Flow, node: fx.Node, step: Step) -> Step:
    """``step`` with the channels in each part of the value, if that is a tuple."""
    parts = flow.values.shapes.get(node.name)
    if not isinstance(parts, list) or step.layout is None:
        return step
    return dataclasses.replace(step, sections=((0, len(step.layout.segments)),) * len(parts))


def _axes(given: Any, dims: int) -> set[int] | None:
    """Axes counted from the front; None if they are not plain numbers."""
    axes = (given,) if isinstance(given, int) else given
    if not isinstance(axes, (tuple, list)) or not axes:
        return None
    if any(isinstance(axis, bool) or not isinstance(axis, int) for axis in axes):
        return None
    return {axis % dims for axis in axes}


def _given_axes(flow: Flow, node: fx.Node, place: int, default: Any) -> Any:
    module = flow.module(node)
    if module is not None:
        return getattr(module, "dim", default)
    for name in ("dim", "dims", "axis"):
        if name in node.kwargs:
            return node.kwargs[name]
    listed = node.args[place:]
    if node.target == "flip" and len(listed) > 1:
        return listed
    return listed[0] if listed else default


def along(place: int, default: Any = None) -> Handler:
    """Works along axes that must not be that of the channels; gives them back, longer, shorter, or not at all.

    Args:
        place: Of the argument ``dim``, ``dims`` or ``axis`` among all.
        default: Of that argument.
    """

    def handle(flow: Flow, node: fx.Node) -> Step | None:
        source = first(node)
        layout, shape, results = flow.layout(source), flow.shape(source), _results(flow, node)
        axes = None if shape is None else _axes(_given_axes(flow, node, place, default), len(shape))
        if layout is None or shape is None or axes is None or not results or layout.dim in axes:
            return None
        gone = len(shape) - len(results[0])
        if gone not in (0, len(axes)) or any(len(result) != len(results[0]) for result in results):
            return None
        dim = layout.dim - (sum(axis < layout.dim for axis in axes) if gone else 0)
        if any(result[dim] != layout.size for result in results):
            return None
        return _tuple_of(flow, node, through(source, layout, dim))

    return handle


def extreme(flow: Flow, node: fx.Node) -> Step | None:
    """max, min: of two tensors, or along an axis."""
    other = argument(node, 1, "other")
    if isinstance(other, fx.Node) and flow.shape(other) is not None:
        return elementwise(flow, node)
    return along(1)(flow, node)


def last_axes(flow: Flow, node: fx.Node) -> Step | None:
    """Normalises over the last axes together, which must not be those of the channels."""
    source, module = first(node), flow.module(node)
    sizes = argument(node, 1, "normalized_shape") if module is None else getattr(module, "normalized_shape", None)
    layout, shape = flow.layout(source), flow.shape(source)
    if layout is None or shape is None or not isinstance(sizes, (tuple, list)):
        return None
    return pointwise(flow, node) if layout.dim < len(shape) - len(sizes) else None


def matrices(flow: Flow, node: fx.Node) -> Step | None:
    """Something done to the last two axes, of which none is the channels'."""
    layout, shape = flow.layout(first(node)), flow.shape(first(node))
    if layout is None or shape is None or layout.dim >= len(shape) - 2:
        return None
    return pointwise(flow, node)


def repeat(flow: Flow, node: fx.Node) -> Step | None:
    """repeat: along other axes only, or the same channels would stand there twice."""
    source, given = first(node), node.args[1:]
    times = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    layout, shape, result = flow.layout(source), flow.shape(source), flow.shape(node)
    if layout is None or shape is None or result is None or not isinstance(times, (tuple, list)):
        return None
    axis = layout.dim + len(result) - len(shape)
    if len(times) != len(result) or times[axis] != 1:
        return None
    return through(source, layout, axis)


def matmul(flow: Flow, node: fx.Node) -> Step | None:
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


def functions(names: str, *modules: Any) -> list[Any]:
    """The functions of these names: of ``torch``, ``torch.nn.functional`` and ``modules``, and methods of a tensor.

    Those that work in place (``relu_``) are there as well.
    """
    found: list[Any] = []
    for name in (spelling for plain in names.split() for spelling in (plain, f"{plain}_")):
        found += [getattr(module, name) for module in (torch, F, *modules) if hasattr(module, name)]
        if hasattr(torch.Tensor, name):
            found.append(name)
    return list(dict.fromkeys(found))
