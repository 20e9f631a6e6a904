"""Where the model's own Python hands a narrow layer a wide value: it has no node that takes the part which is read."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fx_approx._compat import children_of
from fx_approx.core.layer_types import CHANNEL_LAYERS, PRODUCT_LAYERS, layer_type
from fx_approx.ops.channel_slices import spread
from fx_approx.ops.narrow_calls import NARROW_CALLS
from fx_approx.sampling.base import Selection
from fx_approx.subnetworks.cuts import Cut
from fx_approx.subnetworks.model_parts import Specialised
from fx_approx.subnetworks.narrowing import Narrowed, Narrowing
from fx_approx.subnetworks.own_class import fit_sizes
from fx_approx.subnetworks.part_layers import PartLayer, make_heads_attention, make_part_layer

_ASK = (getattr, "size", "dim", len)
_SPLIT = (torch.split, torch.chunk, "split", "chunk", "narrow")
_MOVE = (*_SPLIT, torch.cat, torch.concat, torch.flatten, "flatten")
_PAIRS = (torch.matmul, torch.bmm, torch.einsum, operator.matmul, F.scaled_dot_product_attention, "matmul", "bmm")
_PRODUCTS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
_LAYERS = (*PRODUCT_LAYERS, *CHANNEL_LAYERS)
"""Layers of torch; a subclass of one may call functions with its own tensors, behind what it does by itself."""


@dataclasses.dataclass(frozen=True)
class _State:
    """What the model's Python has in the place of a value of the graph.

    Attributes:
        wide: The entries of it that the graph has, ``[k]``; None if it has the same.
        everything: It has all channels of the full model.
        makers: Narrow layers whose results it is made of, without another such layer between.
    """

    wide: Tensor | None = None
    everything: bool = False
    makers: frozenset[str] = frozenset()


class WideValues:
    """Which layers read a part of a wide value, and which have to write into one, for the model's own Python to run.

    A part that is taken in the graph is taken in the model's Python by the next narrow layer: between them stand
    operations of single channels. Where a wide value meets a narrow one, as a residual stream of which the last
    block computes what is read, the layer that makes the narrow one writes it into zeros.

    Attributes:
        reads: By path of a layer, the entries of its input that it reads.
        writes: Paths of the layers that write into zeros.
        problems: By name of a graph, why there is no such form.
        functions: By path of a layer in a class of the user's, whose forward calls a function, how it is narrowed.
    """

    def __init__(self, narrowing: Narrowing, widens: bool = False, narrow: nn.Module | None = None) -> None:
        """Nothing is known yet.

        Args:
            narrowing: How the layers were narrowed.
            widens: Values that are split by number are made wide, as Python splits them.
            narrow: The model with narrow layers, where they are not those of ``narrowing``.
        """
        self.narrow = narrowing.root if narrow is None else narrow
        self.narrowing, self.widens = narrowing, widens
        self.reads: dict[str, Tensor | None] = {}
        self.writes: set[str] = set()
        self.problems: dict[str, str] = {}
        self.functions: dict[str, Narrowed] = {}

    def narrowed(self, path: str) -> Narrowed | None:
        """How a layer is narrowed; None if it is not."""
        return self.narrowing.layers.get(path) or self.functions.get(path)

    def follow(self, graphs: Mapping[str, Specialised]) -> None:
        """Looks at all graphs of a model, until no further layer has to write into zeros."""
        count = -1
        while len(self.writes) > count:
            count = len(self.writes)
            self.reads, self.problems = {}, {}
            for name, made in graphs.items():
                _Walk(self, name, made).run()

    def index_tensors(self) -> dict[str, Tensor]:
        """By name, the indices that the layers have which :meth:`install` gives."""
        found = {f"{path}.reads": index for path, index in self.reads.items() if index is not None}
        for path in self.writes:
            narrowed = self.narrowed(path)
            if narrowed is not None and narrowed.outputs is not None:
                found[f"{path}.writes"] = narrowed.outputs.indices[0]
        return found

    def install(self, own: nn.Module) -> None:
        """Gives ``own``, a copy of the narrow model, layers that do so."""
        for path, function in self.functions.items():
            function.change(own.get_submodule(path))
        for path in sorted({*self.writes, *(path for path, index in self.reads.items() if index is not None)}):
            layer = own.get_submodule(path)
            if isinstance(layer, nn.MultiheadAttention):
                continue
            narrowed = self.narrowed(path)
            assert narrowed is not None
            index = None
            if path in self.writes and narrowed.outputs is not None:
                index = narrowed.outputs.indices[0].clone()
            make_part_layer(layer, _copy(self.reads.get(path)), index, narrowed.size)
        for layer in own.modules():
            if isinstance(layer, nn.TransformerEncoderLayer) and any(map(_is_part_layer, layer.children())):
                layer.activation_relu_or_gelu = 0  # the fused way of torch would call none of these
        cut = {name.rpartition(".")[0] for name in self.narrowing.cuts}
        for path, layer in own.named_modules():
            if isinstance(layer, nn.MultiheadAttention) and {path, f"{path}.out_proj"} & cut:
                make_heads_attention(layer, _copy(self.reads.get(path)))


class _Walk:
    """One way through a graph."""

    def __init__(self, found: WideValues, part: str, made: Specialised) -> None:
        self.found, self.part, self.made = found, part, made
        self.root, self.layers, self.cuts = found.narrow, found.narrowing.layers, found.narrowing.cuts
        self.states: dict[fx.Node, _State] = {}

    def run(self) -> None:
        for node in self.made.graph.nodes:
            self.states[node] = self._state(node)

    def _state(self, node: fx.Node) -> _State:
        if node in self.made.parts:
            chosen, everything = self.made.parts[node]
            return self._part(self._of(node.args[0]), chosen, everything)
        if node.op == "call_module":
            return self._module(node)
        if node.op not in ("call_function", "call_method") or node.target in _ASK:
            return _State()
        if node.target in _PRODUCTS:
            return self._product(node)
        if node.target in NARROW_CALLS and (owner := self._owner(node)):
            return self._layer(owner, self._of(node.args[0]))
        if node.target is operator.getitem:
            return self._of(node.args[0])
        return self._joined(node)

    def _of(self, value: Any) -> _State:
        return self.states[value] if isinstance(value, fx.Node) else _State()

    def _part(self, source: _State, chosen: Selection, everything: bool) -> _State:
        index = chosen.indices[0]
        if source.wide is None:
            return _State(index, everything)
        return _State(source.wide[index] if source.wide.numel() else source.wide, source.everything)

    def _module(self, node: fx.Node) -> _State:
        path, given = str(node.target), self._of(node.args[0] if node.args else None)
        narrowed = self.layers.get(path)
        if narrowed is None:
            module = self.root.get_submodule(path)
            changes = layer_type(module) in PRODUCT_LAYERS or bool(children_of(module))
            return _State() if changes else given
        if narrowed.sampled:
            self.found.problems[self.part] = f"{path} takes its selections in each call"
            return _State()
        return self._layer(path, given)

    def _layer(self, path: str, given: _State) -> _State:
        """A narrow layer."""
        narrowed = self.found.narrowed(path)
        assert narrowed is not None
        self._read(path, self._index(path, given, narrowed.inputs))
        if narrowed.outputs is None:
            return _State()
        if path in self.found.writes:
            return _State(narrowed.outputs.indices[0], True)
        return _State(makers=frozenset((path,)))

    def _owner(self, node: fx.Node) -> str:
        """The path of the layer whose forward calls a function with its own narrow tensors; empty if there is none."""
        reads = [str(one.target) for one in node.all_input_nodes if one.op == "get_attr" and one.target in self.cuts]
        path = reads[0].rpartition(".")[0] if reads else ""
        module = self.found.narrowing.full.get_submodule(path)
        own = isinstance(module, _LAYERS) and layer_type(module) is None
        if not own or any(one.rpartition(".")[0] != path for one in reads):
            return ""
        if path not in self.found.functions:
            self.found.functions[path] = self._narrowed(self.cuts.get(f"{path}.weight", self.cuts[reads[0]]), module)
        return path

    def _narrowed(self, cut: Cut, module: nn.Module) -> Narrowed:
        full: Tensor = operator.attrgetter(cut.source)(self.found.narrowing.full)
        size, groups, by_channel = int(full.shape[0]), cut.groups, not isinstance(module, tuple(PRODUCT_LAYERS))
        if cut.outputs is not None and (cut.depthwise or by_channel):
            count = cut.outputs.indices.numel()
            groups = count * cut.groups // size if cut.depthwise else count
        inputs = cut.outputs if cut.depthwise or by_channel else cut.inputs
        return Narrowed(inputs, cut.outputs, size, functools.partial(fit_sizes, groups=groups))

    def _index(self, path: str, given: _State, inputs: Selection | None) -> Tensor | None:
        """The entries of what a layer gets that it reads."""
        if given.wide is None:
            return None
        layer: Any = self.root.get_submodule(path)
        names = ("in_features", "in_channels", "num_features", "num_channels", "num_parameters")
        count = next((int(getattr(layer, name)) for name in names if hasattr(layer, name)), -1)
        if path in self.found.functions and inputs is not None:
            count = inputs.indices.numel()
        if count == given.wide.numel():
            return given.wide
        if given.everything and inputs is not None:  # behind a flatten, a channel is several entries
            full: Any = self.found.narrowing.full.get_submodule(path)
            if full.weight.dim() == 1:  # a normalisation has a weight for each channel
                return inputs.indices[0]
            flat = spread(inputs, full.weight.shape[1])
            assert flat is not None
            return flat.indices[0]
        self.found.problems[self.part] = f"{path} reads a part of a value of which a part is there"
        return None

    def _read(self, path: str, index: Tensor | None) -> None:
        known = self.found.reads.setdefault(path, index)
        same = known is index or (known is not None and index is not None and torch.equal(known, index))
        if not same:
            self.found.problems[self.part] = f"{path} is called with wide and with narrow values"

    def _product(self, node: fx.Node) -> _State:
        """A functional product, by a parameter of the model."""
        layer = self._owner(node)
        if layer:
            return self._layer(layer, self._of(node.args[0]))
        weight, given = node.args[1], self._of(node.args[0])
        path = str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else ""
        cut = self.cuts.get(path)
        owner = path.rpartition(".")[0]
        if given.wide is not None:
            if isinstance(self.root.get_submodule(owner), nn.MultiheadAttention):
                self._read(owner, given.wide)
            else:
                self.found.problems[self.part] = f"{node.name} reads a part of a wide value"
        return _State() if cut is None or cut.outputs is None else _State(makers=frozenset(("",)))

    def _joined(self, node: fx.Node) -> _State:
        """Operations of single channels: of wide values, of narrow values, or of both."""
        given = [self.states[one] for one in node.all_input_nodes]
        wide = [one for one in given if one.wide is not None]
        makers = frozenset().union(*(one.makers for one in given))
        if makers and (wide or (self.found.widens and node.target in _SPLIT)):
            if "" in makers:
                self.found.problems[self.part] = f"{node.name} adds a part to a wide value"
            self.found.writes |= makers - {""}
        if not wide:
            return _State(makers=makers)
        if node.target in _PAIRS:
            self.found.problems[self.part] = f"{node.name} would multiply more than what is read"
        everything = all(one.everything for one in wide) and not makers
        if node.target in _MOVE:  # where the entries stand is known only if all are there
            return _State(torch.empty(0, dtype=torch.int64), everything)
        return dataclasses.replace(wide[0], everything=everything)


def _is_part_layer(module: nn.Module) -> bool:
    return isinstance(module, PartLayer)


def _copy(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.clone()
