"""The public verbs: transform, explain, report, restore."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from fx_approx._compat import children_of
from fx_approx.capture.records import Called, CallForm, Section, call_form
from fx_approx.capture.sections import with_sections, with_these
from fx_approx.capture.size_guards import described
from fx_approx.capture.trace import capture, skeleton
from fx_approx.compiler.compilation import Compilation
from fx_approx.compiler.graph_view import GraphView
from fx_approx.compiler.pipeline import install, prepare
from fx_approx.core.candidates import Role
from fx_approx.core.plan import Plan, Policy
from fx_approx.errors import CaptureWarning, NoEffectWarning, ShapesRequiredError
from fx_approx.passes.apply_policy import check_policy, decide
from fx_approx.policies.cost_roofline import RooflineModel
from fx_approx.policies.uniform import DEFAULT_POLICY
from fx_approx.runtime.approx_module import ApproxModule, adopt, find
from fx_approx.runtime.controls import load_sampler_state_dict, sampler_state_dict
from fx_approx.runtime.exact import exact_copy
from fx_approx.runtime.graph_runtime import Runtime
from fx_approx.runtime.handle import GraphHandle
from fx_approx.runtime.shared_selection import coverages
from fx_approx.runtime.validation import check_inputs, check_model, check_seed
from fx_approx.savings.build import build_report
from fx_approx.savings.report import Explanation, SavingsReport
from fx_approx.savings.rows import SelectorState

M = TypeVar("M", bound=nn.Module)


@torch.inference_mode(False)
def transform(
    model: M,
    policy: Policy | None = None,
    example_inputs: Any = None,
    *,
    seed: int = 0,
    selection_interval: int = 1,
    prune_unread: bool = True,
) -> M:
    """A copy of ``model`` that trains with fewer operations, on the same parameters and buffers.

    The result is an instance of the model's own class, with the same ``state_dict``, and exact in ``eval()``. A layer
    is sampled if and only if its own ``training`` flag is set. ``model`` itself is not changed.

    Args:
        model: Any module on its final device. Transform before ``torch.compile`` and DistributedDataParallel.
        policy: What to sample, a policy or a :class:`Plan`; by default :data:`fx_approx.policies.DEFAULT_POLICY`,
            which needs example inputs.
        example_inputs: One training batch as the model is called with it: a tensor, a tuple of positional arguments
            or a dict of keyword arguments. Only shapes are read, except where the model's own Python decides by values:
            then a copy of the model runs on it once. Without it shapes are learnt from the first forward.
        seed: All samples of a training run follow from it (64-bit integer).
        selection_interval: Keep one sample for so many forwards. For some tens of them and more,
            :class:`fx_approx.subnetworks.Phases` trains the same numbers faster, where selections are made ahead: it
            takes this as its interval, and steps slice and scatter nothing.
        prune_unread: Do not compute what no one will read (docs/how-it-works.md): where selections are made ahead and
            example inputs are given, the layers before compute the selected channels only. The numbers are the same,
            but for running statistics of channels that are not computed, and for dropout masks. False keeps all
            channels.

    Returns:
        The transformed model.

    Raises:
        AlreadyTransformedError: ``model`` is or contains the result of a transform.
        CaptureError: ``model`` cannot be captured (scripted, compiled, wrapped, on meta, lazy, not copyable).
        PlanMismatchError: ``policy`` is a plan for another model.
        ShapesRequiredError: The policy decides by shapes and there are no example inputs.
        ValueError: ``example_inputs`` do not fit; names what is wrong.

    Warns:
        NoEffectWarning: Nothing is sampled.
        CaptureWarning: A part is served by module swap; names module and line.
    """
    check_model(model)
    check_seed(seed, selection_interval)
    if not isinstance(prune_unread, bool):
        raise TypeError(f"prune_unread: expected True or False, got {prune_unread!r}")
    policy = DEFAULT_POLICY if policy is None else policy
    check_policy(policy)
    made = _prepare(model, example_inputs)
    view = functools.partial(_view, model, example_inputs, made, prune_unread)
    return _transform(model, policy, made, seed, selection_interval, prune_unread, view)


def _transform(
    model: M,
    policy: Policy,
    made: Compilation,
    seed: int,
    selection_interval: int,
    prune_unread: bool,
    view: Callable[[], GraphView] | None = None,
) -> M:
    plan = decide(made.candidates, policy, view, made.called is not None)
    runtime = install(made, plan, seed, selection_interval, prune_unread)
    for part in made.captured.opaque:
        hint = ". Where torch.compile can capture it: backend=fx_approx.backend(policy)" if part.elsewhere else ""
        warnings.warn(f"not traced, served by {part.served}: {part}{hint}", CaptureWarning, stacklevel=4)
    if not plan.sampled and not runtime.tokens:
        what = "it has no matrix product or convolution" if not made.sites else "every layer stays exact"
        notes = runtime.record.token_notes
        what = f"{what}, and no tokens can be sampled: {'; '.join(notes)}" if notes else what
        warnings.warn(f"transform changed nothing in {type(model).__name__}: {what}", NoEffectWarning, stacklevel=4)
    return cast(M, adopt(made.root, runtime, _reduce))


def explain(
    model: nn.Module,
    policy: Policy | None = None,
    example_inputs: Any = None,
    *,
    prune_unread: bool = True,
    predict: bool = False,
) -> Explanation:
    """What :func:`transform` would do, without doing it: the plan, and the report it predicts.

    Args:
        model: As in :func:`transform`; it is not changed.
        policy: As there.
        example_inputs: As there; without them the report has no shapes.
        prune_unread: As there.
        predict: Say what time an eager step takes, too, as :class:`fx_approx.policies.RooflineModel` predicts it. On a
            device that it has not seen it takes some seconds once.

    Returns:
        An explanation whose ``plan`` can be edited and given to :func:`transform`.
    """
    policy = DEFAULT_POLICY if policy is None else policy
    check_model(model)
    check_policy(policy)
    made = _prepare(model, example_inputs)
    view = functools.partial(_view, model, example_inputs, made, prune_unread)
    plan = decide(made.candidates, policy, view, made.called is not None)
    found = made.predicted(type(model).__name__, plan, prune_unread)
    if predict:
        if made.called is None:
            raise ShapesRequiredError(
                "example_inputs: expected a training batch, since times depend on shapes, got None"
            )
        found = found.with_time(view().estimate(plan, RooflineModel(compiled=False)))
    return Explanation(plan, found)


def view_of(model: nn.Module, policy: Policy, example_inputs: Any, prune_unread: bool = True) -> tuple[GraphView, Plan]:
    """The graph as policies see it, and the plan that ``policy`` makes of it."""
    check_model(model)
    made = _prepare(model, example_inputs)
    view = _view(model, example_inputs, made, prune_unread)
    return view, decide(made.candidates, policy, lambda: view, made.called is not None)


def _view(model: nn.Module, example_inputs: Any, made: Compilation, prune_unread: bool) -> GraphView:
    """What a policy for the whole graph is shown; it times models with the example inputs, if there are any."""

    @functools.cache
    def twin() -> nn.Module:
        return skeleton(model, shared=False)

    def build(plan: Plan) -> nn.Module:
        if not plan.sampled and plan.tokens is None:
            return skeleton(twin())
        return _transform(twin(), plan, _prepare(twin(), example_inputs), 0, 1, prune_unread)

    args, kwargs = check_inputs(model, example_inputs)
    return GraphView(made, prune_unread, build, None if args is None else (args, kwargs), functools.partial(_at, model))


def _at(model: nn.Module, path: str) -> nn.Module:
    """The module at ``path``, or the one around it where a pass has taken a module of the user's apart."""
    for name in path.split(".") if path else ():
        found = children_of(model).get(name)
        if found is None:
            break
        model = found
    return model


