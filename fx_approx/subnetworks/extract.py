"""Makes a subnetwork: the model at the selections of the moment, as ordinary narrow layers with compact parameters."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fx_approx._compat import parameters_of
from fx_approx.capture.containers import leaves
from fx_approx.capture.error_text import describe
from fx_approx.capture.module_snapshot import kept_training_flags
from fx_approx.capture.trace import kept_random_state, skeleton
from fx_approx.compiler.graph_view import extractor
from fx_approx.errors import UnsupportedError
from fx_approx.runtime.approx_module import ApproxModule, find
from fx_approx.runtime.exact import exact_copy
from fx_approx.runtime.handle import GraphHandle
from fx_approx.sampling.base import Selection
from fx_approx.subnetworks.cuts import Cut
from fx_approx.subnetworks.derivations import same_selections
from fx_approx.subnetworks.description import origin_of
from fx_approx.subnetworks.from_backend import extract_from_backend
from fx_approx.subnetworks.record import (
    ModelReference,
    Subnetwork,
    attach,
    identity_of,
    versions_of,
)
from fx_approx.subnetworks.selections import selections_of
from fx_approx.subnetworks.specialize import Specializer
from fx_approx.subnetworks.training_only import refuse_evaluation

_NO_EXAMPLE = "no example_inputs were given, to see whether the model's own Python serves"


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
        UnsupportedError: A selection follows the activations, the forward could not be traced whole, or one layer is
            called with several selections; with a backend, the model's own Python does not serve.
        DistributedMismatchError: The selections differ between the ranks of ``process_group``, on every rank.
    """
    if isinstance(model, GraphHandle):
        return extract_from_backend(model, selections, example_inputs, process_group)
    approx = find(model)
    runtime = approx._fx_approx
    graph = runtime.program.graph
    if graph is None or runtime.program.capture.sections:
        raise UnsupportedError(
            "model: its forward could not be traced as one graph, so that no subnetwork follows from it"
        )
    if runtime.resample is None:
        raise ValueError("model: no selection is made ahead, so that there is nothing to cut out")
    chosen = selections_of(approx, selections, process_group)
    root = skeleton(exact_copy(approx), shared=False)
    maker = Specializer(root, approx, chosen)
    made = maker.run(graph)
    return _finished(approx, maker, made, chosen, example_inputs)


@extractor
def _extracted(approx: nn.Module, example: Any) -> nn.Module:
    """What a policy for subnetworks has timed."""
    return extract(approx, example_inputs=example)


def _finished(
    approx: ApproxModule, maker: Specializer, graph: fx.Graph, chosen: tuple[Selection | None, ...], example: Any
) -> nn.Module:
    root, reason = maker.root, "; ".join(dict.fromkeys(maker.reasons))
    _tie(approx, root, maker)
    module = fx.GraphModule(root, graph, f"{type(root).__name__}Subnetwork")
    if not reason:
        reason = _NO_EXAMPLE if example is None else _differs(root, module, example)
    if reason and approx._fx_approx.program.capture.branching:
        refuse_evaluation(module)
    sub: nn.Module = module if reason else root
    record = Subnetwork(
        maker.cuts,
        chosen,
        identity_of(approx),
        not reason,
        reason,
        versions_of(approx),
        recipe=maker.derivations.recipe(maker.cuts, maker.buffers),
        model=ModelReference(approx),
    )
    attach(sub, dataclasses.replace(record, origin=origin_of(approx, sub)))
    return sub


def _tie(approx: ApproxModule, root: nn.Module, maker: Specializer) -> None:
    """Parameters that are one in the full model are one here, where both are cut alike."""
    places: dict[int, str] = {}
    for name, parameter in approx.named_parameters(remove_duplicate=False):
        first = places.setdefault(id(parameter), name)
        if first == name:
            continue
        one, other = (maker.cuts.get(path, Cut(path)) for path in (first, name))
        if not same_selections(one.inputs, one.outputs, other.inputs, other.outputs):
            raise UnsupportedError(f"model: {first} and {name} are one parameter, and two parts of it are read")
        maker.derivations.note_alike(first, one, other)
        holder, _, attribute = name.rpartition(".")
        parameters_of(root.get_submodule(holder))[attribute] = operator.attrgetter(first)(root)


def _differs(root: nn.Module, graph: nn.Module, example: Any) -> str:
    """Why the forward of ``root`` does not compute what the graph does, in training; empty if it does."""
    given = (example,) if isinstance(example, Tensor) else example
    args, kwargs = ((), dict(given)) if isinstance(given, Mapping) else (tuple(given), {})
    results = []
    for module in (root, graph):
        states = {name: buffer.clone() for name, buffer in module.named_buffers()}
        with kept_random_state(), torch.no_grad(), kept_training_flags(module.modules()):
            try:
                results.append(module.train()(*args, **kwargs))
            except Exception as error:  # whatever a forward says of narrow layers
                return f"the model's own Python does not run on narrow layers: {describe(error)}"
            finally:
                for name, buffer in module.named_buffers():
                    buffer.copy_(states[name])
    one, other = (leaves(result) for result in results)
    same = len(one) == len(other) and all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-5) if isinstance(a, Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )
    return "" if same else "the model's own Python gives other numbers on narrow layers"
