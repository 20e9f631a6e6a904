"""Specialises graphs to fixed selections: what depends on them alone becomes sizes, indices and narrow layers."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fx_approx.core.layer_types import FUSED_LAYERS, PRODUCT_LAYERS, layer_type
from fx_approx.errors import UnsupportedError
from fx_approx.ops import channel_slices
from fx_approx.ops.channel_slices import width
from fx_approx.ops.narrow_calls import NARROW_CALLS, SLICED_CONVOLUTIONS
from fx_approx.ops.sliced_linear import sliced_linear
from fx_approx.runtime.graph_program import PROLOGUE
from fx_approx.sampling.base import Selection
from fx_approx.subnetworks.cuts import Cut
from fx_approx.subnetworks.model_parts import Specialised
from fx_approx.subnetworks.narrowing import Narrowing, SeveralError
from fx_approx.subnetworks.parts import take_part
from fx_approx.subnetworks.slicing import Slicing

_EXACT_CALLS = {narrow: exact for exact, narrow in NARROW_CALLS.items()}
_EXACT_CONVOLUTIONS = {narrow: exact for exact, narrow in SLICED_CONVOLUTIONS.items()}
_CONSTANT = (channel_slices.positions, channel_slices.remaining, channel_slices.spread)


@dataclasses.dataclass(frozen=True)
class Known:
    """A value that follows from the selections, and is never a tensor of the step."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Read:
    """A tensor or an attribute of the model, by its path, before it is known how it is read."""

    path: str