def _prepare(
    model: nn.Module,
    example_inputs: Any,
    form: CallForm | None = None,
    called: tuple[Any, Any] | None = None,
    known: tuple[Sequence[Section], Mapping[str, Called]] | None = None,
) -> Compilation:
    """Capture and find_candidates: everything before a decision.

    ``form`` and ``called`` say how the model is called where there are no example inputs, and ``known`` how modules in
    it are.
    """
    args, kwargs = check_inputs(model, example_inputs)
    root = skeleton(model)
    if args is not None:
        called = described(args), described(kwargs)
    captured = capture(root, call_form(root, args, kwargs) if form is None else form, called)
    if called is not None and known is not None:
        captured = with_these(root, captured, called, *known)
    elif called is not None:
        captured = with_sections(root, captured, called, None if args is None else (args, dict(kwargs)))
    return prepare(root, captured, called)


def report(model: nn.Module | GraphHandle) -> SavingsReport:
    """What each layer of a transformed model saves, and why the others were left exact.

    Shapes that were not known at the transform are filled in from the first forward since.

    Args:
        model: A transformed model, what wraps it, or a backend (:func:`fx_approx.backend`) after the first step.

    Raises:
        ValueError: ``model`` is not transformed, or nothing was compiled yet.
    """
    if isinstance(model, GraphHandle):
        of_all: SavingsReport = model.report()
        return of_all
    approx = find(model)
    runtime = approx._fx_approx
    record, resample = runtime.record, runtime.resample
    if record.called is not None and not record.learnt:
        _learn(approx, runtime)
    covered = coverages(list(resample.each())) if resample is not None and resample.known else {}
    states = {
        key: SelectorState(one.spec, one.enabled, one.owner[0].training, one.last_count, covered.get(one))
        for key, one in runtime.selectors.items()
    }
    built = build_report(
        approx.exact_class.__name__,
        record.candidates,
        record.plan,
        runtime.program.capture.opaque,
        states,
        approx.training,
        record.called is not None,
        record.effects,
        [one.ratio if one.enabled and one.owner[0].training else 1.0 for one in runtime.tokens],
        record.token_notes,
    )
    return dataclasses.replace(built, selection_time=record.selection_time)


