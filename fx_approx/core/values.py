"""What is known of the values of a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fx_approx.core.candidates import Shape


@dataclasses.dataclass(frozen=True)
class Values:
    """What a run of a graph in training mode showed of each value, by node name.

    Attributes:
        shapes: Of a tensor a shape, of a tuple of tensors a list of shapes.
        sizes: Bytes of one entry of a tensor.
        storages: The pieces of memory that a value lies in; views share that of what they show.
        saved: The pieces of memory that autograd keeps for the node, parameters and buffers left out.
        bytes: Of each piece of memory.
        whole: The run came to its end; else nothing is known of the values behind the place where it stopped.
    """

    shapes: Mapping[str, Shape | list[Shape]]
    sizes: Mapping[str, int]
    storages: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    saved: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    bytes: Mapping[int, int] = dataclasses.field(default_factory=dict)
    whole: bool = True

    def of(self, node: Any) -> Shape | None:
        """The shape of a tensor, None for anything else."""
        found = self.shapes.get(node.name) if isinstance(node, fx.Node) else None
        return found if isinstance(found, tuple) else None


def nbytes(values: Values, name: str) -> int:
    """Bytes of a tensor, 0 for anything else."""
    shape: Any = values.shapes.get(name)
    return torch.Size(shape).numel() * values.sizes[name] if isinstance(shape, tuple) else 0
