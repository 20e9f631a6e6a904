"""Example inputs without their values, and what the inputs of later calls must share with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fx_approx._compat import tree_leaves, tree_map_only


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What shape propagation needs of a tensor, without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    def empty(self) -> Tensor:
        """A tensor of this description; inside a fake tensor mode it takes no memory."""
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return made.requires_grad_(self.requires_grad)

    def resized(self, shape: Sequence[int]) -> TensorSpec:
        """The same with another shape, and axes that lie in memory in the same order."""
        strides, step = [0] * len(shape), 1
        for axis in sorted(range(len(shape)), key=lambda axis: (self.stride[axis], -axis)):
            strides[axis], step = step, step * shape[axis]
        return dataclasses.replace(self, shape=tuple(shape), stride=tuple(strides))


NESTED = (
    "a nested tensor has no one shape, so that no sample of it is defined; give a padded batch "
    "(torch.nested.to_padded_tensor) and a mask, or call model.eval()"
)


def holds_nested(value: Any) -> bool:
    """Whether a nested tensor is among the leaves of ``value``."""
    return any(isinstance(leaf, Tensor) and leaf.is_nested for leaf in tree_leaves(value))


def described(value: Any) -> Any:
    """``value`` with a :class:`TensorSpec` in place of every tensor."""
    return tree_map_only(
        Tensor,
        lambda t: TensorSpec(tuple(t.shape), t.stride(), t.dtype, t.device, t.requires_grad),
        value,
    )


Place = tuple[Any, ...]


def places(value: Any, path: Place = ()) -> list[tuple[Place, Any]]:
    """The leaves of nested tuples, lists and dicts, each with its keys. Plain Python: it traces."""
    if isinstance(value, dict):
        return [found for key in value for found in places(value[key], (*path, key))]
    if isinstance(value, (list, tuple)):
        return [found for number, one in enumerate(value) for found in places(one, (*path, number))]
    return [(path, value)]


@dataclasses.dataclass(frozen=True)
class SizeGuard:
    """What the inputs of a graph must share with the example inputs, because Python relied on it while it was traced.

    Attributes:
        names: Of the inputs.
        leaves: Keys of each leaf of the inputs (the first is the number of the input), and its axes, -1 for what is no
            tensor, -2 for None.
        sizes: Leaf, axis and the size it must have.
        not_one: Leaf and axis of a size that must not be one.
        dtypes: Data types of all leaves and of the model's first parameter, if they were asked for: then autocast must
            not be active either.
    """

    names: tuple[str, ...]
    leaves: tuple[tuple[Place, int], ...]
    sizes: tuple[tuple[int, int, int], ...] = ()
    not_one: tuple[tuple[int, int], ...] = ()
    dtypes: tuple[torch.dtype | None, ...] | None = None

    def misfit(self, values: list[Any], parameter: Tensor | None) -> str | None:
        """Why the graph does not fit a call with these inputs; None if it does. Plain Python: it traces."""
        found = places(values)
        if len(found) != len(self.leaves):
            return "its inputs hold another number of tensors than the example inputs"
        for (path, axes), (place, leaf) in zip(self.leaves, found, strict=True):
            if path != place or axes != (leaf.dim() if isinstance(leaf, Tensor) else -2 if leaf is None else -1):
                return f"input {self.names[path[0]]} has other axes or keys than in the example inputs"
        for number, axis, size in self.sizes:
            path, leaf = found[number]
            if leaf.shape[axis] != size:
                return f"axis {axis} of input {self.names[path[0]]} is not {size} long, on which its Python depends"
        for number, axis in self.not_one:
            path, leaf = found[number]
            if leaf.shape[axis] == 1:
                return f"axis {axis} of input {self.names[path[0]]} has one entry, on which its Python depends"
        if self.dtypes is not None:
            leaves = [leaf for _, leaf in found] + [parameter]
            if [leaf.dtype if isinstance(leaf, Tensor) else None for leaf in leaves] != list(self.dtypes):
                return "its Python depends on data types, and they are not those of the example inputs"
            if any([isinstance(leaf, Tensor) and torch.is_autocast_enabled(leaf.device.type) for leaf in leaves]):
                return "its Python depends on data types, and autocast is active"
        return None
