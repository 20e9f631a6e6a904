"""Modules in a few lines: their layers, and a forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def made_of(layers: Callable[[], dict[str, Any]]) -> Callable[[Callable[..., Any]], type[nn.Module]]:
    """Makes the function below a class of that name, whose attributes ``layers`` builds and whose forward it is."""

    def made(forward: Callable[..., Any]) -> type[nn.Module]:
        def __init__(self: nn.Module) -> None:
            nn.Module.__init__(self)
            for name, value in layers().items():
                setattr(self, name, value)

        name, place = forward.__name__, {"__module__": forward.__module__, "__qualname__": forward.__qualname__}
        forward.__code__ = forward.__code__.replace(co_name="forward", co_qualname=f"{forward.__qualname__}.forward")
        forward.__name__ = "forward"
        return type(name, (nn.Module,), {"__init__": __init__, "forward": forward, "__doc__": forward.__doc__, **place})

    return made
