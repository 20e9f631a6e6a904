"""Data-parallel training: gradients of which the sampled part is sent only, and models whose parameters are sharded."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fx_approx.core.hooks import hook_count
from fx_approx.distributed.agreement import check_plans
from fx_approx.distributed.hook import InnerHook, SliceHook
from fx_approx.distributed.slices import find_slices
from fx_approx.distributed.traffic import Traffic
from fx_approx.errors import NoEffectWarning
from fx_approx.runtime.approx_module import ApproxModule, find
from fx_approx.runtime.controls import synchronize_scores
from fx_approx.runtime.sharding import is_sharded

_FSDP_HOOKS = 2  # of fully_shard, before and after a forward


def enable_sparse_allreduce(
    ddp_model: Any,
    *,
    inner: InnerHook | None = None,
    dense: tuple[Any, InnerHook] | None = None,
    check_every: int = 100,
) -> Traffic:
    """Makes DistributedDataParallel reduce only the slices of gradients that the selections of the step made non-zero.

    A weight that reads selected channels gets a gradient in those columns only, and, where what no one reads is not
    computed, in the selected rows only. All ranks make the same selections, from weights, from running norms that are
    averaged over the ranks after each step, or from the seed; so no indices are sent. All other gradients, and all
    gradients of a step in which a layer is exact, are reduced whole. Over micro-batches in ``no_sync``, the union of
    their selections is sent; with ``ema`` scores they need one held selection (:func:`fx_approx.reuse_selection`) and,
    as long as they have not seen a batch, a ``no_sync`` for each.

    A model that could be traced in sections only is left to its own Python.

    Call it by all ranks alike, after ``DistributedDataParallel`` and before the first step. ``torch.compile`` can be
    around the model or around DistributedDataParallel.

    Args:
        ddp_model: DistributedDataParallel around a transformed model whose shapes are known (``example_inputs``).
        inner: A stateless communication hook that averages the packed slices, such as ``fp16_compress_hook``; None is
            ``allreduce_hook``. Not one that keeps state for each position, such as PowerSGD: positions change.
        dense: State and hook, as for ``register_comm_hook``, for the gradients that never have a slice, such as
            ``(PowerSGDState(new_group(), ...), powerSGD_hook)``: their positions do not change. Where the last bucket
            has slices only, its smallest gradient goes there whole. A hook whose callbacks communicate, as PowerSGD's
            do, needs a process group of its own, and under gloo all gradients in one bucket. None is ``inner``.
        check_every: Every so many backward passes, beginning with the first, the ranks compare random state and
            selections, and each looks whether what it leaves out is zero.

    Returns:
        What is sent, as a report that follows the training.

    Raises:
        TypeError: ``ddp_model`` is no DistributedDataParallel, ``inner`` no hook, or ``dense`` no such pair.
        ValueError: It holds no transformed model, or ``check_every`` is below 1.
        DistributedMismatchError: Plans, seeds or steps differ between the ranks, on every rank; also from the backward
            pass.

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
    if dense is not None and not (isinstance(dense, tuple) and len(dense) == 2 and callable(dense[1])):
        raise TypeError(f"dense: expected a pair of a state and a communication hook, got {dense!r}")
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
        resample.published = resample.tracker()
    hook = SliceHook(model, sliced, inner, check_every, group, dense)
    ddp_model.register_comm_hook(hook, lambda state, bucket: state.reduce(bucket))
    _guard_no_sync(ddp_model, model, group)
    return Traffic(model, sliced, whole, hook)


def estimate_traffic(model: Any) -> Traffic:
    """What :func:`enable_sparse_allreduce` would send at the present ratios; needs no process group.

    Args:
        model: A transformed model whose shapes are known (``example_inputs``), or one that holds it.

    Returns:
        A report that follows the ratios, with ``sent`` None.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: It holds no transformed model.
    """
    found = find(model)
    return Traffic(found, *find_slices(found))


def _guard_no_sync(ddp_model: DistributedDataParallel, model: ApproxModule, group: Any) -> None:
    """Running norms of ``ema`` scores stay the same on all ranks over micro-batches, too."""
    plain = ddp_model.no_sync

    @contextlib.contextmanager
    def no_sync() -> Iterator[None]:
        resample = model._fx_approx.resample
        if resample is not None and resample.learns and not resample.held:
            raise RuntimeError(
                "no_sync: ema scores follow each rank's own micro-batches, so that the ranks would choose different "
                "channels; hold one selection over them: with fx_approx.reuse_selection(model): ..."
            )
        with plain():
            yield
        synchronize_scores(model, group)

    ddp_model.no_sync = no_sync  # type: ignore[method-assign]


def enable_fsdp(model: Any, group: Any = None) -> None:
    """Makes a transformed model run under ``fully_shard`` (FSDP2): each block gathered for its own part of the graph.

    The graph of a transformed model does not call the blocks that ``fully_shard`` was called on, so their parameters
    would never be gathered. From here on the stretch of the graph that uses a block's parameters runs inside the hooks
    of ``fully_shard``, as a forward method of the block. Selections that are made at the head of the graph, where
    blocks are not gathered yet, take the norms of their weights from the shards: each rank adds up the squares that it
    has, and one all-reduce of as many numbers as the sampled layers have inputs adds up those. All ranks choose the
    same channels. The running norms of ``ema`` scores are averaged over the ranks in each training forward.

    A model that could be traced in sections only is left to its own Python.

    Call it by all ranks alike, after the last ``fully_shard`` and before the first step; again after another
    ``fully_shard``. The model's own Python, where it runs in place of the graph, needs nothing of this.

    Args:
        model: A transformed model, or what holds one, on which, or on parts of which, ``fully_shard`` was called.
        group: The process group whose ranks train the model together; None for all ranks.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: It holds no transformed model, or ``fully_shard`` was not called; two sharded modules take turns in
            the graph; a sharded module has other hooks, too; a parameter is divided by something else as well.
        RuntimeError: torch.distributed is not initialised.
        DistributedMismatchError: Plans, seeds or steps differ between the ranks, on every rank.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a transformed model under fully_shard, got {type(model).__name__}")
    approx = find(model)
    if not any(map(is_sharded, model.modules())):
        raise ValueError(f"model: fully_shard was called on no part of {type(model).__name__}; call it first")
    # These import torch.distributed.tensor, which takes long, and is there already now.
    from fx_approx.distributed.norms import check_placements
    from fx_approx.distributed.segments import STAGE, divide

    check_plans(approx, group)
    for name, parameter in approx.named_parameters():
        check_placements(name, parameter)
    sharded = {path: module for path, module in approx.named_modules() if path and is_sharded(module)}
    for path, module in sharded.items():
        if hook_count(module) != _FSDP_HOOKS:
            raise ValueError(f"model: {path} has hooks of its own, which a graph cannot call; remove them")
    program = approx._fx_approx.program
    stages = [(name, graph) for name, graph in program.stages if name != STAGE]
    if program.capture.sections:  # between their graphs Python runs, which needs nothing of this; so all is left to it
        program.function, program.pieces = None, {}
    elif stages:
        divided = divide(approx, approx._fx_approx, stages[-1][1], group)
        program.stages = [*stages, (STAGE, divided)]
        program.compile_graph(divided)
    program.sharded = dict.fromkeys(sharded.values(), _FSDP_HOOKS)
