"""Whether two forms of one network compute the same, tried on calls."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fx_approx.capture.containers import copied, leaves, mean_square, tensors
from fx_approx.capture.error_text import describe
from fx_approx.capture.module_snapshot import TensorSnapshot, kept_training_flags
from fx_approx.capture.trace import kept_random_state, skeleton
from fx_approx.runtime.repeatable import Randomness
from fx_approx.subnetworks.cuts import Cut
from fx_approx.subnetworks.record import tensors_of

Call = tuple[tuple[Any, ...], dict[str, Any]]

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Of the largest value of an output, or gradient; of shorter types more. Some models compute in float32 in any case."""


UNTOLD = "its evaluation was not compared"


def recorded(model: nn.Module, inside: Mapping[str, nn.Module], call: Call) -> dict[str, list[Call]]:
    """What ``inside``, modules of ``model``, are called with in training; nothing of the model changes."""
    calls: dict[str, list[Call]] = {path: [] for path in inside}
    if not inside:
        return calls
    with contextlib.ExitStack() as stack:
        stack.enter_context(_trial(model))
        for path, module in inside.items():
            stack.callback(
                module.register_forward_pre_hook(_recorder(calls[path]), with_kwargs=True, prepend=True).remove
            )
        args, kwargs = copied(call)
        with torch.no_grad():
            model(*args, **kwargs)
    return calls


def _recorder(calls: list[Call]) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(copied((args, kwargs)))

    return note


def masked(model: nn.Module, cuts: Mapping[str, Cut]) -> nn.Module:
    """A copy of ``model``, of full size, with zeros for the weights that a subnetwork of these cuts does not read."""
    whole = skeleton(model, shared=False)
    tensors = tensors_of(whole)
    with torch.no_grad():
        for name, cut in cuts.items():
            if cut.inputs is not None and tensors[name].dim() > 1:
                kept = dataclasses.replace(cut, outputs=None)
                value = torch.zeros_like(tensors[name])
                kept.put(value, kept.of(tensors[name]), scaled=False)
                tensors[name].copy_(value)
    return whole


def differs(own: nn.Module, other: nn.Module, calls: Sequence[Call], shared: bool = True) -> str:
    """Why ``own`` does not compute what ``other`` does in training, gradients included; empty if it does.

    Args:
        own: A module of the model's own.
        other: What it should compute.
        calls: Arguments of each call.
        shared: They have the same parameters; else their gradients are not compared, but have to be finite.
    """
    wanted = [parameter for parameter in own.parameters() if parameter.requires_grad]
    for call in calls:
        try:
            mine = _run(own, call, wanted)
        except Exception as error:  # whatever a forward says of narrow layers
            return f"the model's own Python does not run on narrow layers: {describe(error)}"
        expected = _run(other, call, wanted if shared else [])
        if not shared:
            finite = all(grad is None or bool(grad.isfinite().all()) for grad in mine[1])
            mine = (mine[0], []) if finite else ([], [])
        if not _same(mine, expected):
            return "the model's own Python gives other numbers on narrow layers"
    return ""


def differs_in_evaluation(own: nn.Module, full: nn.Module, calls: Sequence[Call]) -> tuple[str, str]:
    """The same for evaluation, and why that cannot be told, if so.

    Args:
        own: A module of the model's own, with narrow layers.
        full: What :func:`masked` gives of it.
        calls: Arguments of each call.
    """
    for call in calls:
        try:
            expected, _ = _run(full, call, training=False)
        except Exception as error:  # in evaluation a model may be called in another way
            return "", f"{UNTOLD}: the full model does not run there as it is called in training: {describe(error)}"
        try:
            mine, _ = _run(own, call, training=False)
        except Exception as error:  # whatever a forward says of narrow layers
            return f"the model's own Python does not run on narrow layers in evaluation: {describe(error)}", ""
        if _shapes(mine) != _shapes(expected):
            return "", f"{UNTOLD}: it returns values of other sizes than the full model"
        if not alike(mine, expected, lambda one, its: _close(one, its, _largest(its))):
            return "the model's own Python gives other numbers on narrow layers in evaluation", ""
    return "", ""


def _shapes(values: Sequence[Any]) -> list[Any]:
    return [value.shape if isinstance(value, Tensor) else None for value in values]


def difference(result: Any, expected: Any) -> str:
    """How what a narrow model returns differs from what it should, in words; empty if it does not."""
    return "" if alike(result, expected, _roughly) else "it gives other numbers on narrow layers"


def alike(one: Any, other: Any, close: Callable[[Tensor, Tensor], bool]) -> bool:
    """Whether two results have equal leaves; of two tensors in floating point, of one shape, ``close`` decides."""
    mine, its = leaves(one), leaves(other)
    return len(mine) == len(its) and all(_equal(*pair, close) for pair in zip(mine, its, strict=True))


def _equal(one: Any, other: Any, close: Callable[[Tensor, Tensor], bool]) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        # Objects that know no equality, as a cache of keys and values.
        unknown = getattr(type(one), "__eq__", None) is object.__eq__
        return type(one) is type(other) if unknown else bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype or not one.is_floating_point():
        return one.dtype == other.dtype and torch.equal(one, other)
    return close(one, other)


def _run(
    module: nn.Module, call: Call, wanted: Sequence[Tensor] = (), training: bool = True
) -> tuple[list[Any], list[Tensor | None]]:
    with _trial(module, training):
        args, kwargs = copied(call)
        result = module(*args, **kwargs)
        made = [one.detach() if isinstance(one, Tensor) else one for one in leaves(result)]
        if not wanted or not any(one.requires_grad for one in tensors(result)):
            return made, []
        return made, list(torch.autograd.grad(mean_square(result), wanted, allow_unused=True))


@contextlib.contextmanager
def _trial(module: nn.Module, training: bool = True) -> Iterator[None]:
    """One mode, without dropout; buffers, flags and random states are as before at the end."""
    before = TensorSnapshot(module.buffers())
    with kept_random_state(), torch.enable_grad(), kept_training_flags(module.modules()), Randomness():
        module.train(training)
        try:
            yield
        finally:
            before.restore()


def _same(one: tuple[list[Any], list[Tensor | None]], other: tuple[list[Any], list[Tensor | None]]) -> bool:
    if not alike(one[0], other[0], lambda mine, its: _close(mine, its, _largest(its))):
        return False
    grads = [(a, b) for a, b in zip(one[1], other[1], strict=True) if a is not None or b is not None]
    largest = max((_largest(b) for _, b in grads if b is not None), default=0.0)
    return all(_close(a, b, largest) for a, b in grads)


def _largest(value: Tensor) -> float:
    """Of what is finite, as masked scores are not."""
    finite = value.abs().nan_to_num(0.0, 0.0, 0.0)
    return float(finite.max()) if value.numel() else 0.0


def _close(one: Tensor | None, other: Tensor | None, largest: float) -> bool:
    """Equal to rounding; what one of both does not depend on has a gradient of zero in the other."""
    if one is None or other is None:
        rest = other if one is None else one
        return rest is not None and not rest.any()
    return torch.allclose(one, other, rtol=0.0, atol=_TOLERANCE.get(one.dtype, 3e-2) * largest, equal_nan=True)


def _roughly(one: Tensor, other: Tensor) -> bool:
    """Equal as far as code that was compiled in another way is: entry by entry."""
    close = {"rtol": 2e-2, "atol": 2e-2} if torch.finfo(one.dtype).eps > 1e-6 else {"rtol": 1e-4, "atol": 1e-5}
    return torch.allclose(one, other, **close, equal_nan=True)
