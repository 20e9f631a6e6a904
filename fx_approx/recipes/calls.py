"""The recipes: fine-tuning, training from scratch, transformers by tokens."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fx_approx._compat import forget_compiled
from fx_approx.capture.module_snapshot import TensorSnapshot, kept_training_flags
from fx_approx.capture.trace import kept_random_state
from fx_approx.compiler.transform import transform
from fx_approx.core.plan import Policy
from fx_approx.dynamo.backend import Backend, backend
from fx_approx.errors import NoEffectWarning, UnsupportedError
from fx_approx.policies.hidden_units import HiddenUnits
from fx_approx.policies.override import Rule, is_rule, rule_text
from fx_approx.policies.tokens import Tokens
from fx_approx.policies.uniform import Exact, Uniform
from fx_approx.recipes.gain import LEAST, Gain, agreed, timed, timed_backend
from fx_approx.recipes.limits import Limited, adapters, has_frozen
from fx_approx.recipes.looks import Look, look
from fx_approx.recipes.recipe import FROZEN, Choice, Recipe
from fx_approx.runtime.handle import GraphHandle
from fx_approx.runtime.validation import check_inputs
from fx_approx.schedules.ratio_scheduler import RatioScheduler
from fx_approx.schedules.schedule import ExactTail, ExactWarmup, PlanRatios, Schedule, check_ratio, check_step
from fx_approx.subnetworks.moments import check_kind
from fx_approx.subnetworks.phases import Phases

_KEPT = 10**9
_ADVICE = "docs/advice.md"


@dataclasses.dataclass(frozen=True)
class _Setting:
    """What a recipe would do.

    Attributes:
        policy: What is sampled.
        warmup: Exact steps at the beginning.
        tail: Exact steps at the end.
        kept: One selection serves the whole training.
        preserve: What was never read is set to zero before the tail.
        choices: All this in words.
    """

    policy: Policy
    warmup: int
    tail: int
    kept: bool
    preserve: bool
    choices: tuple[Choice, ...]

    def schedule(self, steps: int) -> Schedule:
        """The ratio at each step."""
        inner: Schedule = ExactWarmup(PlanRatios(), self.warmup) if self.warmup else PlanRatios()
        return ExactTail(inner, total=steps, steps=self.tail)


@dataclasses.dataclass(frozen=True)
class _Given:
    """The arguments that all recipes have, and the names of the layers that ``layers`` was found to mean."""

    name: str
    model: nn.Module
    batch: Any
    steps: int
    compile: bool
    check: bool
    seed: int
    layers: Rule | None
    found: set[str] = dataclasses.field(default_factory=set)

    def __post_init__(self) -> None:
        check_step("steps", self.steps, 1)
        check_step("seed", self.seed)
        if torch.is_inference_mode_enabled():
            raise RuntimeError(f"{self.name}: called within torch.inference_mode, in which nothing can be trained")
        for name in ("compile", "check"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.layers is not None and not is_rule(self.layers):
            raise TypeError(
                f"layers: expected a glob such as '*.mlp.*', a function of (name, module) or None, got {self.layers!r}"
            )
        if self.batch is None:
            raise ValueError("batch: expected a training batch as the model is called with it, got None")

    def exact(self, what: str, why: str) -> Recipe:
        """A recipe that samples nothing."""
        return Recipe(self.name, self.model, self.steps, (Choice(what, why),), batch=self.batch)


def finetune(
    model: nn.Module,
    batch: Any,
    steps: int,
    ratio: float = 0.5,
    *,
    optimizer: Optimizer | None = None,
    compile: bool = False,
    check: bool = True,
    seed: int = 0,
    layers: Rule | None = None,
) -> Recipe:
    """Fine-tunes trained weights with a part of the channels, which is chosen once, by what the network does with them.

    After a few exact steps the channels are chosen by running norms of activations and weights, and kept. What is not
    read is set to zero at the end, and some exact steps follow. In networks of convolutions all layers are sampled; in
    others those that read hidden units. Where it would not make a step faster, or there are too few steps, nothing is
    sampled.

    Args:
        model: Trained, in training mode on its device; its parameters are trained. Switch activation checkpointing on
            before, and call this inside of ``torch.autocast`` where the model is called so.
        batch: One training batch as the model is called with it: a tensor, a tuple, or a dict of keyword arguments.
        steps: Steps of the optimiser in the whole training.
        ratio: Share of the channels, in (0, 1).
        optimizer: Of the model's parameters. With it the part trains as a physically narrow network, which is fastest;
            ``recipe.model`` is another module then from phase to phase. Without it the transformed model trains.
        compile: Run what is called by ``torch.compile``.
        check: Time some steps first, with and without. Of several ranks, in a process group, the slowest decides.
        seed: All samples follow from it.
        layers: The layers that may be sampled, a glob on their fully-qualified names or a function of name and module
            (``lambda name, module: "mlp" in name``); None for all but the adapters of PEFT, which are small.

    Returns:
        The recipe; ``print`` shows what it chose, and why.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: One out of range, an optimiser of other parameters or on several ranks, or ``layers`` that match
            none.
        CaptureError: ``model`` is compiled, wrapped, transformed or the like.
        UnsupportedError: An optimiser whose state belongs to no parameter, such as LBFGS.
        RuntimeError: Called within ``torch.inference_mode``.
    """
    _check_share(ratio)
    if optimizer is not None:
        _check_optimizer(optimizer)
    given = _Given("finetune", model, batch, steps, compile, check, seed, layers)
    seen = look(model, batch)
    channels = Uniform(ratio, min_k=16, round_to=8, scores="ema")
    warmup, tail = max(10, steps // 20), max(seen.statistics or 1, steps // 50)
    if seen.kind == "convolutions":
        policy: Policy = channels
        what = Choice(f"{ratio:g} of the channels of all layers, kept", "best of all settings in fine-tuned networks")
    else:
        policy = HiddenUnits(channels)
        tail = max(tail, steps // 10)
        what = Choice(f"{ratio:g} of the hidden units, kept", "a trained residual stream is worth leaving whole")
    choices = (
        what,
        Choice(f"{warmup} exact steps first", "they tell which channels count"),
        _tail(tail, seen),
        *_about_weights(given),
    )
    return _made(given, seen, _Setting(_limited(given, policy), warmup, tail, True, True, choices), optimizer)


def pretrain(
    model: nn.Module,
    batch: Any,
    steps: int,
    ratio: float = 0.65,
    *,
    compile: bool = False,
    check: bool = True,
    seed: int = 0,
    layers: Rule | None = None,
) -> Recipe:
    """Trains from scratch with a part of the channels, those of the largest weights, and the last steps exactly.

    Where the architecture is yours to choose, train a narrower network first and compare: from scratch it reached as
    much at as many operations (docs/advice.md).

    Args:
        model: As in :func:`finetune`.
        batch: As there.
        steps: As there.
        ratio: As there.
        compile: As there.
        check: As there.
        seed: As there.
        layers: As there.

    Returns:
        The recipe.

    Raises:
        TypeError: As :func:`finetune`.
        ValueError: As there.
        CaptureError: As there.
    """
    _check_share(ratio)
    given = _Given("pretrain", model, batch, steps, compile, check, seed, layers)
    seen = look(model, batch)
    tail = max(seen.statistics or 1, steps // 50)
    choices = (
        Choice("a rival to try first", f"a narrower network reaches as much from scratch, see {_ADVICE}"),
        Choice(f"{ratio:g} of the channels, those of the largest weights", "more accurate than chosen by activations"),
        _tail(tail, seen),
        *_about_weights(given),
    )
    policy = _limited(given, Uniform(ratio, min_k=16))
    return _made(given, seen, _Setting(policy, 0, tail, False, True, choices))


def transformer(
    model: nn.Module,
    batch: Any,
    steps: int,
    ratio: float = 0.5,
    *,
    hidden_units: float = 1.0,
    mode: str = "auto",
    compile: bool = False,
    check: bool = True,
    seed: int = 0,
    layers: Rule | None = None,
) -> Recipe:
    """Trains a transformer on a part of the tokens, others in each step, and the last tenth of the steps on all.

    Models that pool or read a class token drop the others. Models that put out every position, such as language
    models, could skip blocks: no evidence speaks for it, so they stay exact, unless ``mode="skip"`` asks for it.

    Args:
        model: As in :func:`finetune`.
        batch: As there.
        steps: As there.
        ratio: Share of the tokens, in (0, 1).
        hidden_units: Share of the hidden units on top of that; 1 for all.
        mode: ``auto``, ``drop`` or ``skip``, see :class:`fx_approx.policies.Tokens`.
        compile: As there.
        check: As there.
        seed: As there.
        layers: As there, of those whose hidden units are sampled; tokens are those of all layers.

    Returns:
        The recipe.

    Raises:
        TypeError: As :func:`finetune`.
        ValueError: As there.
        CaptureError: As there.
    """
    _check_share(ratio)
    check_ratio("hidden_units", hidden_units)
    given = _Given("transformer", model, batch, steps, compile, check, seed, layers)
    seen = look(model, batch)
    if hidden_units == 1 and layers is not None:
        raise ValueError("layers: says whose hidden units are sampled, and hidden_units=1 keeps all; expected None")
    units: Policy = Exact()
    if hidden_units < 1:
        units = _limited(given, HiddenUnits(Uniform(hidden_units, min_k=16, round_to=8)))
    tokens = Tokens(ratio, mode, first=0, layers=units)
    if seen.traced and not seen.stacks:
        why = seen.notes[0] if seen.notes else "it has no attention that can be followed"
        return given.exact("exact: no tokens can be sampled", why)
    if seen.traced and mode == "auto" and all(stack.drop is None for stack in seen.stacks):
        return given.exact("exact: tokens can only skip blocks", f"{seen.stacks[0].whole}; mode='skip' tries it")
    tail = max(seen.statistics or 1, steps // 10)
    choices = [
        Choice(f"{ratio:g} of the tokens, others in each step", "from scratch above fewer epochs, fine-tuned level")
    ]
    if hidden_units < 1:
        choices.append(Choice(f"{hidden_units:g} of the hidden units", "asked for"))
    choices.append(_tail(tail, seen))
    if hidden_units < 1:
        choices += _about_weights(given)
    return _made(given, seen, _Setting(tokens, 0, tail, False, hidden_units < 1, tuple(choices)))


def _limited(given: _Given, policy: Policy) -> Policy:
    """``policy`` for the layers that may be sampled."""
    small = adapters(given.model)
    if given.layers is None and not small:
        return policy
    return Limited(policy, given.layers, small, given.found)


def _about_weights(given: _Given) -> list[Choice]:
    """What happens to weights before the exact steps at the end, and to adapters, if there are any."""
    found = [Choice("weights that are not read are set to zero then", "the exact network computes what was trained")]
    if given.layers is None and adapters(given.model):
        found.append(Choice("adapters stay exact", "they are small"))
    if has_frozen(given.model):
        found.append(FROZEN)
    return found


def _check_share(ratio: float) -> None:
    check_ratio("ratio", ratio)
    if ratio == 1:
        raise ValueError("ratio: expected a share in (0, 1), got 1, which is exact training and needs no recipe")


def _check_optimizer(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, Optimizer):
        kind = type(optimizer).__name__  # its text may hold all weights
        raise TypeError(f"optimizer: expected one of torch.optim, made of the model's parameters, got a {kind}")
    check_kind(optimizer)
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if several and torch.distributed.get_world_size() > 1:
        raise ValueError(
            "optimizer: expected None on several ranks: it trains another module from phase to phase, each of which "
            "has to be wrapped; see fx_approx.subnetworks.Phases(wrap=DistributedDataParallel)"
        )


def _tail(tail: int, seen: Look) -> Choice:
    why = "running statistics need as many" if tail == seen.statistics else "the evaluated network has all of it"
    return Choice(f"{tail} exact steps at the end", why)


def _made(given: _Given, seen: Look, setting: _Setting, optimizer: Optimizer | None = None) -> Recipe:
    if seen.statistics is None:
        why = "its BatchNorm averages over all batches (momentum=None)"
        return given.exact("exact: no tail is long enough", why)
    if not any(parameter.requires_grad for parameter in given.model.parameters()):
        return given.exact("exact: nothing is trained", "no parameter has requires_grad")
    spent = setting.warmup + setting.tail
    if 2 * spent > given.steps:
        why = f"{spent} of them would be exact; expected {2 * spent} or more"
        return given.exact(f"exact: {given.steps} steps are too few", why)
    make = _transformed if seen.traced else _by_backend
    with kept_random_state():
        recipe = make(given, setting, optimizer)
    if given.layers is not None and not given.found:
        forget_compiled(given.model)
        raise ValueError(f"layers: expected a rule that some layer fits, got {rule_text(given.layers)}")
    return recipe


def _worth_it(given: _Given, setting: _Setting, gain: Gain, started: float) -> tuple[Choice, ...] | Recipe:
    """The choices with what was measured since ``started``, or the recipe that samples nothing."""
    gain = dataclasses.replace(gain, speedup=agreed(gain.speedup, given.model))
    spent = math.ceil((time.perf_counter() - started) / gain.exact)
    if gain.speedup < LEAST:
        what = f"exact: a step would be {gain.speedup:.2f} times as fast here"
        told = f"expected {LEAST} or more, on this machine and at this batch"
        return given.exact(what, f"{told}; finding this out took as long as {spent} steps")
    exact = setting.warmup + setting.tail
    return (
        *setting.choices,
        Choice(f"a sampled step is {gain.speedup:.2f} times as fast here", gain.how),
        Choice(
            f"the whole training takes {gain.of_training(given.steps, exact):.2f} of the time",
            f"{exact} of {given.steps} steps are exact; finding this out took as long as {spent} exact steps",
        ),
    )


def _transformed(given: _Given, setting: _Setting, optimizer: Optimizer | None) -> Recipe:
    choices = setting.choices
    narrow = optimizer is not None
    if given.check:
        policy, started = setting.policy, time.perf_counter()
        try:
            gain = timed(given.model, policy, given.batch, given.compile, narrow, optimizer)
        except UnsupportedError as error:
            return given.exact("exact: there is no narrow network of it", str(error))
        decided = _worth_it(given, setting, gain, started)
        if isinstance(decided, Recipe):
            return decided
        choices = decided
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        try:
            interval = _KEPT if setting.kept and not narrow else 1
            approx = transform(
                *(given.model, setting.policy, given.batch), seed=given.seed, selection_interval=interval
            )
        except NoEffectWarning as error:
            return given.exact("exact: nothing can be sampled", str(error))
    if given.compile and not narrow:
        approx.compile()
    return _driven(given, setting, approx, optimizer, choices)


def _why_none(handle: Backend) -> str:
    """Why no graph of a backend samples."""
    try:
        rows = handle.report().rows
    except ValueError as error:
        return str(error)
    return "; ".join(dict.fromkeys(row.reason for row in rows)) or "no layer multiplies"


def _by_backend(given: _Given, setting: _Setting, optimizer: Optimizer | None) -> Recipe:
    inner = "inductor" if given.compile else "eager"
    narrow = optimizer is not None
    handle = backend(
        setting.policy, inner=inner, seed=given.seed, selection_interval=_KEPT if setting.kept and not narrow else 1
    )
    model = given.model
    args, kwargs = check_inputs(model, given.batch)
    assert args is not None
    model.compile(backend=handle)
    try:
        recipe = _seen_by(handle, given, setting, optimizer, lambda: model(*args, **kwargs))
    except BaseException:
        forget_compiled(model)
        raise
    if recipe.exact:
        forget_compiled(model)
    return recipe


def _seen_by(
    handle: Backend, given: _Given, setting: _Setting, optimizer: Optimizer | None, call: Callable[[], Any]
) -> Recipe:
    """The recipe of a model that ``handle`` compiles when it is called."""
    model, choices = given.model, setting.choices
    buffers = TensorSnapshot(model.buffers())
    with kept_training_flags(model.modules()), warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        if not model.training:
            model.train()  # graphs of evaluation are exact
        try:
            call()  # graphs appear
        finally:
            buffers.restore()
        if not handle.pieces:
            return given.exact("exact: nothing can be sampled", _why_none(handle))
        if given.check:
            started = time.perf_counter()
            decided = _worth_it(given, setting, timed_backend(model, handle, given.batch), started)
            if isinstance(decided, Recipe):
                return decided
            choices = decided
    choices = (*choices, Choice("by a backend of torch.compile", "torch.fx cannot trace its forward"))
    return _driven(given, setting, handle, optimizer, choices)


def _driven(
    given: _Given,
    setting: _Setting,
    handle: nn.Module | GraphHandle,
    optimizer: Optimizer | None,
    choices: tuple[Choice, ...],
) -> Recipe:
    """The recipe that moves the ratios of a transformed model or a backend."""
    schedule, head = setting.schedule(given.steps), (given.name, given.model, given.steps)
    made = [one.what for one in setting.choices] + ([] if optimizer is None else ["a narrow network trains"])
    if optimizer is None:
        scheduler = RatioScheduler(handle, schedule, preserve=setting.preserve)
        return Recipe(*head, choices, handle, scheduler=scheduler, batch=given.batch, made=made)
    wrap: Any = torch.compile if given.compile else None
    phases = Phases(handle, optimizer, schedule, preserve=setting.preserve, example_inputs=given.batch, wrap=wrap)
    choices = (*choices, Choice("the part is a narrow network of its own", "nothing is sliced in a step"))
    return Recipe(*head, choices, handle, phases=phases, batch=given.batch, made=made)
