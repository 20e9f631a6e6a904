"""The random numbers of the forward that runs now, or that a checkpoint recomputes."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fx_approx._compat import at_end_of_backward, in_backward, tree_leaves
from fx_approx.capture.containers import tensors
from fx_approx.errors import RecomputationError
from fx_approx.runtime.rng import (
    SEED,
    SELECTION_INTERVAL,
    STEP,
    Draw,
    draw,
    fingerprint,
    forget_calls,
    further,
    next_key,
    recall,
)

_numbers = itertools.count()


class ForwardRandomness:
    """What sample a forward takes, kept from its beginning to the end of its backward pass.

    A forward draws once. Layers and sections that Python calls, and not the graph, take their part of that from here,
    and for each further call in one forward another key. When the backward pass reaches the outputs of a forward, its
    numbers are put back, so that a part which a checkpoint recomputes takes the sample that it had.

    A copy belongs to no forward; it keeps only which sites there are.

    Attributes:
        number: Unique in the process; tells forwards of different models apart.
        sites: Numbers of the sites whose uniforms a forward draws, in order.
        counts: Uniforms of each.
        inside: A forward is running in which Python calls layers or sections.
        drawn: The numbers of the present forward; None outside, and where nothing is drawn.
        head: What the sections of the present forward are handed; None outside, and without sections.
        calls: How often a site, or the section of a path, was called in the present forward, outside the graph.
        served: A graph of a section has run in the present forward, in training.
    """

    def __init__(self, sites: Sequence[int] = (), counts: Sequence[int] = ()) -> None:
        self.number = next(_numbers)
        weakref.finalize(self, forget_calls, self.number)
        self.sites, self.counts = list(sites), list(counts)
        self.inside = self.served = False
        self.drawn: Draw | None = None
        self.head: tuple[Any, ...] | None = None
        self.calls: dict[int | str, int] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.sites, self.counts)

    def of(self, key: Tensor) -> Draw:
        """The randomness of ``key``."""
        numbers = draw(key, self.sites, self.counts) if self.sites else key.new_empty(0, dtype=torch.float32)
        return Draw(key, numbers)

    def fresh(self, state: Tensor, inputs: Any) -> Draw:
        """The randomness of a forward that begins with ``inputs``, by which its recomputation is recognised.

        ``state`` counts on, see :func:`fx_approx.runtime.rng.new_state`.
        """
        return self.of(next_key(state, _detached(inputs), self.number))

    def upcoming(self, state: Tensor) -> Draw:
        """The randomness of the next forward, which stays the next."""
        return self.of(torch.stack((state[SEED], state[STEP] // state[SELECTION_INTERVAL])))

    def further(self, number: int) -> Draw | None:
        """The randomness of the ``number``-th further call of one place in the present forward."""
        return self.drawn if self.drawn is None or not number else self.of(further(self.drawn.key, number))

    def counted(self, place: int | str) -> int:
        """How often a site, or the section of a path, was called before in the present forward; this call counts."""
        number = self.calls.get(place, 0)
        self.calls[place] = number + 1
        return number

    def recalled(self, inputs: Any) -> Draw:
        """The randomness of the forward that is recomputed now, at a layer or section that is called with ``inputs``.

        Raises:
            RecomputationError: It was in a part that was called by itself, so that nothing tells which call this is.
        """
        key = recall(fingerprint(self.number, _detached(inputs)))
        if key is not None and (self.drawn is None or not torch.equal(key, self.drawn.key)):
            self.drawn = None  # what follows may belong to the same part, and not to the forward of the whole model
            return self.of(key)
        if self.drawn is None:
            raise RecomputationError(
                "a checkpoint recomputes a part of the transformed model that was called by itself. Checkpoint the "
                "whole model, or put the checkpoint into its forward, or transform the part alone."
            )
        return self.drawn

    def refuse_further(self, place: int | str, what: str) -> None:
        """For a place that is recomputed.

        Raises:
            RecomputationError: Its forward called it several times, each with numbers of its own.
        """
        if self.calls.get(place, 0) > 1:
            raise RecomputationError(
                f"a checkpoint recomputes {what} that its forward called several times outside the graph, and nothing "
                "tells the calls apart: checkpoint the whole model, or leave the layer exact"
            )

    def run(self, forward: Callable[[], Any]) -> Any:
        """Runs a forward in which layers or sections are called by Python; :meth:`mark` is to follow."""
        self.inside, self.calls, self.served = True, {}, False
        try:
            return forward()
        except BaseException:
            if torch.compiler.is_compiling() or not in_backward():
                self.forget()
            raise
        finally:
            self.inside = False

    def mark(self, result: Any) -> None:
        """Makes checkpointed parts recompute with this forward's sample: its backward begins at these outputs."""
        drawn, head, calls = self.drawn, self.head, self.calls
        if (drawn is None and head is None) or torch.compiler.is_compiling():
            return
        if not in_backward():
            self.forget()
        reference = weakref.ref(self)

        def restore(grad: Tensor) -> None:
            randomness = reference()
            if randomness is not None:
                randomness.drawn, randomness.head, randomness.calls = drawn, head, calls
                at_end_of_backward(randomness.forget)

        for tensor in tensors(result):
            if tensor.requires_grad:
                tensor.register_hook(restore)

    def forget(self) -> None:
        """Ends a forward, or its backward pass: no recomputation from now on belongs to it."""
        self.drawn = self.head = None


def _detached(value: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
