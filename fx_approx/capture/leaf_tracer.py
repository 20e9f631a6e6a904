"""Symbolic tracing that never stops: what cannot be traced becomes a leaf, with module and line as the reason."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx, nn
from torch.nn.utils import parametrize

from fx_approx._compat import TENSOR_CONSTANT, checks_replaced, version_of, wrap_functions
from fx_approx.capture.containers import built
from fx_approx.capture.error_text import describe
from fx_approx.capture.known_values import KnownValues
from fx_approx.capture.real_tensors import Functions, Operators, RealTensors, changed_attributes, tensors_in
from fx_approx.capture.records import Opaque
from fx_approx.capture.side_effects import (
    DroppedError,
    Reads,
    grad_mode,
    no_side_effects,
    refused,
    unwatched,
)
from fx_approx.capture.traced_values import NeedsValues, TracedValue, kinds_told
from fx_approx.core.hooks import is_hooked
from fx_approx.core.layer_types import FUSED_LAYERS, layer_type

_CHECKPOINT_FILE = torch.utils.checkpoint.__file__

_FACTORIES = (
    *(torch.zeros, torch.ones, torch.empty, torch.full, torch.rand, torch.randn, torch.randint, torch.randperm),
    *(torch.arange, torch.linspace, torch.eye),
)
"""What takes sizes and no tensor, so that torch itself does not see that a size is traced."""


class LeafTracer(fx.Tracer):
    """Traces a model; a submodule whose forward cannot be traced is kept as a call of that submodule.

    Attributes:
        opaque: The submodules kept whole, by path.
        failed: Some of them, because their forward cannot be traced.
        reads: What the traced code has read of modules.
        parts: The parts of tuples whose length is known, by node.

    Args:
        reads: Filled while tracing, if the caller has them :func:`~fx_approx.capture.side_effects.recorded`.
        values: What example inputs tell of traced values.
        may_ask: A question that example inputs could answer is :class:`NeedsValues`.
    """

    def __init__(self, reads: Reads, values: KnownValues | None = None, may_ask: bool = False) -> None:
        super().__init__(autowrap_modules=(math,), autowrap_functions=_FACTORIES)
        wrap_functions(self, torch)
        self._example, self._may_ask = values, may_ask
        self.failed = False
        self.parts: dict[fx.Node, list[Any]] = {}
        self.reads = reads
        self.opaque: dict[str, Opaque] = {}
        self._read: dict[int, fx.Proxy] = {}
        self._versions: list[tuple[torch.Tensor, int]] = []
        self._outside = grad_mode()

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of ``root``; what tracing would silently remove from its own forward is an error."""
        self.real = RealTensors(root, self.reads)
        with torch.inference_mode(False), torch.enable_grad(), no_side_effects(root), refused():
            self._outside = grad_mode()
            with Operators(self.real), Functions(self.real, self), checks_replaced(self._as_node), kinds_told():
                graph = super().trace(root, concrete_args)
            self.real.check_attributes()
            for node in graph.nodes:
                node.meta.pop("is_wrapped", None)  # generated code would register what it calls, for good
            if self._example is not None:
                self._example.settle(graph)
            if any(version_of(tensor) != version for tensor, version in self._versions):
                raise DroppedError("an in-place change of a tensor that does not depend on an input")
            return graph

    def _as_node(self, check: Callable[..., None]) -> Callable[..., None]:
        def ask(condition: Any, message: Any = None) -> None:
            if isinstance(condition, fx.Proxy):
                self.create_proxy("call_function", check, (condition,), {})
            else:
                check(condition, message)

        return ask

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The traced value of ``node``."""
        return TracedValue(node, self)

    def now_known(self) -> KnownValues | None:
        """What example inputs tell of traced values, if they are at hand."""
        return self._example

    def known(self) -> KnownValues | None:
        """The same for a question without whose answer tracing ends, or goes wrong.

        Raises:
            NeedsValues: They are not at hand, but could be.
        """
        if self._example is None and self._may_ask:
            raise NeedsValues
        return self._example

    def keys(self, obj: fx.Proxy) -> Any:
        """The keys of a dict."""
        return obj.keys()

    def create_arg(self, a: Any) -> Any:
        """Remembers the state of a tensor that becomes a constant: it must not be changed behind the graph's back."""
        if isinstance(a, fx.Proxy) and a.tracer is not self:
            raise DroppedError("a value that was stored while another graph was traced")
        if isinstance(a, fx.Proxy):
            return a.node
        made = built(a)
        if made is not None:
            args, kwargs = made
            return self.create_node("call_function", type(a), self.create_arg(args), self.create_arg(kwargs))
        if isinstance(a, dict) and type(a) is not dict and not type(a).__module__.startswith("torch.fx"):
            raise DroppedError(f"the type of a {type(a).__name__}")
        if not isinstance(a, torch.Tensor):
            return super().create_arg(a)
        return (self.read(a) if self.real.is_in_graph(a) else self._constant(a)).node

    def read(self, tensor: torch.Tensor) -> fx.Proxy:
        """The node that reads a tensor of the model, or one that the forward has made and the graph changes."""
        path = self.real.path(tensor)
        if path is None:
            return self._constant(tensor)
        self.real.note_read(tensor)
        return self._attribute(tensor, path)

    def _attribute(self, tensor: torch.Tensor, path: str) -> fx.Proxy:
        if id(tensor) not in self._read:
            self._read[id(tensor)] = self.create_proxy("get_attr", path, (), {})
        return self._read[id(tensor)]

    def _constant(self, tensor: torch.Tensor) -> fx.Proxy:
        """A tensor that the forward has made: it must not be changed behind the graph's back."""
        path = self.tensor_attrs.get(tensor)
        if path is None:
            with unwatched():
                self._versions.append((tensor, version_of(tensor)))
            path = next(p for n in itertools.count() if not hasattr(self.root, p := f"{TENSOR_CONSTANT}{n}"))
            self.tensor_attrs[tensor] = path
            setattr(self.root, path, tensor)
        return self._attribute(tensor, path)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Layers of torch without children are leaves, as is what hooks or parametrisations have changed."""
        if is_hooked(m) or isinstance(m, FUSED_LAYERS) or parametrize.is_parametrized(m):
            return True
        known = super().is_leaf_module(m, module_qualified_name) or layer_type(m) not in (None, nn.Sequential)
        return known and not list(m.children())

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Traces into ``m``, or takes back what was traced of it and calls it as a leaf."""
        if self._example is not None and self._example.busy:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            inner = [name for name, _ in m.named_children() if name != "parametrizations"]
            if inner and is_hooked(m):
                self.opaque[path] = Opaque(path, "has hooks, which tracing would skip")
            elif inner and parametrize.is_parametrized(m):
                self.opaque[path] = Opaque(path, "is parametrised: its weights are computed at every access")
            return super().call_module(m, forward, args, kwargs)
        last = next(iter(reversed(self.graph.nodes)), None)
        stack, scope = dict(self.module_stack), self.scope
        known, mark = set(self.opaque), self.reads.mark()
        try:
            with no_side_effects(m):
                return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # whatever a user's forward does with a Proxy
            self._take_back(last)
            self.reads.back_to(mark)
            self.scope = scope
            self.module_stack.clear()
            self.module_stack.update(stack)
            for nested in set(self.opaque) - known:
                del self.opaque[nested]
            reason, self.failed = describe(error), True
        result = self._leaf(m, path, args, kwargs)
        self.opaque[path] = Opaque(path, reason, True)
        return result

    def _leaf(self, m: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for tensor in tensors_in((args, kwargs)):
            self.real.note_changed(tensor)  # the module may change it
        self.module_stack[path] = (path, type(m))
        try:
            return self.create_proxy("call_module", path, args, kwargs)
        finally:
            self.module_stack.popitem(last=True)

    def _take_back(self, last: fx.Node | None) -> None:
        """Erases the nodes created after ``last``."""
        gone = []
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            gone.append(node)
        for node in gone:
            self.graph.erase_node(node)
        erased = set(gone)
        for stale in [key for key, proxy in self._read.items() if proxy.node in erased]:
            del self._read[stale]
        self.parts = {node: parts for node, parts in self.parts.items() if node not in erased}

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers are handed out as they are: what is computed of one makes the node that reads it."""
        return attr_val

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Refuses to create a node inside ``torch.utils.checkpoint.checkpoint`` or ``torch.no_grad``.

        And one that changes a parameter, or a buffer of a layer: their values are read ahead of what the layer does.
        """
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_filename == _CHECKPOINT_FILE:
                raise DroppedError("torch.utils.checkpoint")
            frame = frame.f_back  # type: ignore[assignment]
        if grad_mode() != self._outside:
            raise DroppedError("torch.no_grad or alike")
        node = super().create_node(*args, **kwargs)
        for path in changed_attributes(node):
            module, _, name = path.rpartition(".")
            owner = self.root.get_submodule(module)
            if isinstance(getattr(owner, name), nn.Parameter) or self.is_leaf_module(owner, module):
                raise DroppedError(f"a change in place of {path}")
        return node
