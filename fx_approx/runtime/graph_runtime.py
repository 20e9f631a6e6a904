"""What a transformed model carries with it, and how its forward runs."""

from __future__ import annotations

import copy
import itertools
import linecache
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fx_approx._compat import Moved, at_end_of_backward, buffers_of, in_backward, tree_leaves
from fx_approx.capture.containers import tensors
from fx_approx.capture.records import Called, Capture, Section
from fx_approx.capture.size_guards import described
from fx_approx.capture.split_sections import split
from fx_approx.core.candidates import Candidate, Role
from fx_approx.core.plan import Plan
from fx_approx.errors import CaptureError, CaptureWarning, RecomputationError, WidthError
from fx_approx.ops.functorch_guard import refuse_transforms
from fx_approx.runtime.batchnorm import averages
from fx_approx.runtime.checkpoints import is_checkpointed, outlined
from fx_approx.runtime.guards import Guards
from fx_approx.runtime.rng import (
    INCREMENT,
    SEED,
    SELECTION_INTERVAL,
    STEP,
    Draw,
    draw,
    fingerprint,
    forget_calls,
    further,
    new_state,
    next_key,
    recall,
)
from fx_approx.runtime.selector import Selector
from fx_approx.runtime.shared_selection import SharedSelection, SharedSelections

PROLOGUE = "_fx_approx"
"""Where the runtime hangs in a model, and so its name in graphs."""

_numbers = itertools.count()


def selector_target(selector: Selector) -> str:
    """The target of a selector's node in the graph."""
    return f"{PROLOGUE}.{_attribute(selector)}"


def _attribute(selector: Selector) -> str:
    return f"s{selector.site}_{selector.role.value}"


