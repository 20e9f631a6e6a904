"""Makes a subnetwork: the model at the selections of the moment, as ordinary narrow layers with compact parameters."""

from __future__ import annotations

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
from fx_approx.errors import UnsupportedError
from fx_approx.runtime.approx_module import ApproxModule, find
from fx_approx.runtime.exact import exact_copy
from fx_approx.runtime.handle import GraphHandle
from fx_approx.runtime.upcoming import next_selections
from fx_approx.sampling.base import Selection
from fx_approx.subnetworks.cuts import Cut
from fx_approx.subnetworks.from_backend import extract_from_backend, recut_from_backend
from fx_approx.subnetworks.given import check_selections
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
from fx_approx.subnetworks.specialize import Specializer

_NO_EXAMPLE = "no example_inputs were given, to see whether the model's own Python serves"


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
        UnsupportedError: A selection follows the activations, the forward could not be traced whole, or one layer is
            called with several selections; with a backend, the model's own Python does not serve.
    """
    if isinstance(model, GraphHandle):
        return extract_from_backend(model, selections, example_inputs)
    approx = find(model)
    runtime = approx._fx_approx
    graph = runtime.program.graph
    if graph is None or runtime.program.capture.sections:
        raise UnsupportedError(
            "model: its forward could not be traced as one graph, so that no subnetwork follows from it"
        )
    if runtime.resample is None:
        raise ValueError("model: no selection is made ahead, so that there is nothing to cut out")
    chosen = next_selections(approx) if selections is None else tuple(selections)
    check_selections(approx, chosen)
    root = skeleton(exact_copy(approx), shared=False)
    maker = Specializer(root, approx, chosen)
    made = maker.run(graph)
    return _finished(approx, maker, made, chosen, example_inputs)


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
        fresh = extract(model, selections)
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


def _finished(
    approx: ApproxModule, maker: Specializer, graph: fx.Graph, chosen: tuple[Selection | None, ...], example: Any
) -> nn.Module:
    root, reason = maker.root, "; ".join(dict.fromkeys(maker.reasons))
    _tie(approx, root, maker.cuts)
    module = fx.GraphModule(root, graph, f"{type(root).__name__}Subnetwork")
    module.train(approx.training)
    if not reason:
        reason = _NO_EXAMPLE if example is None else _differs(root, module, example)
    if reason and approx._fx_approx.program.capture.branching:
        module.register_forward_pre_hook(_refuse_evaluation)
    sub: nn.Module = module if reason else root
    vars(sub)[RECORD] = Subnetwork(maker.cuts, chosen, identity_of(approx), not reason, reason, versions_of(approx))
    return sub


def _refuse_evaluation(module: nn.Module, args: Any) -> None:
    """A hook of a graph that serves training only.

    Raises:
        RuntimeError: The subnetwork is in evaluation mode.
    """
    if not module.training:
        raise RuntimeError(
            "sub: its graph serves training only, since the model's Python does something else in eval(): write it "
            "back with fx_approx.subnetworks.merge and evaluate the model"
        )


def _tie(approx: ApproxModule, root: nn.Module, cuts: Mapping[str, Cut]) -> None:
    """Parameters that are one in the full model are one here, where both are cut alike."""
    places: dict[int, str] = {}
    for name, parameter in approx.named_parameters(remove_duplicate=False):
        first = places.setdefault(id(parameter), name)
        if first == name:
            continue
        one, other = cuts.get(first), cuts.get(name)
        if (one is None) is not (other is None):
            raise UnsupportedError(f"model: {first} and {name} are one parameter, and only one of them is narrowed")
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
