"""Whether two forms of one network compute the same, tried on calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fx_approx.capture.containers import copied, leaves, mean_square, tensors
from fx_approx.capture.error_text import describe
from fx_approx.capture.module_snapshot import TensorSnapshot, kept_training_flags
from fx_approx.capture.trace import kept_random_state
from fx_approx.runtime.repeatable import Randomness

Call = tuple[tuple[Any, ...], dict[str, Any]]

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Of the largest value of an output, or gradient; of shorter types more. Some models compute in float32 in any case."""


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


def _run(module: nn.Module, call: Call, wanted: Sequence[Tensor]) -> tuple[list[Any], list[Tensor | None]]:
    with _trial(module):
        args, kwargs = copied(call)
        result = module(*args, **kwargs)
        made = leaves(result)
        if not wanted or not any(one.requires_grad for one in tensors(result)):
            return made, []
        grads = torch.autograd.grad(mean_square(result), wanted, allow_unused=True)
        return [one.detach() if isinstance(one, Tensor) else one for one in made], list(grads)


@contextlib.contextmanager
def _trial(module: nn.Module) -> Iterator[None]:
    """Training mode without dropout; buffers, flags and random states are as before at the end."""
    before = TensorSnapshot(module.buffers())
    with kept_random_state(), torch.enable_grad(), kept_training_flags(module.modules()), Randomness():
        module.train()
        try:
            yield
        finally:
            before.restore()


def _same(one: tuple[list[Any], list[Tensor | None]], other: tuple[list[Any], list[Tensor | None]]) -> bool:
    if len(one[0]) != len(other[0]) or not all(map(_alike, one[0], other[0])):
        return False
    grads = [(a, b) for a, b in zip(one[1], other[1], strict=True) if a is not None or b is not None]
    largest = max((_largest(b) for _, b in grads if b is not None), default=0.0)
    return all(_close(a, b, largest) for a, b in grads)


def _alike(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        # Objects that know no equality, as a cache of keys and values.
        unknown = getattr(type(one), "__eq__", None) is object.__eq__
        return type(one) is type(other) if unknown else bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype or not one.is_floating_point():
        return one.dtype == other.dtype and torch.equal(one, other)
    return _close(one, other, _largest(other))


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
