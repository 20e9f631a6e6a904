"""Subnetworks of models that run under a backend of ``torch.compile``: narrow instances of the user's own class."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fx_approx.capture.error_text import describe
from fx_approx.capture.module_snapshot import kept_values
from fx_approx.capture.trace import kept_random_state, skeleton
from fx_approx.errors import UnsupportedError
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.exact import exact_copy
from fx_approx.runtime.graph_program import PROLOGUE
from fx_approx.runtime.handle import GraphHandle
from fx_approx.runtime.repeatable import Randomness
from fx_approx.runtime.upcoming import next_selections
from fx_approx.runtime.validation import check_inputs
from fx_approx.sampling.base import Selection
from fx_approx.subnetworks.comparing import difference, differs_in_evaluation, masked
from fx_approx.subnetworks.cuts import Cut, same_cut
from fx_approx.subnetworks.description import origin_of
from fx_approx.subnetworks.narrowing import Narrowing
from fx_approx.subnetworks.own_class import fit_own_class, inputs_read, narrow_tensors
from fx_approx.subnetworks.record import (
    ModelReference,
    Subnetwork,
    attach,
    identity_of,
    record_of,
    tensors_of,
    versions_of,
)
from fx_approx.subnetworks.selections import check_chosen, check_selections
from fx_approx.subnetworks.specialize import Chosen, specialise

Selections = Sequence[Selection | None]


class NothingToCutOutError(ValueError):
    """No graph of a backend makes a selection ahead, or none does any more."""


class MisfitError(ValueError):
    """A subnetwork cannot be cut anew in place: of other sizes, or of graphs that are no longer there."""


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A graph of a backend at fixed selections.

    Attributes:
        approx: The graph.
        chosen: The selections.
        run: Computes what it does, all of its channels that are read.
        cuts: By path in ``approx``, what is cut of its tensors.
        whole: Paths of the tensors that it reads as they are.
        sliced: Paths of those of which it takes slices, since several selections read them.
    """

    approx: ApproxModule
    chosen: tuple[Selection | None, ...]
    run: Callable[..., Any]
    cuts: Mapping[str, Cut]
    whole: frozenset[str]
    sliced: frozenset[str]


def extract_from_backend(
    handle: GraphHandle, selections: Selections | None, example_inputs: Any, process_group: Any = None
) -> nn.Module:
    """The subnetwork of the model that a backend compiles, see :func:`fx_approx.subnetworks.extract`."""
    model = handle.model("extract")
    args, kwargs = check_inputs(model, example_inputs)
    if args is None:
        raise ValueError(
            "example_inputs: expected a batch as the model is called with it: the model's own Python runs a subnetwork "
            "of what a backend compiles, and it must be seen to compute what the graphs do"
        )
    run = _Run(handle, model, args, kwargs, _Pieces(selections))
    expected = run.expected(quiet=True)
    cuts = _united(run.pieces.made, model)
    chosen = run.pieces.chosen()
    run.pieces.compare(process_group)
    root = skeleton(model, shared=False)
    narrow_tensors(root, model, cuts)
    full, untold = masked(model, cuts), ""

    def check(sub: nn.Module) -> str:
        nonlocal untold
        why = run.misfit(sub, expected)
        if not why:
            why, untold = differs_in_evaluation(sub, full, [(args, dict(kwargs))])
        return why

    reason, notes = fit_own_class(root, model, cuts, check)
    if reason:
        raise UnsupportedError(
            f"model: {type(model).__name__}: {reason}; and a backend of torch.compile has no graph of the whole model "
            f"that could run instead (it has {len(run.pieces.made)} of parts)"
        )
    record = Subnetwork(cuts, chosen, identity_of(model), True, "", versions_of(model), model=ModelReference(model))
    names = _names(model)
    record.graphs = tuple(_held(piece.approx, names) for piece in run.pieces.made)
    record.notes = (*notes, untold) if untold else notes
    attach(root, dataclasses.replace(record, origin=origin_of(model, root)))
    return root


