"""Whether a recipe would pay: steps with and without it, in turn, on this machine."""

from __future__ import annotations

import dataclasses
import inspect
import statistics
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fx_approx.capture.containers import mean_square
from fx_approx.capture.trace import kept_random_state
from fx_approx.compiler.graph_view import speedup_quartiles
from fx_approx.compiler.transform import view_of
from fx_approx.core.plan import Policy
from fx_approx.core.step_cost import MakeOptimizer
from fx_approx.runtime.controls import load_sampler_state_dict, sampler_state_dict, set_sampling
from fx_approx.runtime.handle import GraphHandle
from fx_approx.runtime.validation import check_inputs
from fx_approx.utils.timing import in_turn

LEAST = 1.1
"""A step that is not so many times as fast is not worth what sampling costs in accuracy."""
REPEATS = 5
"""Steps of either kind that are timed."""


@dataclasses.dataclass(frozen=True)
class Gain:
    """What a sampled step gains.

    Attributes:
        speedup: An exact step takes so many times as long: the median of steps in turn.
        exact: Seconds of an exact step.
        quartiles: Lower and upper of what ``speedup`` is the median of, if known.
    """

    speedup: float
    exact: float
    quartiles: tuple[float, float] | None = None

    @property
    def how(self) -> str:
        """How it was measured, and how sure that is."""
        spread = "" if self.quartiles is None else ", quartiles {:.2f} and {:.2f}".format(*self.quartiles)
        return f"{REPEATS} steps in turn{spread}"

    def of_training(self, steps: int, exact: int) -> float:
        """Time of ``steps`` of which ``exact`` are exact, as a share of that of exact steps alone."""
        return (exact + (steps - exact) / self.speedup) / steps


def timed(
    model: nn.Module, policy: Policy, batch: Any, compiled: bool, subnetwork: bool, optimizer: Optimizer | None
) -> Gain:
    """What a step under ``policy`` gains, by steps in turn on copies of the model.

    Raises:
        UnsupportedError: There is no subnetwork.
    """
    view, plan = view_of(model, policy, batch)
    step = view.realized(subnetwork, None if optimizer is None else maker(optimizer))
    decisions = {one.name: one for one in plan.sampled}
    whole, found = step.time([decisions], tokens=[plan.tokens], compiled=compiled, repeats=REPEATS)
    low, middle, high = found.speedup
    return Gain(middle, whole.seconds, (low, high))


def agreed(speedup: float, model: nn.Module) -> float:
    """The least of all ranks of a process group, so that they decide alike."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return speedup
    least = torch.tensor(speedup, dtype=torch.float64, device=next(iter(model.parameters())).device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return float(least)


def maker(optimizer: Optimizer) -> MakeOptimizer:
    """Makes optimisers of the same kind and settings."""
    kind = type(optimizer)
    known = inspect.signature(kind).parameters
    # Some keep among their defaults what their constructor does not take, such as AdamW.
    settings = {name: value for name, value in optimizer.defaults.items() if name in known}
    return lambda parameters: kind(parameters, **settings)


def timed_backend(model: nn.Module, handle: GraphHandle, batch: Any) -> Gain:
    """The same of a model that runs through a backend; its state, gradients and the samplers' are as before."""
    args, kwargs = check_inputs(model, batch)
    assert args is not None
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    state = sampler_state_dict(handle)
    for parameter in model.parameters():
        parameter.grad = None  # or backward would add to what waits there

    def run(enabled: bool) -> None:
        set_sampling(handle, enabled=enabled)
        mean_square(model(*args, **kwargs)).backward()

    device = next(iter(model.parameters())).device
    try:
        with kept_random_state(), torch.enable_grad():
            exact, sampled = in_turn([lambda: run(False), lambda: run(True)], device, REPEATS, warmup=2)
    finally:
        set_sampling(handle, enabled=True)
        load_sampler_state_dict(handle, state)
        with torch.no_grad():
            for name, value in model.named_buffers():
                value.copy_(buffers[name])
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
    low, middle, high = speedup_quartiles(exact, sampled)
    return Gain(middle, statistics.median(exact), (low, high))
