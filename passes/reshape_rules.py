"""What operations do to channels: reshaping, reordering, joining and splitting."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fx_approx._compat import native_pad, tree_leaves
from fx_approx.passes.channel_flow import AS_ANOTHER, Flow, Handler, Link, Step, argument, first, fold, through
from fx_approx.passes.channel_spaces import Layout, Segment, regroup, stretch


def _reshape(flow: Flow, node: fx.Node) -> Step | None:
    """view, reshape, flatten, unflatten, squeeze, unsqueeze."""
    source = first(node)
    layout, before, after = flow.layout(source), flow.shape(source), flow.shape(node)
    if layout is None or before is None or after is None or 0 in before:
        return None
    if node.target in (torch.squeeze, "squeeze") and argument(node, 1, "dim") is None:
        return None  # would remove the axis of the channels, too, where one of them is left
    for old, new in regroup(before, after):
        if layout.dim not in old:
            continue
        # The first axis may be longer in another batch.
        lead = [axis for axis in old if axis < layout.dim and (before[axis] != 1 or axis == 0)]
        rest = math.prod(before[axis] for axis in old if axis > layout.dim)
        wide = [axis for axis in new if after[axis] != 1]
        if lead or not new:
            return None
        if len(wide) <= 1:
            axis = wide[0] if wide else new[0]
            segments = tuple(Segment(s.space, s.count, s.block * rest) for s in layout.segments)
            action = _action(flow, node, axis, len(before))
            return None if action is None else through(source, Layout(axis, segments), action=action, axis=axis)
        action = _action(flow, node, _unit_axis(after, wide), len(before))
        return None if rest != 1 or action is None else _unfold(flow, source, layout, after, wide, action)
    return None


def _action(flow: Flow, node: fx.Node, axis: int, dims: int) -> str | None:
    """How a reshape of a value with ``dims`` axes comes to give fewer units along ``axis``; None if it does not."""
    module = flow.module(node)
    if module is None and node.target in _SIZED:
        given = tree_leaves((node.args[1:], node.kwargs))
        return None if any(isinstance(leaf, torch.dtype) for leaf in given) else "resize"
    if module is None and node.target in AS_ANOTHER:
        return "resize"
    if isinstance(module, nn.Unflatten):
        dim, sizes = module.dim, module.unflattened_size
    elif module is None and node.target in (torch.unflatten, "unflatten"):
        dim, sizes = argument(node, 1, "dim"), argument(node, 2, "sizes")
    else:
        return "plain"
    if not isinstance(dim, int) or not isinstance(sizes, (tuple, list)):
        return None
    place = axis - dim % dims
    return "plain" if not 0 <= place < len(sizes) or sizes[place] == -1 else None


def _unit_axis(after: tuple[int, ...], axes: list[int]) -> int:
    """Which of the axes that channels become counts the units."""
    return axes[1] if len(axes) > 2 and after[axes[0]] in (2, 3) else axes[0]


def _unfold(
    flow: Flow, source: fx.Node, layout: Layout, after: tuple[int, ...], axes: list[int], action: str
) -> Step | None:
    """The channels become several axes: heads by entries, or 2 or 3 times that (query, key and value)."""
    axis = _unit_axis(after, axes)
    times = after[axes[0]] if axis != axes[0] else 1
    inner = math.prod(after[a] for a in axes if a > axis)
    for segment in layout.segments:
        wanted = math.lcm(segment.block, inner)
        if wanted != segment.block and not flow.spaces.coarsen(segment, wanted // segment.block):
            return None
    if times > 1:
        folded = fold(flow, source, layout, times, axis, action=action, axis=axis)
        if folded is None or folded.layout is None:
            return None
        segments, links = folded.layout.segments, folded.links
    else:
        segments, links = layout.segments, (Link(source, 0, 0, len(layout.segments)),)
    shrunk = tuple(Segment(s.space, s.count, s.block // inner) for s in segments)
    return Step(Layout(axis, shrunk), links, action=action, axis=axis)


def _expand(flow: Flow, node: fx.Node) -> Step | None:
    """Repeats along other axes, as heads of keys for the queries that share them."""
    source = first(node)
    layout, before, after = flow.layout(source), flow.shape(source), flow.shape(node)
    if layout is None or before is None or after is None:
        return None
    axis = layout.dim + len(after) - len(before)
    action = _action(flow, node, axis, len(before))
    if action is None or after[axis] != layout.size:
        return None
    return through(source, layout, axis, action=action, axis=axis)


def _reorder(flow: Flow, node: fx.Node) -> Step | None:
    """permute, transpose, mT and alike: found by where a marked axis goes."""
    source = first(node)
    layout, before = flow.layout(source), flow.shape(source)
    if layout is None or before is None:
        return None
    arguments = [a for a in (*node.args[1:], *node.kwargs.values())]
    if any(isinstance(leaf, fx.Node) for leaf in tree_leaves(arguments)):
        return None
    probe = torch.empty([2 if axis == layout.dim else 1 for axis in range(len(before))], device="meta")
    if node.target is getattr:
        moved = getattr(probe, node.args[1])
    elif node.op == "call_method":
        moved = getattr(probe, str(node.target))(*node.args[1:], **node.kwargs)
    else:
        assert callable(node.target)
        moved = node.target(probe, *node.args[1:], **{k: v for k, v in node.kwargs.items() if v is not source})
    return through(source, layout, tuple(moved.shape).index(2))


def _attribute(flow: Flow, node: fx.Node) -> Step | None:
    """``x.mT``, and a part of a named tuple."""
    source, name = node.args[:2]
    if name in _PARTS and isinstance(source, fx.Node):
        return _part(flow, source, _PARTS.index(name))
    return _reorder(flow, node) if name in MOVED else None


_PARTS = ("values", "indices")
MOVED = ("T", "mT")


def _blocks(flow: Flow, node: fx.Node) -> Step | None:
    """Neighbouring channels become positions of one, or the other way: pixel_shuffle, unfold and alike."""
    source = first(node)
    layout, shape, result = flow.layout(source), flow.shape(source), flow.shape(node)
    if layout is None or shape is None or result is None or layout.dim != 1 or len(shape) < 4:
        return None
    if result[1] % layout.size == 0:
        times = result[1] // layout.size
        segments = [Segment(s.space, s.count, s.block * times) for s in layout.segments]
        return through(source, Layout(1, tuple(segments)))
    times = layout.size // result[1]
    if times * result[1] != layout.size or not _whole_blocks(flow, layout, times):
        return None
    return through(source, Layout(1, tuple(Segment(s.space, s.count, s.block // times) for s in layout.segments)))


def _whole_blocks(flow: Flow, layout: Layout, size: int) -> bool:
    """Makes units of whole stretches of ``size`` entries; False if that does not divide."""
    units = [math.lcm(segment.block, size) // segment.block for segment in layout.segments]
    return all(flow.spaces.coarsen(segment, unit) for segment, unit in zip(layout.segments, units, strict=True))


def _stack(flow: Flow, node: fx.Node) -> Step | None:
    operands, dim, result = argument(node, 0, "tensors"), argument(node, 1, "dim", 0), flow.shape(node)
    if result is None or not isinstance(dim, int) or not isinstance(operands, (tuple, list)):
        return None
    layouts = [flow.layout(operand) for operand in operands]
    known = layouts[0] if layouts else None
    if known is None:
        return None
    links = []
    for operand, layout in dict(zip(operands, layouts, strict=True)).items():
        if layout is None or layout.dim != known.dim or not flow.spaces.align(known.segments, layout.segments):
            return None
        flow.spaces.merge(known.segments, layout.segments)
        links.append(Link(operand, 0, 0, len(layout.segments)))
    axis = known.dim + (dim % len(result) <= known.dim)
    return Step(Layout(axis, known.segments), tuple(links), action="plain")


def _pad(flow: Flow, node: fx.Node) -> Step | None:
    """F.pad: of positions, or of channels with a constant, which are channels of their own then."""
    source, pads = first(node), argument(node, 1, "pad")
    layout, shape, result = flow.layout(source), flow.shape(source), flow.shape(node)
    if layout is None or shape is None or result is None or not isinstance(pads, (list, tuple)):
        return None
    own = pads[2 * (len(shape) - 1 - layout.dim) :][:2]
    if not all(isinstance(pad, int) and pad >= 0 for pad in own):
        return None
    if not any(own):
        return through(source, layout)
    if argument(node, 2, "mode", "constant") != "constant":
        return None
    made = flow.spaces.new(node, layout.dim, result[layout.dim])
    ends = None if made is None else stretch(flow.spaces, made.segments, own[0], own[0] + layout.size)
    if made is None or ends is None or not flow.spaces.align(made.segments[slice(*ends)], layout.segments):
        return None
    flow.spaces.merge(made.segments[slice(*ends)], layout.segments)
    return Step(made, (Link(source, 0, ends[0], ends[1] - ends[0]),), action="pad", sections=(ends,))


def _concatenate(flow: Flow, node: fx.Node) -> Step | None:
    operands = argument(node, 0, "tensors")
    dim, result = argument(node, 1, "dim", 0), flow.shape(node)
    if result is None or not isinstance(dim, int) or not isinstance(operands, (tuple, list)):
        return None
    dim %= len(result)
    # Key-value caches begin with an empty vector, which adds nothing.
    operands = [operand for operand in operands if flow.shape(operand) != (0,)]
    if len(set(operands)) != len(operands):  # each place might be demanded differently
        return None
    layouts = [flow.layout(operand) for operand in operands]
    known = next((layout for layout in layouts if layout is not None), None)
    if known is None:
        return None
    if known.dim != dim:  # other parts of the same channels, one behind the other
        if any(layout is None or layout.dim != known.dim for layout in layouts):
            return None
        links = []
        for operand, layout in zip(operands, layouts, strict=True):
            if layout is None or not flow.spaces.align(known.segments, layout.segments):
                return None
            flow.spaces.merge(known.segments, layout.segments)
            links.append(Link(operand, 0, 0, len(layout.segments)))
        return Step(known, tuple(links), action="plain")
    segments: list[Segment] = []
    links = []
    for operand in operands:
        layout = flow.ensure(operand, dim)
        if layout is None:
            return None
        links.append(Link(operand, 0, len(segments), len(layout.segments)))
        segments += layout.segments
    return Step(Layout(dim, tuple(segments)), tuple(links), action="plain")


def _split(flow: Flow, node: fx.Node) -> Step | None:
    """chunk, split, tensor_split: a tuple of stretches of the channels, or of another axis."""
    source, pieces = first(node), flow.values.shapes.get(node.name)
    layout, shape = flow.layout(source), flow.shape(source)
    dim = argument(node, 2, "dim", 0)
    if layout is None or shape is None or not isinstance(dim, int) or not isinstance(pieces, list):
        return None
    if dim % len(shape) != layout.dim:
        return through(source, layout, sections=((0, len(layout.segments)),) * len(pieces))
    sections, start = [], 0
    for piece in pieces:
        end = start + piece[layout.dim]
        ends = stretch(flow.spaces, layout.segments, start, end)
        if ends is None:
            return None
        sections.append(ends)
        start = end
    if start != layout.size:
        return None
    return through(source, layout, action="split", sections=tuple(sections))


def _unbind(flow: Flow, node: fx.Node) -> Step | None:
    source, pieces = first(node), flow.values.shapes.get(node.name)
    layout, shape, dim = flow.layout(source), flow.shape(source), argument(node, 1, "dim", 0)
    if layout is None or shape is None or not isinstance(dim, int) or not isinstance(pieces, list):
        return None
    dim %= len(shape)
    if dim == layout.dim:
        return None
    ends = ((0, len(layout.segments)),) * len(pieces)
    return through(source, layout, layout.dim - (dim < layout.dim), sections=ends)


def _part(flow: Flow, source: fx.Node, place: int) -> Step | None:
    """One part of a tuple."""
    layout, sections = flow.layout(source), flow.steps[source].sections
    if layout is None or not -len(sections) <= place < len(sections) or flow.steps[source].action == "pad":
        return None
    start, end = sections[place]
    return Step(Layout(layout.dim, layout.segments[start:end]), (Link(source, start, 0, end - start),), (), "plain")


def _item(flow: Flow, node: fx.Node) -> Step | None:
    """One part of a tuple, or an indexed tensor."""
    source, place = node.args
    if not isinstance(source, fx.Node) or (layout := flow.layout(source)) is None:
        return None
    shape = flow.shape(source)
    if shape is None:
        return _part(flow, source, place) if isinstance(place, int) else None
    places = spelled_out(place, len(shape))
    if places is None:
        return None
    axis = moved = 0
    for p in places:
        if p is None:
            moved += 1
            continue
        if axis == layout.dim:
            break
        moved += not isinstance(p, int)
        axis += 1
    else:
        return through(source, layout, layout.dim - axis + moved)
    if not isinstance(p, slice) or any(isinstance(edge, fx.Node) for edge in (p.start, p.stop, p.step)):
        return None
    start, stop, step = p.indices(layout.size)
    if (start, stop, step) == (0, layout.size, 1):
        return through(source, layout, moved)
    return _stretch(flow, source, layout, start, stop, moved) if step == 1 else None


def spelled_out(place: Any, dims: int) -> list[Any] | None:
    """An index of a tensor of ``dims`` axes without its ellipsis; None if it is more than numbers and slices."""
    places = list(place) if isinstance(place, tuple) else [place]
    if any(isinstance(p, bool) or not isinstance(p, (int, slice, type(None), type(...))) for p in places):
        return None
    if ... in places:
        at = places.index(...)
        missing = dims - sum(p is not None and p is not ... for p in places)
        places[at : at + 1] = [slice(None)] * missing
    return places


def _stretch(flow: Flow, source: fx.Node, layout: Layout, start: int, stop: int, dim: int) -> Step | None:
    """The channels from ``start`` to ``stop`` only."""
    ends = stretch(flow.spaces, layout.segments, start, stop) if start < stop else None
    if ends is None:
        return None
    links = (Link(source, ends[0], 0, ends[1] - ends[0]),)
    return Step(Layout(dim, layout.segments[slice(*ends)]), links, action="take")


def _narrow(flow: Flow, node: fx.Node) -> Step | None:
    """narrow: of the channels, or of another axis."""
    source = first(node)
    dim, start, length = (argument(node, place, name) for place, name in enumerate(("dim", "start", "length"), 1))
    layout, shape, result = flow.layout(source), flow.shape(source), flow.shape(node)
    if layout is None or shape is None or result is None or not isinstance(dim, int):
        return None
    if dim % len(shape) != layout.dim:
        return through(source, layout)
    if not isinstance(start, int) or not isinstance(length, int):
        return None
    start %= layout.size
    return _stretch(flow, source, layout, start, start + length, layout.dim)


_SIZED = (torch.reshape, "view", "reshape", "expand")
"""What is told the size of every axis of the result."""


def _as_another(flow: Flow, node: fx.Node) -> Step | None:
    return _expand(flow, node) if node.target == "expand_as" else _reshape(flow, node)


RESHAPES: dict[Any, Handler] = {
    **dict.fromkeys((torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze), _reshape),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel"), _reshape),
    **dict.fromkeys((torch.permute, torch.transpose, torch.swapaxes, torch.swapdims), _reorder),
    **dict.fromkeys((torch.movedim, torch.moveaxis, torch.t, torch.adjoint), _reorder),
    **dict.fromkeys(("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t"), _reorder),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _concatenate),
    **dict.fromkeys((torch.chunk, torch.split, torch.tensor_split, "chunk", "split", "tensor_split"), _split),
    **dict.fromkeys((torch.unbind, "unbind"), _unbind),
    **dict.fromkeys((torch.narrow, "narrow"), _narrow),
    **dict.fromkeys(AS_ANOTHER, _as_another),
    "expand": _expand,
    operator.getitem: _item,
}
"""By function, or name of a method: what may give a view of its operand."""

REGROUPINGS: dict[Any, Handler] = {
    torch.stack: _stack,
    F.pad: _pad,
    native_pad: _pad,
    getattr: _attribute,
    **dict.fromkeys((F.pixel_shuffle, F.pixel_unshuffle, F.unfold, F.fold), _blocks),
}
"""The same, of what gives a copy."""
