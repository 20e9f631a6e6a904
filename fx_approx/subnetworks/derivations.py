"""How all that a subnetwork knows of its selections follows from those that the model makes, to be followed again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fx_approx.errors import UnsupportedError
from fx_approx.sampling.base import Selection
from fx_approx.subnetworks.cuts import Cut


@dataclasses.dataclass(frozen=True)
class _Value:
    """Stands for the value of a number among those of a :class:`Recipe`."""

    number: int


@dataclasses.dataclass(frozen=True)
class _Step:
    """A call of a function; in the arguments numbers stand for values."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any


@dataclasses.dataclass(frozen=True)
class _Source:
    """Which values a cut has."""

    inputs: _Value | None
    outputs: _Value | None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What follows from selections, as calls one behind the other; :meth:`follow` makes it of other selections.

    Attributes:
        steps: The values are the selections that the model makes, and behind them one for each step.
        cuts: By name, the cut of a tensor, whose selections are values.
        buffers: By name, the value that a buffer has.
        alike: Cuts that must have equal selections, since one tensor stands for both.
    """

    steps: tuple[_Step, ...]
    cuts: Mapping[str, tuple[Cut, _Source]]
    buffers: Mapping[str, _Value]
    alike: tuple[tuple[str, _Source, _Source], ...]

    def follow(self, chosen: Sequence[Selection | None]) -> tuple[dict[str, Cut], dict[str, Tensor]]:
        """The cuts and the buffers for other selections of the same sizes.

        Raises:
            UnsupportedError: Two selections of one tensor, which were equal, differ now.
        """
        values: list[Any] = list(chosen)

        def now(one: Any) -> Any:
            return None if one is None else values[one.number]

        for step in self.steps:
            args, kwargs = (_replaced(part, _Value, now) for part in (step.args, step.kwargs))
            values.append(step.function(*args, **kwargs))
        for name, one, other in self.alike:
            if not same_selections(now(one.inputs), now(one.outputs), now(other.inputs), now(other.outputs)):
                raise UnsupportedError(f"model: {name} is called with several selections")
        cuts = {
            name: dataclasses.replace(cut, inputs=now(source.inputs), outputs=now(source.outputs))
            for name, (cut, source) in self.cuts.items()
        }
        return cuts, {name: now(value) for name, value in self.buffers.items()}


class Derivations:
    """Calls functions of selections and writes the calls down.

    Attributes:
        chosen: The selections that the model makes, each an object of its own, also where one was given twice.
    """

    def __init__(self, chosen: Sequence[Selection | None]) -> None:
        """Begins with what the model makes."""
        self.chosen = tuple(None if one is None else Selection(*one) for one in chosen)
        self._steps: list[_Step] = []
        self._made: list[Any] = list(self.chosen)
        self._places = {id(one): _Value(place) for place, one in enumerate(self.chosen)}
        self._alike: list[tuple[str, Cut, Cut]] = []

    def derive(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``function(*args, **kwargs)``, a selection, a tensor, or None.

        Args:
            function: Of a module, so that it can be pickled.
            args: Selections that were given or derived here, in tuples and lists too, and plain values.
            kwargs: As ``args``.
        """
        value = function(*args, **kwargs)
        self._steps.append(_Step(function, *(_replaced(part, Selection, self._place) for part in (args, kwargs))))
        self._places[id(value)] = _Value(len(self._made))
        self._made.append(value)  # it lives on, so that its id stays its own
        return value

    def note_alike(self, name: str, one: Cut, other: Cut) -> None:
        """Writes down that ``name`` serves two readers, whose selections must be equal ever after."""
        self._alike.append((name, one, other))

    def recipe(self, cuts: Mapping[str, Cut], buffers: Mapping[str, Tensor]) -> Recipe:
        """How ``cuts`` and ``buffers`` were made; each of their values was given or derived here."""
        return Recipe(
            tuple(self._steps),
            {
                name: (dataclasses.replace(cut, inputs=None, outputs=None), self._source(cut))
                for name, cut in cuts.items()
            },
            {name: self._place(value) for name, value in buffers.items()},
            tuple((name, self._source(one), self._source(other)) for name, one, other in self._alike),
        )

    def _source(self, cut: Cut) -> _Source:
        inputs, outputs = (None if one is None else self._place(one) for one in (cut.inputs, cut.outputs))
        return _Source(inputs, outputs)

    def _place(self, value: Any) -> _Value:
        return self._places[id(value)]


def first_row(selection: Selection) -> Tensor:
    """The indices of a selection of one group, ``[k]``."""
    return selection.indices[0]


def same_selections(
    inputs: Selection | None, outputs: Selection | None, other_inputs: Selection | None, other_outputs: Selection | None
) -> bool:
    """Whether two cuts hold the same numbers: of inputs the units and their scales, of outputs the units."""
    return _same(inputs, other_inputs, True) and _same(outputs, other_outputs, False)


def _same(one: Selection | None, other: Selection | None, scaled: bool) -> bool:
    if one is None or other is None or one is other:
        return one is other
    if not torch.equal(one.indices, other.indices):
        return False
    if not scaled or one.scale is None or other.scale is None:
        return not scaled or one.scale is other.scale
    return torch.equal(one.scale, other.scale)


def _replaced(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """``value`` with what is of ``kind`` changed, in tuples, lists and dicts too."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_replaced(one, kind, change) for one in value)
    if isinstance(value, dict):
        return {key: _replaced(one, kind, change) for key, one in value.items()}
    return value
