"""The ways to reduce gradients that benchmarks/multinode.py compares, each as DistributedDataParallel with its hook."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from _replay import Replay
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from fx_approx import distributed
from fx_approx.distributed.hook import Part
from fx_approx.runtime.approx_module import find

HOOKS = ("dense", "fp16", "powersgd")
_GROUPS = 16
"""More than any of the networks has buckets."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """``ratio`` None is the exact network; ``compute`` is this one's computing, of the exact one's."""

    name: str
    hook: str = "dense"
    ratio: float | None = None
    scores: str = "weight"
    compute: float = 1.0

    def __post_init__(self) -> None:
        """Names the field that does not fit."""
        if self.hook not in HOOKS:
            raise ValueError(f"hook: expected one of {', '.join(HOOKS)}, not {self.hook!r}")
        if self.hook == "powersgd" and self.ratio is not None:
            raise ValueError("hook: PowerSGD keeps an error for each position, which slices do not have")

    @property
    def recording(self) -> tuple[float | None, str]:
        """Variants with the same replay the same gradients."""
        return self.ratio, self.scores if self.ratio is not None else ""


class Reduced:
    """One variant, ready to step; counts the bytes that it hands to all-reduces and the CPU time of its hook.

    Attributes:
        buckets: (bytes of gradients, bytes sent, all-reduces) of each bucket of the last step; empty without a hook.
        packing: CPU seconds inside of the hook, so far, until it hands a bucket over.
        unpacked: CPU seconds of unpacking each slice.
        running: Whose step began last.
    """

    running: ClassVar[Reduced | None] = None

    def __init__(self, variant: Variant, replay: Replay, powersgd_rank: int) -> None:
        self.variant, self.replay = variant, replay
        # Buffers stay as they are in a replay; sending them would add the same few bytes to all variants.
        self.parallel = DistributedDataParallel(
            replay, broadcast_buffers=False, gradient_as_bucket_view=True, init_sync=False
        )
        self.buckets: list[tuple[int, int, int]] = []
        self.packing = 0.0
        self.unpacked: list[float] = []
        self.traffic: distributed.Traffic | None = None
        self._power: PowerSGDState | None = None
        self._groups: list[Any] = []
        self._new: list[tuple[int, int, int]] = []
        if variant.ratio is not None:
            self._slices(fp16_compress_hook if variant.hook == "fp16" else allreduce_hook)
        elif variant.hook == "fp16":
            self.parallel.register_comm_hook(None, lambda state, bucket: self._timed(fp16_compress_hook, bucket, 0.5))
        elif variant.hook == "powersgd":
            self._power = PowerSGDState(None, matrix_approximation_rank=powersgd_rank, start_powerSGD_iter=2)
            # Its callbacks reduce within gloo's threads, of which a group has two, and in no set order: with one group
            # for all buckets they wait for each other.
            self._groups = [dist.new_group() for _ in range(_GROUPS)]
            self.parallel.register_comm_hook(None, lambda state, bucket: self._compressed(bucket))

    def step(self) -> None:
        """Forward and backward pass with the reduction; gradients stay until :meth:`drop`."""
        Reduced.running = self
        self.parallel(torch.zeros((), requires_grad=True)).backward()
        if self._new:
            self.buckets, self._new = self._new, []

    def drop(self) -> None:
        """Forgets the gradients."""
        for parameter in self.replay.parameters():
            parameter.grad = None

    @property
    def nbytes(self) -> int:
        """Handed to all-reduces in the last step: the report's figure, halved where 16 bits are sent."""
        if self.traffic is not None:
            sent = self.traffic.sent or 0
            return sent // (2 if self.variant.hook == "fp16" else 1) + self._small()[1]
        if self._power is not None:
            return sum(sent for _, sent, _ in self.buckets)
        dense = sum(p.nbytes for p in self.replay.parameters())
        return dense // 2 if self.variant.hook == "fp16" else dense

    @property
    def small(self) -> int:
        """All-reduces of running norms in a step."""
        return self._small()[0]

    def _small(self) -> tuple[int, int]:
        resample = find(self.replay)._fx_approx.resample
        learnt = [one for one in resample.each() if one.running is not None and one.age is not None]
        return 2 if learnt else 0, sum(2 * one.running.nbytes + one.age.nbytes for one in learnt)

    def _slices(self, inner: Callable[..., Any]) -> None:
        def counted(group: Any, bucket: Any) -> Any:
            sent.append(bucket.buffer().nbytes // (2 if inner is fp16_compress_hook else 1))
            return inner(group, bucket)

        sent: list[int] = []
        self.traffic = distributed.enable_sparse_allreduce(self.parallel, inner=counted)
        hook = self.traffic._hook
        plain = hook.reduce

        def reduce(bucket: Any) -> Any:
            start = time.thread_time()
            future = plain(bucket)
            self.packing += time.thread_time() - start
            self._new.append((bucket.buffer().nbytes, sent.pop(), 1))
            return future

        hook.reduce = reduce

    def _timed(self, hook: Callable[..., Any], bucket: Any, share: float) -> Any:
        start = time.thread_time()
        future = hook(None, bucket)
        self.packing += time.thread_time() - start
        self._new.append((bucket.buffer().nbytes, int(share * bucket.buffer().nbytes), 1))
        return future

    def _compressed(self, bucket: Any) -> Any:
        assert self._power is not None
        self._power.process_group = self._groups[bucket.index() % _GROUPS]
        before, dense = self._power.total_numel_after_compression, bucket.buffer().nbytes
        start = time.thread_time()
        future = powerSGD_hook(self._power, bucket)
        self.packing += time.thread_time() - start
        numbers = self._power.total_numel_after_compression - before
        self._new.append((dense, numbers * bucket.buffer().itemsize, 3) if numbers else (dense, dense, 1))
        return future


def _put(part: Part, flat: torch.Tensor, plain: Callable[[Part, torch.Tensor], None] = Part.put) -> None:
    start = time.thread_time()
    plain(part, flat)
    if Reduced.running is not None:
        Reduced.running.unpacked.append(time.thread_time() - start)


Part.put = _put  # type: ignore[method-assign]


def averaged(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Over all ranks, one by one."""
    found = {}
    for name, gradient in gradients.items():
        total = gradient.clone()
        dist.all_reduce(total)
        found[name] = total / dist.get_world_size()
    return found
