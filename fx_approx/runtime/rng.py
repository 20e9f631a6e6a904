"""Randomness of a transformed model: which sample a forward takes, and how a recomputation gets the same one.

The random numbers are a hash of (seed, step, site, element). ``next_key`` is the prologue: the first node of the
graph, which hands out the step as a fresh tensor and counts on. It is an opaque operator, so that it runs as written
in eager and compiled code, and can see whether the forward is a recomputation by an activation checkpoint. It must
then hand out the step of the forward that is recomputed: a new one would silently give wrong gradients.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fx_approx._compat import in_backward, version_of
from fx_approx.errors import RecomputationError
from fx_approx.sampling.base import Selection
from fx_approx.sampling.device_uniforms import uniforms
from fx_approx.sampling.uniforms import derive_key, lane_uniforms, site_lanes, site_uniforms

STEP, INCREMENT, SELECTION_INTERVAL, SEED = range(4)

_NEXT_SEED = 0x3C6EF372FE94F82B  # odd, so that seeds near each other stay apart
_REMEMBERED = 4096


class Draw(NamedTuple):
    """The randomness of one forward, fresh tensors that nothing overwrites.

    Attributes:
        key: ``[seed, step]``, int64.
        numbers: Uniforms of all sites whose counts are known beforehand, float32, one site behind the other.
    """

    key: Tensor
    numbers: Tensor


@dataclasses.dataclass
class _Call:
    """The key of a forward, and the first key of those with the same input that were not recomputed yet.

    Steps only grow, so the two are equal exactly if all between them are; comparing them is a host sync, done only
    when a recomputation asks.
    """

    key: Tensor
    first: Tensor
    storages: tuple[StorageWeakRef, ...]
    waiting: bool = True

    @property
    def alive(self) -> bool:
        """Whether its inputs still exist; if not, another tensor has got their address."""
        return not any([storage.expired() for storage in self.storages])


Fingerprint = tuple[object, ...]
_calls: collections.OrderedDict[Fingerprint, _Call] = collections.OrderedDict()


def new_state(seed: int, selection_interval: int = 1) -> Tensor:
    """``[step, increment, selection interval, seed]``, int64: all that the samples of a run depend on."""
    return torch.tensor([0, 1, selection_interval, seed], dtype=torch.int64)


def fingerprint(owner: int, inputs: list[Tensor]) -> Fingerprint:
    """What identifies a forward to its recomputation: a checkpoint calls again with the same tensors.

    An inference tensor has no version; it cannot be part of a backward pass either.
    """
    return (
        owner,
        *((t.data_ptr(), 0 if t.is_inference() else version_of(t), tuple(t.shape)) for t in inputs),
    )


def recall(call: Fingerprint) -> Tensor | None:
    """The key that the forward ``call`` was given, None if unknown.

    Raises:
        RecomputationError: Two forwards took the same input with different samples.
    """
    found = _calls.get(call)
    if found is None or not found.alive:
        return None
    if not torch.equal(found.key, found.first):
        raise RecomputationError(
            "two forwards with the same input tensor wait for their backward, so the sample of the recomputed one "
            "cannot be told. Give each its own tensor (x.clone()), or keep one sample: "
            "`with fx_approx.reuse_selection(model)`."
        )
    found.waiting = False
    return found.key.clone()


def forget_calls(owner: int) -> None:
    """Drops what is remembered of a model that is gone."""
    for call in [call for call in _calls if call[0] == owner]:
        _calls.pop(call, None)


def _remember(call: Fingerprint, key: Tensor, inputs: list[Tensor]) -> None:
    before = _calls.pop(call, None)
    own = key.clone()
    ambiguous = before is not None and before.waiting and before.alive
    storages = tuple([StorageWeakRef(tensor.untyped_storage()) for tensor in inputs])
    _calls[call] = _Call(own, before.first if before is not None and ambiguous else own, storages)
    while len(_calls) > _REMEMBERED:
        _calls.popitem(last=False)


@torch.library.custom_op("fx_approx::next_key", mutates_args=("state",))
def next_key(state: Tensor, inputs: list[Tensor], owner: int) -> Tensor:
    """Hands out ``[seed, step]`` as a fresh int64 tensor and advances ``state``.

    Args:
        state: As :func:`new_state`; its step grows by its increment (0 while held).
        inputs: The tensors that the forward was called with, to recognise its recomputation.
        owner: Number of the transformed model.

    Raises:
        RecomputationError: In a backward pass, for a forward whose sample is not known.
    """
    call = fingerprint(owner, inputs)
    if in_backward():
        key = recall(call)
        if key is None:
            raise RecomputationError(
                "a checkpoint recomputes a forward that is not remembered: its input tensors are not those of any "
                f"of the last {_REMEMBERED} forwards, or were changed in place since. Checkpoint parts of the model "
                "instead of calling it on temporary inputs, or keep one sample: "
                "`with fx_approx.reuse_selection(model)`."
            )
        return key
    if state.device.type == "cpu":
        step, _, interval, seed = state.tolist()
        key = torch.tensor((seed, step // interval))
    else:
        key = torch.stack((state[SEED], state[STEP] // state[SELECTION_INTERVAL]))
    state[STEP] += state[INCREMENT]
    _remember(call, key, inputs)
    return key


def further(key: Tensor, number: int) -> Tensor:
    """The key of the ``number``-th further call of a layer in one forward: that of another seed, ``key`` as for 0."""
    return key + number * key.new_tensor((_NEXT_SEED, 0))


@next_key.register_fake
def _(state: Tensor, inputs: list[Tensor], owner: int) -> Tensor:
    if _traced_in_checkpoint():
        raise RecomputationError(
            "torch.compile around a checkpoint of the whole model cannot keep its sample for the recomputation. "
            "Compile inside the checkpoint instead: checkpoint(torch.compile(model), x), or checkpoint parts of it."
        )
    return state.new_empty(2)


@torch.library.custom_op("fx_approx::draw", mutates_args=())
def draw(key: Tensor, sites: list[int], counts: list[int]) -> Tensor:
    """Uniforms of several sites, one behind the other.

    Opaque for the compiler, since Inductor 2.13 takes about a minute over the hash (it reasons about the range of every
    integer); one call serves all sites of a model, since the hash is some hundred small operations however long.

    Args:
        key: ``[seed, step]`` as :func:`next_key` gave it.
        sites: Numbers of the sites.
        counts: Uniforms of each.

    Returns:
        float32 ``[sum(counts)]`` in (0, 1); those of a site depend on key and site only.
    """
    if not sites:
        return key.new_empty(0, dtype=torch.float32)
    numbers, places, elements = _positions(tuple(sites), tuple(counts), key.device)
    if key.device.type == "cpu":  # reading the key is free there, and what is one number is quicker in Python
        base: int = derive_key(*key.tolist())
        if len(sites) == 1:
            return lane_uniforms(*site_lanes(base, sites[0]), elements)
        return site_uniforms(torch.tensor(base), numbers, places, elements)
    return uniforms(key, numbers, places, elements)


@draw.register_fake
def _(key: Tensor, sites: list[int], counts: list[int]) -> Tensor:
    return key.new_empty(sum(counts), dtype=torch.float32)


@functools.lru_cache(maxsize=64)
def _positions(
    sites: tuple[int, ...], counts: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor]:
    with torch.inference_mode(False):  # they serve later calls too
        places = [torch.full((count,), place, dtype=torch.int64) for place, count in enumerate(counts)]
        elements = [torch.arange(count, dtype=torch.int64) for count in counts]
        which = torch.cat(places).to(device) if len(sites) > 1 else None
        return torch.tensor(sites, dtype=torch.int64, device=device), which, torch.cat(elements).to(device)


_SELECTIONS = 64
_kept: collections.deque[tuple[int, Tensor, Tensor, Tensor]] = collections.deque(maxlen=_SELECTIONS)
_selections: collections.deque[tuple[int, Tensor, tuple[Selection | None, ...]]] = collections.deque(maxlen=_SELECTIONS)


def remember_selection(owner: int, key: Tensor, chosen: tuple[Selection | None, ...]) -> None:
    """Keeps the selections of a forward for its recomputation."""
    _selections.append((owner, key, chosen))


def recall_selection(owner: int, key: Tensor) -> tuple[Selection | None, ...]:
    """The selections of the forward that had ``key``.

    Raises:
        RecomputationError: It is too long ago.
    """
    for whose, remembered, chosen in reversed(_selections):
        if whose == owner and torch.equal(remembered, key):
            return chosen
    raise RecomputationError(
        f"a checkpoint recomputes a forward whose selections are not remembered: only those of the last {_SELECTIONS} "
        "forwards are. Run the backward passes sooner."
    )


@torch.library.custom_op("fx_approx::keep", mutates_args=("held_key", "held_indices", "held_scale"))
def keep(
    key: Tensor, indices: Tensor, scale: Tensor, held_key: Tensor, held_indices: Tensor, held_scale: Tensor, owner: int
) -> tuple[Tensor, Tensor]:
    """The selections kept under ``key``; under a new key those given, which are kept from now on.

    All of it runs on the device, without a host sync, but for a recomputation by a checkpoint: that gets what its
    forward got.

    Args:
        key: ``[seed, step]`` of this forward.
        indices: int64 ``[n]``.
        scale: float32 ``[m]``.
        held_key: The key of what is kept, changed in place.
        held_indices: As ``indices``, changed in place.
        held_scale: As ``scale``, changed in place.
        owner: Number of what makes the selections.
    """
    if in_backward():
        for whose, remembered, old_indices, old_scale in reversed(_kept):
            if whose == owner and torch.equal(remembered, key):
                return old_indices.clone(), old_scale.clone()
    same = (key == held_key).all()
    indices, scale = torch.where(same, held_indices, indices), torch.where(same, held_scale, scale)
    held_key.copy_(key)
    held_indices.copy_(indices)
    held_scale.copy_(scale)
    # Copies, since compiled code uses the memory of its results again.
    _kept.append((owner, key.clone(), held_indices.clone(), held_scale.clone()))
    return indices, scale


@keep.register_fake
def _(
    key: Tensor, indices: Tensor, scale: Tensor, held_key: Tensor, held_indices: Tensor, held_scale: Tensor, owner: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(indices), torch.empty_like(scale)


def _traced_in_checkpoint() -> bool:
    """Whether Dynamo is tracing the body of an activation checkpoint.

    The compiled backward would read the state after it has moved on. Torch notices that, but only in the backward, and
    in words about versions; that is what happens if Dynamo's class has another name one day.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if type(frame.f_locals.get("self")).__name__ == "CheckpointHigherOrderVariable":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
