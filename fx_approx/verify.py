"""Verification: the graph that computes what is demanded against the one that computes all, same selections."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from fx_approx._compat import DropoutBase, tree_leaves
from fx_approx.approx import ApproxModule, find
from fx_approx.capture import kept_random_state
from fx_approx.checks import check_inputs
from fx_approx.controls import load_sampler_state, sampler_state
from fx_approx.runtime import Runtime

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.1}
"""Largest difference that is rounding, by data type, relative to the largest value of the kind."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """One tensor that both graphs make.

    Attributes:
        kind: ``output``, ``loss``, ``gradient`` or ``statistics``.
        name: Of the parameter or buffer; a number for an output.
        difference: Largest absolute difference.
        scale: Largest absolute value of all tensors of this kind, without demand; 1 for integers and truth values.
    """

    kind: str
    name: str
    difference: float
    scale: float

    @property
    def relative(self) -> float:
        """The difference as a share of the scale; NaN and Inf where the tensors hold such in different places."""
        return self.difference / self.scale if self.scale else self.difference


@dataclasses.dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    Attributes:
        differences: Of every output, the loss, every gradient, and the running statistics that were computed.
        tolerance: Up to which share of the scale a difference is rounding.
        hoisted: Some work is not done because no one reads it; if not, there was nothing to verify.
    """

    differences: tuple[Difference, ...]
    tolerance: float
    hoisted: bool

    @property
    def passed(self) -> bool:
        """Whether all differences are rounding."""
        return all(one.relative <= self.tolerance for one in self.differences)

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
            rows.append([kind, len(of_kind), f"{worst.relative:.1e}", f"{worst.scale:.3g}", worst.name])
        said = "the same numbers" if self.passed else "DIFFERENT numbers"
        if not self.hoisted:
            said = "nothing is hoisted, so there was nothing to compare"
        table = tabulate(rows, ["kind", "tensors", "largest difference", "of", "at"], disable_numparse=True)
        return f"{table}\n\nWith and without demand: {said} (tolerance {self.tolerance:g})."


def verify(
    model: nn.Module, batch: Any, loss: Callable[[Any], Tensor] | None = None, *, tolerance: float | None = None
) -> Verification:
    """Runs a training step with and without demand, under the same selections, and compares all that comes of it.

    The model is as before afterwards: parameters, gradients, buffers, sampler state and random state. Dropout layers
    are off meanwhile, since a mask over fewer channels is another mask.

    Args:
        model: A transformed model, on its device, in training mode.
        batch: A batch as the model is called with it: a tensor, a tuple of arguments or a dict of keywords.
        loss: Makes a scalar of the model's output; by default the mean of the squares of all its tensors.
        tolerance: Largest difference, relative to the largest value of its kind (for gradients, of the whole model's);
            by default 1e-10 in float64, 2e-3 in float32, 0.1 in shorter types.

    Raises:
        ValueError: ``model`` is not transformed, in evaluation mode or under ``fully_shard``, or ``batch`` does not
            fit.
    """
    approx = find(model)
    if approx._fx_approx.sharded:
        raise ValueError("model: the graph without demand cannot run on shards; verify before fully_shard")
    if not approx.training:
        raise ValueError("model: expected training mode, since nothing is sampled in evaluation; call model.train()")
    args, kwargs = check_inputs(approx, batch)
    if args is None:
        raise ValueError("batch: expected a tensor, a tuple of arguments or a dict of keyword arguments, got None")
    runtime = approx._fx_approx
    plain = runtime.plain
    hoisted = len(runtime.stages) > 2
    dtype = next((p.dtype for p in approx.parameters() if p.is_floating_point()), torch.float32)
    with undone(approx):
        if runtime.resample is not None and not runtime.resample.known:
            approx(*args, **kwargs)  # the first step of learnt scores is exact
        before = {name: buffer.clone() for name, buffer in approx.named_buffers()}
        with undone(approx):
            ours = _step(approx, runtime, args, kwargs, loss)
        with undone(approx):
            if plain is not None:
                runtime.function = runtime.compiled(plain)
            theirs = _step(approx, runtime, args, kwargs, loss)
    found = []
    for kind, tensors in ours.items():
        others = theirs[kind]
        if kind == "statistics":  # of the channels that were computed; other buffers did not change
            changed = {name: tensor != before[name] for name, tensor in tensors.items()}
            tensors, others = ({name: t[changed[name]] for name, t in made.items()} for made in (tensors, others))
        numbers = [t for t in others.values() if t.numel() and _is_number(t)]
        scale = max((float(t.abs().max()) for t in numbers), default=0.0)
        for name, tensor in tensors.items():
            own = scale if _is_number(tensor) else 1.0  # an index or a mask has no rounding, and is no scale of others
            found.append(Difference(kind, name, _distance(tensor, others[name]), own))
    limit = TOLERANCE.get(dtype, 0.1) if tolerance is None else tolerance
    return Verification(tuple(found), limit, hoisted)


def _distance(one: Tensor, other: Tensor) -> float:
    if not one.numel():
        return 0.0
    same = (one == other) | (one.isnan() & other.isnan())
    wide = torch.complex128 if one.is_complex() else torch.float64
    return float(torch.where(same, 0.0, (one.to(wide) - other.to(wide)).abs()).nan_to_num(nan=math.inf).max())


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def mean_square(result: Any) -> Tensor:
    """A scalar of a model's output: the mean of the squares of each of its tensors, added up."""
    squares = [t.square().mean() for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]
    return torch.stack(squares).sum()


def _step(
    approx: ApproxModule, runtime: Runtime, args: tuple[Any, ...], kwargs: Any, loss: Callable[[Any], Tensor] | None
) -> dict[str, dict[str, Tensor]]:
    """All that a training step makes, by kind and name."""
    with torch.enable_grad():
        result = approx(*args, **kwargs)
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        scalar = (mean_square if loss is None else loss)(result)
        wanted = {name: p for name, p in approx.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(scalar, list(wanted.values()), allow_unused=True)
    return {
        "output": {str(i): t.detach() for i, t in enumerate(outputs)},
        "loss": {"loss": scalar.detach()},
        "gradient": {
            name: torch.zeros_like(p) if grad is None else grad
            for (name, p), grad in zip(wanted.items(), grads, strict=True)
        },
        "statistics": {name: buffer.clone() for name, buffer in approx.named_buffers() if buffer.is_floating_point()},
    }


@contextlib.contextmanager
def undone(approx: ApproxModule) -> Iterator[None]:
    """Puts buffers, sampler state, random state, dropout and the graph back."""
    runtime = approx._fx_approx
    buffers = [(buffer, buffer.clone()) for buffer in approx.buffers()]
    state, function = sampler_state(approx), runtime.function
    modules = list(approx.modules())
    dropouts: list[tuple[nn.Module, str, float]] = [(m, "p", m.p) for m in modules if isinstance(m, DropoutBase)]
    dropouts += [(m, "dropout", m.dropout) for m in modules if isinstance(m, nn.MultiheadAttention)]
    with kept_random_state():
        try:
            for module, name, _ in dropouts:
                setattr(module, name, 0.0)
            yield
        finally:
            runtime.function = function
            for module, name, share in dropouts:
                setattr(module, name, share)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            load_sampler_state(approx, state)
