"""What a transformed model carries with it, and how its forward runs."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from fx_approx._compat import Moved, buffers_of, in_backward, is_profiling
from fx_approx.capture.records import Capture, Section
from fx_approx.capture.size_guards import NESTED, described, holds_nested
from fx_approx.core.candidates import Role
from fx_approx.errors import CaptureError, CaptureWarning, UnsupportedError, WidthError
from fx_approx.ops.functorch_guard import refuse_transforms
from fx_approx.runtime.batchnorm_record import BatchNormRecord
from fx_approx.runtime.forward_randomness import ForwardRandomness
from fx_approx.runtime.graph_program import PROLOGUE, GraphProgram, profiled
from fx_approx.runtime.plan_record import PlanRecord
from fx_approx.runtime.rng import INCREMENT, Draw, new_state
from fx_approx.runtime.selector import Selector
from fx_approx.runtime.shared_selection import SharedSelection, SharedSelections
from fx_approx.runtime.token_selection import TokenSelection

_PACKED = "an input is a PackedSequence, of which Python reads what a graph does not"
_WIDTH = "a value has another number of channels"


def selector_target(selector: Selector) -> str:
    """The target of a selector's node in the graph."""
    return f"{PROLOGUE}.{_attribute(selector)}"


def _attribute(selector: Selector) -> str:
    return f"s{selector.site}_{selector.role.value}"


