"""The selections that a training step of a transformed model made, as factors of column-row pairs."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fx_approx.capture.records import SECTION
from fx_approx.core.candidates import Frontend, Role
from fx_approx.sampling import Selection


@dataclasses.dataclass(frozen=True)
class Factors:
    """What multiplies each pair of the calls of one layer or function, in the order of the calls.

    Attributes:
        calls: ``[pairs of all groups]`` each: 0 for a pair that was not read, its scale for one that was; None for a
            call that was exact.
        every: The number of calls was not known beforehand, as in a part that is not traced.
    """

    calls: tuple[Tensor | None, ...]
    every: bool = False


class Watched:
    """Records what the selectors of transformed models choose while they run.

    Attributes:
        ran: The models in the order in which their graphs ran, with what they were called with.
    """

    def __init__(self, model: nn.Module, pieces: Sequence[nn.Module]) -> None:
        """Watches ``pieces``, which are graphs of ``model`` on its parameters, or the model itself."""
        self.model, self.pieces = model, tuple(pieces)
        self.ran: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
        self._ahead: dict[int, tuple[Selection | None, ...]] = {}
        self._own: dict[int, list[Selection | None]] = {}
        self._called: collections.Counter[str] = collections.Counter()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Records the forwards inside."""
        handles = []
        for piece in self.pieces:
            runtime: Any = piece._fx_approx
            handles.append(piece.register_forward_pre_hook(self._note_call, with_kwargs=True))
            if runtime.resample is not None:
                handles.append(runtime.resample.register_forward_hook(self._note_ahead, prepend=True))
            for section in runtime.program.capture.sections:
                note = functools.partial(self._note_section, section.path)
                handles.append(piece.get_submodule(section.path).register_forward_pre_hook(note))
            handles += [one.register_forward_hook(self._note_own) for one in runtime.selectors.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note_call(self, piece: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.ran.append((piece, args, kwargs))

    def _note_section(self, path: str, *_: Any) -> None:
        self._called[path] += 1

    def _note_ahead(self, resample: nn.Module, args: Any, made: tuple[Selection | None, ...]) -> None:
        self._ahead.setdefault(id(resample), made)

    def _note_own(self, selector: nn.Module, args: Any, made: Selection | None) -> None:
        self._own.setdefault(id(selector), []).append(made)

    def factors(self) -> dict[str, Factors]:
        """By the name of a layer or function in the model, without the number of its call.

        Raises:
            ValueError: A product chose where the plan has no selection of one product of the output.
        """
        found: dict[str, Factors] = {}
        for piece in dict.fromkeys(piece for piece, _, _ in self.ran):
            for name, own in self._of(piece).items():
                before = found.get(name)
                found[name] = own if before is None else Factors((*before.calls, *own.calls), own.every or before.every)
        return found

    def _of(self, piece: nn.Module) -> dict[str, Factors]:
        runtime: Any = piece._fx_approx
        places = _places(piece, self.model)
        ahead = {} if runtime.resample is None else self._shared(runtime)
        times = self._times(runtime)
        again: dict[str, int] = {}
        found: dict[str, Factors] = {}
        for candidate in runtime.record.candidates:
            selector = runtime.selectors.get((candidate.name, Role.OUTPUT))
            own = [] if selector is None else self._own.get(id(selector), [])
            total = (candidate.pairs or 0) * candidate.groups
            made = [_factor(one, total, candidate.groups) for one in own] if own else [ahead.get(candidate.name)]
            every = candidate.frontend is Frontend.SWAP or len(own) > 1
            name = _renamed(candidate.fqn, places)
            before = found.get(name, Factors(()))
            found[name] = Factors((*before.calls, *made), before.every or every)
            again[name] = 1 if own else times.get(candidate.node, 1)
        return {name: Factors(own.calls * again[name], own.every) for name, own in found.items()}

    def _times(self, runtime: Any) -> dict[str, int]:
        """How often each node of a section ran: as often as the section was called, each time under one selection."""
        sections = runtime.program.capture.sections
        nodes = runtime.program.capture.graph.nodes if sections else ()
        return {n.name: self._called[sections[n.meta[SECTION]].path] for n in nodes if SECTION in n.meta}

    def _shared(self, runtime: Any) -> dict[str, Tensor]:
        """The factors of the readers whose selections are made ahead, by the reader's name."""
        made = self._ahead.get(id(runtime.resample))
        if made is None:
            return {}
        widths = {one.name: (one.pairs or 0) * one.groups for one in runtime.record.candidates}
        found: dict[str, Tensor] = {}
        for chosen, one in zip(made, runtime.record.analysis.sharing.classes, strict=True):
            if chosen is None:
                continue
            units = _factor(chosen, one.units, one.groups)
            assert units is not None
            for reading in one.readings:
                factor = found.setdefault(reading.name, units.new_ones(widths[reading.name]))
                stretch = slice(reading.offset, reading.offset + one.units * reading.block)
                factor[stretch] = units.repeat_interleave(reading.block)
        return found


def _places(piece: nn.Module, model: nn.Module) -> dict[str, str]:
    """Where the modules of ``piece`` are in ``model``: those on the same parameters, and those that hold them."""
    paths = {id(parameter): path for path, parameter in model.named_parameters(remove_duplicate=False)}
    found: dict[str, str] = {}
    for path, parameter in piece.named_parameters():
        here, there = path.split("."), paths.get(id(parameter), path).split(".")
        while here and there and here[-1] == there[-1]:
            here, there = here[:-1], there[:-1]
            found.setdefault(".".join(here), ".".join(there))
    return found


def _renamed(name: str, places: dict[str, str]) -> str:
    """The name in the model of what is called ``name`` in a graph of it."""
    here = name
    while here and here not in places:
        here = here.rpartition(".")[0]
    rest = name[len(here) :].removeprefix(".")
    return ".".join(filter(None, (places.get(here, here), rest)))


def _factor(chosen: Selection | None, total: int, groups: int) -> Tensor | None:
    """``[total]``; a selection of each group counts from the group's first pair."""
    if chosen is None:
        return None
    indices, scale = chosen
    if not total:
        raise ValueError("a selection was made of a product whose number of pairs is not known")
    if indices.shape[0] not in (1, groups):
        raise ValueError(f"expected a selection for each of {groups} groups, got {indices.shape[0]}")
    starts = torch.arange(indices.shape[0], device=indices.device).unsqueeze(1) * (total // indices.shape[0])
    values = torch.ones(indices.shape, dtype=torch.float64) if scale is None else scale.double()
    factor = torch.zeros(total, dtype=torch.float64)
    factor.index_add_(0, (indices + starts).flatten(), values.flatten())
    return factor
