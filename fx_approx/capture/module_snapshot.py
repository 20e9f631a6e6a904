"""Modules as they were before something ran that may change them: attributes, tensors, training flags."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from fx_approx.capture.side_effects import containers

_PLAIN = (bool, int, float, str, type(None))


class AttributeSnapshot:
    """Attributes of modules and other objects, and what the containers in them hold; values are not copied.

    Containers are lists, dicts, sets and deques, those inside others too, and so the dictionaries in which a module
    holds its parameters, buffers, children and hooks.
    """

    def __init__(self, objects: Iterable[object]) -> None:
        self._attributes = [(vars(one), dict(vars(one))) for one in objects]
        seen: set[int] = set()
        self._contents = [
            (container, copy.copy(container))
            for _, attributes in self._attributes
            for value in attributes.values()
            for container in containers(value, seen)
        ]

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Puts all of it back at the end, as it was when the snapshot was taken; may be entered again and again."""
        try:
            yield
        finally:
            for container, contents in self._contents:
                container.clear()
                container.update(contents) if isinstance(container, (dict, set)) else container.extend(contents)
            for attributes, before in self._attributes:
                attributes.clear()
                attributes.update(before)


class TensorSnapshot:
    """The values of tensors, to be written back into the same tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._kept = [(tensor, tensor.clone()) for tensor in tensors]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts them back."""
        for tensor, value in self._kept:
            tensor.copy_(value)


@contextlib.contextmanager
def kept_training_flags(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Puts the training flag of each of ``modules`` back, whatever happens inside."""
    flags = [(module, module.training) for module in modules]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextlib.contextmanager
def kept_values(model: nn.Module) -> Iterator[None]:
    """Puts buffers and plain attributes back, such as a count of calls."""
    buffers = TensorSnapshot(model.buffers())
    plain = [
        (vars(m), {name: value for name, value in vars(m).items() if isinstance(value, _PLAIN)})
        for m in model.modules()
    ]
    try:
        yield
    finally:
        for attributes, before in plain:
            attributes.update(before)
        buffers.restore()
