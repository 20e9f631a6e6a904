"""The plain arguments of a layer's product, such as stride and padding."""

from __future__ import annotations

from typing import Any

from torch import nn

from fx_approx.ops.base import OPS


def op_kwargs_of(module: nn.Module, kind: str) -> dict[str, Any]:
    """The plain arguments of a layer that its op names."""
    return {name: getattr(module, name) for name in OPS[kind].kwarg_names}
