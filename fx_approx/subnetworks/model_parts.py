"""A model without selections: its graph, or one for each of its sections."""

from __future__ import annotations

import dataclasses

from torch import Tensor, fx

from fx_approx.sampling.base import Selection
from fx_approx.subnetworks.graph_form import Serves


@dataclasses.dataclass
class Specialised:
    """A graph without selections.

    Attributes:
        graph: It computes the same; targets are paths in the model.
        tensors: By target, the indices and constants that it reads beside the model's own tensors.
        parts: Each node that reads a part of a wide value, with what it reads, and whether the value has everything.
        hints: What may keep the model's own Python from computing the same.
    """

    graph: fx.Graph
    tensors: dict[str, Tensor]
    parts: dict[fx.Node, tuple[Selection, bool]]
    hints: list[str]


@dataclasses.dataclass(frozen=True)
class Part:
    """The model, or a section of it.

    Attributes:
        path: Of the module; "" for the model.
        made: Its graph.
        serves: Which calls the graph serves.
    """

    path: str
    made: Specialised
    serves: Serves