@dataclasses.dataclass(frozen=True)
class Sliced:
    """The slices of a layer's weight and bias, by their paths, and the groups of the convolution that is left."""

    weight: Cut
    bias: Cut | None
    groups: int


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Fixed selections.

    Attributes:
        ahead: Those that are made ahead together, in order.
        outside: By path, those of layers that Python calls, outside of all graphs.
        further: By target of the node that makes one, those of products of two values of the step.
    """

    ahead: Sequence[Selection | None]
    outside: Mapping[str, Selection | None]
    further: Mapping[str, Selection | None]


def specialise(
    graphs: Mapping[str, fx.Graph],
    full: nn.Module,
    narrowing: Narrowing,
    head: Sequence[Any],
    chosen: Chosen,
) -> dict[str, Specialised]:
    """Copies graphs of a transformed model, with ordinary layers and functions in place of those with selections.

    Args:
        graphs: By name; several are those of the sections of one model.
        full: The transformed model.
        narrowing: Is told how each tensor of the model is read.
        head: What the sections are handed: a selection or None each.
        chosen: The selections.

    Raises:
        UnsupportedError: A selection is made within the step.
    """
    while True:
        try:
            for path, selection in chosen.outside.items():
                if selection is not None:
                    narrowing.narrow_outside(path, selection)
            made = {name: _Specializer(graph, full, narrowing, head, chosen).run() for name, graph in graphs.items()}
            narrowing.check_ties()
            return made
        except SeveralError as error:  # it stays whole, and the graphs slice it
            narrowing.begin_anew(error.source)


class _Specializer:
    """Copies one graph."""

    def __init__(
        self, source: fx.Graph, full: nn.Module, narrowing: Narrowing, head: Sequence[Any], chosen: Chosen
    ) -> None:
        self.source, self.full, self.narrowing = source, full, narrowing
        self.head, self.chosen = head, chosen
        self.root = narrowing.root
        self.slicing = Slicing()
        self.graph = self.slicing.graph
        self.parts: dict[fx.Node, tuple[Selection, bool]] = {}
        self.hints: list[str] = []

    def run(self) -> Specialised:
        made: dict[fx.Node, Any] = {}
        for node in self.source.nodes:
            try:
                made[node] = self._node(node, made)
            except UnsupportedError as error:
                raise UnsupportedError(f"model: {node.name}: {error}") from None
        return Specialised(self.graph, self.slicing.tensors, self.parts, self.hints)

    def _node(self, node: fx.Node, made: Mapping[fx.Node, Any]) -> Any:
        def now(value: Any) -> Any:
            return fx.map_arg(value, lambda one: made[one])

        args, kwargs = now(node.args), dict(now(dict(node.kwargs)))
        if node.op == "placeholder" and node.target == "head":
            return Known(self.head)
        if node.op == "output":
            return self.graph.output(self._revealed(args[0]))
        if node.op == "call_module" and str(node.target).startswith(PROLOGUE):
            return self._runtime_call(node)
        if node.op == "get_attr":
            return Read(str(node.target))
        if node.target is operator.getitem and isinstance(args[0], Sizes):
            return args[0].at(_known(args[1]))
        if node.target is operator.getitem and isinstance(args[0], (Known, tuple)):
            value = args[0].value if isinstance(args[0], Known) else args[0]
            found = value[args[1]]
            return Known(found) if isinstance(args[0], Known) else found
        if node.target in _CONSTANT:
            return Known(node.target(*_known(args), **_known(kwargs)))
        if node.target is channel_slices.slice_weights:
            return self._slices(*args)
        if node.op == "call_module":
            return self._module(node, args, kwargs)
        special = self._special(node, args, kwargs)
        return self._copied(node, args, kwargs) if special is None else special

    def _runtime_call(self, node: fx.Node) -> Any:
        if node.target == PROLOGUE:
            return Known(None)
        if node.target == f"{PROLOGUE}.resample":
            return Known(self.chosen.ahead)
        if str(node.target).startswith(f"{PROLOGUE}.o"):  # running norms: nothing is learnt any more
            return Known(None)
        if node.target in self.chosen.further:
            return Known(self.chosen.further[str(node.target)])
        raise UnsupportedError(
            "its selection follows the activations or gradients of the step, so that no fixed network computes the "
            "same; expected scores weight, ema or uniform, of the output"
        )

    # ---- reading the model's tensors

    def _read(self, value: Any) -> Any:
        """``value``, or the node that reads it, as it stands in the subnetwork."""
        return self.graph.get_attr(value.path) if isinstance(value, Read) else value

    def _whole(self, read: Read) -> fx.Node:
        """The node that reads all of a tensor, or an attribute that is none."""
        if read.path.startswith(f"{PROLOGUE}.c"):  # a constant of the capture
            name = f"_constant_{read.path.removeprefix(PROLOGUE + '.c').replace('.', '_')}"
            return self.slicing.tensor(name, operator.attrgetter(read.path)(self.full))
        self.narrowing.use_whole(read.path)
        return self.graph.get_attr(read.path)

    def _revealed(self, value: Any) -> Any:
        """What a node is called with, where what is known is plain, and tensors of the model are read whole."""
        return _known(value, self._whole)

    def _copied(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        new = self.graph.create_node(node.op, node.target, self._revealed(args), self._revealed(kwargs), node.name)
        new.meta = {key: value for key, value in node.meta.items() if key in ("val", "nn_module_stack")}
        return new

    def _layer(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node:
        """A call of a layer that has been narrowed."""
        new = self.graph.call_module(str(node.target), self._revealed(args))
        new.meta = {key: value for key, value in node.meta.items() if key in ("val", "nn_module_stack")}
        return new

    def _exact(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        """A call of a module with all of its tensors."""
        module = self.root.get_submodule(str(node.target))
        if isinstance(module, FUSED_LAYERS) or not list(module.children()):  # others are Python that calls layers
            self.narrowing.use_module(str(node.target))
        return self._copied(node, args, kwargs)

    # ---- products

    def _slices(
        self, weight: Read, bias: Read | None, inputs: Any, outputs: Any, groups: int = 1, depthwise: bool = False
    ) -> Known:
        chosen, made = (None if one is None else one.value for one in (inputs, outputs))
        if chosen is None and made is None:
            return Known(None)
        left = Cut(weight.path, None if depthwise else chosen, made, groups, depthwise)
        rest = None if bias is None else Cut(bias.path, None, made)
        if depthwise and made is not None:
            full: Tensor = operator.attrgetter(left.source)(self.full)
            groups = made.indices.numel() * groups // full.shape[0]
        return Known(Sliced(left, rest, groups))

    def _module(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = str(node.target)
        given = args[1] if len(args) > 1 else None
        if isinstance(given, Known) and isinstance(given.value, Sliced):
            return self._product(node, args[0], given.value)
        if len(args) == 3 and isinstance(args[2], Known):  # a ReLU of which a part is read as well
            whole = self._exact(node, args[:1], {})
            return whole, self._select(whole, args[1], args[2])
        if isinstance(given, Known) and isinstance(given.value, Selection):
            if layer_type(self.root.get_submodule(path)) not in PRODUCT_LAYERS:
                return self._channels(node, args[0], given.value)
            if args[4:] == (True,):
                return self._straight_through(node, args[0], given.value)
            return self._read_part(node, args[0], given.value)
        if isinstance(given, Known) or (given is None and len(args) > 1):
            return self._exact(node, args[:1], {})  # a sampled layer that is exact now, or in this call
        return self._exact(node, args, kwargs)

    def _product(self, node: fx.Node, input: Any, sliced: Sliced) -> fx.Node:
        """A layer with a part of its weight."""
        path = str(node.target)
        if not self.narrowing.narrow_product(path, sliced.weight, sliced.bias, sliced.groups):
            return self._layer(node, (input,))
        self.hints.append(f"{path} is read with several selections")
        layer: Any = self.full.get_submodule(path)
        weight, bias = self.slicing.cut(sliced.weight), self.slicing.cut(sliced.bias)
        return self.slicing.call_layer(layer, self._read(input), weight, bias, sliced.groups)

    def _read_part(self, node: fx.Node, input: Any, chosen: Selection) -> fx.Node:
        """A layer that reads a part of its input, and of which all outputs are computed."""
        path = str(node.target)
        layer: Any = self.full.get_submodule(path)
        groups = getattr(layer, "groups", 1)
        flat = channel_slices.spread(chosen, layer.weight.shape[1]) if groups > 1 else chosen
        bias = None if layer.bias is None else Cut(f"{path}.bias")
        part = self._select(input, -1 if isinstance(layer, nn.Linear) else 1, Known(flat))
        return self._product(node, part, Sliced(Cut(f"{path}.weight", chosen, None, groups), bias, groups))

    def _straight_through(self, node: fx.Node, input: Any, chosen: Selection) -> fx.Node:
        """A layer with a sampled output whose gradients are exact: it needs its whole weight."""
        path = str(node.target)
        self.hints.append(f"{path} has gradients that do not follow its output")
        self.narrowing.sample(path)
        return self._layer(node, (input, self.slicing.selection(chosen), None, None, True))

    def _channels(self, node: fx.Node, input: Any, chosen: Selection) -> fx.Node:
        """A normalisation, or another layer with parameters of each channel, on some channels."""
        path = str(node.target)
        if not self.narrowing.narrow_channels(path, chosen):
            return self._layer(node, (input,))
        self.hints.append(f"{path} is called with several selections")
        return self._layer(node, (input, self.slicing.selection(chosen)))

    # ---- functions of this package

    def _special(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function of this package, as functions of torch; None for any other."""
        target: Any = node.target
        if getattr(target, "__module__", "") == channel_slices.__name__:
            args = tuple(self._whole(one) if isinstance(one, Read) else one for one in args)
        if target is channel_slices.narrow:
            return self._select(args[0], args[1], args[2], node.args[2])
        if target is channel_slices.tapped:
            return args[0], self._select(args[0], args[1], args[2], node.args[2])
        if target is channel_slices.tapped_relu:
            whole = self.graph.call_function(F.relu, (args[0], *args[3:]))
            return whole, self._select(whole, args[1], args[2], node.args[2])
        if target is channel_slices.resize:
            return self._resized(node, *args)
        if target is channel_slices.whole_size:
            return self._whole_size(*args)
        if target is channel_slices.take_parts:
            input, dim, before, parts = args
            self.hints.append(f"{node.name} takes a stretch of channels by number")
            return self.graph.call_method("narrow", (input, dim, width(_known(before)), width(_known(parts))))
        if target is channel_slices.split_parts:
            input, sections, dim = args
            self.hints.append(f"{node.name} splits channels by number")
            return self.graph.call_function(torch.split, (input, [width(_known(parts)) for parts in sections], dim))
        if target is channel_slices.pad_parts:
            return self._padded(*args)
        if target is sliced_linear or target in _EXACT_CONVOLUTIONS:
            return self._sliced_call(target, args, kwargs)
        if target in _EXACT_CALLS:
            return self._narrow_call(target, args, kwargs)
        if getattr(target, "__module__", "").startswith("fx_approx.ops"):
            return self._sampled_call(node, args, kwargs)
        return None

    def _resized(self, node: fx.Node, input: Any, shape: Any, axis: int, parts: Any, method: str) -> fx.Node:
        if isinstance(shape, Sizes):  # those of another value, whole
            before, behind = shape.at(slice(None, axis)), shape.at(slice(axis + 1, None))
            counted = self.graph.call_function(operator.add, (before, (width(_known(parts)),)))
            return self.graph.call_method(method, (input, self.graph.call_function(operator.add, (counted, behind))))
        sizes = list(shape) if isinstance(shape, (tuple, list)) else [shape]
        if isinstance(shape, fx.Node):
            raise UnsupportedError("its shape is a value of the step")
        if sizes[axis] != -1:
            self.hints.append(f"{node.name} names the number of channels")
            sizes[axis] = width(_known(parts))
        return self.graph.call_method(method, (input, tuple(sizes)))

    def _padded(self, input: Any, pad: Sequence[int], value: float | None, dim: int, ends: Any) -> fx.Node:
        """Padding of channels, of which only the selected ones are made."""
        rank = len(pad) // 2
        before, behind = (width(_known(parts)) for parts in ends)
        self.hints.append("a pad names numbers of channels")
        # Channels stand behind the batch: of the axes that ``pad`` counts from the last, the one that it counts last.
        sizes = [*pad[: 2 * (rank - 1)], before, behind]
        return self.graph.call_function(F.pad, (input, sizes, "constant", value))

    def _whole_size(self, input: Any, dim: int, size: int, which: Any = None) -> Any:
        sizes = Sizes(input, dim, size)
        return sizes if which is None else sizes.at(which.value if isinstance(which, Known) else which)

    def _sliced_call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """A functional product: its weight is a parameter of the model, narrowed where it stands."""
        input, weight, bias, slices = args[:4]
        exact = F.linear if target is sliced_linear else _EXACT_CONVOLUTIONS[target]
        if not isinstance(slices, Known) or slices.value is None:
            given = self._revealed((input, weight, bias, *args[4:]))
            return self.graph.call_function(exact, given, self._revealed(kwargs))
        cut: Sliced = slices.value
        if self.narrowing.cut_all([one for one in (cut.weight, cut.bias) if one is not None]):
            own = self.slicing.cut(cut.weight), self.slicing.cut(cut.bias)
        else:
            own = self._read(weight), self._read(bias)
        if target is sliced_linear:
            return self.graph.call_function(F.linear, (self._read(input), *own))
        if kwargs.get("groups", 1) != 1:
            self.hints.append("a grouped convolution names its groups")
            kwargs = {**kwargs, "groups": cut.groups}
        return self.graph.call_function(exact, (self._read(input), *own, *args[4:]), kwargs)

    def _narrow_call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        chosen, channels = kwargs.pop("chosen"), kwargs.pop("channels")
        selection = chosen.value if isinstance(chosen, Known) else chosen
        exact = _EXACT_CALLS[target]
        if selection is None:
            return self.graph.call_function(exact, self._revealed(args), self._revealed(kwargs))
        reads = [one.path for one in (*args[1:], *kwargs.values()) if isinstance(one, Read)]
        cuts = [Cut(path, None, selection) for path in reads if self.narrowing.has(path)]
        if self.narrowing.cut_all(cuts):
            known = {"chosen": self.slicing.selection(selection), "channels": channels}
            return self.graph.call_function(target, self._revealed(args), {**self._revealed(kwargs), **known})
        args, kwargs = tuple(map(self._read, args)), {name: self._read(one) for name, one in kwargs.items()}
        count = selection.indices.shape[1]
        if exact is F.group_norm:
            self.hints.append("group_norm names its groups")
            args = (args[0], count * args[1] // channels, *args[2:])
        elif exact.__name__.startswith("conv_transpose"):  # one kernel for each channel
            self.hints.append(f"{exact.__name__} names its groups")
            args, kwargs = (args[:6], {**dict(zip(("dilation",), args[7:], strict=False)), **kwargs, "groups": count})
        return self.graph.call_function(exact, args, kwargs)

    def _sampled_call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """A product of two values of the step, of chosen pairs: the op itself computes it."""
        names = ("selection", "grad_input", "grad_weight", "straight_through")
        how = {name: kwargs.pop(name, None) for name in names}
        chosen = how["selection"].value if isinstance(how["selection"], Known) else None
        args, kwargs = self._revealed(args), self._revealed(kwargs)
        if chosen is None:
            name = str(getattr(node.target, "__name__", ""))
            return self.graph.call_function(getattr(F, name, None) or getattr(torch, name), args, kwargs)
        self.hints.append(f"{node.name} is a product of chosen pairs")
        self.narrowing.sliced[node.name] = None
        kwargs |= {"selection": self.slicing.selection(chosen), "straight_through": bool(how["straight_through"])}
        return self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]

    def _select(self, value: Any, dim: int, chosen: Any, origin: Any = None) -> Any:
        """The chosen entries of a wide value.

        ``origin`` is the node of the original graph that they come from; of :func:`remaining` they count what is left.
        """
        selection = chosen.value if isinstance(chosen, Known) else chosen
        if selection is None:
            return value
        index = self.slicing.indices(selection.indices[0], chosen)
        made = self.graph.call_function(take_part, (value, dim, index))
        everything = not (isinstance(origin, fx.Node) and origin.target is channel_slices.remaining)
        self.parts[made] = selection, everything
        return made


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a value, of which that along ``dim`` is said to be ``size``."""

    input: fx.Node
    dim: int
    size: int

    def at(self, place: Any) -> Any:
        """One of them, or a stretch."""
        if isinstance(place, int) and place >= 0 and self.dim >= 0:
            return self.size if place == self.dim else self.input.graph.call_method("size", (self.input, place))
        return self.input.graph.call_function(operator.getitem, (self.node(), place))

    def node(self) -> fx.Node:
        """All of them."""
        given = self.input, self.dim, self.size
        return self.input.graph.call_function(channel_slices.whole_size, given)


def _known(value: Any, read: Any = None) -> Any:
    """A value, or what a node is called with, in which what is known is plain; ``read`` makes nodes of what is read."""
    if isinstance(value, Known):
        return value.value
    if isinstance(value, Sizes):
        return value.node()
    if isinstance(value, Read):
        return read(value)
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return type(value)(_known(one, read) for one in value) if not hasattr(value, "_fields") else value
    if isinstance(value, dict):
        return {key: _known(one, read) for key, one in value.items()}
    if isinstance(value, slice):
        return slice(*(_known(one, read) for one in (value.start, value.stop, value.step)))
    return value
