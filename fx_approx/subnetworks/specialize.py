"""Specialises a graph to fixed selections: what depends on them alone becomes sizes, indices and narrow layers."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fx_approx._compat import buffers_of, parameters_of
from fx_approx.core.layer_types import PRODUCT_LAYERS, layer_type
from fx_approx.errors import UnsupportedError
from fx_approx.ops import channel_slices
from fx_approx.ops.channel_slices import width
from fx_approx.ops.narrow_calls import NARROW_CALLS, SLICED_CONVOLUTIONS
from fx_approx.ops.sliced_linear import sliced_linear
from fx_approx.runtime.graph_program import PROLOGUE
from fx_approx.sampling.base import Selection
from fx_approx.subnetworks.cuts import Cut
from fx_approx.subnetworks.derivations import Derivations, first_row, same_selections
from fx_approx.subnetworks.parts import take_part

INDICES = "_selected"
"""Prefix of the buffers with indices, where a part of a wide value is read."""

_EXACT_CALLS = {narrow: exact for exact, narrow in NARROW_CALLS.items()}
_EXACT_CONVOLUTIONS = {narrow: exact for exact, narrow in SLICED_CONVOLUTIONS.items()}
_CONSTANT = (channel_slices.positions, channel_slices.remaining, channel_slices.spread)
_SIZES = (
    "in_features",
    "out_features",
    "in_channels",
    "out_channels",
    "num_features",
    "num_channels",
    "num_parameters",
)


@dataclasses.dataclass(frozen=True)
class Known:
    """A value that follows from the selections, and is never a tensor of the step."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Sliced:
    """The slices of a layer's weight and bias, by their paths, and the groups of the convolution that is left."""

    weight: Cut
    bias: Cut | None
    groups: int


