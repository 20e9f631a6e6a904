"""What a trial step may change of a transformed model, put back when it is over."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from fx_approx._compat import DropoutBase
from fx_approx.capture.module_snapshot import kept_values
from fx_approx.capture.trace import kept_random_state
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.controls import load_sampler_state_dict, sampler_state_dict
from fx_approx.runtime.handle import GraphHandle, pieces_of
from fx_approx.runtime.repeatable import Randomness


@contextlib.contextmanager
def undone(model: ApproxModule | GraphHandle) -> Iterator[None]:
    """Puts buffers, plain attributes, sampler state, switches, random state, dropout and the graph back."""
    with kept_random_state(), contextlib.ExitStack() as stack:
        if isinstance(model, GraphHandle):
            for one in model.models:
                stack.enter_context(kept_values(one))
            stack.enter_context(_kept_switches(model))
        for approx in pieces_of(model):
            stack.enter_context(_undone(approx))
        yield


@contextlib.contextmanager
def _undone(approx: ApproxModule) -> Iterator[None]:
    runtime = approx._fx_approx
    program = runtime.program
    state, function, pieces = sampler_state_dict(approx), program.function, program.pieces
    modules = list(approx.modules())
    dropouts: list[tuple[nn.Module, str, float]] = [(m, "p", m.p) for m in modules if isinstance(m, DropoutBase)]
    dropouts += [(m, "dropout", m.dropout) for m in modules if isinstance(m, (nn.MultiheadAttention, nn.RNNBase))]
    switches = [(one, one.enabled) for one in runtime.switches]
    with kept_values(approx):
        try:
            for module, name, _ in dropouts:
                setattr(module, name, 0.0)
            yield
        finally:
            program.function, program.pieces = function, pieces
            for module, name, share in dropouts:
                setattr(module, name, share)
            for selector, on in switches:
                selector.enabled = on
            load_sampler_state_dict(approx, state)


@contextlib.contextmanager
def _kept_switches(handle: GraphHandle) -> Iterator[None]:
    """Graphs that appear meanwhile, for other shapes, get the switches that those before them had."""
    before = {(name, role): s.enabled for one in handle.pieces for (name, role), s in one._fx_approx.selectors.items()}
    appeared: list[ApproxModule] = []

    def note(approx: ApproxModule, new: bool) -> None:
        appeared.append(approx)

    handle.follow(note)
    try:
        yield
    finally:
        handle.leave(note)
        for approx in appeared:
            for site, selector in approx._fx_approx.selectors.items():
                selector.enabled = before.get(site, selector.enabled)


@contextlib.contextmanager
def repeatable(model: ApproxModule | GraphHandle) -> Iterator[Randomness]:
    """The graphs run uncompiled and drop nothing at random, see :class:`fx_approx.runtime.repeatable.Randomness`."""
    drawn = Randomness()
    if isinstance(model, GraphHandle):
        with model.running_uncompiled(lambda: drawn):
            yield drawn
    else:
        with drawn:
            yield drawn


def module_of(model: ApproxModule | GraphHandle, purpose: str) -> nn.Module:
    """Whose parameters and buffers they are; of a backend the user's own model.

    Raises:
        ValueError: A backend has compiled no model yet, or several.
    """
    return model.model(purpose) if isinstance(model, GraphHandle) else model


def runnable(model: ApproxModule | GraphHandle, purpose: str) -> nn.Module:
    """What is called, so that the graphs run."""
    return model.compiled(model.model(purpose)) if isinstance(model, GraphHandle) else model