def recut_from_backend(
    sub: nn.Module, handle: GraphHandle, selections: Selections | None, process_group: Any = None
) -> tuple[dict[str, Tensor], Subnetwork]:
    """What the tensors of ``sub`` hold at other selections, and its record then; nothing is changed.

    Raises:
        MisfitError: Its graphs are no longer there.
        ValueError: The selections are of another model.
    """
    record, model = record_of(sub), handle.model("reselect")
    pieces = _Pieces(selections)
    for approx in graphs_of(record, handle):
        pieces.made.append(pieces.specialised(approx))
    chosen, cuts = pieces.chosen(), _united(pieces.made, model)
    pieces.compare(process_group)
    full = tensors_of(model)
    fresh = {name: cuts.get(name, Cut(name)).of(tensor) for name, tensor in full.items()}
    for name, tensor in tensors_of(sub).items():
        holder, _, attribute = name.rpartition(".")
        if attribute == "reads" and name not in full:
            weight = f"{holder}.weight".lstrip(".")
            cut = cuts.get(weight, Cut(weight))
            fresh[name] = tensor if cut.inputs is None else inputs_read(cut, full[weight])
    return fresh, dataclasses.replace(record, cuts=cuts, selections=chosen, versions=versions_of(model))


def graphs_of(record: Subnetwork, handle: GraphHandle) -> list[ApproxModule]:
    """The graphs that a subnetwork was cut out of, in the order of its selections.

    Raises:
        MisfitError: One is no longer there.
    """
    names, found = _names(handle.model("a subnetwork")), []
    for graph in record.graphs:
        alike = [one for one in handle.pieces if _held(one, names) == graph]
        if not alike:
            raise MisfitError("model: the graphs that sub was cut out of are gone; run a training step first")
        found.append(alike[-1])
    return found


def made_ahead(approx: ApproxModule) -> int:
    """How many selections a graph makes ahead together."""
    resample = approx._fx_approx.resample
    return 0 if resample is None else len(resample.shared)


class _Pieces:
    """Has the graphs of a backend run at fixed selections, which are made when each is called first.

    Attributes:
        made: The graphs, in the order of their first calls.
        quiet: Nothing is dropped at random.
    """

    def __init__(self, selections: Selections | None) -> None:
        self.given = None if selections is None else list(selections)
        self.made: list[_Piece] = []
        self.quiet = True

    def __call__(self, approx: ApproxModule) -> Callable[..., Any]:
        """What runs in the place of a graph."""
        piece = next((piece for piece in self.made if piece.approx is approx), None)
        if piece is None:
            piece = self.specialised(approx)
            self.made.append(piece)
        return _quietly(piece.run) if self.quiet else piece.run

    def specialised(self, approx: ApproxModule) -> _Piece:
        """A graph at its next selections, or at the first of those that are given and left."""
        count = made_ahead(approx)
        if self.given is None:
            chosen = next_selections(approx)
        else:
            chosen, self.given = tuple(self.given[:count]), self.given[count:]
            check_selections(approx, chosen, sum(len(piece.chosen) for piece in self.made))
        graph = approx._fx_approx.program.graph
        assert graph is not None
        narrowing = Narrowing(skeleton(exact_copy(approx)), approx)
        made = specialise({"": graph}, approx, narrowing, (), Chosen(chosen, {}, {}))[""]
        narrowing.apply()
        whole = frozenset(_read(made.graph, narrowing.root)) - set(narrowing.cuts)
        run = _AtSelections(approx, chosen).run
        return _Piece(approx, chosen, run, narrowing.cuts, whole, narrowing.kept)

    def compare(self, process_group: Any) -> None:
        """DistributedMismatchError where the selections differ between the ranks of a group, if there is one."""
        for piece in self.made if process_group is not None else ():
            check_chosen(piece.approx, piece.chosen, process_group)

    def chosen(self) -> tuple[Selection | None, ...]:
        """All selections.

        Raises:
            NothingToCutOutError: There are none.
            ValueError: More were given.
        """
        found = tuple(one for piece in self.made for one in piece.chosen)
        if not found:
            raise NothingToCutOutError("model: no graph makes a selection ahead, so that there is nothing to cut out")
        if self.given:
            raise ValueError(
                f"selections: expected {len(found)}, one for each that the graphs make, got {len(self.given)} more"
            )
        return found


class _AtSelections(fx.Interpreter):
    """Runs the graph of a transformed model at given selections; nothing of its sampling state moves."""

    def __init__(self, approx: ApproxModule, chosen: tuple[Selection | None, ...]) -> None:
        super().__init__(approx, graph=approx._fx_approx.program.graph)
        self.chosen = chosen

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target == f"{PROLOGUE}.resample":
            return self.chosen
        if target == PROLOGUE or str(target).startswith(f"{PROLOGUE}.o"):  # randomness, and what scores learn from
            return None
        return super().call_module(target, args, kwargs)


