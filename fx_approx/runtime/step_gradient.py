"""The gradient of a step, exact or with some layers sampled, without a trace in the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.handle import GraphHandle, pieces_of
from fx_approx.runtime.rng import SELECTION_INTERVAL, STEP
from fx_approx.runtime.snapshot import module_of, repeatable, runnable, undone
from fx_approx.runtime.token_selection import TOKENS

Loss = Callable[[nn.Module, Any], Tensor]


def scalar(loss: Loss, model: Any, batch: Any) -> Tensor:
    """``loss(model, batch)``.

    Raises:
        ValueError: It is no scalar, or depends on no parameter.
    """
    value: Any = loss(model, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"loss: expected it to return a scalar tensor, got {what}")
    if not value.requires_grad:
        raise ValueError("loss: it depends on no parameter that requires a gradient")
    return value


def sampled_gradient(
    model: ApproxModule | GraphHandle, batch: Any, loss: Loss, names: Collection[str], number: int = 0
) -> Tensor:
    """The gradient of ``loss(model, batch)`` by all parameters, in one vector, zeros where the loss depends on none.

    Dropout is off, compiled code is not used. Nothing changes: neither ``.grad``, buffers, switches nor random states.

    Args:
        model: A transformed model in training mode, or a backend that has compiled one.
        batch: Given to ``loss``.
        loss: Returns a scalar.
        names: The layers that are sampled, if they are not switched off, and ``tokens``.
        number: The samples are those of the ``number``-th step from now.

    Raises:
        ValueError: The loss is no scalar, or depends on no parameter.
    """
    run = runnable(model, "a gradient")
    parameters = [p for p in module_of(model, "a gradient").parameters() if p.requires_grad]
    with undone(model), torch.enable_grad(), _without_compiled_code(model):
        for approx in pieces_of(model):
            runtime = approx._fx_approx
            for (name, _), selector in runtime.selectors.items():
                selector.enabled = selector.enabled and name in names
            for one in runtime.tokens:
                one.enabled = one.enabled and TOKENS in names
            if runtime.resample is not None:
                runtime.resample.note_known()
        for state in {id(one._fx_approx.state): one._fx_approx.state for one in pieces_of(model)}.values():
            state[STEP] += number * int(state[SELECTION_INTERVAL])
        found = torch.autograd.grad(scalar(loss, run, batch), parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )


@contextlib.contextmanager
def _without_compiled_code(model: ApproxModule | GraphHandle) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if isinstance(model, ApproxModule):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(repeatable(model))
        yield
