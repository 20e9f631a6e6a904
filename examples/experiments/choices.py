"""Which try of a variant is taken: the best on training examples that were held out; and what a run is known by."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from config import Config, ConfigError, Variant, plain
from records import Records, accuracy, digest, told

FORMAT = 1


def described(config: Config, name: str, identity: Mapping[str, Any]) -> dict[str, Any]:
    """All that the results of a variant depend on, but for the seed, code and versions."""
    found = {
        "variant": plain(config.variants[name]),
        "data": {**config.data.model_dump(), "workers": 0},
        "network": dict(config.network),
        "training": config.training.model_dump(),
        "start": None if config.start is None else config.start.model_dump(),
        **identity,
    }
    to = config.variants[name].to
    return {**found, "to": plain(config.variants[to])} if to else found


def key(described: Mapping[str, Any], seed: int, validation: int = 0) -> str:
    """Tells runs apart; those with so many examples held out are others."""
    return digest([FORMAT, described, seed, *([validation] if validation else [])])


@dataclasses.dataclass(frozen=True)
class Try:
    """One of the ways that a variant may be trained.

    Attributes:
        values: What is tried, by dotted names of fields.
        config: The configuration with these values in the variant, and with what was chosen in the one whose cost it
            has.
    """

    values: Mapping[str, Any]
    config: Config


class NotChosen(ConfigError):
    """Not all tries of a variant were run."""


class Choices:
    """What the validation runs of a configuration say, computed in one way.

    Attributes:
        records: Those runs.
    """

    def __init__(self, config: Config, identity: Mapping[str, Any], out: Path, wait: bool = False) -> None:
        """Of the runs in ``out``; ``wait`` for those that other processes are at."""
        self.records = Records(out, f"{config.name}-choice")
        self._config, self._identity, self._wait = config, identity, wait

    def tries(self, name: str) -> list[Try]:
        """Those of a variant, in order; one alone if nothing is tried.

        Raises:
            NotChosen: It is to cost what another one does, and that one's choice has not been made.
        """
        variant = self._config.variants[name]
        beside = self.settled([variant.to]) if variant.to else self._config
        return [Try(values, put(beside, name, other)) for values, other in variant.alternatives()]

    def key(self, name: str, one: Try, seed: int) -> str:
        """Of a validation run."""
        return key(described(one.config, name, self._identity), seed, self._config.validation)

    def settled(self, names: Iterable[str]) -> Config:
        """The configuration with what was chosen in ``names``, and in those whose costs they have.

        Raises:
            NotChosen: Not all tries of one were run.
        """
        given, config = self._config.variants, self._config
        for name in names:
            for other in filter(None, (given[name].to, name)):
                if given[other].tries:
                    config = put(config, other, self.chosen(other).config.variants[other])
        return config

    def chosen(self, name: str) -> Try:
        """The try whose mean accuracy is best, the first of equals.

        Raises:
            NotChosen: Not all of them were run; says which, and how to.
            ConfigError: All of them diverged.
        """
        tries = self.tries(name)
        means = [self._mean(name, one) for one in tries]
        best = max(range(len(tries)), key=lambda place: means[place])
        if means[best] == -math.inf:
            where, grid = self._where(name), self._config.variants[name].grid
            raise ConfigError(f"{where}: expected values of which some do not diverge, got {told(grid)}")
        return tries[best]

    def taken(self, name: str) -> str:
        """What was chosen, for people."""
        one, tries = self.chosen(name), self.tries(name)
        return f"takes {told(one.values)}, {percent(self._mean(name, one))} on held-out examples, of {len(tries)} tries"

    def accuracy(self, name: str, one: Try, seed: int) -> float | None:
        """Of a validation run, per cent; minus infinity if it diverged, None if it was not made."""
        run = self.key(name, one, seed)
        record = self.records.find(run)
        if record is None and self._wait:
            with self.records.claim(run, wait=True):  # no other process is at it any more
                record = self.records.find(run)
        if record is None:
            return None
        return -math.inf if record["diverged"] else accuracy(record)

    def _mean(self, name: str, one: Try) -> float:
        found = []
        for seed in self._config.choice_seeds:
            reached = self.accuracy(name, one, seed)
            if reached is None:
                raise NotChosen(
                    f"{self._where(name)}: expected a run of each with {self._config.validation} examples held out, "
                    f"got none of {told(one.values)}, seed {seed}, in {self.records.path}; first, with the other "
                    f"options of this run: run.py {self._config.path} --choose --only {name!r}"
                )
            found.append(reached)
        return sum(found) / len(found)

    def _where(self, name: str) -> str:
        return f"{self._config.path.name}: variants.{name!r}.tries"


def put(config: Config, name: str, variant: Variant) -> Config:
    """``config`` with another variant of that name."""
    return config.model_copy(update={"variants": {**config.variants, name: variant}})


def percent(reached: float) -> str:
    """An accuracy, for people."""
    return "diverged" if reached == -math.inf else f"{reached:.2f} %"


def ordered(config: Config, names: Sequence[str]) -> list[str]:
    """``names`` with baselines last, whose costs follow from what was chosen in others."""
    return sorted(names, key=lambda name: bool(config.variants[name].equal))
