"""Which part of each parameter's gradient the selections of a step can make non-zero."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fx_approx.core.candidates import Role
from fx_approx.core.plan_effects import FULL, Axis
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.selection_tracker import SelectionTracker

_WEIGHTED = ("linear", "conv")


@dataclasses.dataclass(frozen=True)
class Sliced:
    """A weight of which only a slice can get a gradient.

    Attributes:
        name: Path of the parameter.
        layer: Name of the candidate.
        rows: Outputs that are computed; empty for all.
        columns: Inputs that are read; empty for all.
    """

    name: str
    layer: str
    rows: Axis
    columns: Axis


def find_slices(model: ApproxModule) -> tuple[dict[nn.Parameter, Sliced], dict[str, str]]:
    """The sliced weights of a transformed model; and, for the other sampled layers, why theirs are reduced whole."""
    runtime = model._fx_approx
    effects = runtime.record.effects
    candidates = {one.name: one for one in runtime.record.candidates}
    found, whole = {}, {}
    uses = weight_uses(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    operations = {one.candidate: one for one in effects.operations}
    shared = {reading.name for one in effects.classes for reading in one.readings}
    for name, candidate in candidates.items():
        decision, operation = runtime.record.plan[name], operations.get(name)
        path = None if operation is None else operation.weight
        if operation is None or path is None or not candidate.kind.startswith(_WEIGHTED):
            if decision.roles:
                whole[name] = "its shapes are not known" if not effects.operations else "it has no weight of its own"
            continue
        if path not in parameters:  # a function of a buffer
            continue
        parameter = parameters[path]
        rows = operation.axis if effects.hoisted and operation.action in ("produce", "depthwise") else ()
        columns = effects.reads.get(name, ()) if candidate.groups == 1 else ()
        rows, columns = _narrow(rows), _narrow(columns)
        if decision.roles and name not in shared:
            whole[name] = "its selection is not made ahead (scores read activations), and ranks may differ"
        elif decision.roles and (set(decision.roles) != {Role.OUTPUT} or decision.straight_through):
            whole[name] = "its weight's gradient does not follow the selection of its output"
        if name in whole:
            columns = ()
        if not parameter.requires_grad or not (rows or columns):
            continue
        if uses[parameter] > 1:
            whole[name] = f"{path} is used {uses[parameter]} times"
            continue
        found[parameter] = Sliced(path, name, rows, columns)
    return found, whole


def _narrow(axis: Axis) -> Axis:
    """``axis``; empty where all of it is there."""
    return axis if any(part.place != FULL for part in axis) else ()


def weight_uses(model: ApproxModule) -> Mapping[nn.Parameter, int]:
    """How often the graph reads each parameter; once more where Python beside it may."""
    captured = model._fx_approx.program.capture
    graph = captured.graph
    uses: collections.Counter[nn.Parameter] = collections.Counter(model.parameters() if captured.sections else ())
    known = dict(model.named_parameters(remove_duplicate=False))
    for node in () if graph is None else graph.nodes:
        if node.op == "call_module":
            uses.update(model.get_submodule(str(node.target)).parameters())
        elif node.op == "get_attr" and str(node.target) in known:
            uses[known[str(node.target)]] += len(node.users)
    return uses


def selected(axis: Axis, mask: Tensor, slices: Sequence[slice]) -> Tensor:
    """Which entries of an axis are selected, bool; ``mask`` and ``slices`` as :class:`SelectionTracker` has them."""
    flags = []
    for part in axis:
        own = torch.ones(part.count, dtype=torch.bool) if part.place == FULL else mask[slices[part.place]]
        flags.append(own if part.block == 1 else own.repeat_interleave(part.block))
    return torch.cat(flags)


def indices(axes: Iterable[Axis], published: SelectionTracker) -> dict[Axis, Tensor]:
    """Entries of each axis that are selected, on the device; one wait for it and one copy for all of them."""
    mask, device = published.mask.cpu(), published.mask.device
    found = {axis: selected(axis, mask, published.slices).nonzero().flatten() for axis in axes}
    if device.type == "cpu" or not found:
        return found
    whole = torch.cat(list(found.values())).to(device)
    return dict(zip(found, whole.split([len(one) for one in found.values()]), strict=True))