class Specializer:
    """Copies the graph of a transformed model, with ordinary layers and functions in place of those with selections.

    Attributes:
        graph: The copy.
        cuts: By path in ``root``, what each of its parameters and buffers is of the full model.
        derivations: How the selections of cuts and buffers follow from those that the model makes.
        buffers: By name, those that hold what is derived from selections.
        reasons: Why the model's own Python cannot be what runs.
    """

    def __init__(self, root: nn.Module, full: nn.Module, chosen: Sequence[Selection | None]) -> None:
        """A copy for fixed selections.

        Args:
            root: A copy of the exact model with tensors of its own; its layers are narrowed in place.
            full: The transformed model.
            chosen: The selections that are made ahead, in order.
        """
        self.root, self.full, self.derivations = root, full, Derivations(chosen)
        self.graph = fx.Graph()
        self.cuts: dict[str, Cut] = {}
        self.buffers: dict[str, Tensor] = {}
        self.reasons: list[str] = []
        self._narrowed: dict[str, Any] = {}
        self._index_names: dict[int, str] = {}
        self._held: list[Any] = []

    def run(self, graph: fx.Graph) -> fx.Graph:
        """The graph that computes the same without selections.

        Raises:
            UnsupportedError: A selection is made within the step, or one layer has several.
        """
        made: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            try:
                made[node] = self._node(node, made)
            except UnsupportedError as error:
                raise UnsupportedError(f"model: {node.name}: {error}") from None
        return self.graph

    def _node(self, node: fx.Node, made: Mapping[fx.Node, Any]) -> Any:
        def now(value: Any) -> Any:
            return fx.map_arg(value, lambda one: made[one])

        args, kwargs = now(node.args), now(dict(node.kwargs))
        if node.op == "output":
            return self.graph.output(_revealed(args[0]))
        if node.op == "call_module" and str(node.target).startswith(PROLOGUE):
            return self._runtime_call(node, args)
        if node.op == "get_attr":
            return self._attribute(node)
        if node.target is operator.getitem and isinstance(args[0], (Known, tuple)):
            value = args[0].value if isinstance(args[0], Known) else args[0]
            found = value[args[1]]
            return Known(found) if isinstance(args[0], Known) else found
        if node.target in _CONSTANT:
            return Known(self.derivations.derive(node.target, *_revealed(args), **_revealed(kwargs)))
        if node.target is channel_slices.slice_weights:
            return self._slices(*args)
        if node.op == "call_module":
            return self._module(node, args, kwargs)
        special = self._special(node, args, kwargs)
        return self._copied(node, args, kwargs) if special is None else special

    def _runtime_call(self, node: fx.Node, args: tuple[Any, ...]) -> Any:
        if node.target == PROLOGUE:
            return Known(None)
        if node.target == f"{PROLOGUE}.resample":
            return Known(self.derivations.chosen)
        if str(node.target).startswith(f"{PROLOGUE}.o"):  # running norms: nothing is learnt any more
            return Known(None)
        raise UnsupportedError(
            "its selection follows the activations of the step, so that no fixed network computes the same; "
            "expected scores weight, ema or uniform"
        )

    def _attribute(self, node: fx.Node) -> Any:
        if str(node.target).startswith(f"{PROLOGUE}.c"):  # a constant of the capture
            name = f"_constant_{str(node.target).removeprefix(PROLOGUE + '.c').replace('.', '_')}"
            if name not in buffers_of(self.root):
                value = operator.attrgetter(str(node.target))(self.full)
                self.root.register_buffer(name, value.clone(), persistent=False)
            return self.graph.get_attr(name)
        return self.graph.create_node("get_attr", str(node.target))

    def _slices(
        self, weight: Any, bias: Any, inputs: Any, outputs: Any, groups: int = 1, depthwise: bool = False
    ) -> Known:
        chosen, made = (None if one is None else one.value for one in (inputs, outputs))
        if chosen is None and made is None:
            return Known(None)
        left = Cut(str(weight.target), None if depthwise else chosen, made, groups, depthwise)
        rest = None if bias is None else Cut(str(bias.target), None, made)
        if depthwise and made is not None:
            full: Tensor = operator.attrgetter(left.source)(self.full)
            groups = made.indices.numel() * groups // full.shape[0]
        return Known(Sliced(left, rest, groups))

    def _module(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = str(node.target)
        given = args[1] if len(args) > 1 else None
        if isinstance(given, Known) and isinstance(given.value, Sliced):
            self._narrow_product(path, given.value)
            return self._copied(node, args[:1], {})
        if len(args) == 3 and isinstance(args[2], Known):  # a ReLU of which a part is read as well
            whole = self._copied(node, args[:1], {})
            return whole, self._select(whole, args[1], args[2])
        if any(isinstance(one, Known) and one.value is not None for one in args[2:]) or args[4:] == (True,):
            raise UnsupportedError("its gradients are sampled apart from its output")
        if isinstance(given, Known):
            if isinstance(given.value, Selection) and layer_type(self.root.get_submodule(path)) in PRODUCT_LAYERS:
                return self._copied(node, (self._read_part(path, args[0], given),), {})
            if isinstance(given.value, Selection):
                self._narrow_channels(path, given.value)
            return self._copied(node, args[:1], {})
        if given is None and len(args) == 2:  # another call of a sampled layer, which says that it is exact
            return self._copied(node, args[:1], {})
        return self._copied(node, args, kwargs)

    def _read_part(self, path: str, input: Any, given: Known) -> Any:
        """The part of the input of a layer that it reads, where all of its outputs are computed."""
        layer: Any = self.root.get_submodule(path)
        groups = getattr(layer, "groups", 1)
        axis = -1 if isinstance(layer, nn.Linear) else 1
        derive = self.derivations.derive
        flat = Known(derive(channel_slices.spread, given.value, layer.weight.shape[1])) if groups > 1 else given
        bias = None if layer.bias is None else Cut(f"{path}.bias")
        if not self._seen(path, Cut(f"{path}.weight", given.value, None, groups)):
            self._narrowed.pop(path)
            self._narrow_product(path, Sliced(Cut(f"{path}.weight", given.value, None, groups), bias, groups))
        return self._select(input, axis, flat)

    def _special(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function of this package, as functions of torch; None for any other."""
        target: Any = node.target
        if target is channel_slices.narrow:
            return self._select(*args[:3])
        if target is channel_slices.tapped:
            return args[0], self._select(*args[:3])
        if target is channel_slices.tapped_relu:
            whole = self.graph.call_function(F.relu, (args[0], *args[3:]))
            return whole, self._select(whole, args[1], args[2])
        if target is channel_slices.resize:
            input, shape, axis, parts, method = args
            sizes = list(shape) if isinstance(shape, (tuple, list)) else [shape]
            if isinstance(shape, fx.Node):
                raise UnsupportedError("its shape is a value of the step")
            if sizes[axis] != -1:
                self.reasons.append(f"{node.name} names the number of channels")
                sizes[axis] = width(_revealed(parts))
            return self.graph.call_method(method, (input, tuple(sizes)))
        if target is channel_slices.whole_size:
            return self._whole_size(*args)
        if target is channel_slices.take_parts:
            input, dim, before, parts = args
            self.reasons.append(f"{node.name} takes a stretch of channels by number")
            return self.graph.call_method("narrow", (input, dim, width(_revealed(before)), width(_revealed(parts))))
        if target is channel_slices.split_parts:
            input, sections, dim = args
            self.reasons.append(f"{node.name} splits channels by number")
            return self.graph.call_function(torch.split, (input, [width(_revealed(parts)) for parts in sections], dim))
        if target is channel_slices.pad_parts:
            return self._padded(*args)
        if target is sliced_linear or target in _EXACT_CONVOLUTIONS:
            return self._sliced_call(target, args, kwargs)
        if target in _EXACT_CALLS:
            return self._narrow_call(target, args, kwargs)
        if getattr(target, "__module__", "").startswith("fx_approx.ops"):
            return self._sampled_call(node, args, kwargs)
        return None

    def _padded(self, input: Any, pad: Sequence[int], value: float | None, dim: int, ends: Any) -> fx.Node:
        """Padding of channels, of which only the selected ones are made."""
        rank = len(pad) // 2
        before, behind = (width(_revealed(parts)) for parts in ends)
        self.reasons.append("a pad names numbers of channels")
        # Channels stand behind the batch: of the axes that ``pad`` counts from the last, the one that it counts last.
        sizes = [*pad[: 2 * (rank - 1)], before, behind]
        return self.graph.call_function(F.pad, (input, sizes, "constant", value))

    def _whole_size(self, input: Any, dim: int, size: int, which: Any = None) -> Any:
        if which is not None:
            asked = which.value if isinstance(which, Known) else which
            return size if asked == dim else self.graph.call_method("size", (input, asked))
        whole = self.graph.call_method("size", (input,))
        return _Sizes(self.graph, whole, dim, size)

    def _sliced_call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """A functional product: its weight is a parameter of the model, narrowed where it stands."""
        input, weight, bias, slices = args[:4]
        if not isinstance(slices, Known) or slices.value is None:
            exact = F.linear if target is sliced_linear else _EXACT_CONVOLUTIONS[target]
            return self.graph.call_function(exact, (input, weight, bias, *args[4:]), kwargs)
        cut: Sliced = slices.value
        self._replace(cut.weight)
        if cut.bias is not None:
            self._replace(cut.bias)
        if target is sliced_linear:
            return self.graph.call_function(F.linear, (input, weight, bias))
        if kwargs.get("groups", 1) != 1:
            self.reasons.append("a grouped convolution names its groups")
            kwargs = {**kwargs, "groups": cut.groups}
        return self.graph.call_function(_EXACT_CONVOLUTIONS[target], (input, weight, bias, *args[4:]), kwargs)

    def _narrow_call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        chosen, channels = kwargs.pop("chosen"), kwargs.pop("channels")
        selection = chosen.value if isinstance(chosen, Known) else chosen
        exact = _EXACT_CALLS[target]
        if selection is not None:
            for one in (*args[1:], *kwargs.values()):
                if isinstance(one, fx.Node) and one.op == "get_attr":
                    self._replace(Cut(str(one.target), None, selection))
            if exact is F.group_norm:
                self.reasons.append("group_norm names its groups")
                args = (args[0], selection.indices.shape[1] * args[1] // channels, *args[2:])
            elif exact.__name__.startswith("conv_transpose"):
                raise UnsupportedError("a functional transposed convolution is not supported")
        return self.graph.call_function(exact, args, kwargs)

    def _sampled_call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        names = ("selection", "grad_input", "grad_weight", "straight_through")
        chosen = {name: kwargs.pop(name, None) for name in names}
        if any(isinstance(one, Known) and one.value is not None for one in chosen.values()):
            raise UnsupportedError("a product of two activations chooses by what they hold")
        exact = getattr(F, str(getattr(node.target, "__name__", "")), None) or getattr(torch, node.target.__name__)  # type: ignore[union-attr]
        return self.graph.call_function(exact, args, kwargs)

    def _select(self, value: Any, dim: int, chosen: Any) -> Any:
        """The chosen entries of a wide value."""
        selection = chosen.value if isinstance(chosen, Known) else chosen
        if selection is None:
            return value
        key = id(chosen)  # one value of the graph, and not one set of numbers: others come in its place
        if key not in self._index_names:
            name = f"{INDICES}{len(self._index_names)}"
            self.buffers[name] = self.derivations.derive(first_row, selection)
            self.root.register_buffer(name, self.buffers[name].clone())
            self._index_names[key] = name
            self._held.append(chosen)
        self.reasons.append("a part of a wide value is read")
        return self.graph.call_function(take_part, (value, dim, self.graph.get_attr(self._index_names[key])))

    def _copied(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        new = self.graph.create_node(node.op, node.target, _revealed(args), _revealed(kwargs), node.name)
        new.meta = {key: value for key, value in node.meta.items() if key == "val"}
        return new

    # ---- narrow layers

    def _narrow_product(self, path: str, sliced: Sliced) -> None:
        if self._seen(path, sliced.weight):
            return
        layer: Any = self.root.get_submodule(path)
        self._replace(sliced.weight)
        if sliced.bias is not None and not sliced.bias.whole:
            self._replace(sliced.bias)
        shape, groups = layer.weight.shape, sliced.groups
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = shape
        else:
            layer.groups = groups
            layer.out_channels, layer.in_channels = shape[0], shape[1] * groups

    def _narrow_channels(self, path: str, chosen: Selection) -> None:
        if self._seen(path, Cut(path, None, chosen)):
            return
        layer: Any = self.root.get_submodule(path)
        before, count = {name: getattr(layer, name) for name in _SIZES if hasattr(layer, name)}, chosen.indices.numel()
        for name, tensor in (*parameters_of(layer).items(), *buffers_of(layer).items()):
            if tensor is not None and tensor.dim() and tensor.shape[0] in before.values():
                self._replace(Cut(f"{path}.{name}" if path else name, None, chosen))
        if isinstance(layer, nn.GroupNorm):
            layer.num_groups = count * layer.num_groups // layer.num_channels
        if hasattr(layer, "groups"):  # a transposed convolution with one kernel for each channel
            layer.groups = count
        for name in before:
            setattr(layer, name, count)

    def _seen(self, path: str, cut: Cut) -> bool:
        """Whether the layer has been narrowed so; an error if otherwise."""
        known = self._narrowed.get(path)
        if known is None:
            self._narrowed[path] = cut
            return False
        if not _same(known, cut):
            raise UnsupportedError(f"{path} is called with several selections")
        self.derivations.note_alike(path, known, cut)
        return True

    def _replace(self, cut: Cut) -> None:
        """Puts the compact tensor in the place of the full one, under the same name."""
        known = self.cuts.get(cut.source)
        if known is not None:
            if not _same(known, cut):
                raise UnsupportedError(f"{cut.source} is read with several selections")
            self.derivations.note_alike(cut.source, known, cut)
            return
        self.cuts[cut.source] = cut
        holder, _, name = cut.source.rpartition(".")
        module = self.root.get_submodule(holder)
        full = operator.attrgetter(cut.source)(self.full)
        compact = cut.of(full)
        if name in parameters_of(module):
            parameters_of(module)[name] = nn.Parameter(compact, requires_grad=full.requires_grad)
        else:
            buffers_of(module)[name] = compact


class _Sizes(tuple[Any, ...]):
    """The sizes of a value of which one is known; a place of it is a number or a node."""

    def __new__(cls, graph: fx.Graph, whole: fx.Node, dim: int, size: int) -> _Sizes:
        made = super().__new__(cls, ())
        made.graph, made.whole, made.dim, made.size = graph, whole, dim, size  # type: ignore[attr-defined]
        return made

    def __getitem__(self, place: Any) -> Any:
        one: Any = self
        if isinstance(place, slice):
            raise UnsupportedError("a part of its sizes is read")
        return one.size if place == one.dim else one.graph.call_function(operator.getitem, (one.whole, place))


def _revealed(value: Any) -> Any:
    """A value, or what a node is called with, in which what is known is plain."""
    if isinstance(value, Known):
        return value.value
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return type(value)(map(_revealed, value)) if not hasattr(value, "_fields") else value
    if isinstance(value, dict):
        return {key: _revealed(one) for key, one in value.items()}
    if isinstance(value, slice):
        return slice(_revealed(value.start), _revealed(value.stop), _revealed(value.step))
    return value


def _same(one: Cut, other: Cut) -> bool:
    return (
        one.source == other.source
        and one.groups == other.groups
        and same_selections(one.inputs, one.outputs, other.inputs, other.outputs)
    )