class Runtime(Moved):
    """Plan, selectors, graph and random state of one transformed model; not one of its submodules.

    So ``state_dict``, ``parameters()`` and ``buffers()`` are those of the original, and neither an averaged model nor
    the buffer broadcast of data-parallel training touches the state.

    Attributes:
        state: ``[step, increment, selection interval, seed]``, see :func:`fx_approx.runtime.rng.new_state`.
        number: Unique in the process; tells forwards of different models apart.
        capture: The captured graph before the rewrite.
        graph: The rewritten graph that runs.
        stages: The graph after each pass, by name; the last one runs.
        whole: The model as a section of itself.
        resample: Makes the selections that are made ahead; None if there are none.
        called: What a forward was called with, as described by :func:`fx_approx.capture.size_guards.described`.
        learnt: The candidates' shapes were propagated from that.
        shaped: They were known at the transform.
        analysis: What the passes found, see :class:`fx_approx.passes.ChannelAnalysis`.
        effects: What they do to each product and value, see :class:`fx_approx.passes.PlanEffects`.
        prunes: Channels that no one reads are not computed.
        function: The code of the graph; None if the model's own Python runs.
        pieces: The code of each section by its path, and of their head, see :mod:`fx_approx.capture.split_sections`;
            empty without any.
        guards: What the graph takes for granted, by the path of the section; "" is the model itself.
        head: What the sections of the present forward are handed; None outside, and without sections.
        served: A graph of a section has run in the present forward, in training.
        candidates: All candidates.
        plan: What was decided.
        selection_time: What the selections were measured to cost, if they were.
        settings: Ratios and switches that the model has had.
        sampling_swapped: Some layer in an untraced part is sampled.
        averages: BatchNorm layers averaged plainly at the transform already, see :meth:`gathers`.
        gathered: Statistics were gathered by exact forwards since the last change of mode.
        sharded: Modules that the graph calls by ``fully_shard``'s hooks, and how many hooks those are.
    """

    state: Tensor
    resample: SharedSelections | None

    def __init__(
        self, capture: Capture, candidates: tuple[Candidate, ...], plan: Plan, seed: int, selection_interval: int
    ) -> None:
        super().__init__()
        self.register_buffer("state", new_state(seed, selection_interval), persistent=False)
        self.number = next(_numbers)
        weakref.finalize(self, forget_calls, self.number)
        self.capture, self.candidates, self.plan = capture, candidates, plan
        self.whole = Section("", capture.form, Called(()), capture.guard)
        self.graph: fx.Graph | None = None
        self.stages: list[tuple[str, fx.Graph]] = []
        self.add_module("resample", None)
        self.function: Callable[..., Any] | None = None
        self.selectors: dict[tuple[str, Role], Selector] = {}
        self.pieces: dict[str | None, Callable[..., Any]] = {}
        self.guards: dict[str, Guards] = {}
        self.head: tuple[Any, ...] | None = None
        self.served = False
        self.sampling_swapped = False
        self.inside = False
        self.drawn: Draw | None = None
        self.calls: dict[int | str, int] = {}
        self.sites: list[int] = []
        self.counts: list[int] = []
        self.called: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.learnt = self.shaped = False
        self.prunes = True
        self.analysis: Any = None
        self.effects: Any = None
        self.warned: set[str] = set()
        self.settings: set[tuple[Any, ...]] = set()
        self.selection_time: Any = None
        self.sharded: dict[nn.Module, int] = {}
        self.stale_from = 0
        self.exact_since: int | None = None
        self.averages = self.gathered = False

    def add(self, name: str, selector: Selector) -> None:
        """Registers a selector of candidate ``name``."""
        self.add_module(_attribute(selector), selector)
        self.selectors[name, selector.role] = selector

    def lay_out(self) -> None:
        """Gives each site its place among the uniforms that a forward draws; to be called when counts have changed."""
        counted: list[Selector | SharedSelection] = [s for s in self.selectors.values() if s.count and not s.shared]
        if self.resample is not None:
            self.resample.fit()
            counted += [shared for shared in self.resample.each() if shared.count]
        self.sites, self.counts = [s.site for s in counted], [s.count for s in counted]
        for selector, offset in zip(counted, itertools.accumulate(self.counts, initial=0), strict=False):
            selector.offset = offset

    @property
    def plain(self) -> fx.Graph | None:
        """The graph that computes all channels, under the same selections."""
        return dict(self.stages).get("share", self.graph)

    @property
    def setting(self) -> tuple[Any, ...]:
        """What compiled code depends on, of what can be set: where sampling is off, not on the ratio."""
        return tuple([one.spec if one.enabled else None for one in self.selectors.values()])

    @property
    def samples(self) -> bool:
        """Whether some layer is sampled when its training flag is set."""
        return any([selector.enabled and not selector.exact for selector in self.selectors.values()])

    @property
    def draws(self) -> bool:
        """Whether some sampler of the model is random, so that forwards need a key."""
        if self.resample is not None and self.resample.draws:
            return True
        for selector in self.selectors.values():
            if not selector.shared and selector.sampler.random and selector.active and not selector.exact:
                return True
        return False

    def forward(self, *inputs: Any) -> Draw | None:
        """The prologue: the randomness of this forward in fresh tensors, or None if nothing is drawn."""
        drawn = self._following(_detached(inputs)) if self.draws else None
        if self.sampling_swapped:
            self.drawn = drawn
        return drawn

    def _following(self, inputs: list[Tensor]) -> Draw:
        return self._draw(next_key(self.state, inputs, self.number))

    def upcoming(self, key: Tensor | None = None) -> Draw:
        """The randomness of the next forward, which stays the next; or that of ``key``."""
        if key is None:
            key = torch.stack((self.state[SEED], self.state[STEP] // self.state[SELECTION_INTERVAL]))
        return self._draw(key)

    def _draw(self, key: Tensor) -> Draw:
        numbers = draw(key, self.sites, self.counts) if self.sites else key.new_empty(0, dtype=torch.float32)
        return Draw(key, numbers)

    def draw_for(self, selector: Selector, inputs: list[Tensor]) -> Draw | None:
        """The randomness for a layer that is called outside the graph.

        Inside a forward it is that forward's, for each further call of the layer another. In a recomputation, that of
        the forward that is recomputed. A direct call of the layer takes one of its own.
        """
        if not selector.sampler.random:
            return None
        if self.inside:
            if self.drawn is None or torch.compiler.is_compiling():  # a compiled checkpoint cannot count
                return self.drawn
            number = self.calls.get(selector.site, 0)
            self.calls[selector.site] = number + 1
            return self._draw(further(self.drawn.key, number)) if number else self.drawn
        if not torch.compiler.is_compiling() and in_backward():
            self._refuse_further(selector.site, f"a {selector.kind} layer")
            return self._recalled(_detached(inputs))
        return self._following(_detached(inputs))

    def _recalled(self, inputs: list[Tensor]) -> Draw:
        """The randomness that a layer had in the forward that is recomputed now.

        Raises:
            RecomputationError: It was in a part that was called by itself, so that nothing tells which call this is.
        """
        key = recall(fingerprint(self.number, inputs))
        if key is not None and (self.drawn is None or not torch.equal(key, self.drawn.key)):
            self.drawn = None  # what follows may belong to the same part, and not to the forward of the whole model
            return self._draw(key)
        if self.drawn is None:
            raise RecomputationError(
                "a checkpoint recomputes a part of the transformed model that was called by itself. Checkpoint the "
                "whole model, or put the checkpoint into its forward, or transform the part alone."
            )
        return self.drawn

    def run(self, root: nn.Module, exact: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """One forward of ``root``: through the graph, or through its own Python ``exact`` with swapped layers."""
        if not torch.compiler.is_compiling():
            _refuse_proxies(root, (*args, *kwargs.values()))
            if self.called is None:
                self.called = described(args), described(dict(kwargs))
        if self.gathers(root):
            return self._run_exact(root, exact, args, kwargs)
        if root.training and self.samples and not torch.compiler.is_compiling():
            refuse_transforms()
        values = None if self.function is None else self.capture.form.bind(args, kwargs)
        unfit = "" if self.function is None else self._unfit(root, values, self.whole)
        if unfit is not None or values is None or self.function is None:
            return self._run_python(root, exact, args, kwargs, unfit)
        try:
            result = self._run_graph(root, values)
        except WidthError:  # the model's own layers say what does not fit
            return self._run_python(root, exact, args, kwargs, "a value has another number of channels")
        if self.resample is not None and root.training and not torch.compiler.is_compiling():
            self.resample.known = True
        return result

    def _run_graph(self, root: nn.Module, values: list[Any]) -> Any:
        function = self.function
        assert function is not None
        if self.pieces:
            self._begin(root, values)
        elif not self.sampling_swapped:
            return function(root, *values)
        return self._run_inside(lambda: function(root, *values))

    def _begin(self, root: nn.Module, inputs: Any) -> None:
        """The randomness of a forward, and what its sections are handed."""
        self.drawn = self._following(_detached(inputs)) if self.draws else None
        self.head = self.pieces[None](root, self.drawn) if self.pieces else None

    def _run_inside(self, forward: Callable[[], Any]) -> Any:
        """Runs a forward in which layers or sections are called by Python."""
        self.inside, self.calls, self.served = True, {}, False
        try:
            result = forward()
        except BaseException:
            if torch.compiler.is_compiling() or not in_backward():
                self.drawn = self.head = None
            raise
        finally:
            self.inside = False
        if self.served and self.resample is not None:
            self.resample.known = True
        self._mark(result)
        return result

    def run_section(
        self,
        root: nn.Module,
        section: Section,
        module: nn.Module,
        exact: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """One call of a module with a graph of its own, or of its own Python ``exact`` with swapped layers.

        Called several times in one forward of the model, each call draws for itself.

        Raises:
            RecomputationError: A checkpoint recomputes it, and nothing tells which of several calls that was.
        """
        if module.training and self.samples and not torch.compiler.is_compiling():
            refuse_transforms()
        function = self.pieces.get(section.path)
        if module is not self.guards[section.path].top:  # a copy of this module alone, such as a replica's
            function = None
        values = None if function is None else section.form.bind(args, kwargs)
        unfit = "" if function is None else self._unfit(module, values, section)
        if unfit is None and values is not None and function is not None:
            try:
                result = function(root, self._head_of_call(root, section, (args, kwargs)), *values)
                self.served = self.served or (module.training and not torch.compiler.is_compiling())
                return result
            except WidthError:  # the layers themselves say what does not fit
                unfit = "a value has another number of channels"
        if self.resample is not None and self.resample.published is not None:
            self.resample.published.fill()
        result = exact(module, *args, **kwargs)
        self._warn(exact, unfit, 6)
        return result

    def _head_of_call(self, root: nn.Module, section: Section, inputs: Any) -> tuple[Any, ...] | None:
        """What a section is handed: by the forward that runs or is recomputed, or by a draw of its own."""
        drawn, compiling = None, torch.compiler.is_compiling()
        if self.inside:
            kept = self.resample is not None and self.resample.held
            if compiling or kept or self.drawn is None:  # a compiled forward cannot count
                return self.head
            number = self.calls.get(section.path, 0)
            self.calls[section.path] = number + 1
            if not number:
                return self.head
            drawn = self._draw(further(self.drawn.key, number))
        elif not compiling and in_backward():
            forward = self.drawn
            drawn = self._recalled(_detached(inputs)) if self.draws else None
            if self.head is not None and drawn is forward:
                self._refuse_further(section.path, f"the module {section.path}")
                return self.head
        elif self.draws:
            drawn = self._following(_detached(inputs))
        head: tuple[Any, ...] = self.pieces[None](root, drawn)
        return head

    def _refuse_further(self, place: int | str, what: str) -> None:
        if self.calls.get(place, 0) > 1 and self.draws:
            raise RecomputationError(
                f"a checkpoint recomputes {what} that its forward called several times outside the graph, and nothing "
                "tells the calls apart: checkpoint the whole model, or leave the layer exact"
            )

    def gathers(self, root: nn.Module) -> bool:
        """Whether this forward is there to gather BatchNorm statistics, as ``update_bn`` of torch runs it.

        Its signs: training mode, no gradients, and plain averages where there were running ones at the transform. Grad
        mode alone says nothing: a reentrant activation checkpoint runs its forward without gradients, too.
        """
        return root.training and not torch.is_grad_enabled() and not self.averages and averages(root)

    def _run_exact(
        self, root: nn.Module, exact: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The forward of the exact model; neither switches nor what is drawn or learnt change."""
        selectors = [(selector, selector.enabled) for selector in self.selectors.values()]
        for selector, _ in selectors:
            selector.enabled = False
        try:
            result = exact(root, *args, **kwargs)
        finally:
            for selector, enabled in selectors:
                selector.enabled = enabled
        self.gathered = True
        return result

    def _unfit(self, module: nn.Module, values: list[Any] | None, section: Section) -> str | None:
        """Why the graph of ``module`` cannot serve a call: None if it can, "" if that is nothing to warn of."""
        if values is None:
            return f"it is called in another way than it was captured ({', '.join(section.form.dynamic)})"
        misfit = None if section.guard is None else section.guard.misfit(values, next(module.parameters(), None))
        return self.guards[section.path].broken(self.sharded) if misfit is None else misfit

    def _run_python(
        self,
        root: nn.Module,
        exact: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        reason: str | None,
    ) -> Any:
        self._begin(root, (args, kwargs))
        if self.resample is not None and self.resample.published is not None and not self.pieces:
            self.resample.published.fill()
        result = self._run_inside(lambda: exact(root, *args, **kwargs))
        self._warn(exact, reason, 7)
        return result

    def _warn(self, exact: Callable[..., Any], reason: str | None, stacklevel: int) -> None:
        """Says once why a graph did not serve, if there is a reason."""
        if reason and not torch.compiler.is_compiling() and reason not in self.warned and self.samples:
            self.warned.add(reason)
            name = exact.__qualname__.rpartition(".")[0]
            warnings.warn(
                f"the graph of {name} cannot serve this call: {reason}. Module swap serves it. "
                "Pass example_inputs that look like your calls, and transform again after a change of the model.",
                CaptureWarning,
                stacklevel=stacklevel,
            )

    def _mark(self, result: Any) -> None:
        """Makes checkpointed parts recompute with this forward's sample: its backward begins at these outputs."""
        drawn, head, calls = self.drawn, self.head, self.calls
        if (drawn is None and head is None) or torch.compiler.is_compiling():
            return
        if not in_backward():
            self.drawn = self.head = None
        reference = weakref.ref(self)

        def restore(grad: Tensor) -> None:
            runtime = reference()
            if runtime is not None:
                runtime.drawn, runtime.head, runtime.calls = drawn, head, calls
                at_end_of_backward(runtime.forget)

        for tensor in tensors(result):
            if tensor.requires_grad:
                tensor.register_hook(restore)

    def forget(self) -> None:
        """Ends a backward pass: no recomputation from now on belongs to its forward."""
        self.drawn = self.head = None

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
        return self._code(graph)

    def _code(self, graph: fx.Graph) -> Callable[..., Any]:
        code = graph.python_code("self")
        name = f"<fx_approx {self.number}.{next(_numbers)}>"
        weakref.finalize(self, linecache.cache.pop, name, None)
        linecache.cache[name] = (len(code.src), None, code.src.splitlines(keepends=True), name)
        namespace: dict[str, Any] = dict(code.globals)
        exec(compile(code.src, name, "exec"), namespace)
        function: Callable[..., Any] = namespace["forward"]
        return function

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follows the model to its device; keeps dtypes and values."""
        for module in self.modules():
            buffers = buffers_of(module)
            for name, buffer in buffers.items():
                if buffer is not None:
                    buffers[name] = buffer.to(fn(torch.empty(0, device=buffer.device)).device)
        self.drawn = self.head = None

    def _fx_approx_move(self, fn: Callable[[Tensor], Tensor], usual: Callable[[], object]) -> None:
        self.move(fn)

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        """A copy with its own random state; plan, candidates and graphs are shared, since nothing changes them."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        shared = {"capture", "whole", "candidates", "plan", "graph", "function", "pieces", "stages", "analysis", "effects"}
        for name, value in vars(self).items():
            new.__dict__[name] = value if name in shared else copy.deepcopy(value, memo)
        new.number, new.drawn, new.head, new.inside = next(_numbers), None, None, False
        new.state[INCREMENT] = 1  # the copy is not held, even where the original is
        weakref.finalize(new, forget_calls, new.number)
        return new

    def __getstate__(self) -> dict[str, Any]:
        """For a part of a model that is pickled by itself: its layers draw by this, and no graph runs."""
        nothing = {"graph": None, "function": None, "analysis": None, "effects": None, "head": None, "drawn": None}
        captured = Capture(None, self.capture.form, (), (), {})
        return {**vars(self), **nothing, "pieces": {}, "guards": {}, "stages": [], "capture": captured}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.number = next(_numbers)
        weakref.finalize(self, forget_calls, self.number)

    @property
    def seed(self) -> int:
        """The seed that all samples depend on."""
        return int(self.state[SEED])


def _run_whole(root: Any, *values: Any) -> Any:
    """The graph of a model of which some parts have graphs of their own."""
    runtime: Runtime = root._fx_approx
    return runtime.pieces[""](root, runtime.head, *values)


def _refuse_proxies(root: nn.Module, values: tuple[Any, ...]) -> None:
    if any([isinstance(value, fx.Proxy) for value in values]):
        raise CaptureError(
            f"torch.fx: {type(root).__name__} is a transformed model, which cannot be traced symbolically again. "
            "Trace the exact model, fx_approx.restore(model); torch.compile and torch.export take this one"
        )


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _detached(value: Any) -> list[Tensor]:
    return [tensor.detach() for tensor in _tensors(value)]