class Runtime(Moved):
    """Runs the forwards of one transformed model, with the selectors of its graph; not one of its submodules.

    So ``state_dict``, ``parameters()`` and ``buffers()`` are those of the original, and neither an averaged model nor
    the buffer broadcast of data-parallel training touches the state. It is a module since the graph calls it, as its
    prologue, and the selectors in it.

    Attributes:
        record: What was decided, and what is known of the model.
        program: The graph, and the code that runs it.
        randomness: Of the forward that runs now, or is recomputed.
        batchnorm: What the BatchNorm statistics were gathered from.
        state: ``[step, increment, selection interval, seed]``, see :func:`fx_approx.runtime.rng.new_state`.
        selectors: By candidate and role; each is a submodule, too.
        tokens: Selections of tokens, each a submodule, too.
        resample: Makes the selections that are made ahead; None if there are none.
        sampling_swapped: Some layer in an untraced part is sampled.
        settings: Ratios and switches that the model has had.
        warned: Why the graph did not serve a call, as far as that was told.
    """

    state: Tensor
    resample: SharedSelections | None

    def __init__(self, capture: Capture, record: PlanRecord, seed: int, selection_interval: int) -> None:
        super().__init__()
        self.register_buffer("state", new_state(seed, selection_interval), persistent=False)
        self.add_module("resample", None)
        self.record, self.program = record, GraphProgram(capture)
        self.randomness, self.batchnorm = ForwardRandomness(), BatchNormRecord()
        self.selectors: dict[tuple[str, Role], Selector] = {}
        self.tokens: tuple[TokenSelection, ...] = ()
        self.sampling_swapped = False
        self.settings: set[tuple[Any, ...]] = set()
        self.warned: set[str] = set()

    def add(self, name: str, selector: Selector) -> None:
        """Registers a selector of candidate ``name``."""
        self.add_module(_attribute(selector), selector)
        self.selectors[name, selector.role] = selector

    def add_tokens(self, selection: TokenSelection) -> None:
        """Registers the selection of the tokens of one stretch."""
        self.add_module(f"t{len(self.tokens)}", selection)
        self.tokens = (*self.tokens, selection)

    def lay_out(self) -> None:
        """Gives each site its place among the uniforms that a forward draws; to be called when counts have changed."""
        counted: list[Selector | SharedSelection | TokenSelection] = [
            s for s in self.selectors.values() if s.count and not s.shared
        ]
        if self.resample is not None:
            self.resample.fit()
            counted += [shared for shared in self.resample.each() if shared.count]
        counted += [one for one in self.tokens if one.count]
        sites, counts = [s.site for s in counted], [s.count for s in counted]
        self.randomness.sites, self.randomness.counts = sites, counts
        for selector, offset in zip(counted, itertools.accumulate(counts, initial=0), strict=False):
            selector.offset = offset

    @property
    def switches(self) -> tuple[Selector | TokenSelection, ...]:
        """All that samples, of layers and of tokens, each with a switch ``enabled``."""
        return (*self.selectors.values(), *self.tokens)

    @property
    def parts(self) -> tuple[object, ...]:
        """The plain objects that it is made of; a forward may change their attributes."""
        return self.record, self.program, self.randomness, self.batchnorm

    @property
    def setting(self) -> tuple[Any, ...]:
        """What compiled code depends on, of what can be set: where sampling is off, not on the ratio."""
        return tuple([one.spec if one.enabled else None for one in self.switches])

    @property
    def samples(self) -> bool:
        """Whether some layer is sampled when its training flag is set."""
        if any([one.enabled and not one.keeps_all for one in self.tokens]):
            return True
        return any([selector.enabled and not selector.exact for selector in self.selectors.values()])

    @property
    def draws(self) -> bool:
        """Whether some sampler of the model is random, so that forwards need a key."""
        if self.resample is not None and self.resample.draws:
            return True
        if any([one.needs_key and one.active for one in self.tokens]):
            return True
        for selector in self.selectors.values():
            if not selector.shared and selector.sampler.random and selector.active and not selector.exact:
                return True
        return False

    def forward(self, *inputs: Any) -> Draw | None:
        """The prologue: the randomness of this forward in fresh tensors, or None if nothing is drawn."""
        drawn = self.randomness.fresh(self.state, inputs) if self.draws else None
        if self.sampling_swapped:
            self.randomness.drawn = drawn
        return drawn

    def draw_for(self, selector: Selector, inputs: list[Tensor]) -> Draw | None:
        """The randomness for a layer that is called outside the graph.

        Inside a forward it is that forward's, for each further call of the layer another. In a recomputation, that of
        the forward that is recomputed. A direct call of the layer takes one of its own.
        """
        randomness = self.randomness
        if not selector.sampler.random:
            return None
        if randomness.inside:
            if randomness.drawn is None or torch.compiler.is_compiling():  # a compiled checkpoint cannot count
                return randomness.drawn
            return randomness.further(randomness.counted(selector.site))
        if not torch.compiler.is_compiling() and in_backward():
            if self.draws:
                randomness.refuse_further(selector.site, f"a {selector.kind} layer")
            return randomness.recalled(inputs)
        return randomness.fresh(self.state, inputs)

    def run(self, root: nn.Module, exact: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """One forward of ``root``: through the graph, or through its own Python ``exact`` with swapped layers."""
        recorded = False
        if not torch.compiler.is_compiling():
            recorded = is_profiling()
            _refuse_proxies(root, (*args, *kwargs.values()))
            if holds_nested((args, dict(kwargs))):
                if root.training and self.samples:
                    raise UnsupportedError(NESTED)
                return exact(root, *args, **kwargs)
            if self.record.called is None:
                self.record.called = described(args), described(dict(kwargs))
        if self.batchnorm.gathers(root):
            return self._run_exact(root, exact, args, kwargs)
        if root.training and self.samples and not torch.compiler.is_compiling():
            refuse_transforms()
        if any([isinstance(one, PackedSequence) for one in (*args, *kwargs.values())]):
            return self._run_python(root, exact, args, kwargs, _PACKED)
        program = self.program
        function = profiled(program.function) if recorded else program.function
        match, values = program.match(program.whole, root, function, args, kwargs)
        if not match.ok or function is None:
            return self._run_python(root, exact, args, kwargs, match.reason)
        try:
            result = self._run_graph(root, function, values)
        except WidthError:  # the model's own layers say what does not fit
            return self._run_python(root, exact, args, kwargs, _WIDTH)
        if self.resample is not None and root.training and not torch.compiler.is_compiling():
            self.resample.known = True
        return result

    def _run_graph(self, root: nn.Module, function: Callable[..., Any], values: Sequence[Any]) -> Any:
        if self.program.pieces:
            self._begin(root, values)
        elif not self.sampling_swapped:
            return function(root, *values)
        return self._run_inside(lambda: function(root, *values))

    def _begin(self, root: nn.Module, inputs: Any) -> None:
        """The randomness of a forward, and what its sections are handed."""
        randomness, pieces = self.randomness, self.program.pieces
        randomness.drawn = randomness.fresh(self.state, inputs) if self.draws else None
        randomness.head = pieces[None](root, randomness.drawn) if pieces else None

    def _run_inside(self, forward: Callable[[], Any]) -> Any:
        """Runs a forward in which layers or sections are called by Python."""
        result = self.randomness.run(forward)
        if self.randomness.served and self.resample is not None:
            self.resample.known = True
        self.randomness.mark(result)
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
        program, recorded = self.program, False
        function = program.pieces.get(section.path)
        if not torch.compiler.is_compiling():
            recorded = is_profiling()
            if module.training and self.samples:
                refuse_transforms()
        if module is not program.guards[section.path].top:  # a copy of this module alone, such as a replica's
            function = None
        if recorded:
            function = profiled(function)
        match, values = program.match(section, module, function, args, kwargs)
        reason = match.reason
        if match.ok and function is not None:
            try:
                result = function(root, self._head_of_call(root, section, (args, kwargs)), *values)
                if module.training and not torch.compiler.is_compiling():
                    self.randomness.served = True
                return result
            except WidthError:  # the layers themselves say what does not fit
                reason = _WIDTH
        if self.resample is not None and self.resample.published is not None:
            self.resample.published.fill()
        result = exact(module, *args, **kwargs)
        self._warn(module, exact, reason, 6)
        return result

    def _head_of_call(self, root: nn.Module, section: Section, inputs: Any) -> tuple[Any, ...] | None:
        """What a section is handed: by the forward that runs or is recomputed, or by a draw of its own."""
        randomness, compiling = self.randomness, torch.compiler.is_compiling()
        drawn = None
        if randomness.inside:
            kept = self.resample is not None and self.resample.held
            if compiling or kept or randomness.drawn is None:  # a compiled forward cannot count
                return randomness.head
            number = randomness.counted(section.path)
            if not number:
                return randomness.head
            drawn = randomness.further(number)
        elif not compiling and in_backward():
            forward = randomness.drawn
            drawn = randomness.recalled(inputs) if self.draws else None
            if randomness.head is not None and drawn is forward:
                if self.draws:
                    randomness.refuse_further(section.path, f"the module {section.path}")
                return randomness.head
        elif self.draws:
            drawn = randomness.fresh(self.state, inputs)
        head: tuple[Any, ...] = self.program.pieces[None](root, drawn)
        return head

    def _run_exact(
        self, root: nn.Module, exact: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The forward of the exact model; neither switches nor what is drawn or learnt change."""
        selectors = [(one, one.enabled) for one in self.switches]
        for selector, _ in selectors:
            selector.enabled = False
        try:
            result = exact(root, *args, **kwargs)
        finally:
            for selector, enabled in selectors:
                selector.enabled = enabled
        self.batchnorm.gathered = True
        return result

    def _run_python(
        self,
        root: nn.Module,
        exact: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        reason: str | None,
    ) -> Any:
        self._begin(root, (args, kwargs))
        if self.resample is not None and self.resample.published is not None and not self.program.pieces:
            self.resample.published.fill()
        result = self._run_inside(lambda: exact(root, *args, **kwargs))
        self._warn(root, exact, reason, 7)
        return result

    def _warn(self, module: nn.Module, exact: Callable[..., Any], reason: str | None, stacklevel: int) -> None:
        """Says once why a graph did not serve a training step, if there is a reason."""
        training = module.training and torch.is_grad_enabled()
        if reason and training and not torch.compiler.is_compiling() and reason not in self.warned and self.samples:
            self.warned.add(reason)
            name = exact.__qualname__.rpartition(".")[0]
            warnings.warn(
                f"the graph of {name} cannot serve this call: {reason}. Module swap serves it. "
                "Pass example_inputs that look like your calls, and transform again after a change of the model.",
                CaptureWarning,
                stacklevel=stacklevel,
            )

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follows the model to its device; keeps dtypes and values."""
        for module in self.modules():
            buffers = buffers_of(module)
            for name, buffer in buffers.items():
                if buffer is not None:
                    buffers[name] = buffer.to(fn(torch.empty(0, device=buffer.device)).device)
        self.randomness.forget()

    def _fx_approx_move(self, fn: Callable[[Tensor], Tensor], usual: Callable[[], object]) -> None:
        self.move(fn)

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        """A copy with its own random state; plan, candidates and graphs are shared, since nothing changes them."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for name, value in vars(self).items():
            new.__dict__[name] = copy.deepcopy(value, memo)
        new.state[INCREMENT] = 1  # the copy is not held, even where the original is
        return new

    def __getstate__(self) -> dict[str, Any]:
        """For a part of a model that is pickled by itself: its layers draw by this, and no graph runs."""
        return {**vars(self), "record": self.record.for_parts(), "program": self.program.for_parts()}


def _refuse_proxies(root: nn.Module, values: tuple[Any, ...]) -> None:
    if any([isinstance(value, fx.Proxy) for value in values]):
        raise CaptureError(
            f"torch.fx: {type(root).__name__} is a transformed model, which cannot be traced symbolically again. "
            "Trace the exact model, fx_approx.restore(model); torch.compile and torch.export take this one"
        )
