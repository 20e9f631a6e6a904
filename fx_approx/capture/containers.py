"""Containers that keep their type in a graph: how one is made again from its parts."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import torch
from torch import Tensor

from fx_approx._compat import tree_leaves


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
    """The elements of nested containers and dataclasses, in order; None is one."""
    if is_record(value):
        return [found for field in dataclasses.fields(value) for found in leaves(getattr(value, field.name, None))]
    return [
        found for one in tree_leaves(value, is_leaf=is_record) for found in (leaves(one) if is_record(one) else [one])
    ]


def is_record(value: Any) -> bool:
    """Whether ``value`` is an object of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested containers and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [found for one in value.values() for found in tensors(one)]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [found for one in value for found in tensors(one)]
    if is_record(value):
        return [found for field in dataclasses.fields(value) for found in tensors(getattr(value, field.name, None))]
    return []


def mean_square(result: Any) -> Tensor:
    """A scalar of a model's output: the mean of the squares of each of its tensors, added up."""
    squares = [t.square().mean() for t in tensors(result) if t.is_floating_point()]
    return torch.stack(squares).sum()
