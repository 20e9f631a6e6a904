"""What subnetworks are cut out of, for both frontends: a transformed model, or a backend's graphs."""

from __future__ import annotations

import abc
from typing import Any

from torch import nn

from fx_approx.errors import UnsupportedError
from fx_approx.runtime.approx_module import ApproxModule, find
from fx_approx.runtime.controls import set_each, synchronize_scores
from fx_approx.runtime.handle import GraphHandle
from fx_approx.runtime.rng import SELECTION_INTERVAL
from fx_approx.subnetworks.extract import extract
from fx_approx.subnetworks.from_backend import MisfitError, graphs_of, made_ahead
from fx_approx.subnetworks.record import record_of
from fx_approx.subnetworks.reselect import cut_anew, fits, reselect_graphs
from fx_approx.subnetworks.selections import Selections, check_chosen, first_selections, selections_of


class Source(abc.ABC):
    """Where :class:`fx_approx.subnetworks.Phases` gets its subnetworks.

    Attributes:
        given: The transformed model, or the backend, as functions on both take it.
        full: What is called where no subnetwork is.
        example: A batch, on which the model's own Python is tried.
    """

    given: ApproxModule | GraphHandle
    full: nn.Module
    example: Any

    @property
    @abc.abstractmethod
    def pieces(self) -> tuple[ApproxModule, ...]:
        """The transformed graphs."""

    @abc.abstractmethod
    def sample_sub(self) -> nn.Module | None:
        """A subnetwork by any selections, to be thrown away; None where there is nothing to cut yet."""

    @abc.abstractmethod
    def chosen(self, group: Any) -> Selections | None:
        """The next selections, equal on all ranks of ``group``; None where each graph tells when it is cut."""

    @abc.abstractmethod
    def anew(self, sub: nn.Module, chosen: Selections | None, group: Any) -> bool:
        """Cuts ``sub`` anew in place; False, with nothing changed, where it takes another subnetwork."""

    @property
    def interval(self) -> int:
        """Steps that the transform keeps a selection for."""
        return max((int(one._fx_approx.state[SELECTION_INTERVAL]) for one in self.pieces), default=1)

    @property
    def samples(self) -> bool:
        """Whether a layer is sampled in training."""
        return any(one._fx_approx.samples for one in self.pieces)

    @property
    def setting(self) -> tuple[Any, ...]:
        """All ratios and switches."""
        return tuple(one._fx_approx.setting for one in self.pieces)

    def settings(self) -> dict[Any, tuple[float, bool]]:
        """Ratio and switch of each selector, to be set again by ``set_each``."""
        return {
            one: (one.spec.ratio, one.enabled) for piece in self.pieces for one in piece._fx_approx.selectors.values()
        }

    def switch_off(self) -> None:
        """Leaves the full model exact."""
        set_each(self.given, {one: (ratio, False) for one, (ratio, _) in self.settings().items()})

    def check_learnt(self) -> None:
        """ValueError where selections would follow scores that have learnt nothing."""
        for piece in self.pieces:
            resample = piece._fx_approx.resample
            if resample is not None and not resample.known:
                raise ValueError(
                    "schedule: scores ema have learnt nothing yet, and a subnetwork teaches them nothing; expected "
                    "exact steps before the first phase, such as ExactWarmup(schedule, 50), in which phases.model, or "
                    "recipe.model, was called in training mode, and no other module"
                )

    def compare(self, sub: nn.Module, group: Any) -> None:
        """DistributedMismatchError where ranks have cut by other selections."""
        for approx, chosen in self.graphs(sub):
            if chosen:
                check_chosen(approx, chosen, group)

    @abc.abstractmethod
    def graphs(self, sub: nn.Module) -> list[tuple[ApproxModule, Selections]]:
        """The graphs that ``sub`` was cut out of, each with those of its selections that are made ahead together.

        Raises:
            ValueError: One is no longer there.
        """

    def make(self, chosen: Selections | None, group: Any) -> nn.Module:
        """A subnetwork by these selections."""
        return extract(self.given, chosen, example_inputs=self.example, process_group=group)


class TransformedSource(Source):
    """A transformed model."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.given = self.full = self.approx = find(model)
        self.example = example

    @property
    def pieces(self) -> tuple[ApproxModule, ...]:
        return (self.approx,)

    def sample_sub(self) -> nn.Module | None:
        return extract(self.approx, first_selections(self.approx) or None)

    def chosen(self, group: Any) -> Selections | None:
        if group is not None:
            synchronize_scores(self.approx, group)
        found = selections_of(self.approx, None, group)
        self.check_learnt()
        return found

    def anew(self, sub: nn.Module, chosen: Selections | None, group: Any) -> bool:
        record = record_of(sub)
        assert chosen is not None
        if not fits(record, chosen):
            return False
        try:
            cut_anew(sub, record, self.approx, chosen)
        except UnsupportedError:  # selections of one tensor were equal, or are so now
            return False
        return True

    def graphs(self, sub: nn.Module) -> list[tuple[ApproxModule, Selections]]:
        return [(self.approx, record_of(sub).selections)]


class BackendSource(Source):
    """What a backend of ``torch.compile`` runs."""

    def __init__(self, handle: GraphHandle, example: Any) -> None:
        """Needs a batch.

        Raises:
            ValueError: There is no example, or the backend has compiled no model, or several, or no graph that samples.
        """
        if example is None:
            raise ValueError("example_inputs: expected a batch, which a subnetwork of a backend's model is tried on")
        self.given = self.handle = handle
        self.full, self.example = handle.compiled(handle.model("Phases")), example
        if not handle.pieces:
            raise ValueError("model: the backend has compiled no graph that samples yet; run a training step first")
        self._held = handle.pieces

    @property
    def pieces(self) -> tuple[ApproxModule, ...]:
        return self.handle.pieces

    def sample_sub(self) -> nn.Module | None:
        return None

    def chosen(self, group: Any) -> Selections | None:
        for piece in self.pieces if group is not None else ():
            synchronize_scores(piece, group)
        self.check_learnt()
        return None

    def make(self, chosen: Selections | None, group: Any) -> nn.Module:
        made = super().make(chosen, group)
        # Compiled code alone keeps graphs, and the state of their samplers: they must not go while a subnetwork trains.
        self._held = tuple(graphs_of(record_of(made), self.handle))
        return made

    def anew(self, sub: nn.Module, chosen: Selections | None, group: Any) -> bool:
        try:
            reselect_graphs(sub, record_of(sub), self.handle, chosen, group)
        except (MisfitError, UnsupportedError):
            return False
        return True

    def graphs(self, sub: nn.Module) -> list[tuple[ApproxModule, Selections]]:
        record, found, start = record_of(sub), [], 0
        for approx in graphs_of(record, self.handle):
            count = made_ahead(approx)
            found.append((approx, record.selections[start : start + count]))
            start += count
        return found


def source_of(model: nn.Module | GraphHandle, example: Any) -> Source:
    """What subnetworks of ``model`` are cut out of."""
    return BackendSource(model, example) if isinstance(model, GraphHandle) else TransformedSource(model, example)
