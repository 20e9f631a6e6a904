"""Times of the variants of a training step, and what follows from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from _device import Quartiles, quartiles, speedup


@dataclasses.dataclass(frozen=True)
class Timed:
    """One variant.

    Attributes:
        model: Name of the model.
        what: Its scope, or what is sampled.
        optimizer: Name of the optimiser.
        variant: ``exact``, ``kept``, ``subnetwork`` or ``narrow``.
        compiled: By ``torch.compile``.
        seconds: Of each step, in the order in which all variants took theirs.
        parameters: Trained ones.
        own_forward: The subnetwork is an instance of the model's own class.
        reason: Why it is not, if so.
        measured: When, and on what.
    """

    model: str
    what: str
    optimizer: str
    variant: str
    compiled: bool
    seconds: list[float]
    parameters: int
    own_forward: bool
    reason: str
    measured: str = ""

    @property
    def key(self) -> tuple[str, str, str, str, bool]:
        """What tells it from the others."""
        return self.model, self.what, self.optimizer, self.variant, self.compiled

    @property
    def milliseconds(self) -> float:
        """The median."""
        return 1000 * quartiles(self.seconds)[1]

    def over(self, other: Timed) -> Quartiles:
        """How many times as fast as ``other``, over neighbouring steps."""
        return speedup(other.seconds, self.seconds)


def measured_on(environment: Mapping[str, Any]) -> str:
    """When, and on what, from the environment of a run."""
    told = "{date}, {processor}, {threads} threads, load {load}, torch {torch}"
    return told.format_map(environment)