def _read(graph: fx.Graph, root: nn.Module) -> list[str]:
    """Paths of the tensors that a graph reads."""
    paths = [str(node.target) for node in graph.find_nodes(op="get_attr") if node.users]
    for node in graph.find_nodes(op="call_module"):
        layer = root.get_submodule(str(node.target))
        paths += [f"{node.target}.{name}" for name in tensors_of(layer)]
    return paths


def _names(model: nn.Module) -> dict[int, str]:
    """The first name of each tensor of a model, by its id."""
    first: dict[int, str] = {}
    for name, tensor in tensors_of(model).items():
        first.setdefault(id(tensor), name)
    return first


def _held(approx: ApproxModule, names: Mapping[int, str]) -> tuple[str, ...]:
    """The tensors of the model that a graph works with: they tell it from others."""
    return tuple(sorted({names[id(one)] for one in tensors_of(approx).values() if id(one) in names}))


def _united(pieces: Sequence[_Piece], model: nn.Module) -> dict[str, Cut]:
    """By name in the model, how all graphs together cut its tensors.

    Raises:
        UnsupportedError: They do not agree on one, or it is none of the model.
    """
    tensors, first = tensors_of(model), _names(model)
    turned = {(t.data_ptr(), tuple(t.shape[::-1])): first[id(t)] for t in tensors.values() if t.dim() == 2}
    cuts: dict[str, Cut] = {}

    def name_of(piece: _Piece, path: str) -> tuple[str | None, bool]:
        tensor = operator.attrgetter(path)(piece.approx)
        name = first.get(id(tensor))
        other = turned.get((tensor.data_ptr(), tuple(tensor.shape))) if name is None else None
        return name or other, name is None

    for piece in pieces:
        for path, cut in piece.cuts.items():
            found, transposed = name_of(piece, path)
            if found is None:
                raise UnsupportedError(f"model: {path} is narrowed, and it is no tensor of {type(model).__name__}")
            own = dataclasses.replace(cut, source=found, transposed=transposed)
            if not same_cut(cuts.setdefault(found, own), own):
                raise UnsupportedError(f"model: {found} is read with several selections")
    for piece in pieces:
        for path in sorted(piece.sliced):
            raise UnsupportedError(
                f"model: {name_of(piece, path)[0]} is narrowed by one reader and read whole, or in another way, by "
                "another; keep one of the layers exact"
            )
        for path in piece.whole:
            found = None if path.startswith("_") else name_of(piece, path)[0]
            if found in cuts:
                raise UnsupportedError(
                    f"model: {found} is narrowed by one reader and read whole as {path} by another; keep one of the "
                    "layers exact"
                )
    return {
        name: dataclasses.replace(cuts[first[id(tensor)]], source=name)
        for name, tensor in tensors.items()
        if first[id(tensor)] in cuts
    }


def _quietly(run: Callable[..., Any]) -> Callable[..., Any]:
    def without_dropout(*inputs: Any, **more: Any) -> Any:
        with Randomness():
            return run(*inputs, **more)

    return without_dropout


@dataclasses.dataclass
class _Run:
    """A call of a model that its subnetwork has to repeat."""

    handle: GraphHandle
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    pieces: _Pieces

    def expected(self, quiet: bool) -> Any:
        """What the graphs compute in training, at the selections; the model is as before afterwards."""
        self.pieces.quiet = quiet
        with self.handle.replaced(self.pieces):
            return self._called(self.model, self.handle.compiled(self.model))

    def misfit(self, sub: nn.Module, expected: Any) -> str:
        """Why ``sub`` does not compute that; empty if it does."""
        try:
            if not difference(self._called(sub, _quietly(sub)), expected):
                return ""
            # What runs between the graphs does drop at random.
            return difference(self._called(sub, sub), self.expected(quiet=False))
        except Exception as error:  # whatever a forward says of narrow layers
            return f"its own Python does not run on narrow layers: {describe(error)}"

    def _called(self, module: nn.Module, call: Callable[..., Any]) -> Any:
        with kept_random_state(), kept_values(module), torch.enable_grad():
            if not module.training:
                module.train()
            torch.manual_seed(0)
            return call(*self.args, **dict(self.kwargs))
