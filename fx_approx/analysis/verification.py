"""Verification: the graph that computes what is demanded against one that computes all, same selections."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from fx_approx.capture.containers import leaves, mean_square
from fx_approx.core.candidates import Role
from fx_approx.runtime.approx_module import ApproxModule, find
from fx_approx.runtime.handle import GraphHandle, pieces_of
from fx_approx.runtime.repeatable import Randomness
from fx_approx.runtime.snapshot import module_of, repeatable, runnable, undone
from fx_approx.runtime.validation import check_inputs
from fx_approx.utils.tables import wrapped

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.1}
"""Largest difference that is rounding, by data type, relative to the largest value of the kind."""


_NAME = 44
"""Most characters of a name in a line of the text."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """One tensor that both graphs make.

    Attributes:
        kind: ``output``, ``loss``, ``gradient`` or ``statistics``.
        name: Of the parameter or buffer; a number for an output.
        difference: Largest absolute difference.
        scale: Largest absolute value of all tensors of this kind, without demand; 1 for integers and truth values.
        missing: Which graph gives None in its place, the difference being infinite then; empty where both give it.
    """

    kind: str
    name: str
    difference: float
    scale: float
    missing: str = ""

    @property
    def relative(self) -> float:
        """The difference as a share of the scale; NaN and Inf where the tensors hold such in different places."""
        return self.difference / self.scale if self.scale else self.difference

    def __str__(self) -> str:
        return f"{self.name} ({self.missing})" if self.missing else self.name


@dataclasses.dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    Attributes:
        differences: Of every output, the loss, every gradient, and the running statistics that were computed.
        tolerance: Up to which share of the scale a difference is rounding.
        hoisted: Some work is not done because no one reads it; if not, there was nothing to verify.
        tokens: Some tokens are left out: it was compared with all of them, those left out masked.
        incomparable: Where the model itself draws random numbers, more with all channels than with some, so that
            numbers cannot be compared; None where it draws none, or the same.
    """

    differences: tuple[Difference, ...]
    tolerance: float
    hoisted: bool
    incomparable: str | None = None
    tokens: bool = False

    @property
    def passed(self) -> bool:
        """Whether all differences are rounding. False, too, where numbers cannot be compared."""
        return self.incomparable is None and all(one.relative <= self.tolerance for one in self.differences)

    @property
    def worst(self) -> Difference:
        """The largest difference relative to its scale."""
        return max(self.differences, key=lambda one: math.inf if math.isnan(one.relative) else one.relative)

    def __str__(self) -> str:
        """The largest difference of each kind."""
        rows = []
        for kind in dict.fromkeys(one.kind for one in self.differences):
            of_kind = [one for one in self.differences if one.kind == kind]
            worst = max(of_kind, key=lambda one: math.inf if math.isnan(one.relative) else one.relative)
            rows.append([kind, len(of_kind), f"{worst.relative:.1e}", f"{worst.scale:.3g}", wrapped(str(worst), _NAME)])
        said = "the same numbers" if self.passed else "DIFFERENT numbers"
        if self.incomparable is not None:
            said = f"cannot be compared, since {self.incomparable}"
        if not self.hoisted:
            said = "nothing is hoisted, so there was nothing to compare"
        table = tabulate(rows, ["kind", "tensors", "largest difference", "of", "at"], disable_numparse=True)
        what = "With some tokens, and with all but those left out masked" if self.tokens else "With and without demand"
        return f"{table}\n\n{what}: {said} (tolerance {self.tolerance:g})."


