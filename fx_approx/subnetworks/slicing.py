"""Puts fixed selections into a graph: their indices as buffers, and the slices that are taken of whole tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fx_approx._compat import padding_of
from fx_approx.core.layer_types import PRODUCT_LAYERS, layer_type
from fx_approx.ops.base import op_kwargs_of
from fx_approx.sampling.base import Selection
from fx_approx.subnetworks.cuts import Cut
from fx_approx.subnetworks.part_layers import take_columns

INDICES = "_selected"
"""Prefix of the buffers with indices, where a part of a wide value is read."""


class Slicing:
    """One graph and the indices in it.

    Attributes:
        graph: The graph.
        tensors: By name, the indices, scales and constants that it reads.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._held: list[Any] = []

    def tensor(self, name: str, value: Tensor) -> fx.Node:
        """A node that reads a copy of ``value``."""
        if name not in self.tensors:
            self.tensors[name] = value.detach().clone()
        return self.graph.get_attr(name)

    def indices(self, value: Tensor, owner: Any = None) -> fx.Node:
        """A node that reads ``value``, once for each ``owner``: one value of the graph, and not one set of numbers.

        Other numbers come in its place when the subnetwork is cut out anew.
        """
        owner = value if owner is None else owner
        if id(owner) not in self._names:
            self._names[id(owner)] = f"{INDICES}{len(self._names)}"
            self._held.append(owner)
        return self.tensor(self._names[id(owner)], value)

    def selection(self, chosen: Selection) -> fx.Node:
        """A node with the selection, for an op that takes one."""
        scale = None if chosen.scale is None else self.indices(chosen.scale)
        return self.graph.call_function(Selection, (self.indices(chosen.indices), scale))

    def cut(self, cut: Cut | None) -> fx.Node | None:
        """A node with what :meth:`Cut.of` takes, of the whole tensor."""
        if cut is None:
            return None
        value = self.graph.get_attr(cut.source)
        if cut.outputs is not None:
            index = self.indices(cut.outputs.indices)
            value = self.graph.call_function(
                torch.index_select, (value, 0, self.graph.call_method("view", (index, -1)))
            )
        if cut.inputs is None:
            return value
        index = self.indices(cut.inputs.indices)
        scale = None if cut.inputs.scale is None else self.indices(cut.inputs.scale)
        return self.graph.call_function(take_columns, (value, index, scale))

    def call_layer(self, layer: Any, input: Any, weight: Any, bias: Any, groups: int) -> fx.Node:
        """What ``layer`` computes, with other tensors than its own."""
        kind = PRODUCT_LAYERS[layer_type(layer) or nn.Linear]
        if kind == "linear":
            return self.graph.call_function(F.linear, (input, weight, bias))
        op_kwargs = {**op_kwargs_of(layer, kind), "groups": groups}
        if layer.padding_mode != "zeros":
            input = self.graph.call_function(F.pad, (input, padding_of(layer)), {"mode": layer.padding_mode})
            op_kwargs["padding"] = 0
        return self.graph.call_function(getattr(F, kind), (input, weight, bias), op_kwargs)
