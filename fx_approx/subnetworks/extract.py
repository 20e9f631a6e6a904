"""Makes a subnetwork: the model at the selections of the moment, as ordinary narrow layers with compact parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from fx_approx.capture.split_sections import split
from fx_approx.capture.trace import skeleton
from fx_approx.runtime.approx_module import ApproxModule, find
from fx_approx.runtime.exact import exact_copy
from fx_approx.runtime.graph_program import PROLOGUE
from fx_approx.runtime.handle import GraphHandle
from fx_approx.runtime.upcoming import further_selections, further_selectors, next_selections
from fx_approx.sampling.base import Selection
from fx_approx.subnetworks.assemble import Forms, Part, assembled, reassembled
from fx_approx.subnetworks.from_backend import extract_from_backend, recut_from_backend
from fx_approx.subnetworks.given import check_selections
from fx_approx.subnetworks.graph_form import Serves
from fx_approx.subnetworks.narrowing import Narrowing
from fx_approx.subnetworks.record import (
    RECORD,
    Subnetwork,
    check_origin,
    full_model,
    identity_of,
    record_of,
    tensors_of,
    versions_of,
)
from fx_approx.subnetworks.specialize import Chosen, handed, specialise

Assemble = Callable[[nn.Module, list[Part], Narrowing], tuple[nn.Module, Forms, str]]


def extract(
    model: nn.Module | GraphHandle, selections: Sequence[Selection | None] | None = None, *, example_inputs: Any = None
) -> nn.Module:
    """The subnetwork of a transformed model: ordinary layers of torch with compact parameters of their own.

    It computes in training what ``model`` computes with these selections kept, and in evaluation the same: it is a
    narrower network, which any optimiser, DDP, FSDP, ``torch.compile`` and ``torch.export`` take as they take any
    other. :func:`fx_approx.subnetworks.merge` writes it back.

    Args:
        model: A transformed model, or what wraps it, or a backend that has compiled one; all selections are made ahead
            (scores ``weight``, ``ema`` or ``uniform``).
        selections: One for each selection that the model makes, in its order; by default those of its next step.
        example_inputs: A batch as the model is called with it. With it, the model's own Python runs the subnetwork
            where it gives the same numbers as the graph; without it the graph does. Required with a backend, whose
            graphs are of parts.

    Returns:
        An instance of the model's own class where its forward serves, else a ``torch.fx.GraphModule``;
        ``subnetworks.record_of(sub).reason`` says why.

    Raises:
        ValueError: ``model`` is not transformed, samples nothing, ``selections`` are of another model, or a backend has
            compiled none yet or is given no ``example_inputs``.
        UnsupportedError: A selection follows the activations or gradients of the step; or neither a graph nor the
            model's own Python serves ``example_inputs``; with a backend, the model's own Python does not.
    """
    if isinstance(model, GraphHandle):
        return extract_from_backend(model, selections, example_inputs)
    approx = find(model)

    def assemble(root: nn.Module, parts: list[Part], narrowing: Narrowing) -> tuple[nn.Module, Forms, str]:
        return assembled(approx, root, parts, narrowing, example_inputs)

    return _extracted(approx, selections, assemble)


def _extracted(approx: ApproxModule, selections: Sequence[Selection | None] | None, assemble: Assemble) -> nn.Module:
    """A subnetwork that ``assemble`` puts together of a narrow copy and its graphs."""
    further = further_selections(approx)
    if approx._fx_approx.resample is None and not further:
        raise ValueError("model: no selection is made ahead, so that there is nothing to cut out")
    chosen = (*next_selections(approx), *further) if selections is None else tuple(selections)
    check_selections(approx, chosen)
    root = skeleton(exact_copy(approx), shared=False)
    narrowing = Narrowing(root, approx)
    parts = _parts(approx, narrowing, _placed(approx, chosen))
    narrowing.apply()
    sub, forms, reason = assemble(root, parts, narrowing)
    own = not isinstance(sub, fx.GraphModule)
    vars(sub)[RECORD] = Subnetwork(
        narrowing.cuts, chosen, identity_of(approx), own, reason, versions_of(approx), forms=forms
    )
    return sub


def _placed(approx: ApproxModule, chosen: tuple[Selection | None, ...]) -> Chosen:
    outside, inside = further_selectors(approx)
    ahead = len(chosen) - len(outside) - len(inside)
    behind = ahead + len(outside)
    return Chosen(
        chosen[:ahead],
        dict(zip(outside, chosen[ahead:behind], strict=True)),
        dict(zip(inside, chosen[behind:], strict=True)),
    )


def _parts(approx: ApproxModule, narrowing: Narrowing, chosen: Chosen) -> list[Part]:
    """The specialised graph of the model, or of each of its sections; none where nothing could be traced."""
    program = approx._fx_approx.program
    captured, graph = program.capture, program.graph
    if graph is None:
        specialise({}, approx, narrowing, (), chosen)
        return []
    if not captured.sections:
        made = specialise({"": graph}, approx, narrowing, (), chosen)
        return [Part("", made[""], Serves(captured.form, captured.guard, bool(captured.branching)))]
    head, own = split(graph, len(captured.sections), PROLOGUE)
    graphs = {section.path: part for section, part in zip(captured.sections, own, strict=True)}
    made = specialise(graphs, approx, narrowing, handed(head, chosen.ahead), chosen)
    return [
        Part(section.path, made[section.path], Serves(section.form, section.guard, bool(each.branching)))
        for section, each in zip(captured.sections, captured.each, strict=True)
    ]


def reselect(
    sub: nn.Module, model: nn.Module | GraphHandle, selections: Sequence[Selection | None] | None = None
) -> tuple[Selection | None, ...]:
    """Cuts ``sub`` out of ``model`` anew, by other selections of the same sizes, into the same tensors.

    Parameters stay the same objects, so that optimisers, compiled code and the buckets of data-parallel training go on.
    Write it back first: what ``sub`` holds is overwritten.

    Args:
        sub: What :func:`fx_approx.subnetworks.extract` returned.
        model: The model that it was cut out of, or the backend.
        selections: As in ``extract``; by default those of the model's next step.

    Returns:
        The selections.

    Raises:
        ValueError: ``sub`` is of another model, has not been written back, or the sizes differ. Nothing is changed
            then.
    """
    record = record_of(sub)
    check_origin(record, full_model(record, model))
    if not record.merged:
        raise ValueError("sub: what it has learnt would be lost; call fx_approx.subnetworks.merge(sub, model) first")
    if record.graphs:
        if not isinstance(model, GraphHandle):
            raise ValueError("model: expected the backend that compiles it, whose graphs make the selections")
        new, again = recut_from_backend(sub, model, selections)
    else:
        fresh = _recut(find(model), selections, record)  # type: ignore[arg-type]
        new, again = tensors_of(fresh), record_of(fresh)
    old = tensors_of(sub)
    for name in dict.fromkeys((*old, *new)):
        mine, other = (None if name not in one else tuple(one[name].shape) for one in (old, new))
        if mine != other:
            raise ValueError(
                f"selections: {name} would have the shape {other}, expected {mine}, which it has in sub: another ratio "
                "needs another subnetwork"
            )
    with torch.no_grad():
        for name, tensor in old.items():
            tensor.copy_(new[name])
    record.cuts, record.selections, record.versions, record.merged = again.cuts, again.selections, again.versions, False
    return record.selections


def _recut(approx: ApproxModule, selections: Sequence[Selection | None] | None, record: Subnetwork) -> nn.Module:
    """The subnetwork anew, in the form that it has."""

    def assemble(root: nn.Module, parts: list[Part], narrowing: Narrowing) -> tuple[nn.Module, Forms, str]:
        return reassembled(root, parts, narrowing, record.forms), record.forms, record.reason

    return _extracted(approx, selections, assemble)
