"""A transformed graph in the place of the graph that Dynamo gave."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from fx_approx._compat import FailOnRecompileLimitHit, Unsupported, buffers_of, mark_dynamic, parameters_of
from fx_approx.dynamo.layer_recovery import LayerRecovery
from fx_approx.errors import CaptureWarning
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.handle import GraphHandle


class CompiledGraph:
    """Runs a transformed graph with the inputs of Dynamo's graph, as long as the frame's modules live."""

    __slots__ = (
        "__weakref__",
        "approx",
        "cold",
        "dynamic",
        "exact",
        "handle",
        "held",
        "inputs",
        "run",
        "scalars",
        "turned",
    )  # no __dict__:
    # Dynamo would copy it.

    def __init__(
        self,
        handle: GraphHandle,
        approx: ApproxModule,
        run: Callable[..., Any],
        lifted: LayerRecovery,
        exact: Callable[[str], Callable[..., Any]],
    ) -> None:
        """``exact`` is told why and compiles the graph as it was, where the inner backend cannot take ours."""
        self.handle, self.approx, self.run = handle, approx, run
        self.exact: Callable[[str], Callable[..., Any]] | None = exact
        self.inputs, self.dynamic, self.scalars = lifted.inputs, lifted.dynamic, lifted.scalars
        self.held = [(place, _tensor(approx, path)) for place, path in lifted.parameters if path not in lifted.turned]
        self.turned = [
            (place, approx.get_submodule(path.rpartition(".")[0]))
            for place, path in lifted.parameters
            if path in lifted.turned
        ]
        self.cold = _learns_yet(approx)
        # Dynamo drops its own reference with the modules; but what it notes of the stack while it compiles the inner
        # graph refers to the outer code, a cycle that no garbage collector sees.
        for root in lifted.frame.roots:
            weakref.finalize(root.module, _release, weakref.ref(self))

    def __call__(self, *inputs: Any) -> Any:
        """Runs the graph on the inputs of Dynamo's, parameters included."""
        changed = {id(tensor): inputs[place] for place, tensor in self.held if inputs[place] is not tensor}
        if changed:  # someone has put other parameters into the model
            _replace(self.approx, changed)
            self.held = [(place, inputs[place]) for place, _ in self.held]
        for place, layer in self.turned:
            parameters_of(layer)["weight"] = inputs[place].t()
        for place, dim in self.dynamic:
            mark_dynamic(inputs[place], dim)
        values = [inputs[place].item() if place in self.scalars else inputs[place] for place in self.inputs]
        if self.handle.stand_in is not None:
            return self.handle.stand_in(self.approx)(*values)
        if self.handle.uncompiled is not None:
            with self.handle.uncompiled():
                return self.approx(*values)
        if self.cold:  # scores that learn do so from a first step that is not compiled
            self.cold = False
            return self.approx(*values)
        try:
            result = self.run(*values)
        except FailOnRecompileLimitHit:
            warnings.warn("a graph has had too many settings and runs uncompiled now", CaptureWarning, stacklevel=2)
            self.run = self.approx
            return self.run(*values)
        except Unsupported as error:
            if self.exact is None:
                raise
            return self._go_exact(self.exact(str(error).split("\n")[0]), inputs)
        self.exact = None
        return result

    def _go_exact(self, exact: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
        """From now on the graph runs as Dynamo gave it."""
        count = len(inputs)
        self.inputs, self.held, self.dynamic, self.scalars = tuple(range(count)), [], (), frozenset()
        self.turned = []
        self.run, self.exact = exact, None
        return exact(*inputs)


def _replace(approx: nn.Module, changed: dict[int, Tensor]) -> None:
    for module in approx.modules():
        for registry in cast(list[dict[str, Any]], [parameters_of(module), buffers_of(module)]):
            registry.update({name: changed[id(t)] for name, t in registry.items() if id(t) in changed})


def _learns_yet(approx: ApproxModule) -> bool:
    runtime = approx._fx_approx
    learning = [selector for selector in runtime.selectors.values() if selector.score.learns and not selector.shared]
    return any(s.running is None for s in learning) or (runtime.resample is not None and not runtime.resample.known)


def _release(compiled: weakref.ref[CompiledGraph]) -> None:
    gone = compiled()
    if gone is not None and hasattr(gone, "approx"):
        del gone.approx, gone.run, gone.held, gone.turned
        gone.exact = None


def _tensor(root: nn.Module, path: str) -> Tensor:
    holder, _, name = path.rpartition(".")
    value: Tensor = getattr(root.get_submodule(holder), name)
    return value