def verify(
    model: nn.Module | GraphHandle,
    batch: Any,
    loss: Callable[[Any], Tensor] | None = None,
    *,
    tolerance: float | None = None,
) -> Verification:
    """Runs a training step with and without demand, under the same selections, and compares all that comes of it.

    Where tokens are left out, the other step is one of the model with all tokens, in which those that are left out are
    masked from attention, and pass by the blocks that they skip. It gathers nothing.

    The model is as before afterwards: parameters, gradients, buffers, plain attributes, sampler state and random state.
    Dropout is off meanwhile, in layers, functions and attention, and so are the random slopes of RReLU, since a mask
    over fewer channels is another mask. Where the model draws other random numbers by the channel (noise), the result
    says that it cannot be compared, and where. It fails where one graph gives None and the other a tensor.

    Args:
        model: A transformed model, on its device, in training mode, or a backend that has compiled one.
        batch: A batch as the model is called with it: a tensor, a tuple of arguments or a dict of keywords.
        loss: Makes a scalar of the model's output; by default the mean of the squares of all its tensors.
        tolerance: Largest difference, relative to the largest value of its kind (for gradients, of the whole model's);
            by default 1e-10 in float64, 2e-3 in float32, 0.1 in shorter types.

    Raises:
        ValueError: ``model`` is not transformed, in evaluation mode or under ``fully_shard``, ``batch`` does not
            fit, or a backend has compiled no model yet, or several.
    """
    subject = model if isinstance(model, GraphHandle) else find(model)
    module, run = module_of(subject, "verify"), runnable(subject, "verify")
    if any(approx._fx_approx.program.sharded for approx in pieces_of(subject)):
        raise ValueError("model: the graph without demand cannot run on shards; verify before fully_shard")
    if not module.training:
        raise ValueError("model: expected training mode, since nothing is sampled in evaluation; call model.train()")
    args, kwargs = check_inputs(module, batch)
    if args is None:
        raise ValueError("batch: expected a tensor, a tuple of arguments or a dict of keyword arguments, got None")
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    with undone(subject):
        if not all(one._fx_approx.resample is None or one._fx_approx.resample.known for one in pieces_of(subject)):
            run(*args, **kwargs)  # the first step of learnt scores is exact
        before = {name: buffer.clone() for name, buffer in module.named_buffers()}
        chosen: dict[nn.Module, list[Any]] = {}
        with undone(subject), _tokens_noted(subject, chosen):
            ours, drawn = _step(subject, run, args, kwargs, loss)
        with undone(subject), _tokens_again(subject, chosen):
            for program in (approx._fx_approx.program for approx in pieces_of(subject)):
                whole = program.plain if program.masked is None else program.masked
                if whole is not None:
                    program.serve(whole)
            theirs, drawn_whole = _step(subject, run, args, kwargs, loss)
    tokens = any(approx._fx_approx.program.masked is not None for approx in pieces_of(subject))
    hoisted = tokens or any(len(approx._fx_approx.program.stages) > 2 for approx in pieces_of(subject))
    differ = drawn_whole.differs_from(drawn)
    incomparable = _by_rows(subject) if differ is None else f"the model draws random numbers of its own: {differ}"
    found = []
    for kind, mine in ours.items():
        others = theirs[kind]
        if kind == "statistics":  # of the channels that were computed; other buffers did not change
            changed = {name: t != before[name] for name, t in mine.items() if t is not None}
            mine, others = ({n: made[n][changed[n]] for n in changed} for made in (mine, others))  # type: ignore[index]
        numbers = [t for t in others.values() if t is not None and t.numel() and _is_number(t)]
        scale = max((float(t.abs().max()) for t in numbers), default=0.0)
        for name in dict.fromkeys((*mine, *others)):
            if kind != "output" or not mine.get(name) is others.get(name) is None:
                found.append(_difference(kind, name, mine.get(name), others.get(name), scale))
    limit = TOLERANCE.get(dtype, 0.1) if tolerance is None else tolerance
    return Verification(tuple(found), limit, hoisted, incomparable, tokens)


@contextlib.contextmanager
def _hooked(subject: ApproxModule | GraphHandle, hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    handles = [one.register_forward_hook(hook) for approx in pieces_of(subject) for one in approx._fx_approx.tokens]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tokens_noted(
    subject: ApproxModule | GraphHandle, chosen: dict[nn.Module, list[Any]]
) -> contextlib.AbstractContextManager[None]:
    """Inside, what is chosen is written down, by what chooses."""
    return _hooked(subject, lambda module, args, result: chosen.setdefault(module, []).append(result))


def _tokens_again(
    subject: ApproxModule | GraphHandle, chosen: dict[nn.Module, list[Any]]
) -> contextlib.AbstractContextManager[None]:
    """Inside, the same is chosen once more."""
    before = {module: iter(results) for module, results in chosen.items()}
    return _hooked(subject, lambda module, args, result: next(before[module], result))


def _by_rows(subject: ApproxModule | GraphHandle) -> str | None:
    """A product whose selection would be another one if all tokens were there; None if there is none."""
    for approx in pieces_of(subject):
        for (name, role), selector in approx._fx_approx.selectors.items():
            follows = role is Role.GRAD_WEIGHT or (role is Role.OUTPUT and not selector.ahead)
            if follows and approx._fx_approx.program.masked is not None:
                return f"the selection of {name} ({role.value}) follows the tokens that are there"
    return None


def _difference(kind: str, name: str, one: Tensor | None, other: Tensor | None, scale: float) -> Difference:
    if one is None and other is None:
        return Difference(kind, name, 0.0, scale)
    if one is None or other is None:
        return Difference(kind, name, math.inf, scale, f"None {'with' if one is None else 'without'} demand")
    # An index or a mask has no rounding, and is no scale of others.
    return Difference(kind, name, _distance(one, other), scale if _is_number(one) else 1.0)


def _distance(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return math.inf
    if not one.numel():
        return 0.0
    same = (one == other) | (one.isnan() & other.isnan())
    wide = torch.complex128 if one.is_complex() else torch.float64
    return float(torch.where(same, 0.0, (one.to(wide) - other.to(wide)).abs()).nan_to_num(nan=math.inf).max())


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _step(
    subject: ApproxModule | GraphHandle,
    run: nn.Module,
    args: tuple[Any, ...],
    kwargs: Any,
    loss: Callable[[Any], Tensor] | None,
) -> tuple[dict[str, dict[str, Tensor | None]], Randomness]:
    """All that a training step makes, by kind and name, and the random numbers that the model drew for it."""
    module = module_of(subject, "verify")
    with torch.enable_grad():
        with repeatable(subject) as drawn:
            result = run(*args, **kwargs)
        outputs = {str(place): leaf for place, leaf in enumerate(leaves(result))}
        scalar = (mean_square if loss is None else loss)(result)
        wanted = {name: p for name, p in module.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(scalar, list(wanted.values()), allow_unused=True)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    made: dict[str, dict[str, Tensor | None]] = {
        "output": {n: t.detach() if isinstance(t, Tensor) else None for n, t in outputs.items()},
        "loss": {"loss": scalar.detach()},
        "gradient": dict(zip(wanted, grads, strict=True)),
        "statistics": {**buffers},
    }
    return made, drawn
