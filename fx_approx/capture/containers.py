"""Containers that keep their type in a graph: how one is made again from its parts."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import torch
from torch import Tensor

from fx_approx._compat import tree_leaves, tree_map_only


def built(value: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments with which the class of ``value`` makes it again, or None if that is not known or not needed.

    Known are dataclasses (the outputs of Hugging Face models among them) and dicts whose class has no ``__init__`` of
    its own, as an ``OrderedDict``.
    """
    if is_record(value):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        if isinstance(value, dict) and not set(value) <= set(fields):
            return None
        return (), {name: getattr(value, name) for name in fields}
    if not isinstance(value, dict) or type(value) is dict or type(value).__module__.startswith("torch.fx"):
        return None
    if type(value).__init__ not in (dict.__init__, collections.OrderedDict.__init__) or getattr(
        value, "__dict__", None
    ):
        return None
    return ([(key, one) for key, one in value.items()],), {}


def leaves(value: Any) -> list[Any]:
    """The elements of nested containers and dataclasses, in order; None is one.

    Containers are all dicts, lists, tuples, sets and deques, subclasses too, and what pytrees know beside them.
    """
    if isinstance(value, Tensor):
        return [value]
    if is_record(value):
        parts = _parts(value)
    elif isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        parts = list(value)
    else:
        parts = tree_leaves(value, is_leaf=lambda one: one is not value)
        if len(parts) == 1 and parts[0] is value:
            return [value]
    return [found for one in parts for found in leaves(one)]


def _parts(record: Any) -> list[Any]:
    """The fields of a dataclass; where it is a dict, as outputs of Hugging Face are, what else is in it as well."""
    fields = {field.name: getattr(record, field.name, None) for field in dataclasses.fields(record)}
    items = record if isinstance(record, dict) else {}
    return [*fields.values(), *(one for name, one in items.items() if one is not fields.get(name, items))]


def is_record(value: Any) -> bool:
    """Whether ``value`` is an object of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested containers and dataclasses, in order."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def copied(value: Any) -> Any:
    """``value`` with a copy in the place of each tensor: without history, asking for a gradient where that one does."""
    return tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), value)


def mean_square(result: Any) -> Tensor:
    """A scalar of a model's output: the mean of the squares of each of its tensors, added up."""
    squares = [t.square().mean() for t in tensors(result) if t.is_floating_point()]
    return torch.stack(squares).sum()
