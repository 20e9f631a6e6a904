"""Which examples the epochs of a run read: all of them, or those that an importance sampler draws."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from config import Config, ConfigError, expect, one_of
from torch import Tensor

from fx_approx.data import ImportanceSampler

RULES: dict[str, Callable[..., ImportanceSampler]] = {
    "importance": ImportanceSampler,
    "infobatch": ImportanceSampler.infobatch,
}


def sampler_of(config: Config, name: str, size: int, seed: int) -> ImportanceSampler | None:
    """The sampler of a variant for so many examples, None if it reads all of them.

    Raises:
        ConfigError: Names variant, key, value and what would be right.
    """
    options = dict(config.variants[name].examples)
    if not options:
        return None
    where, epochs = f"{config.path.name}: variants.{name!r}.examples", config.training.epochs
    try:
        one_of("data.kind", config.data.kind, ("images", "speakers", "labelled"))
        expect("training.epochs", epochs, "a whole number beside examples", epochs >= 1 and epochs == int(epochs))
        rule = options.pop("rule", None)
        one_of("rule", rule, list(RULES))
        return RULES[rule](size, epochs=int(epochs), seed=seed, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None


def steps_of(config: Config, name: str, size: int) -> int:
    """Steps of a training by the sampler of a variant: the most there can be, where chance decides.

    Raises:
        ConfigError: As :func:`sampler_of`.
    """
    sampler, total = sampler_of(config, name, size, 0), 0
    assert sampler is not None
    sampler.update(torch.arange(size), torch.ones(size))
    for epoch in range(int(config.training.epochs)):
        sampler.set_epoch(epoch)
        total += (len(sampler) if sampler.sampler == "systematic" else size) // config.training.batch
    return total


class Reading:
    """The epochs of a run that does not read all of its examples.

    Attributes:
        epochs: How many there are.
        sampler: What draws them.
    """

    def __init__(self, sampler: ImportanceSampler, epochs: int, batch: int) -> None:
        """Begins before the first epoch."""
        self.sampler, self.epochs, self._batch = sampler, epochs, batch
        self._number, self._chosen = 0, torch.empty(0, dtype=torch.int64)

    def order(self, number: int) -> Tensor:
        """The examples of epoch ``number``."""
        self.sampler.set_epoch(number)
        self._number, self._chosen = number, torch.tensor(list(self.sampler))
        return self._chosen

    def batch(self, place: int) -> tuple[Tensor, Tensor]:
        """The numbers of the examples of a batch of the epoch, and what their losses weigh."""
        index = self._chosen[place * self._batch : (place + 1) * self._batch]
        return index, self.sampler.weights(index)

    def share(self, place: int) -> float:
        """How much of the training is over before a batch of the epoch; each epoch counts as much."""
        return (self._number + place / max(1, math.floor(self._chosen.numel() / self._batch))) / self.epochs
