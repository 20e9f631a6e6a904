"""The communication hook: packs the slices of a bucket, reduces them, and puts them back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fx_approx.core.plan_effects import Axis
from fx_approx.distributed.agreement import check_selections, digest_of, readers_of
from fx_approx.distributed.slices import Sliced, indices
from fx_approx.errors import DistributedMismatchError
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.controls import synchronize_scores
from fx_approx.runtime.selection_tracker import SelectionTracker

InnerHook = Callable[[Any, Any], torch.futures.Future[Any]]
_WORTH = 0.9
"""Share of a parameter's gradient above which it is not worth packing."""


class Bucket(Protocol):
    """What is read of a :class:`torch.distributed.GradBucket`."""

    def buffer(self) -> Tensor:
        """The gradients of the bucket as one flat tensor."""
        ...

    def gradients(self) -> list[Tensor]:
        """Each, as a view into the buffer."""
        ...

    def parameters(self) -> list[Tensor]:
        """The parameters that the gradients belong to."""
        ...

    def index(self) -> int:
        """The number of the bucket."""
        ...

    def is_last(self) -> bool:
        """Whether it is the last one of the backward pass."""
        ...


class Packed:
    """What of a bucket is sent, with the interface of :class:`torch.distributed.GradBucket`."""

    def __init__(
        self, buffer: Tensor, shapes: Sequence[Sequence[int]], parameters: Sequence[Tensor], index: int, last: bool
    ) -> None:
        """Gradients of these shapes, one behind the other in ``buffer``, and whose they are."""
        self._buffer, self._shapes, self._owners = buffer, shapes, list(parameters)
        self._index, self._last = index, last

    def buffer(self) -> Tensor:
        """The gradients of the bucket as one flat tensor."""
        return self._buffer

    def set_buffer(self, buffer: Tensor) -> None:
        """Puts another tensor in the place of the buffer."""
        self._buffer = buffer

    def gradients(self) -> list[Tensor]:
        """Each, as a view into the buffer."""
        parts = self._buffer.split([math.prod(shape) for shape in self._shapes])
        return [part.view(*shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def parameters(self) -> list[Tensor]:
        """Whose gradients, or slices of gradients, these are."""
        return self._owners

    def index(self) -> int:
        """The number of the bucket."""
        return self._index

    def is_last(self) -> bool:
        """Whether it is the last one of the backward pass."""
        return self._last


class Part:
    """The slice of one gradient that is sent.

    A copy of it goes through whole rows of memory where the kernel's positions of a channel lie together, in one pass:
    about twice as fast on CPUs as one axis after the other.
    """

    def __init__(self, gradient: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
        """``gradient`` is a view into the bucket, ``[O, I, ...]``."""
        self.gradient, self.rows, self.columns = gradient, rows, columns

    @property
    def whole(self) -> bool:
        """Whether it is all of the gradient."""
        return self.rows is None and self.columns is None

    @property
    def shape(self) -> list[int]:
        """The shape of the slice that is sent."""
        shape = list(self.gradient.shape)
        for dim, chosen in enumerate((self.rows, self.columns)):
            if chosen is not None:
                shape[dim] = chosen.shape[0]
        return shape

    @property
    def size(self) -> int:
        """How many numbers are sent."""
        return math.prod(self.shape)

    def nonzero(self) -> int:
        """How many numbers of the slice are not zero."""
        flat = self.gradient.new_empty(self.size)
        self.take(flat)
        return int(flat.count_nonzero())

    def take(self, flat: Tensor) -> None:
        """Copies the slice to ``flat``, ``[size]``, which is overwritten."""
        places = self._places()
        if places is not None:
            source = self._flattened()
            torch.index_select(source, 0, places, out=flat.view(places.shape[0], source.shape[1]))
            return
        part = self.gradient
        if self.rows is not None:
            part = part.index_select(0, self.rows)
        if self.columns is not None:
            part = part.index_select(1, self.columns)
        flat.view(part.shape).copy_(part)

    def put(self, flat: Tensor) -> None:
        """Writes the slice back; all else is zero already."""
        places = self._places()
        if places is not None:
            target = self._flattened()
            target.index_copy_(0, places, flat.view(places.shape[0], target.shape[1]))
            return
        target, value = self.gradient, flat.view(self.shape)
        if self.rows is not None and self.columns is not None:
            target[self.rows.unsqueeze(1), self.columns] = value
        elif self.rows is not None:
            target.index_copy_(0, self.rows, value)
        elif self.columns is not None:
            target.index_copy_(1, self.columns, value)
        else:
            target.copy_(value)

    def _flattened(self) -> Tensor:
        """``[rows of memory, what lies together]``: outputs, or outputs times inputs where those are chosen, too."""
        shape = self.gradient.shape
        together = 1 if self.columns is None else 2
        return self.gradient.view(math.prod(shape[:together]), math.prod(shape[together:]))

    def _places(self) -> Tensor | None:
        """Which rows of memory the slice has, in order; None where it has none of its own."""
        if self.whole or not self.gradient.is_contiguous():
            return None
        if self.columns is None:
            return self.rows
        outputs, inputs = self.gradient.shape[:2]
        if self.gradient.numel() == outputs * inputs:  # single numbers: one axis after the other is faster
            return None
        rows = torch.arange(outputs, device=self.columns.device) if self.rows is None else self.rows
        return (rows.unsqueeze(1) * inputs + self.columns).reshape(-1)


class SliceHook:
    """Reduces the buckets of one model; counts what it sends.

    Attributes:
        steps: Backward passes that were reduced.
        sent: Bytes that were handed to the inner hook in the last one.
        by_layer: Likewise, of each layer with a slice.
    """

    def __init__(
        self,
        model: ApproxModule,
        sliced: Mapping[nn.Parameter, Sliced],
        inner: InnerHook,
        check_every: int,
        group: dist.ProcessGroup | None,
        dense: tuple[Any, InnerHook] | None = None,
    ) -> None:
        """State of the hook; see :func:`fx_approx.distributed.enable_sparse_allreduce` for the arguments."""
        self._model, self._sliced, self._inner, self._dense = model, sliced, inner, dense
        self._check_every, self._group = check_every, group
        self.steps = self.sent = 0
        self.by_layer: dict[str, int] = {}
        self._counting: tuple[int, dict[str, int]] | None = None
        self._axes = list(dict.fromkeys(axis for own in sliced.values() for axis in (own.rows, own.columns) if axis))
        self._found: dict[Axis, Tensor] = {}

    @property
    def _published(self) -> SelectionTracker | None:
        resample = self._model._fx_approx.resample
        return None if resample is None else resample.published

    def reduce(self, bucket: Bucket) -> torch.futures.Future[Tensor]:
        """Reduces one bucket; the future's value is the whole bucket, averaged."""
        try:
            return self._reduce(bucket)
        except BaseException:
            self._counting = None  # the next backward pass begins anew
            raise

    def _reduce(self, bucket: Bucket) -> torch.futures.Future[Tensor]:
        checking = self.steps % self._check_every == 0
        if self._counting is None:
            self._counting, published = (0, {}), self._published
            self._found = {} if published is None else indices(self._axes, published)
            if checking:
                self._check()
        buffer, last = bucket.buffer(), bucket.is_last()
        whose = bucket.parameters()
        parts = [self._part(g, p, checking) for g, p in zip(bucket.gradients(), whose, strict=True)]
        places = range(len(parts))
        loads: list[tuple[Sequence[int], Any, InnerHook]] = [(places, self._group, self._inner)]
        if self._dense is not None:
            others = [place for place in places if whose[place] not in self._sliced]
            if last and not others:
                others = [self._spare(parts, whose)]
            sliced = [place for place in places if place not in others]
            loads = [(sliced, self._group, self._inner), (others, *self._dense)]
        futures = [
            self._send([parts[place] for place in own], [whose[place] for place in own], state, hook, bucket)
            for own, state, hook in loads
            if own
        ]
        if last:
            self._end()
        return futures[0] if len(futures) == 1 else _joined(futures[0], futures[1], buffer)

    def _spare(self, parts: list[Part], whose: Sequence[Tensor]) -> int:
        """Leaves one gradient of the last bucket whole, always the same, to show the other hook that a step ends."""
        place = min(range(len(parts)), key=lambda place: parts[place].gradient.numel())
        parts[place] = Part(parts[place].gradient, None, None)
        own = self._sliced[whose[place]]  # type: ignore[index]
        assert self._counting is not None
        self._counting[1][own.layer] = parts[place].gradient.nbytes
        return place

    def _send(
        self, parts: Sequence[Part], whose: Sequence[Tensor], state: Any, hook: InnerHook, bucket: Bucket
    ) -> torch.futures.Future[Tensor]:
        """Has ``hook`` reduce some gradients of a bucket; the future's value is the bucket, where they are again."""
        buffer, shapes, sizes = bucket.buffer(), [part.shape for part in parts], [part.size for part in parts]
        plain = sum(sizes) == buffer.numel()
        flat = buffer if plain else buffer.new_empty(sum(sizes))
        if not plain:
            for part, own in zip(parts, flat.split(sizes), strict=True):
                part.take(own)
        assert self._counting is not None
        sent, layers = self._counting
        self._counting = sent + flat.nbytes, layers
        future = hook(state, Packed(flat, shapes, whose, bucket.index(), bucket.is_last()))

        def unpack(done: torch.futures.Future[Any]) -> Tensor:
            found = done.value()
            value: Tensor = found[0] if isinstance(found, (list, tuple)) else found
            value = value.to(buffer.dtype)
            if not plain:
                for part, own in zip(parts, value.split(sizes), strict=True):
                    part.put(own)
            elif value is not buffer:
                buffer.copy_(value)
            return buffer

        return future.then(unpack)

    def _check(self) -> None:
        digest = digest_of(self._published, self._model._fx_approx.state)
        check_selections(digest, readers_of(self._model), self._group)

    def _part(self, gradient: Tensor, parameter: Tensor, checking: bool) -> Part:
        own = self._sliced.get(parameter)  # type: ignore[call-overload]
        if own is None:
            return Part(gradient, None, None)
        part = Part(gradient, self._found.get(own.rows), self._found.get(own.columns))
        if checking and not part.whole and gradient.count_nonzero() != part.nonzero():
            raise DistributedMismatchError(
                f"the gradient of {own.name} is not zero outside of its selection: the weight is used elsewhere, or "
                "the model was changed since the transform"
            )
        if part.size > _WORTH * gradient.numel():
            part = Part(gradient, None, None)
        assert self._counting is not None
        self._counting[1][own.layer] = part.size * gradient.itemsize
        return part

    def _end(self) -> None:
        """The last bucket is on its way."""
        assert self._counting is not None
        self.sent, self.by_layer = self._counting
        self._counting = None
        self.steps += 1
        published = self._published
        if published is not None:
            published.clear()
        synchronize_scores(self._model, self._group)


def _joined(
    first: torch.futures.Future[Tensor], second: torch.futures.Future[Tensor], buffer: Tensor
) -> torch.futures.Future[Tensor]:
    """Done when both are; its value is ``buffer``."""
    if buffer.is_cuda:  # futures of NCCL are done at once, and their callbacks have streams that wait for the device

        def wait(_: torch.futures.Future[Tensor]) -> Tensor:
            second.wait()
            return buffer

        return first.then(wait)

    def join(done: torch.futures.Future[list[torch.futures.Future[Tensor]]]) -> Tensor:
        for future in done.value():
            future.wait()  # it is done; an error comes out here
        return buffer

    return torch.futures.collect_all([first, second]).then(join)
