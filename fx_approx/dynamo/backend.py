"""The Dynamo frontend: ``torch.compile(model, backend=fx_approx.backend(policy))``.

For models that torch.fx cannot trace. Dynamo hands over each graph of a frame, functional, with the parameters among
its inputs; layers are put back at their paths (:mod:`fx_approx.dynamo.layer_recovery`), the same passes run, and the
inner backend compiles the result. The model itself is not changed.
"""

from __future__ import annotations

import collections
import dataclasses
import inspect
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fx_approx._compat import (
    HigherOrderOperator,
    backend_named,
    backend_names,
    buffers_of,
    inductor,
    is_compiled,
    retraces_autocast,
    switches_autocast,
)
from fx_approx.capture.error_text import describe
from fx_approx.capture.size_guards import TensorSpec
from fx_approx.capture.trace import kept_random_state, skeleton
from fx_approx.compiler.compilation import Compilation
from fx_approx.compiler.graph_view import GraphView
from fx_approx.compiler.pipeline import install, prepare
from fx_approx.compiler.transform import report
from fx_approx.core.plan import Decision, Plan, Policy, make_plan
from fx_approx.dynamo.frame import Frame, Known, current_frame, is_skipped, module_in_compile
from fx_approx.dynamo.graph_runner import CompiledGraph
from fx_approx.dynamo.layer_recovery import LayerRecovery, higher_order, lift, multiplying, place_of
from fx_approx.dynamo.report import CapturedGraph, Key, Left, Owners, Steps, whole_report
from fx_approx.errors import CaptureError, CaptureWarning, NoEffectWarning
from fx_approx.ops.base import find_op
from fx_approx.passes.apply_policy import check_policy, decide
from fx_approx.policies.override import Override, rule_text
from fx_approx.policies.uniform import DEFAULT_POLICY
from fx_approx.runtime.approx_module import ApproxModule, adopt
from fx_approx.runtime.batchnorm import averages
from fx_approx.runtime.controls import apply_settings, load_sampler_state_dict, sampler_state_dict, unmatched
from fx_approx.runtime.handle import GraphHandle
from fx_approx.runtime.validation import check_model, check_seed
from fx_approx.savings.build import merged_reports
from fx_approx.savings.report import Explanation, SavingsReport

_STREAMS = 0x1B873593CC9E2D51  # odd: the seeds of a model's graphs stay apart
_OUTSIDE = "called outside any module of the frame, so no training flag says when to sample"
_UNREACHED = "in no registered submodule, so that eval() does not reach it"
_SKIPPED = (
    "torch skips the frames of its own modules, so that nn.Sequential(...).compile(backend=...) hands nothing over; "
    "use torch.compile(model, backend=...) there"
)
_EVALUATING = "its layers are in evaluation mode"
_PARAMETRISATION = "part of a parametrisation: it makes a weight"


def backend(
    policy: Policy | None = None,
    *,
    inner: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    selection_interval: int = 1,
    prune_unread: bool = True,
) -> Backend:
    """A backend of ``torch.compile`` that samples: ``torch.compile(model, backend=fx_approx.backend(policy))``.

    Unlike :func:`fx_approx.transform` it serves models that cannot be traced symbolically, Hugging Face transformers
    among them, and models with graph breaks: each graph is rewritten by itself, and demand stops between them.

    A layer is sampled if and only if its own ``training`` flag is set; another mode, and another instance of a class,
    is compiled by itself. Where nothing is sampled, the inner backend gets the very graph that it would get without us.

    Args:
        policy: As in :func:`fx_approx.transform`; what it calls the first and the last layer is that of each graph. A
            :class:`fx_approx.Plan` may cover more layers than one graph has.
        inner: The backend that compiles the rewritten graph, by name or itself.
        mode: Of the inner backend, as in ``torch.compile``.
        options: Of the inner backend, as in ``torch.compile``.
        seed: As in :func:`fx_approx.transform`; every graph has its own stream of random numbers that follows from it.
        selection_interval: As there.
        prune_unread: As there.

    Raises:
        TypeError: An argument of a wrong type.
        ValueError: No backend has that name, or a number is out of range.
        RuntimeError: Inductor knows no such mode or option.
    """
    check_seed(seed, selection_interval)
    if not isinstance(prune_unread, bool):
        raise TypeError(f"prune_unread: expected True or False, got {prune_unread!r}")
    policy = DEFAULT_POLICY if policy is None else policy
    check_policy(policy)
    if isinstance(inner, str):
        known = [name for name in backend_names() if name != "fx_approx"]  # that is this one
        if inner not in known:
            raise ValueError(f"inner: no backend {inner!r}; there are: {', '.join(sorted(known))}")
        if inner == "inductor":
            inductor(mode, options)
    elif not callable(inner):
        raise TypeError(f"inner: expected the name of a backend or a callable, got {inner!r}")
    return Backend(policy, inner, mode, options, seed, selection_interval, prune_unread)


