"""One model of the zoo: transformed, trained for a step, verified, and compared with the oracle."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import re
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _zoo_oracle import MismatchError, Oracle
from _zoo_selections import Watched
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import fx_approx
from fx_approx.policies import Uniform

POLICY = Uniform(0.5)

TOLERANCE = 1e-8
"""Largest error that is rounding in float64, see :func:`_errors`."""

SHORT_TOLERANCE = 1e-5
"""The same of a model that computes some values in a shorter type whatever its own is."""

_FLOOR = 1e-6  # of the largest gradient: gradients that are zero but for rounding, such as of a bias before BatchNorm


@dataclasses.dataclass(frozen=True)
class Made:
    """A model to be tried.

    Attributes:
        model: In float64, without dropout, in training mode.
        inputs: What it is called with: positional arguments.
        keywords: And by name.
        plain: The same model on parameters of the same names and values, as the oracle runs it; None for a copy.
    """

    model: nn.Module
    inputs: tuple[Any, ...] = ()
    keywords: dict[str, Any] = dataclasses.field(default_factory=dict)
    plain: nn.Module | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: Unique.
        family: What it is one of.
        make: Builds it.
        compiled: By the Dynamo backend, else by ``fx_approx.transform``.
    """

    name: str
    family: str
    make: Callable[[], Made]
    compiled: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one model.

    Attributes:
        name: Its name.
        family: Its family.
        frontend: ``transform`` or ``backend``.
        products: Products there are.
        sampled: Products that are sampled.
        narrowed: Products of which no one reads some outputs, so that those are not computed.
        saved: Share of the FLOPs of a training step that is not computed.
        untraced: Parts that were not traced, or graphs that stayed exact, with the reason.
        stops: Where demand stopped: the reasons, with how often, the most frequent first.
        verified: With and without demand the numbers are the same; None if nothing is left out.
        verify_error: The largest difference there.
        error: Largest error against the oracle; None if it could not be compared.
        error_at: Of what.
        tolerance: What counts as rounding.
        graphs: Graphs that ran.
        seconds: Of all this.
        failure: What went wrong; "" if nothing did.
    """

    name: str
    family: str
    frontend: str
    products: int = 0
    sampled: int = 0
    narrowed: int = 0
    saved: float = 0.0
    untraced: tuple[str, ...] = ()
    stops: tuple[tuple[str, int], ...] = ()
    verified: bool | None = None
    verify_error: float | None = None
    error: float | None = None
    error_at: str = ""
    tolerance: float = TOLERANCE
    graphs: int = 0
    seconds: float = 0.0
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether the model ran, was sampled, and computed the right numbers."""
        right = self.error is not None and self.error <= self.tolerance
        return not self.failure and right and self.verified is not False and self.sampled > 0


