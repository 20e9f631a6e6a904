"""Texts as batches: next characters of a text, who speaks in a play, and texts with labels."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from config import ConfigError, Data
from images import Batch, split
from torch import Tensor

Tokenizer = Callable[[Sequence[str], int], Tensor]
"""Texts and a length to ids ``[texts, length]``, 0 where there is nothing."""

_SPEECH = re.compile(r"^([A-Z][A-Za-z' ]+):\n(.+?)(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)
_SPEAKERS = 10


def read(root: Path, name: str) -> str:
    """The text ``input.txt`` in the folder ``name`` below ``root``.

    Raises:
        ConfigError: It is not there.
    """
    for place in (root / name / "input.txt", root / "input.txt"):
        if place.is_file():
            return place.read_text(encoding="utf-8")
    raise ConfigError(f"--data {root}: expected {name}/input.txt, the text that char-rnn calls tiny-shakespeare")


def characters_of(texts: Sequence[str], length: int) -> Tensor:
    """Code points below 128, one for each character; 0 beyond the end."""
    rows = [[min(ord(letter), 127) for letter in text[:length]] for text in texts]
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


class Characters:
    """Stretches of one text, each with the character that follows every one of its characters.

    The last tenth of the text is for the test. An epoch is as many stretches as cover the text once, at random places.
    """

    def __init__(self, text: str, data: Data, device: torch.device) -> None:
        """Counts the characters of ``text``."""
        letters = sorted(set(text))
        places = {letter: place for place, letter in enumerate(letters)}
        ids = torch.tensor([places[letter] for letter in text], device=device)
        cut = len(ids) * 9 // 10
        self._length = data.length
        train, test = ids[:cut], ids[cut:]
        self._train = train[: data.limit * data.length + 1] if data.limit else train
        self._test = test[: data.test_limit * data.length + 1] if data.test_limit else test
        self.name, self.classes = "characters", len(letters)
        self.size = (len(self._train) - 1) // self._length

    def epoch(self, seed: int, number: int, batch: int, order: Tensor | None = None) -> Iterator[Batch]:
        """The full batches of an epoch."""
        generator = torch.Generator().manual_seed(seed * 100_003 + number)
        count = self.size // batch * batch
        starts = torch.randint(len(self._train) - self._length, (count,), generator=generator)
        steps = torch.arange(self._length, device=self._train.device)
        for chosen in starts.to(self._train.device).split(batch):
            places = chosen[:, None] + steps
            yield self._train[places], self._train[places + 1]

    def test(self) -> Iterator[Batch]:
        """The end of the text, cut into stretches."""
        count = (len(self._test) - 1) // self._length
        x = self._test[: count * self._length].view(count, -1)
        y = self._test[1 : count * self._length + 1].view(count, -1)
        yield from zip(x.split(64), y.split(64), strict=True)

    def held_out(self, count: int) -> Characters:
        """The same text but for the end of what is trained on, of ``count`` stretches and a character."""
        cut = len(self._train) - count * self._length - 1
        made = copy.copy(self)
        made._train, made._test = self._train[:cut], self._train[cut:]
        made.size = (cut - 1) // self._length
        return made


def speeches(text: str) -> list[tuple[str, str]]:
    """Speaker and speech of those in ``text`` (a name with a colon, then lines up to a blank one) by the ten busiest.

    Raises:
        ConfigError: There are none of two speakers or more.
    """
    found = [(one[1], one[2].replace("\n", " ")) for one in _SPEECH.finditer(text)]
    busiest = [name for name, _ in Counter(name for name, _ in found).most_common(_SPEAKERS)]
    if len(busiest) < 2:
        raise ConfigError("data: expected speeches of two speakers or more: NAME:, then lines up to a blank one")
    return [(name, speech) for name, speech in found if name in busiest]


def labelled(root: Path, name: str) -> list[tuple[str, str]]:
    """Label and text of each line of ``texts.tsv``, with a tab in between, in the folder ``name`` below ``root``.

    Raises:
        ConfigError: It is not there, has a line without a tab, or fewer than two labels.
    """
    places = [root / name / "texts.tsv", root / "texts.tsv"]
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        raise ConfigError(f"--data {root}: expected {name}/texts.tsv, a label, a tab and a text in each line")
    found = []
    for number, line in enumerate(place.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        label, tab, text = line.partition("\t")
        if not (label and tab and text):
            raise ConfigError(f"{place.name}, line {number}: expected a label, a tab and a text, got {line[:60]!r}")
        found.append((label, text))
    if len({label for label, _ in found}) < 2:
        raise ConfigError(f"{place.name}: expected two labels or more in {len(found)} lines")
    return found


class Labelled:
    """Texts with labels, to tell the label. Every fifth text is for the test."""

    def __init__(
        self, name: str, pairs: Sequence[tuple[str, str]], data: Data, device: torch.device, tokenizer: Tokenizer
    ) -> None:
        """Takes ``pairs`` of label and text."""
        names = [label for label, _ in Counter(label for label, _ in pairs).most_common()]
        ids = tokenizer([text for _, text in pairs], data.length).to(device)
        labels = torch.tensor([names.index(label) for label, _ in pairs], device=device)
        test = torch.arange(len(labels), device=device) % 5 == 4
        limit, test_limit = data.limit or len(labels), data.test_limit or len(labels)
        self._train, self._labels = ids[~test][:limit], labels[~test][:limit]
        self._test, self._test_labels = ids[test][:test_limit], labels[test][:test_limit]
        self.name, self.classes, self.size = name, len(names), len(self._train)

    def epoch(self, seed: int, number: int, batch: int, order: Tensor | None = None) -> Iterator[Batch]:
        """The full batches of an epoch, in random order or in ``order``."""
        generator = torch.Generator().manual_seed(seed * 100_003 + number)
        order = torch.randperm(self.size, generator=generator) if order is None else order
        for chosen in order.to(self._train.device)[: len(order) // batch * batch].split(batch):
            yield self._train[chosen], self._labels[chosen]

    def test(self) -> Iterator[Batch]:
        """All test texts."""
        yield from zip(self._test.split(256), self._test_labels.split(256), strict=True)

    def held_out(self, count: int) -> Labelled:
        """The same texts but for ``count`` of those that are trained on."""
        kept, out = (one.to(self._train.device) for one in split(self.size, count))
        made = copy.copy(self)
        made._test, made._test_labels = self._train[out], self._labels[out]
        made._train, made._labels, made.size = self._train[kept], self._labels[kept], len(kept)
        return made
