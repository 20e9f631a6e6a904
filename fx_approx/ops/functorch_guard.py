"""Function transforms that sampling does not support, refused with a clear error."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_approx._compat import is_batched, transforms_in_progress
from fx_approx.errors import UnsupportedError


def refuse_transforms() -> None:
    """Raises UnsupportedError inside a vmap or a forward-mode derivative.

    Under vmap the scores would have to be those of all examples together; the sampled products have no forward-mode
    derivative.
    """
    unsupported = {"Vmap": "vmap", "Jvp": "forward-mode derivatives (jvp)"}
    for kind in transforms_in_progress():
        if kind in unsupported:
            raise UnsupportedError(
                f"{unsupported[kind]} of a model that samples is not supported. Call model.eval() or "
                "fx_approx.set_sampling(model, enabled=False), then the model is exact and can be transformed; "
                "torch.func.grad and functional_call work while sampling."
            )


def refuse_vmap(grad: Tensor) -> None:
    """Raises UnsupportedError for a gradient of several backward passes at once, in vmap.

    Each would draw from scores of its own.
    """
    if torch.compiler.is_compiling():
        return
    if is_batched(grad):
        raise UnsupportedError(
            "vmap over the backward pass of a sampled product (torch.func.jacrev, is_grads_batched=True) is not "
            "supported. Call model.eval() or fx_approx.set_sampling(model, enabled=False), then the model is exact, or "
            "run the backward passes one by one under fx_approx.reuse_selection(model)."
        )
