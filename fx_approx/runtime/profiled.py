"""Scopes for a profiler: what a forward of the graph spends on each product, under the name of its layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.profiler import record_function

from fx_approx._compat import is_profiling
from fx_approx.capture.records import META_KEY
from fx_approx.ops.channel_slices import slice_weights


def scoped(function: Callable[..., Any], graph: fx.Graph, prologue: str) -> Callable[..., Any]:
    """``function``, the code of ``graph``; while a profiler records an eager call, its nodes one by one in scopes.

    Args:
        function: Called with the model and the inputs.
        graph: What it computes.
        prologue: Where the runtime hangs in the model.
    """

    def run(model: nn.Module, *inputs: Any) -> Any:
        if not torch.compiler.is_compiling() and is_profiling():
            return _Scopes(model, graph, prologue).run(*inputs)
        return function(model, *inputs)

    return run


class _Scopes(fx.Interpreter):
    def __init__(self, model: nn.Module, graph: fx.Graph, prologue: str) -> None:
        super().__init__(model, graph=graph)
        self.prologue = prologue

    def run_node(self, n: fx.Node) -> Any:
        name = scope_of(n, self.prologue)
        with contextlib.nullcontext() if name is None else record_function(name):
            return super().run_node(n)


def scope_of(node: fx.Node, prologue: str) -> str | None:
    """The name of the scope of a node; None for what belongs to no product.

    A product has the name of its row in the savings report, its selection that name with ``: selection``, the slice of
    its weight that with ``: slice``. Selections that are made at the head for all are ``fx_approx: selections``.
    """
    if META_KEY in node.meta:
        return ", ".join(node.meta[META_KEY])
    slices = node.op == "call_function" and node.target is slice_weights
    if not slices and (node.op != "call_module" or str(node.target).partition(".")[0] != prologue):
        return None
    names = next((", ".join(user.meta[META_KEY]) for user in node.users if META_KEY in user.meta), "fx_approx")
    return f"{names}: {'slice' if slices else 'selection' if names != 'fx_approx' else 'selections'}"