class Backend(GraphHandle):
    """What :func:`backend` returns; ``torch.compile`` calls it with each graph.

    Attributes:
        policy: What decides.
    """

    def __init__(
        self,
        policy: Policy,
        inner: str | Callable[..., Any],
        mode: str | None,
        options: dict[str, Any] | None,
        seed: int,
        selection_interval: int,
        prune_unread: bool,
    ) -> None:
        super().__init__()
        self.policy = policy
        self._inner, self._how = inner, {"mode": mode, "options": options}
        self._seed, self._selection_interval, self._prune_unread = seed, selection_interval, prune_unread
        self._graphs: list[CapturedGraph] = []
        self._steps = Steps()
        self._warned: set[str] = set()
        self._streams: dict[Key, int] = {}
        self._numbers: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._given: weakref.WeakKeyDictionary[nn.Module, None] = weakref.WeakKeyDictionary()
        self._known: Known = weakref.WeakKeyDictionary()
        self._unmatched = list(policy.rules) if isinstance(policy, Override) else []

    def __repr__(self) -> str:
        return f"fx_approx.backend({self.policy!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        """Itself: a handle of graphs, which Lightning keeps a copy of, to compile the same model again."""
        return self

    @property
    def __name__(self) -> str:
        """``fx_approx``; torch.compile asks for it when it is given the backend, before any frame runs.

        So the backend sees which module it is given for: frames of parts are all that is seen of a forward that Dynamo
        leaves to Python.

        Warns:
            CaptureWarning: It compiles a module in place whose frames torch skips, so that it would do so silently.
        """
        module, in_place = module_in_compile()
        if module is not None and in_place and is_skipped(module):
            self._warn(f"{type(module).__name__}.compile() compiles nothing of its own: {_SKIPPED}", CaptureWarning)
        elif module is not None:
            self._given[module] = None
        return "fx_approx"

    @property
    def pieces(self) -> tuple[ApproxModule, ...]:
        """The transformed graphs in the order of their compilation, as modules; they live as long as the code."""
        return tuple(approx for graph in self._graphs if graph.approx is not None and (approx := graph.approx()))

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The user's own modules that were compiled, of those inside another only that other."""
        known = list(dict.fromkeys((*self._given, *self._numbers)))
        inner = {part for one in known for part in one.modules() if part is not one}
        return tuple(one for one in known if one not in inner)

    def compiled(self, model: nn.Module) -> nn.Module:
        """One of :attr:`models`, so that a call of it runs through the graphs."""
        if is_compiled(model):
            return model
        return cast(nn.Module, torch.compile(model, backend=self))

    def print_passes(self, *, whole: bool = False) -> None:
        """Prints each graph after each pass, as the models of :func:`fx_approx.transform` do.

        Args:
            whole: Print the lines that a pass left alone, too.
        """
        for piece in self.pieces:
            piece.print_passes(whole=whole)

    def report(self) -> SavingsReport:
        """What each layer saves, over all graphs compiled in training mode so far, and why the others are exact.

        Where a graph was compiled again, for other shapes or with other layers in it, the last one counts. Layers that
        multiply in no graph, as behind a graph break, or in one that cannot be taken apart, have rows too. For their
        operations a copy of the model runs once on fake tensors, shaped as the first step's; a note says where that
        cannot be done, so that the totals leave them out.

        Raises:
            ValueError: Nothing was compiled yet.
        """
        self._graphs = [graph for graph in self._graphs if graph.alive]
        if not self._graphs:
            raise ValueError(
                "nothing was compiled in training mode yet: run a training step first. If one was run, torch compiled "
                f"no frame of it that multiplies: {_SKIPPED}"
            )
        taken: list[CapturedGraph] = []
        for graph in reversed(self._graphs):
            code, roots, names = graph.key
            if not any((code, roots) == other.key[:2] and names & other.key[2] for other in taken):
                taken.append(graph)
        merged = whole_report(taken[::-1], self._steps, report)
        rules = dict.fromkeys((*self._unmatched, *unmatched(self)))
        notes = [f"No layer of any graph so far matches the rule {rule_text(rule)}." for rule in rules]
        return dataclasses.replace(merged, notes=(*merged.notes, *notes))

    def explain(self, model: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
        """What a compiled training step of ``model`` would sample: the plan, and the report it predicts.

        Dynamo captures a copy of the model on the same parameters; the copy runs one exact forward.

        Args:
            model: The model, not compiled; it is not changed.
            args: What its forward is called with.
            kwargs: The same, by keyword.

        Returns:
            An explanation whose ``plan`` can be edited and given to :func:`backend`.

        Raises:
            ValueError: Two graphs multiply by one layer, so that no plan tells them apart; or none multiplies.
        """
        check_model(model)
        found: list[tuple[Plan, SavingsReport]] = []
        left: list[str] = []

        def record(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            graph = self._analysed(gm, example_inputs)
            if isinstance(graph, _Graph):
                found.append((graph.plan, graph.predicted(self._prune_unread)))
            elif graph is not None:
                left.append(graph.note)
            return gm.forward

        copy = skeleton(model)
        for module in copy.modules():
            buffers = buffers_of(module)
            for name, buffer in buffers.items():
                buffers[name] = None if buffer is None else buffer.clone()
        with kept_random_state():
            torch.compile(copy.train(), backend=record)(*args, **kwargs)
        if not found:
            why = f"can be sampled. {' '.join(left)}" if left else "multiplies"
            raise ValueError(f"model: no graph that Dynamo captures of {type(model).__name__} {why}")
        decisions = tuple(decision for plan, _ in found for decision in plan)
        counts = collections.Counter(decision.name for decision in decisions)
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise ValueError(
                f"model: several graphs multiply by {', '.join(twice)}, and one plan cannot tell them apart; give the "
                "backend a policy instead, or remove the graph breaks between"
            )
        identities = {name: identity for plan, _ in found for name, identity in plan.identities.items()}
        report = merged_reports([report for _, report in found])
        return Explanation(
            Plan(decisions, identities), dataclasses.replace(report, notes=(*report.notes, *dict.fromkeys(left)))
        )

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **how: Any) -> Callable[..., Any]:
        """Compiles one graph; called by Dynamo.

        Args:
            gm: The graph.
            example_inputs: Its inputs, parameters included.
            how: ``mode`` and ``options`` that were given to ``torch.compile``.
        """
        how = {**self._how, **how}
        graph = self._analysed(gm, example_inputs)
        if graph is None:
            return self._exact(gm, example_inputs, how)
        if isinstance(graph, Left):
            self._leave(graph)
            return self._exact(gm, example_inputs, how)
        if not graph.plan.sampled and graph.plan.tokens is None:
            reason = "; ".join(dict.fromkeys(decision.reason for decision in graph.plan))
            kind = CaptureWarning if graph.blocked else NoEffectWarning
            self._leave(Left(graph.key, graph.name, reason, graph.owners, graph.predicted(self._prune_unread)), kind)
            return self._exact(gm, example_inputs, how)
        root = graph.lifted.root
        runtime = install(
            graph.prepared, graph.plan, self._seed_of(graph.key), self._selection_interval, self._prune_unread
        )
        approx, new = adopt(root, runtime, _cannot_pickle), True
        for other in self._graphs:
            before = other.approx() if other.key == graph.key and other.approx is not None else None
            if before is not None:
                _take_over(approx, before)
                new = False
        compilation = CapturedGraph(graph.key, graph.name, graph.owners, approx=weakref.ref(approx))
        self._graphs.append(compilation)
        if new:
            apply_settings(self, approx)
        self.appeared(approx, new)
        inputs = list(example_inputs)

        def exact(reason: str) -> Callable[..., Any]:
            self._graphs = [other for other in self._graphs if other is not compilation]
            self._leave(graph.left(reason, self._prune_unread))
            return self._exact(gm, inputs, how)

        # Torch's eager backend would make functions without second derivatives of what has them. Lightning puts a
        # function of its own in the place of torch.compile, which copies the backend; not all backends can be copied.
        compile_ = inspect.unwrap(torch.compile)
        run = approx if self._inner == "eager" else compile_(approx, backend=self._inner, fullgraph=True, **how)
        return CompiledGraph(self, approx, run, graph.lifted, exact)

    def _analysed(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> _Graph | Left | None:
        """A graph with its plan, or why there is none; None if it multiplies nothing, or is no training step's."""
        if not any(_multiplies(node) for node in gm.graph.nodes):
            return None
        frame = current_frame(self._known)
        for root in frame.roots:
            self._numbers.setdefault(root.module, len(self._numbers))
        training = frame.training
        if training:
            self._steps.add(frame)
        special = higher_order(gm)
        try:
            if special:
                raise CaptureError(f"it contains {', '.join(sorted(special))}")
            if self._inner != "eager" and switches_autocast(gm.graph) and not retraces_autocast():
                raise CaptureError("autocast inside the forward, which this version of torch traces once only")
            lifted = lift(gm, frame)
            called = tuple(_described(example_inputs[p], p in lifted.scalars) for p in lifted.inputs)
            prepared = _owned(prepare(lifted.root, lifted.captured, (called, {})), frame)
        except Exception as error:  # whatever a graph may hold: exact training goes on
            frame.guard((root, "") for root in frame.roots)
            reason = str(error) if isinstance(error, CaptureError) else describe(error)
            layers = multiplying(gm, frame)
            key = frame.code, self._numbers_of(frame), frozenset(layers)
            owners = frame.owners({name: place_of(frame, path) for name, path in layers.items()})
            return Left(key, _name(frame), reason, owners) if training else None
        frame.guard([*filter(None, (place_of(frame, one.owner) for one in prepared.sites))])
        if not torch.is_grad_enabled():
            frame.guard_momenta()
            if any(averages(root.module) for root in frame.roots):  # as update_bn of torch runs it: exact statistics
                return None
        graph = _Graph(lifted, prepared, Plan((), {}), self._numbers_of(frame))
        if not any(lifted.root.get_submodule(one.owner).training for one in prepared.sites):
            frame.guard((root, "") for root in frame.roots)
            blocked = [one.candidate.blocked for one in prepared.sites if one.candidate.blocked]
            reason = "; ".join(dict.fromkeys(blocked)) if len(blocked) == len(prepared.sites) else _EVALUATING
            return graph.left(reason, self._prune_unread) if training else None
        return dataclasses.replace(graph, plan=self._plan(prepared, frame))

    def _numbers_of(self, frame: Frame) -> tuple[int, ...]:
        return tuple(self._numbers[root.module] for root in frame.roots)

    def _leave(self, left: Left, kind: type[Warning] = CaptureWarning) -> None:
        """Notes that a graph of a training step is not sampled, and warns once of each reason."""
        self._graphs.append(CapturedGraph(left.key, left.name, left.owners, left))
        self._warn(f"a graph stays exact: {left.reason}", kind)

    def _warn(self, message: str, kind: type[Warning]) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, kind, stacklevel=4)

    def _seed_of(self, key: Key) -> int:
        """Each set of layers has its own stream of random numbers, the first one that of the seed itself."""
        number = self._streams.setdefault(key, len(self._streams))
        return (self._seed + _STREAMS * number + 2**63) % 2**64 - 2**63

    def _exact(self, gm: fx.GraphModule, example_inputs: Sequence[Any], how: dict[str, Any]) -> Callable[..., Any]:
        given = {name: value for name, value in how.items() if value is not None}
        if self._inner == "inductor":
            compiler = inductor(how.get("mode"), how.get("options"))
            given = {}
        else:
            compiler = backend_named(self._inner)
        compiled: Callable[..., Any] = compiler(gm, list(example_inputs), **given)
        return compiled

    def _plan(self, prepared: Compilation, frame: Frame) -> Plan:
        policy, view = self.policy, GraphView(prepared, self._prune_unread, find=lambda path: _module(frame, path))
        if isinstance(policy, Plan):
            policy = policy.part(prepared.candidates)
        elif isinstance(policy, Override):
            policy = policy.part(view)
            self._unmatched = [rule for rule in self._unmatched if rule not in policy.rules]
        return decide(prepared.candidates, policy, lambda: view)


@dataclasses.dataclass(frozen=True)
class _Graph:
    """A graph of a frame with what was decided."""

    lifted: LayerRecovery
    prepared: Compilation
    plan: Plan
    roots: tuple[int, ...]

    @property
    def name(self) -> str:
        """The class of the frame's first module."""
        return _name(self.lifted.frame)

    @property
    def key(self) -> Key:
        """What tells the layers of the graph from those of others, however often it is compiled."""
        names = frozenset(candidate.name for candidate in self.prepared.candidates)
        return self.lifted.frame.code, self.roots, names

    @property
    def owners(self) -> Owners:
        """By candidate, the module in whose forward it stands."""
        frame = self.lifted.frame
        return frame.owners({one.candidate.name: place_of(frame, one.owner) for one in self.prepared.sites})

    @property
    def blocked(self) -> bool:
        """Whether something other than the policy keeps a candidate exact."""
        return any(candidate.blocked for candidate in self.prepared.candidates)

    def predicted(self, prune_unread: bool) -> SavingsReport:
        """Its report before anything is rewritten."""
        return self.prepared.predicted(self.name, self.plan, prune_unread)

    def left(self, reason: str, prune_unread: bool) -> Left:
        """The graph as one that stays exact."""
        found = [
            dataclasses.replace(
                one, candidate=dataclasses.replace(one.candidate, blocked=one.candidate.blocked or reason)
            )
            for one in self.prepared.sites
        ]
        prepared = dataclasses.replace(self.prepared, sites=found)
        candidates = prepared.candidates
        plan = make_plan(candidates, [Decision(candidate.name) for candidate in candidates])
        graph = dataclasses.replace(self, prepared=prepared, plan=plan)
        return Left(self.key, self.name, reason, self.owners, graph.predicted(prune_unread))


def _name(frame: Frame) -> str:
    return next((type(root.module).__name__ for root in frame.roots), "graph")


def _take_over(approx: ApproxModule, before: ApproxModule) -> None:
    """The same layers at other shapes go on with the settings, the count of steps and what was learnt."""
    runtime, old = approx._fx_approx, before._fx_approx
    for key, selector in runtime.selectors.items():
        selector.set_spec(old.selectors[key].spec)
        selector.enabled = old.selectors[key].enabled
    for one, other in zip(runtime.tokens, old.tokens, strict=False):
        one.set_ratio(other.ratio)
        one.enabled = other.enabled
    runtime.lay_out()
    load_sampler_state_dict(approx, sampler_state_dict(before))
    runtime.state = old.state
    for one, other in zip(runtime.tokens, old.tokens, strict=False):
        one.join(other)
    if runtime.resample is not None and old.resample is not None:
        runtime.resample.join(old.resample)


def _module(frame: Frame, path: str) -> nn.Module | None:
    """The user's own module at a path of the skeleton."""
    place = place_of(frame, path)
    return None if place is None else place[0].find(place[1])


def _multiplies(node: fx.Node) -> bool:
    higher_order = isinstance(node.target, HigherOrderOperator)
    return node.op in ("call_function", "call_method") and (higher_order or find_op(node.target) is not None)


def _owned(prepared: Compilation, frame: Frame) -> Compilation:
    """Blocks what no training flag speaks for, and what makes weights."""
    found = []
    for one in prepared.sites:
        reason = None
        if not one.owner and len(frame.roots) != 1:
            reason = _OUTSIDE
        elif _module(frame, one.owner) is None:
            reason = _UNREACHED
        elif "parametrizations" in one.owner.split("."):
            reason = _PARAMETRISATION
        blocked = one.candidate.blocked or reason
        found.append(dataclasses.replace(one, candidate=dataclasses.replace(one.candidate, blocked=blocked)))
    return dataclasses.replace(prepared, sites=found)


def _described(value: Any, number: bool) -> Any:
    """A tensor's description, with the sizes that Dynamo has seen in place of symbols; a number as one."""
    if number:
        return 1.0 if value.is_floating_point() else 1
    if not isinstance(value, Tensor):
        return _size(value)
    sizes, strides = (tuple(map(_size, numbers)) for numbers in (value.shape, value.stride()))
    return TensorSpec(sizes, strides, value.dtype, value.device, value.requires_grad)


def _size(value: Any) -> Any:
    return value.node.hint if isinstance(value, torch.SymInt) else value


def _cannot_pickle(approx: ApproxModule) -> tuple[Any, ...]:
    raise TypeError("a graph of torch.compile cannot be pickled; save the model itself, it is not changed")
