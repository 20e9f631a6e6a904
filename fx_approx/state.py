"""Randomness of a transformed model: which sample a forward takes, and how a recomputation gets the same one.

The random numbers are a hash of (seed, step, site, element). ``next_key`` is the prologue: the first node of the
graph, which hands out the step as a fresh tensor and counts on. It is an opaque operator, so that it runs as written
in eager and compiled code, and can see whether the forward is a recomputation by an activation checkpoint. It must
then hand out the step of the forward that is recomputed: a new one would silently give wrong gradients.
"""

from __future__ import annotations

import collections
import dataclasses

import torch
from torch import Tensor

from fx_approx.errors import RecomputationError

STEP, INCREMENT, EVERY, SEED = range(4)

_REMEMBERED = 4096


@dataclasses.dataclass
class _Call:
    """The key of a forward, and the first key of those with the same input that were not recomputed yet.

    Steps only grow, so the two are equal exactly if all between them are; comparing them is a host sync, done only
    when a recomputation asks.
    """

    key: Tensor
    first: Tensor
    waiting: bool = True


Fingerprint = tuple[object, ...]
_calls: collections.OrderedDict[Fingerprint, _Call] = collections.OrderedDict()


def new_state(seed: int, every: int = 1) -> Tensor:
    """``[step, increment, every, seed]``, int64: all that the samples of a run depend on."""
    return torch.tensor([0, 1, every, seed], dtype=torch.int64)


def in_backward() -> bool:
    """Whether this thread is inside a backward pass, so that a forward is a recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)


def fingerprint(owner: int, inputs: list[Tensor]) -> Fingerprint:
    """What identifies a forward to its recomputation: a checkpoint calls again with the same tensors.

    An inference tensor has no version; it cannot be part of a backward pass either.
    """
    return (
        owner,
        *((t.data_ptr(), 0 if t.is_inference() else t._version, tuple(t.shape)) for t in inputs),
    )


def recall(call: Fingerprint) -> Tensor | None:
    """The key that the forward ``call`` was given, None if unknown.

    Raises:
        RecomputationError: Two forwards took the same input with different samples.
    """
    found = _calls.get(call)
    if found is None:
        return None
    if not torch.equal(found.key, found.first):
        raise RecomputationError(
            "two forwards with the same input tensor wait for their backward, so the sample of the recomputed one "
            "cannot be told. Give each its own tensor (x.clone()), or keep one sample: `with fx_approx.hold(model)`."
        )
    found.waiting = False
    return found.key.clone()


def _remember(call: Fingerprint, key: Tensor) -> None:
    before = _calls.pop(call, None)
    own = key.clone()
    _calls[call] = _Call(own, before.first if before is not None and before.waiting else own)
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
                "instead of calling it on temporary inputs, or keep one sample: `with fx_approx.hold(model)`."
            )
        return key
    key = torch.stack((state[SEED], state[STEP] // state[EVERY]))
    state[STEP] += state[INCREMENT]
    _remember(call, key)
    return key


@next_key.register_fake
def _(state: Tensor, inputs: list[Tensor], owner: int) -> Tensor:
    return state.new_empty(2)
