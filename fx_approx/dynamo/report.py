"""The report of a Dynamo backend: all graphs that were captured, and what multiplies in none of them."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import CodeType

from torch import nn

from fx_approx.core.candidates import RoleFlops
from fx_approx.core.layer_types import PRODUCT_LAYERS
from fx_approx.dynamo.frame import Frame
from fx_approx.dynamo.layer_recovery import prefix_of
from fx_approx.dynamo.step_totals import Products, Step, UncountableError, step_of
from fx_approx.passes.find_candidates import BLOCKED_MODULES
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.savings.build import merged_reports
from fx_approx.savings.report import Row, SavingsReport, Totals

Key = tuple[CodeType, tuple[int, ...], frozenset[str]]

Reporter = Callable[[ApproxModule], SavingsReport]

Owners = Mapping[str, "weakref.ref[nn.Module] | None"]

_NO_GRAPH = "in no graph that Dynamo captured (graph break, or a frame that torch skips): Python runs it"
_AGAIN = "more calls than the captured graphs have rows for: counted as exact"


@dataclasses.dataclass(frozen=True)
class Left:
    """A graph of a training step that stays exact.

    Attributes:
        key: What tells its layers from those of other graphs.
        name: The class of the frame's first module.
        reason: Why.
        owners: By multiply, the module in whose forward it stands.
        made: Its rows; None where its multiplies could not be told one from the other.
    """

    key: Key
    name: str
    reason: str
    owners: Owners
    made: SavingsReport | None = None

    @property
    def note(self) -> str:
        """A sentence for a report."""
        return f"Exact: a graph of {self.name}: {self.reason}."


@dataclasses.dataclass(frozen=True)
class CapturedGraph:
    """A graph that was compiled in training mode: left exact, or transformed.

    Attributes:
        key: What tells its layers from those of other graphs.
        name: The class of the frame's first module.
        owners: By multiply, the module in whose forward it stands.
        left: Why it is exact.
        approx: The transformed graph.
    """

    key: Key
    name: str
    owners: Owners
    left: Left | None = None
    approx: weakref.ref[ApproxModule] | None = None

    @property
    def alive(self) -> bool:
        """Whether the code that runs it still exists."""
        return self.approx is None or self.approx() is not None

    def report(self, of: Reporter) -> SavingsReport | None:
        """Its report, with the ratios as they are now; None if it is exact and has no rows."""
        approx = None if self.approx is None else self.approx()
        if approx is not None:
            return dataclasses.replace(of(approx), model=self.name)
        assert self.left is not None
        return self.left.made


class Steps:
    """The outermost calls that were compiled, one for each set of modules, and what they multiply in all."""

    def __init__(self) -> None:
        self._frames: weakref.WeakKeyDictionary[nn.Module, set[CodeType]] = weakref.WeakKeyDictionary()
        self._steps: dict[int, tuple[weakref.ref[nn.Module], str, Step | None]] = {}
        self._counted: dict[Step, Products | str] = {}

    def add(self, frame: Frame) -> None:
        """Notes a frame of a training step, and its call if it is the outermost one of its modules."""
        step: Step | None = None
        for root in frame.roots:
            self._frames.setdefault(root.module, set()).add(frame.code)
            known = self._steps.get(id(root.module))
            if not root.path and (known is None or known[0]() is not root.module):
                step = step_of(frame) if step is None else step
                self._steps[id(root.module)] = weakref.ref(root.module), prefix_of(frame, root), step

    def calls(self) -> list[tuple[Step | None, dict[str, nn.Module], bool]]:
        """Each outermost call, its modules by their names, and whether several frames ran it."""
        found: dict[Step | None, dict[str, nn.Module]] = {}
        for reference, name, step in self._steps.values():
            module = reference()
            if module is not None:
                found.setdefault(step, {})[name] = module
        return [(step, modules, self._broken(modules)) for step, modules in found.items()]

    def _broken(self, modules: Mapping[str, nn.Module]) -> bool:
        parts = [part for module in modules.values() for part in module.modules()]
        return len(set[CodeType]().union(*(self._frames.get(part, ()) for part in parts))) > 1

    def products(self, step: Step | None) -> Products:
        """What a call multiplies; counted once.

        Raises:
            UncountableError: It cannot be counted.
        """
        if step is None:
            raise UncountableError("its arguments cannot be written down")
        if step not in self._counted:
            try:
                self._counted[step] = step.products()
            except UncountableError as error:
                self._counted[step] = str(error)
        known = self._counted[step]
        if isinstance(known, str):
            raise UncountableError(known)
        return known


def whole_report(graphs: Sequence[CapturedGraph], steps: Steps, of: Reporter) -> SavingsReport:
    """One report of all graphs, each by ``of``, and of what multiplies in none of them."""
    reports = [made for graph in graphs if (made := graph.report(of)) is not None]
    name = " + ".join(dict.fromkeys(graph.name for graph in graphs))
    merged = merged_reports(reports) if reports else SavingsReport(name, (), Totals(RoleFlops(), RoleFlops(), 0, 0, 0))
    rest = _Rest(graphs, of)
    for step, modules, broken in steps.calls():
        rest.add(steps, step, modules, broken)
    rest.finish()
    left = [graph.left for graph in graphs if graph.left is not None]
    notes = [one.note for one in left]
    if not rest.rows and not notes and not rest.notes:
        return merged
    exact = sum((row.exact for row in rest.rows if row.exact is not None), RoleFlops())
    totals = dataclasses.replace(
        merged.totals, exact=merged.totals.exact + exact, executed=merged.totals.executed + exact
    )
    kept = tuple(dict.fromkeys((*merged.notes, *notes, *rest.notes)))
    return dataclasses.replace(merged, model=name, rows=(*merged.rows, *rest.rows), totals=totals, notes=kept)


class _Rest:
    """What multiplies without a row in the reports of the graphs.

    Attributes:
        rows: For it.
        notes: What the totals leave out.
    """

    def __init__(self, graphs: Sequence[CapturedGraph], of: Reporter) -> None:
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.done: dict[nn.Module, RoleFlops] = {}
        self.unseen: dict[nn.Module, str] = {}
        self.loose = RoleFlops()  # of rows whose module is registered nowhere: counted where it is called
        self.gone: list[tuple[str, str]] = []
        for graph in graphs:
            made = graph.report(of)
            flops = {row.name: row.exact or RoleFlops() for row in made.rows} if made is not None else None
            for name, reference in graph.owners.items():
                module = None if reference is None else reference()
                if flops is None and graph.left is not None:
                    if module is None:
                        self.gone.append((name, graph.left.reason))
                    else:
                        self.unseen[module] = graph.left.reason
                elif module is not None and flops is not None:
                    self.done[module] = self.done.get(module, RoleFlops()) + flops.get(name, RoleFlops())
                elif flops is not None:
                    self.loose += flops.get(name, RoleFlops())

    def add(self, steps: Steps, step: Step | None, modules: Mapping[str, nn.Module], broken: bool) -> None:
        """What a call of ``modules`` multiplies in no graph."""
        layers = {path: layer for name, module in modules.items() for path, layer in _layers(module, name).items()}
        missing = {
            path: layer for path, layer in layers.items() if not any(part in self.done for part in layer.modules())
        }
        inside = {part for module in modules.values() for part in module.modules()}
        if not missing and not broken and inside.isdisjoint(self.unseen):
            return
        try:
            products = steps.products(step)
        except UncountableError as error:
            for path, layer in missing.items():
                self._row(path, _kind(layer), None, self.unseen.pop(layer, _NO_GRAPH))
                self.done[layer] = RoleFlops()
            names = ", ".join(type(module).__name__ for module in modules.values())
            self.notes.append(
                f"The totals are those of the captured graphs: the whole step of {names} cannot be counted ({error})."
            )
            return
        places = {path: one for name, module in modules.items() for path, one in module.named_modules(prefix=name)}
        for path, kinds in products.items():
            module = places.get(path)
            parts = [] if module is None else list(module.modules()) if path in layers else [module]
            known = sum((self.done[part] for part in parts if part in self.done), RoleFlops())
            whole = sum(kinds.values(), RoleFlops())
            left = _difference(whole, known)
            if path not in layers:
                left, self.loose = _difference(left, self.loose), _difference(self.loose, left)
            if not left.total:
                if path in missing and not kinds:  # it ran, but in a fused function that cannot be counted
                    self._row(path, _kind(layers[path]), None, _NO_GRAPH)
                continue
            reason = _AGAIN if known.total else next((self.unseen[p] for p in parts if p in self.unseen), _NO_GRAPH)
            kind = _kind(layers[path]) if path in layers else "+".join(kinds)
            self._row(path if path in layers else f"{path}.{kind}".strip("."), kind, left, reason)
            self.done.update({part: self.done.get(part, RoleFlops()) for part in parts})
            if module is not None:
                self.done[module] = self.done[module] + left

    def finish(self) -> None:
        """What was not counted: rows without numbers."""
        left = [(type(module).__name__, why) for module, why in self.unseen.items() if module not in self.done]
        for name, reason in (*self.gone, *left):
            self._row(name, "?", None, reason)
        unknown = sum(row.exact is None for row in self.rows)
        if unknown:
            self.notes.append(
                f"{unknown} rows of layers in no transformed graph have no shapes and are not in the totals."
            )

    def _row(self, name: str, kind: str, flops: RoleFlops | None, reason: str) -> None:
        self.rows.append(Row(name, kind, "?", (), False, None, flops, flops, 0, None, None, reason))


def _layers(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The layers that multiply, by their paths; what is inside of one is not listed."""
    kinds = (*PRODUCT_LAYERS, *(kind for kind, _ in BLOCKED_MODULES))
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules(prefix=name):
        if isinstance(module, kinds) and not any(path.startswith(f"{other}.") for other in found):
            found[path] = module
    return found


def _kind(layer: nn.Module) -> str:
    return type(layer).__name__.lower()


def _difference(one: RoleFlops, other: RoleFlops) -> RoleFlops:
    return RoleFlops(*(max(0, a - b) for a, b in zip(_parts(one), _parts(other), strict=True)))


def _parts(flops: RoleFlops) -> tuple[int, ...]:
    return flops.output, flops.grad_input, flops.grad_weight
