"""Makes a subnetwork: the model at the selections of the moment, as ordinary narrow layers with compact parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

from fx_approx.capture.trace import skeleton
from fx_approx.compiler.extractors import extractor
from fx_approx.runtime.approx_module import find
from fx_approx.runtime.exact import exact_copy
from fx_approx.runtime.handle import GraphHandle
from fx_approx.runtime.upcoming import further_selectors
from fx_approx.sampling.base import Selection
from fx_approx.subnetworks.assemble import assembled
from fx_approx.subnetworks.description import origin_of
from fx_approx.subnetworks.from_backend import extract_from_backend
from fx_approx.subnetworks.narrowing import Narrowing
from fx_approx.subnetworks.record import ModelReference, Subnetwork, attach, identity_of, versions_of
from fx_approx.subnetworks.sections import exact_parts, parts_of
from fx_approx.subnetworks.selections import first_selections, selections_of


def extract(
    model: nn.Module | GraphHandle,
    selections: Sequence[Selection | None] | None = None,
    *,
    example_inputs: Any = None,
    process_group: Any = None,
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
        process_group: Ranks of torch.distributed that train the subnetwork together, ``dist.group.WORLD`` for all:
            they compare the selections, and are to call this alike. None compares nothing, so that one rank may call.

    Returns:
        An instance of the model's own class where its forward serves, else a ``torch.fx.GraphModule``;
        ``subnetworks.record_of(sub).reason`` says why.

    Raises:
        ValueError: ``model`` is not transformed, samples nothing, ``selections`` are of another model, or a backend has
            compiled none yet or is given no ``example_inputs``.
        UnsupportedError: The model samples tokens; a selection follows the activations or gradients of the step; or
            neither a graph nor the model's own Python serves ``example_inputs``; with a backend, the model's own
            Python does not.
        DistributedMismatchError: The selections differ between the ranks of ``process_group``, on every rank.
    """
    if isinstance(model, GraphHandle):
        return extract_from_backend(model, selections, example_inputs, process_group)
    approx = find(model)
    if approx._fx_approx.resample is None and not any(further_selectors(approx)):
        raise ValueError("model: no selection is made ahead, so that there is nothing to cut out")
    chosen = selections_of(approx, selections, process_group)
    root = skeleton(exact_copy(approx), shared=False)
    narrowing = Narrowing(root, approx)
    parts = parts_of(approx, narrowing, chosen)
    narrowing.apply()
    made = assembled(approx, root, parts, narrowing, example_inputs, functools.partial(exact_parts, approx))
    record = Subnetwork(
        narrowing.cuts,
        chosen,
        identity_of(approx),
        made.forms.get("", True) is not None,
        made.reason,
        versions_of(approx),
        forms=made.forms,
        sliced=tuple(narrowing.sliced),
        model=ModelReference(approx),
        notes=made.notes,
    )
    attach(made.sub, dataclasses.replace(record, origin=origin_of(approx, made.sub)))
    return made.sub


@extractor
def _extracted(approx: nn.Module, example: Any) -> nn.Module:
    """What a policy for subnetworks has timed; its sizes count, and not which channels they are."""
    return extract(approx, first_selections(find(approx)) or None, example_inputs=example)
