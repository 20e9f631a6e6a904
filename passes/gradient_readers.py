"""Values whose own gradient something may ask for: inside the forward, or of what a forward hands out.

Where a part of a value is taken, the gradients of part and whole come together at the value itself. What asks for the
gradient of the value must hold the value, and not what stands behind that point; and what is asked for is a gradient of
all its entries, so that it must not be made of a part only.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fx_approx.core.hooks import is_hooked
from fx_approx.core.layer_types import layer_type
from fx_approx.passes.aliasing import same_memory
from fx_approx.passes.channel_flow import Flow

_FUNCTIONS = (torch.autograd.grad, torch.autograd.backward)
_METHODS = ("backward", "requires_grad_", "retain_grad", "register_hook", "register_post_accumulate_grad_hook")
_ATTRIBUTES = ("grad", "grad_fn")
_KNOWN = ("torch", operator.__name__, "_operator", "builtins", math.__name__)


def asked_inside(flow: Flow) -> frozenset[fx.Node]:
    """Values whose gradient the forward asks for, or marks, and all that may be another name of one."""
    roots = {source for node in flow.graph.nodes for source in _asked(node)}
    return frozenset(found for source in roots for found in same_memory(flow, source))


def handed_out(flow: Flow) -> frozenset[fx.Node]:
    """Values that code beyond the graph holds: the outputs, and what parts that are not traced, or hooks, are given."""
    roots = {source for node in flow.graph.nodes if _hands_out(flow, node) for source in node.all_input_nodes}
    return frozenset(found for source in roots for found in same_memory(flow, source))


def _asked(node: fx.Node) -> Iterator[fx.Node]:
    if node.op == "call_function" and any(node.target is one for one in _FUNCTIONS):
        yield from node.all_input_nodes
    elif node.op == "call_method" and node.target in _METHODS:
        yield from (node, *node.all_input_nodes)
    elif node.op == "call_function" and node.target is getattr and node.args[1] in _ATTRIBUTES:
        yield from node.all_input_nodes


def _hands_out(flow: Flow, node: fx.Node) -> bool:
    if node.op == "output":
        return True
    module = flow.module(node)
    if module is not None:
        return layer_type(module) is None or is_hooked(module)
    if node.op != "call_function" or flow.steps[node].layout is not None:
        return False
    home: Any = getattr(node.target, "__module__", None) or "torch"
    return str(home).partition(".")[0] not in _KNOWN