def loss_of(result: Any) -> Tensor:
    """A scalar that depends on every entry of every floating-point output, differently."""
    parts = []
    for tensor in tree_leaves(result):
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            weights = torch.linspace(0.5, 1.5, tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
            parts.append(((tensor * weights).sum() + tensor.square().mean()).double())
    return torch.stack(parts).sum()


def without_dropout(model: nn.Module) -> nn.Module:
    """The model in training mode, with nothing random in it."""
    for module in model.modules():
        for name, value in vars(module).items():
            random = "drop" in name and isinstance(value, float)
            if random or (name == "p" and "Drop" in type(module).__name__ and isinstance(value, float)):
                setattr(module, name, 0.0)
            elif name == "p" and type(module).__name__ == "StochasticDepth":
                module.p = 0.0
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return model.train()


def settle(model: nn.Module) -> nn.Module:
    """In float64 and training mode, without dropout; nothing is zero to begin with, which would hide what is behind."""
    without_dropout(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.double().train()


@dataclasses.dataclass
class _Step:
    """Outputs and gradients of a training step."""

    outputs: list[Tensor]
    grads: dict[str, Tensor]


def _train(model: nn.Module, call: Callable[..., Any], made: Made) -> _Step:
    model.zero_grad(set_to_none=True)
    result = call(*_copied(made.inputs), **_copied(made.keywords))
    outputs = [t.detach().clone() for t in tree_leaves(result) if isinstance(t, Tensor)]
    loss_of(result).backward()
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in wanted.items()}
    model.zero_grad(set_to_none=True)
    return _Step(outputs, grads)


def _copied(value: Any) -> Any:
    return tree_map(lambda one: one.clone() if isinstance(one, Tensor) else one, value)


def _errors(ours: _Step, theirs: _Step) -> Iterator[tuple[float, str]]:
    """The largest error of each tensor as a share of its largest entry, and what it is.

    Gradients that are zero but for rounding are measured by the largest gradient of the model.
    """
    if len(ours.outputs) != len(theirs.outputs) or ours.grads.keys() != theirs.grads.keys():
        yield float("inf"), "the number of outputs or gradients"
        return
    for place, (one, other) in enumerate(zip(ours.outputs, theirs.outputs, strict=True)):
        yield _error(one, other, 0.0), f"output {place}"
    largest = max((float(grad.abs().max()) for grad in theirs.grads.values() if grad.numel()), default=0.0)
    for name, grad in theirs.grads.items():
        yield _error(ours.grads[name], grad, _FLOOR * largest), f"gradient of {name}"


def _error(one: Tensor, other: Tensor, floor: float) -> float:
    if one.shape != other.shape or one.dtype != other.dtype:
        return float("inf")
    if not one.numel() or torch.equal(one, other):
        return 0.0
    if not one.is_floating_point():
        return float("inf")
    scale = max(float(other.abs().max()), floor)
    error = float((one - other).abs().max()) / scale if scale else float("inf")
    return error if error == error else float("inf")


def examine(entry: Entry) -> Result:
    """Tries one model; what goes wrong is told in the result."""
    start = time.perf_counter()
    torch.manual_seed(0)
    frontend = "backend" if entry.compiled else "transform"
    blank = Result(entry.name, entry.family, frontend)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            result = _examine(blank, entry.make(), entry.compiled)
        except Exception as error:
            said = " ".join(str(error).split())[:300]
            result = dataclasses.replace(blank, failure=f"{type(error).__name__}: {said}")
    told = [str(one.message) for one in heard if issubclass(one.category, fx_approx.errors.CaptureWarning)]
    folder = re.compile(r"(?<![\w.~:/-])/\S*/")  # of this machine, before the name of a file
    untraced = tuple(dict.fromkeys(folder.sub("", note) for note in (*result.untraced, *told)))
    return dataclasses.replace(result, untraced=untraced, seconds=time.perf_counter() - start)


def _examine(result: Result, made: Made, compiled: bool) -> Result:
    plain = copy.deepcopy(made.model) if made.plain is None else made.plain
    if compiled:
        torch._dynamo.reset()
        backend = fx_approx.backend(POLICY, inner="eager")
        call: Callable[..., Any] = torch.compile(made.model, backend=backend)
        for _ in range(2):  # some models note in their first forward what they then go by, and are compiled again
            _train(made.model, call, made)
        model, pieces, report = made.model, backend.pieces, backend.report()
    else:
        example = made.inputs or made.keywords
        model = fx_approx.transform(made.model, POLICY, example)
        call, pieces, report = model, (model,), fx_approx.report(model)
    watched = Watched(made.model if compiled else model, pieces)
    with contextlib.ExitStack() as held:
        for piece in pieces:
            held.enter_context(fx_approx.reuse_selection(piece))
        held.enter_context(watched.recording())
        ours = _train(model, call, made)
    result = _reported(result, report)
    result = dataclasses.replace(result, graphs=len(watched.ran))
    if not any(own is not None for one in watched.factors().values() for own in one.calls):
        return dataclasses.replace(result, failure="nothing was sampled")
    result = _verified(result, watched, made, compiled)
    oracle = Oracle(plain, watched.factors())
    with oracle.following():
        theirs = _train(plain, plain, made)
    tolerance = SHORT_TOLERANCE if oracle.lower else TOLERANCE
    error, where = max(_errors(ours, theirs), default=(0.0, ""))
    verified = None if result.verify_error is None else result.verify_error <= tolerance
    result = dataclasses.replace(result, error=error, error_at=where, tolerance=tolerance, verified=verified)
    try:
        oracle.check()
    except MismatchError as mismatch:
        return dataclasses.replace(result, failure=str(mismatch))
    return result


def _reported(result: Result, report: Any) -> Result:
    reasons = collections.Counter(_reason(stop) for stop in report.stops)
    return dataclasses.replace(
        result,
        products=len(report.rows),
        sampled=sum(1 for row in report.rows if row.samples),
        narrowed=sum(1 for row in report.rows if row.demand),
        saved=report.totals.saved,
        untraced=tuple(report.notes),
        stops=tuple(reasons.most_common()),
    )


def _reason(stop: str) -> str:
    """What a stop is for, without the names and numbers of one place."""
    parts = (stop.partition(": ")[2] or stop).split("; ")
    return re.sub(r"\d+", "N", "; ".join(dict.fromkeys(map(_without_place, parts))))


def _without_place(reason: str) -> str:
    """``the addition in layer1.0 reads all of it`` without the place, and layers without their names."""
    found = re.fullmatch(r"(.+?)((?: in| behind) .+)? (reads (?:all|other channels) of it)", reason)
    if found is None:
        return reason
    return f"{found[1] if found[2] else 'a layer'} {found[3]}"


def _verified(result: Result, watched: Watched, made: Made, compiled: bool) -> Result:
    """With the check of the package itself, of each graph."""
    worst: float | None = None
    for piece, args, kwargs in watched.ran:
        given = (_detached(args) or _detached(kwargs)) if compiled else (made.inputs or made.keywords)
        found = fx_approx.analysis.verify(piece, given, loss_of)
        if found.hoisted:
            worst = max(found.worst.relative, worst or 0.0)
    return dataclasses.replace(result, verify_error=worst)


def _detached(value: Any) -> Any:
    return tree_map(lambda one: one.detach() if isinstance(one, Tensor) else one, value)
