"""What a node of a graph does to channels, by the registry of ``operations.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from fx_approx.core.hooks import is_hooked
from fx_approx.core.layer_types import layer_type
from fx_approx.core.values import Values
from fx_approx.passes.aliasing import changed_for_others
from fx_approx.passes.channel_flow import Flow, Handler, Step
from fx_approx.passes.channel_spaces import Restart
from fx_approx.passes.node_words import place
from fx_approx.passes.operations import BY_NAME, FUNCTIONS, MODULES

Modules = Callable[[type[nn.Module]], Handler | None]
"""The rule of a type of layers."""

Calls = Callable[[Any], Handler | None]
"""The rule of a function, or of the name of a method."""


def handle(
    flow: Flow,
    node: fx.Node,
    of_module: Modules = MODULES.get,
    of_call: Calls = FUNCTIONS.get,
) -> Step | None:
    """What ``node`` does to the channels, or to what else these rules are of; None if that is not known."""
    if seen := changed_for_others(flow, node):
        flow.stopped[node] = f"{place(node)} changes in place what others read"
        if not seen <= flow.spaces.dead:
            flow.spaces.dead |= seen
            raise Restart
    handler = None if node in flow.spaces.dead else _handler(flow, node, of_module, of_call)
    return None if handler is None else handler(flow, node)


def _handler(flow: Flow, node: fx.Node, of_module: Modules, of_call: Calls) -> Handler | None:
    """The rule of what ``node`` calls, by the type of a layer or by a function or name of a method."""
    if node.op == "call_module":
        module = flow.module(node)
        if module is None or is_hooked(module) or "forward" in vars(module):
            return None
        kind = layer_type(module)
        return None if kind is None else of_module(kind)
    if node.op not in ("call_function", "call_method"):
        return None
    try:
        handler = of_call(node.target)
    except TypeError:
        return None
    if handler is None:
        handler = BY_NAME.get(getattr(node.target, "__name__", "")) if node.op == "call_function" else None
    return handler


def find_flow(root: nn.Module, graph: fx.Graph, values: Values) -> Flow:
    """Which values of ``graph`` hold the same channels."""
    return Flow(root, graph, values, handle)
