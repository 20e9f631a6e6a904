"""The graph of a transformed model, the code that runs it, and whether it may serve a call."""

from __future__ import annotations

import copy
import itertools
import linecache
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from fx_approx.capture.records import Called, Capture, Section
from fx_approx.capture.split_sections import split
from fx_approx.runtime.checkpoints import is_checkpointed, outlined
from fx_approx.runtime.guards import NO_GRAPH, GraphMatch, Guards
from fx_approx.runtime.profiled import scoped

PROLOGUE = "_fx_approx"
"""Where the runtime hangs in a model, and so its name in graphs."""

_numbers = itertools.count()

_SHARED = ("capture", "whole", "graph", "stages", "masked", "function", "pieces")


class GraphProgram:
    """The rewritten graph of a model and its code, or that of the sections where the forward itself is not traced.

    Attributes:
        capture: The captured graph before the rewrite.
        whole: The model as a section of itself, with the guard of its own graph.
        graph: The rewritten graph that runs; None if the forward could not be traced.
        stages: The graph after each pass, by name; the last one runs.
        masked: The graph that computes all tokens, of which those that are left out are not seen, under the same
            selections; None where none are left out.
        function: The code of the graph, called with the model and the inputs; None if the model's own Python runs.
        pieces: The code of each section by its path, and that of their head by None, see
            :mod:`fx_approx.capture.split_sections`; empty without any.
        guards: What the graph takes for granted, by the path of the section; "" is the model itself.
        sharded: Modules that the graph calls by ``fully_shard``'s hooks, and how many hooks those are.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        own = Section("", capture.form, Called(()), capture.guard)
        self.whole = next((section for section in capture.sections if not section.path), own)
        self.graph: fx.Graph | None = None
        self.stages: list[tuple[str, fx.Graph]] = []
        self.masked: fx.Graph | None = None
        self.function: Callable[..., Any] | None = None
        self.pieces: dict[str | None, Callable[..., Any]] = {}
        self.guards: dict[str, Guards] = {}
        self.sharded: Mapping[nn.Module, int] = {}

    @property
    def plain(self) -> fx.Graph | None:
        """The graph that computes all channels, under the same selections."""
        return dict(self.stages).get("share", self.graph)

    def match(
        self,
        section: Section,
        module: nn.Module,
        function: Callable[..., Any] | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> tuple[GraphMatch, Sequence[Any]]:
        """Whether ``function`` may serve a call of ``module``, and its inputs for that. Plain Python: it traces.

        Args:
            section: ``module`` as it was captured; :attr:`whole` for the model.
            module: What is called.
            function: The code of its graph; None if there is none, which is nothing to warn of.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.
        """
        if function is None:
            return NO_GRAPH, ()
        values = section.form.bind(args, kwargs)
        if values is None:
            dynamic = ", ".join(section.form.dynamic)
            return GraphMatch(False, f"it is called in another way than it was captured ({dynamic})"), ()
        misfit = None if section.guard is None else section.guard.misfit(values, next(module.parameters(), None))
        if misfit is not None:
            return GraphMatch(False, misfit), ()
        return self.guards[section.path].check(self.sharded), values

    def compile_graph(self, graph: fx.Graph) -> None:
        """Makes ``graph`` the one that runs."""
        self.graph = graph
        self.serve(graph)

    def serve(self, graph: fx.Graph, make: Callable[[fx.Graph], Callable[..., Any]] | None = None) -> None:
        """Runs ``graph`` from now on, or each section of it by itself; :attr:`graph` stays what it is.

        Args:
            graph: A rewritten graph of the model.
            make: What runs a graph, called with the model and the inputs; by default its Python code.
        """
        make = self.compiled if make is None else make
        sections = self.capture.sections
        if not sections:
            self.function = make(graph)
            return
        head, own = split(graph, len(sections), PROLOGUE)
        self.pieces = {None: self.compiled(head)}
        for section, part in zip(sections, own, strict=True):
            self.pieces[section.path] = make(part)
        self.function = _run_whole if "" in self.pieces else None

    def compiled(self, graph: fx.Graph) -> Callable[..., Any]:
        """Python code of ``graph``, called with the model and the inputs."""
        if is_checkpointed(graph):
            function = self._code(outlined(graph, self._code))
            return lambda model, *inputs: function(model, model, *inputs)
        return scoped(self._code(graph), graph, PROLOGUE)

    def _code(self, graph: fx.Graph) -> Callable[..., Any]:
        """A function whose lines a traceback and a debugger can show, as long as the program lives."""
        code = graph.python_code("self")
        name = f"<fx_approx {next(_numbers)}>"
        weakref.finalize(self, linecache.cache.pop, name, None)
        linecache.cache[name] = (len(code.src), None, code.src.splitlines(keepends=True), name)
        namespace: dict[str, Any] = dict(code.globals)
        exec(compile(code.src, name, "exec"), namespace)
        function: Callable[..., Any] = namespace["forward"]
        return function

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphProgram:
        """Graphs and code are shared, since nothing changes them; what is granted is so of the modules of the copy."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for name, value in vars(self).items():
            setattr(new, name, value if name in _SHARED else copy.deepcopy(value, memo))
        return new

    def for_parts(self) -> GraphProgram:
        """What is pickled with a part of the model, whose graph does not run there: how the model was called."""
        return GraphProgram(Capture(None, self.capture.form, (), (), {}))


def _run_whole(root: Any, *values: Any) -> Any:
    """The graph of a model of which some parts have graphs of their own."""
    runtime = root._fx_approx
    return runtime.program.pieces[""](root, runtime.randomness.head, *values)