def analysed(model: nn.Module, example_inputs: Any) -> Compilation:
    """What the passes find of a model before a policy decides."""
    check_model(model)
    return _prepare(model, example_inputs)


def analysed_again(approx: ApproxModule) -> Compilation:
    """The same of a transformed model, or of a graph of a backend, with what it was called with where that is known."""
    runtime = approx._fx_approx
    return prepare(exact_copy(approx), runtime.program.capture, runtime.record.called)


def _learn(approx: ApproxModule, runtime: Runtime) -> None:
    record = runtime.record
    made = analysed_again(approx)
    record.candidates = made.candidates
    record.effects = made.effects(record.plan, record.analysis, False)
    record.learnt = True


def restore(model: nn.Module) -> nn.Module:
    """The exact model again: the original class and layers, on the same parameters and buffers.

    Raises:
        ValueError: ``model`` is not transformed.
    """
    return exact_copy(find(model))


def _reduce(approx: ApproxModule) -> tuple[Any, ...]:
    runtime = approx._fx_approx
    record, captured = runtime.record, runtime.program.capture
    switches = {key: (s.spec, s.enabled) for key, s in runtime.selectors.items()}
    tokens = tuple((one.ratio, one.enabled) for one in runtime.tokens)
    parts = exact_copy(approx), record.plan.to_dict(), captured.form, sampler_state_dict(approx), switches
    known = captured.sections, dict(captured.strays)
    return _rebuild, (*parts, record.called, record.prunes, record.shaped, known, tokens)


def _rebuild(
    model: nn.Module,
    plan: Mapping[str, Any],
    form: CallForm,
    state: Mapping[str, Any],
    switches: Mapping[tuple[str, Role], tuple[Any, bool]],
    called: tuple[Any, Any] | None,
    prune_unread: bool,
    shaped: bool,
    known: tuple[Sequence[Section], Mapping[str, Called]],
    tokens: Sequence[tuple[float, bool]],
) -> nn.Module:
    """Unpickles: transforms the exact model again by the same plan."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = _prepare(model, None, form, called if shaped else None, known)
        approx = _transform(model, Plan.from_dict(plan), made, 0, 1, prune_unread)
    runtime = find(approx)._fx_approx
    load_sampler_state_dict(approx, state)
    runtime.record.called = called
    for key, (spec, enabled) in switches.items():
        runtime.selectors[key].set_spec(spec)
        runtime.selectors[key].enabled = enabled
    for one, (ratio, enabled) in zip(runtime.tokens, tokens, strict=True):
        one.set_ratio(ratio)
        one.enabled = enabled
    runtime.lay_out()
    return approx
