"""Networks a quarter as wide, say, as their constructors say, so that many can be tried on a small processor."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

_LEAST = 16  # channels from which on a layer is made narrower: images and small heads stay as they are

_kept: set[int] = set()
_factors = [4]


def narrower(channels: Any) -> Any:
    """A part of a number of channels, or of each of several; small ones and those that do not divide stay."""
    if isinstance(channels, (list, tuple)):
        return type(channels)(map(narrower, channels))
    wide = isinstance(channels, int) and channels >= _LEAST and channels % _factors[-1] == 0 and channels not in _kept
    return channels // _factors[-1] if wide else channels


def _groups(given: dict[str, Any]) -> int:
    """As many channels in a group as before, where that fits; a depthwise convolution stays one."""
    groups, inputs, outputs = given["groups"], given["in_channels"], given["out_channels"]
    wanted = narrower(inputs) if groups == inputs else narrower(groups)
    return math.gcd(int(wanted), int(narrower(inputs)), int(narrower(outputs)))


def _convolution(given: dict[str, Any]) -> None:
    given["groups"] = _groups(given)
    for name in ("in_channels", "out_channels"):
        given[name] = narrower(given[name])


def _some(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(given: dict[str, Any]) -> None:
        given.update({name: narrower(given[name]) for name in names})

    return change


_LAYERS: dict[type[nn.Module], Callable[[dict[str, Any]], None]] = {
    _ConvNd: _convolution,
    _NormBase: _some("num_features"),
    nn.Linear: _some("in_features", "out_features"),
    nn.LayerNorm: _some("normalized_shape"),
    nn.GroupNorm: _some("num_groups", "num_channels"),
}


@contextlib.contextmanager
def thin(*keep: int, factor: int = 4) -> Iterator[None]:
    """Layers made inside have 1 / ``factor`` of the channels asked for, but of the numbers in ``keep``."""
    _kept.update(keep)
    _factors.append(factor)
    before = {layer: layer.__init__ for layer in _LAYERS}
    try:
        for layer, change in _LAYERS.items():
            layer.__init__ = _changed(before[layer], change)  # type: ignore[method-assign]
        yield
    finally:
        _kept.clear()
        _factors.pop()
        for layer, made in before.items():
            layer.__init__ = made  # type: ignore[method-assign]


def _changed(make: Callable[..., None], change: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
    signature = inspect.signature(make)

    def narrowed(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        change(bound.arguments)
        make(*bound.args, **bound.kwargs)

    return narrowed
