"""NarrowGraph: makes a rewritten graph compute only what the demand pass found to be read."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fx_approx.core.plan_effects import FULL
from fx_approx.ops.channel_slices import (
    narrow,
    pad_parts,
    resize,
    slice_weights,
    split_parts,
    spread,
    take_parts,
    tapped,
    tapped_relu,
    whole_size,
)
from fx_approx.ops.narrow_calls import NARROW_CALLS, SLICED_CONVOLUTIONS
from fx_approx.ops.sliced_linear import sliced_linear
from fx_approx.passes.aliasing import can_tap_relu, is_changed
from fx_approx.passes.channel_flow import AS_ANOTHER, Flow, argument, asks_sizes, first
from fx_approx.passes.channel_liveness import Demand
from fx_approx.passes.channel_spaces import Layout
from fx_approx.passes.find_candidates import attribute
from fx_approx.passes.gradient_readers import asked_inside, handed_out
from fx_approx.passes.graph_head import GraphHead
from fx_approx.passes.layer_rules import CONVOLUTIONS
from fx_approx.passes.reshape_rules import spelled_out
from fx_approx.runtime.graph_runtime import Runtime
from fx_approx.runtime.layers import swap
from fx_approx.runtime.narrow_layers import swap_channelwise
from fx_approx.runtime.selector import Site


class NarrowGraph:
    """Narrows the values of one rewritten graph.

    Attributes:
        whole_of: Node of the rewritten graph that takes a part of a value, or hands it on -> the node that makes it.

    Args:
        flow: What operations do to channels, of the captured graph.
        demand: Which of them are to be computed, of the captured graph.
        header: Of the rewritten graph.
        copies: Captured node -> its node in the rewritten graph; kept up to date.
        runtime: Makes the selections of layers that are called elsewhere.
    """

    def __init__(
        self, flow: Flow, demand: Demand, header: GraphHead, copies: dict[fx.Node, fx.Node], runtime: Runtime
    ) -> None:
        self.flow, self.demand, self.header = flow, demand, header
        self.graph, self.copies, self.runtime = header.graph, copies, runtime
        self.whole_of: dict[fx.Node, fx.Node] = {}
        self._narrowed: dict[tuple[fx.Node, int, fx.Node], fx.Node] = {}
        self._taps: list[tuple[fx.Node, fx.Node, fx.Node, fx.Node]] = []
        self._asked = asked_inside(flow)
        self._held = self._asked | handed_out(flow)

    def run(self) -> None:
        """Rewrites every node whose value has channels, in order."""
        for node in self.flow.graph.nodes:
            step, have = self.flow.steps[node], self.demand.have.get(node, ())
            if step.action == "produce":
                self._produce(node, have)
                continue
            self._edges(node)
            if step.action == "take":
                self._take(node, have)
            elif step.layout is not None and any(place != FULL for place in have):
                self._some(node, have)
        for node, step in self.flow.steps.items():
            if step.layout is not None and any(place != FULL for place in self.demand.have[node]):
                self._sizes(node, step.layout)
        self._untap()

    def _some(self, node: fx.Node, have: Sequence[int]) -> None:
        """A value of which some channels are there."""
        action = self.flow.steps[node].action
        if action in ("layer", "depthwise"):
            self._layer(node, have)
        elif action == "resize":
            self._resize(node, have)
        elif action == "split":
            self._split(node, have)
        elif action == "pad":
            self._pad(node, have)

    def _edges(self, node: fx.Node) -> None:
        """Narrows the operands that hold more than the node computes."""
        step = self.flow.steps[node]
        if step.layout is None:
            return
        own, have = self.copies[node], self.demand.have[node]
        for source, wants in self.demand.wanted(step.links, node).items():
            self._replace(own, source, self.narrowed(source, wants, own))
        for operand, dim in step.follow:
            index = self.header.positions(step.layout.segments, have)
            if index is not None:
                self._replace(own, operand, self._gather(operand, dim, index, own))

    def _replace(self, user: fx.Node, source: fx.Node, new: fx.Node) -> None:
        if new is not self.copies[source]:
            user.replace_input_with(self.copies[source], new)

    def narrowed(self, source: fx.Node, wants: Sequence[int], before: fx.Node) -> fx.Node:
        """The value of ``source`` with what is wanted of it only."""
        layout, have = self.flow.layout(source), self.demand.have[source]
        if layout is None or tuple(wants) == tuple(have):
            return self.copies[source]
        index = self.header.rest(layout.segments, have, wants)
        return self.copies[source] if index is None else self._gather(source, layout.dim, index, before)

    def _gather(self, source: fx.Node, dim: int, index: fx.Node, before: fx.Node) -> fx.Node:
        key = source, dim, index
        if key in self._narrowed:
            return self._narrowed[key]
        value = self.copies[source]
        early = value.op == "placeholder" or source in self.flow.constants
        if early or source in self._held or is_changed(self.flow, source):
            with self.graph.inserting_before(before):
                part = self.graph.call_function(narrow, (value, dim, index, self._size(source)))
            self.whole_of[part] = value
        else:
            part = self._tap(source, value, dim, index)
        if source not in self._asked:  # which may be marked between one reader and the next
            self._narrowed[key] = part
        return part

    def _size(self, source: fx.Node) -> int | None:
        """The whole number of channels of a value; None if a part is there, or if a layer's weights give them."""
        layout = self.flow.layout(source)
        whole = layout is not None and all(place == FULL for place in self.demand.have[source])
        made = self.flow.steps[source].action in ("produce", "depthwise", "layer")
        return layout.size if layout is not None and whole and not made else None

    def _tap(self, source: fx.Node, value: fx.Node, dim: int, index: fx.Node) -> fx.Node:
        """Takes a part of a value where it is made; whoever reads the whole of it reads it behind that."""
        both = self._tapped_relu(source, value, dim, index)
        if both is None:
            with self.graph.inserting_after(value):
                both = self.graph.call_function(tapped, (value, dim, index, self._size(source)))
        with self.graph.inserting_after(both):
            part = self.graph.call_function(operator.getitem, (both, 1))
            whole = self.graph.call_function(operator.getitem, (both, 0))
        value.replace_all_uses_with(whole, delete_user_cb=lambda user: user not in (both, whole, part))
        if both.target is tapped_relu:
            self.graph.erase_node(value)
        self.copies[source] = whole
        made = value if both.target is tapped else both
        self.whole_of.update(dict.fromkeys((whole, part, both) if both.target is tapped else (whole, part), made))
        self._taps.append((source, both, whole, part))
        return part

    def _tapped_relu(self, source: fx.Node, value: fx.Node, dim: int, index: fx.Node) -> fx.Node | None:
        """A ReLU that gives the part as well; None if the value is not one, or has been tapped already."""
        if value.target != source.target or not can_tap_relu(self.flow, source):
            return None
        module = self.flow.module(source)
        if module is not None:
            swap_channelwise(module)
            value.args, value.kwargs = (first(value), dim, index), {}
            return value
        with self.graph.inserting_after(value):
            inplace = bool(source.target is F.relu and argument(source, 1, "inplace", False))
            return self.graph.call_function(tapped_relu, (first(value), dim, index, inplace))

    def _untap(self) -> None:
        """A value of which no one reads the whole is narrowed only."""
        for source, both, whole, part in reversed(self._taps):
            if not whole.users and both.target is tapped:
                both.target = narrow
                self.copies[source] = both
                part.replace_all_uses_with(both)
                self.graph.erase_node(whole)
                self.graph.erase_node(part)

    def _produce(self, node: fx.Node, have: Sequence[int]) -> None:
        """A linear or convolution layer: computes the demanded outputs from the selected inputs."""
        own = self.copies[node]
        module = self.flow.module(node)
        step = self.flow.steps[node]
        reads = self.header.sharing.reads.get(node)
        chosen = own.args[1] if module is not None and len(own.args) > 1 else own.kwargs.get("selection")
        others: Any = own.args[2:]
        if module is None:
            others = [value for name, value in own.kwargs.items() if name.startswith(("grad_", "straight_"))]
        outputs = None if step.layout is None else self.header.positions(step.layout.segments, have)
        if any(others) or (outputs is None and reads is None):
            return
        input = own.args[0] if own.args else own.kwargs["input"]
        groups = step.groups
        if reads is not None:
            source, layout = self.flow.readers[node]
            input = self.narrowed(source, reads, own)
            chosen = self.header.positions(layout.segments, reads, groups)
        elif isinstance(chosen, fx.Node):
            with self.graph.inserting_before(own):
                pairs = self._pairs(node)
                flat = self.graph.call_function(spread, (chosen, pairs)) if groups > 1 else chosen
                axis = 1 if self._convolution(node) else -1
                part = self.graph.call_function(narrow, (input, axis, flat, pairs * groups))
                if isinstance(input, fx.Node):
                    self.whole_of[part] = input
                input = part
        weight, bias = self._weights(node)
        slicing = (weight, bias, chosen, outputs, groups)
        slices = self._sliced(slicing, own)
        if module is not None:
            swap(module, Site({}, False, self.runtime))
            own.args, own.kwargs = (input, slices), {}
            return
        self._call_sliced(node, (input, weight, bias, slices))

    def _convolution(self, node: fx.Node) -> bool:
        module = self.flow.module(node)
        return any(node.target is one for one in CONVOLUTIONS) if module is None else not isinstance(module, nn.Linear)

    def _call_sliced(self, node: fx.Node, operands: tuple[Any, ...]) -> None:
        """Puts a product with slices in place of a functional one; ``operands`` end with the slices."""
        with self.graph.inserting_before(self.copies[node]):
            if not self._convolution(node):
                new = self.graph.call_function(sliced_linear, operands)
            else:
                names = ("stride", "padding", "dilation", "groups")
                given = {name: argument(node, place, name) for place, name in enumerate(names, 3)}
                op_kwargs = {name: value for name, value in given.items() if value}
                new = self.graph.call_function(SLICED_CONVOLUTIONS[node.target], operands, op_kwargs)
        self._take_over(node, new)

    def _sliced(self, slicing: tuple[Any, ...], before: fx.Node) -> fx.Node:
        """The slices of a layer, once however often it is called; at the head if they read nothing of the step."""
        chosen = slicing[2]
        make: Callable[[], fx.Node] = lambda: self.graph.call_function(slice_weights, slicing)  # noqa: E731
        if isinstance(chosen, fx.Node) and chosen.op == "call_module":
            with self.graph.inserting_before(before):
                return make()
        return self.header.once(("slices", *slicing), make)

    def _pairs(self, node: fx.Node) -> int:
        module = self.flow.module(node)
        weight = attribute(self.flow.root, argument(node, 1, "weight")) if module is None else module.weight
        assert isinstance(weight, torch.Tensor)
        return int(weight.shape[1])

    def _weights(self, node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        module = self.flow.module(node)
        if module is not None:
            weight = self.header.read(f"{node.target}.weight")
            return weight, None if module.bias is None else self.header.read(f"{node.target}.bias")
        given, bias = argument(node, 1, "weight"), argument(node, 2, "bias")
        weight = self.header.read(str(given.target))
        return weight, None if bias is None else self.header.read(str(bias.target))

    def _layer(self, node: fx.Node, have: Sequence[int]) -> None:
        """What takes the selection: normalisation, activation with parameters, depthwise convolution."""
        step, own, module = self.flow.steps[node], self.copies[node], self.flow.module(node)
        assert step.layout is not None
        chosen = self.header.positions(step.layout.segments, have)
        if step.action == "depthwise":
            weight, bias = self._weights(node)
            chosen = self._sliced((weight, bias, None, chosen, step.groups, True), own)
            if module is None:
                self._call_sliced(node, (first(own), weight, bias, chosen))
                return
            swap(module, Site({}, False, self.runtime))
        elif module is None:
            own.target = NARROW_CALLS[own.target]
            own.kwargs = {**own.kwargs, "chosen": chosen, "channels": step.layout.size}
            return
        else:
            swap_channelwise(module)
        own.args, own.kwargs = (first(own), chosen), {}

    def _sizes(self, node: fx.Node, layout: Layout) -> None:
        """Whoever asks for the sizes of a narrowed value is told those of the whole."""
        value = self.copies[node]
        for user in node.users:
            if asks_sizes(user):
                self._tell_size(user, value, layout)
            elif user.op == "call_method" and user.target in AS_ANOTHER and user.args[0] is not node:
                own = self.copies[user]
                if own.op == "call_method" and own.target == user.target:
                    with self.graph.inserting_before(own):
                        size = self.graph.call_function(whole_size, (value, layout.dim, layout.size))
                    own.target, own.args = str(own.target).removesuffix("_as"), (own.args[0], size)

    def _tell_size(self, user: fx.Node, value: fx.Node, layout: Layout) -> None:
        own = self.copies[user]
        which = () if user.op == "call_function" else user.args[1:]
        with self.graph.inserting_before(own):
            new = self.graph.call_function(whole_size, (value, layout.dim, layout.size, *which))
        self._take_over(user, new)

    def _take(self, node: fx.Node, have: Sequence[int]) -> None:
        """A stretch of the channels: where it begins depends on what is there."""
        step, own = self.flow.steps[node], self.copies[node]
        link = step.links[0]
        source = self.flow.layout(link.source)
        assert step.layout is not None and source is not None
        there = self.demand.wanted(step.links, node)[link.source]
        if all(place == FULL for place in there):
            return
        before = self.header.parts(source.segments[: link.start], there[: link.start])
        parts = self.header.parts(step.layout.segments, have)
        with self.graph.inserting_before(own):
            new = self.graph.call_function(take_parts, (first(own), source.dim, before, parts))
            if node.target is operator.getitem:
                sizes = self.flow.shape(link.source)
                places = None if sizes is None else spelled_out(node.args[1], len(sizes))
                assert places is not None
                axes = [at for at, place in enumerate(places) if place is not None]
                places[axes[source.dim]] = slice(None)
                new = self.graph.call_function(operator.getitem, (new, tuple(places)))
        self._take_over(node, new)

    def _pad(self, node: fx.Node, have: Sequence[int]) -> None:
        step, own = self.flow.steps[node], self.copies[node]
        assert step.layout is not None
        parts = self.header.parts(step.layout.segments, have)
        (start, end), pads, value = step.sections[0], argument(own, 1, "pad"), argument(own, 3, "value")
        ends = parts[:start], parts[end:]
        with self.graph.inserting_before(own):
            new = self.graph.call_function(pad_parts, (first(own), tuple(pads), value, step.layout.dim, ends))
        self._take_over(node, new)

    def _resize(self, node: fx.Node, have: Sequence[int]) -> None:
        step, own = self.flow.steps[node], self.copies[node]
        assert step.layout is not None
        sizes = own.args[1:] if len(own.args) > 1 else (own.kwargs.get("shape", own.kwargs.get("size")),)
        parts = self.header.parts(step.layout.segments, have)
        method = str(own.target) if own.op == "call_method" else "reshape"
        with self.graph.inserting_before(own):
            if method in AS_ANOTHER:
                method, sizes = method.removesuffix("_as"), (self._size_of(node.args[1]),)
            shape = sizes[0] if len(sizes) == 1 else tuple(sizes)
            new = self.graph.call_function(resize, (first(own), shape, step.axis, parts, method))
        self._take_over(node, new)

    def _size_of(self, node: Any) -> fx.Node:
        """The size of the whole of a value."""
        layout, value = self.flow.layout(node), self.copies[node]
        if layout is None:
            return self.graph.call_method("size", (value,))
        return self.graph.call_function(whole_size, (value, layout.dim, layout.size))

    def _split(self, node: fx.Node, have: Sequence[int]) -> None:
        step, own = self.flow.steps[node], self.copies[node]
        assert step.layout is not None
        parts = self.header.parts(step.layout.segments, have)
        sections = tuple(parts[start:end] for start, end in step.sections)
        with self.graph.inserting_before(own):
            new = self.graph.call_function(split_parts, (first(own), sections, step.layout.dim))
        self._take_over(node, new)

    def _take_over(self, node: fx.Node, new: fx.Node) -> None:
        own = self.copies[node]
        new.meta = dict(own.meta)
        own.replace_all_uses_with(new)
        self.graph.erase_node(own)
        self.copies[node] = new
