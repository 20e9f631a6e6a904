"""Data-parallel training that sends the sampled part of each gradient only."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from fx_approx.approx import ApproxModule, find
from fx_approx.controls import synchronize_scores
from fx_approx.distributed.agreement import check_plans
from fx_approx.distributed.hook import InnerHook, SliceHook
from fx_approx.distributed.slices import find_slices
from fx_approx.distributed.traffic import Traffic
from fx_approx.errors import NoEffectWarning
from fx_approx.published import Published

__all__ = ["Traffic", "register"]


def register(ddp_model: Any, *, inner: InnerHook | None = None, check_every: int = 100) -> Traffic:
    """Makes DistributedDataParallel reduce only the slices of gradients that the selections of the step made non-zero.

    A weight that reads selected channels gets a gradient in those columns only, and, where what no one reads is not
    computed, in the selected rows only. All ranks make the same selections, from weights, from running norms that are
    averaged over the ranks after each step, or from the seed; so no indices are sent. All other gradients, and all
    gradients of a step in which a layer is exact, are reduced whole. Over micro-batches in ``no_sync``, the union of
    their selections is sent; with ``stale`` scores they need one held selection (:func:`fx_approx.hold`) and, as
    long as they have not seen a batch, a ``no_sync`` for each.

    Call it by all ranks alike, after ``DistributedDataParallel`` and before the first step. ``torch.compile`` can be
    around the model or around DistributedDataParallel.

    Args:
        ddp_model: DistributedDataParallel around a transformed model whose shapes are known (``example_inputs``).
        inner: A stateless communication hook that averages the packed slices, such as ``fp16_compress_hook``; None is
            ``allreduce_hook``. Not one that keeps state for each position, such as PowerSGD: positions change.
        check_every: Every so many backward passes, beginning with the first, the ranks compare random state and
            selections, and each looks whether what it leaves out is zero.

    Returns:
        What is sent, as a report that follows the training.

    Raises:
        TypeError: ``ddp_model`` is no DistributedDataParallel, or ``inner`` cannot be called.
        ValueError: It holds no transformed model, or ``check_every`` is below 1.
        DisagreementError: Plans, seeds or steps differ between the ranks, on every rank; also from the backward pass.

    Warns:
        NoEffectWarning: Some sampled layers are reduced whole, with the reason; or all are.
    """
    if not isinstance(ddp_model, DistributedDataParallel):
        raise TypeError(
            f"ddp_model: expected a DistributedDataParallel around a transformed model, got {type(ddp_model).__name__}"
        )
    if inner is None:  # torch cannot import its hooks where it was built without distributed
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook as inner
    if not callable(inner):
        raise TypeError(f"inner: expected a communication hook, got {inner!r}")
    if isinstance(check_every, bool) or not isinstance(check_every, int) or check_every < 1:
        raise ValueError(f"check_every: expected an integer of at least 1, got {check_every!r}")
    model = find(ddp_model)
    group = ddp_model.process_group
    check_plans(model, group)
    sliced, whole = find_slices(model)
    if whole or not sliced:
        why = [f"{name}: {reason}" for name, reason in whole.items()]
        what = f"{len(whole)} sampled layers are" if sliced else "no gradient has a slice: all are"
        warnings.warn(f"{what} reduced whole{', such as ' + why[0] if why else ''}", NoEffectWarning, stacklevel=2)
    resample = model._fx_approx.resample
    if resample is not None:
        resample.published = Published(resample)
    hook = SliceHook(model, sliced, inner, check_every, group)
    ddp_model.register_comm_hook(hook, lambda state, bucket: state.reduce(bucket))
    _guard_no_sync(ddp_model, model, group)
    return Traffic(model, sliced, whole, hook)


def _guard_no_sync(ddp_model: DistributedDataParallel, model: ApproxModule, group: Any) -> None:
    """Running norms of ``stale`` scores stay the same on all ranks over micro-batches, too."""
    plain = ddp_model.no_sync

    @contextlib.contextmanager
    def no_sync() -> Iterator[None]:
        resample = model._fx_approx.resample
        if resample is not None and resample.learns and not resample.held:
            raise RuntimeError(
                "no_sync: stale scores follow each rank's own micro-batches, so that the ranks would choose different "
                "channels; hold one selection over them: with fx_approx.hold(model): ..."
            )
        with plain():
            yield
        synchronize_scores(model, group)

    ddp_model.no_sync = no_sync  # type: ignore[method-assign]
