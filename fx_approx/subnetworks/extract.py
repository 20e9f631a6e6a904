"""Makes a subnetwork: the model at the selections of the moment, as ordinary narrow layers with compact parameters."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fx_approx._compat import parameters_of, tree_leaves
from fx_approx.capture.trace import skeleton
from fx_approx.compiler.transform import restore
from fx_approx.errors import UnsupportedError
from fx_approx.runtime.approx_module import ApproxModule, find
from fx_approx.sampling.base import Selection
from fx_approx.subnetworks.cuts import Cut
from fx_approx.subnetworks.specialize import Specializer

RECORD = "_fx_approx_subnetwork"
"""Where a subnetwork keeps what it was cut out of."""


@dataclasses.dataclass
class Subnetwork:
    """What a subnetwork knows of the model that it was cut out of; :func:`record_of` gives it.

    Attributes:
        cuts: By name of each narrowed parameter or buffer, what it holds of the full one.
        selections: The selections, in the order in which the model makes them.
        identity: What the full model must be: its layers and their shapes.
        own_forward: Its forward is the model's own Python.
        reason: Why it is not, if so.
        versions: Of the full parameters when it was cut out; a change since is refused by :func:`merge`.
        merged: It has been written back since it was cut out.
    """

    cuts: Mapping[str, Cut]
    selections: tuple[Selection | None, ...]
    identity: tuple[tuple[str, tuple[int, ...]], ...]
    own_forward: bool
    reason: str
    versions: dict[str, int]
    merged: bool = False

    def cut_of(self, name: str) -> Cut:
        """What the parameter or buffer ``name`` holds of the full model's; all of it where nothing is cut off."""
        return self.cuts.get(name, Cut(name))


def extract(
    model: nn.Module, selections: Sequence[Selection | None] | None = None, *, example_inputs: Any = None
) -> nn.Module:
    """The subnetwork of a transformed model: ordinary layers of torch with compact parameters of their own.

    It computes in training what ``model`` computes with these selections kept, and in evaluation the same: it is a
    narrower network, which any optimiser, DDP, FSDP, ``torch.compile`` and ``torch.export`` take as they take any
    other. :func:`fx_approx.subnetworks.merge` writes it back.

    Args:
        model: A transformed model, or what wraps it, all of whose selections are made ahead (scores ``weight``, ``ema``
            or ``uniform``).
        selections: One for each selection that the model makes, in its order; by default those of its next step.
        example_inputs: A batch as the model is called with it. With it, the model's own Python runs the subnetwork
            where it gives the same numbers as the graph; without it the graph does.

    Returns:
        An instance of the model's own class where its forward serves, else a ``torch.fx.GraphModule``;
        ``subnetworks.record_of(sub).reason`` says why.

    Raises:
        ValueError: ``model`` is not transformed, samples nothing, or ``selections`` are of another model.
        UnsupportedError: A selection follows the activations, the forward could not be traced whole, or one layer is
            called with several selections.
    """
    approx = find(model)
    runtime = approx._fx_approx
    graph = runtime.graph
    if graph is None or runtime.capture.sections:
        raise UnsupportedError(
            "model: its forward could not be traced as one graph, so that no subnetwork follows from it"
        )
    if runtime.resample is None:
        raise ValueError("model: no selection is made ahead, so that there is nothing to cut out")
    chosen = next_selections(approx) if selections is None else tuple(selections)
    _check(approx, chosen)
    exact = restore(approx)
    root = skeleton(exact, shared=False)
    maker = Specializer(root, approx, chosen)
    made = maker.run(graph)
    return _finished(approx, maker, made, chosen, example_inputs)


def next_selections(approx: ApproxModule) -> tuple[Selection | None, ...]:
    """The selections that the next training step of ``approx`` would make, or those that are kept."""
    runtime = approx._fx_approx
    resample, graph = runtime.resample, runtime.graph
    assert resample is not None and graph is not None
    node = next(node for node in graph.nodes if node.op == "call_module" and str(node.target).endswith(".resample"))
    weights = [operator.attrgetter(str(argument.target))(approx) for argument in node.args[1:]]
    kept = resample.held and bool(resample.held_key[0] >= 0)
    resample.note_known()
    modes = {selector.owner[0]: selector.owner[0].training for selector in runtime.selectors.values()}
    try:
        for owner in modes:
            owner.training = True
        with torch.no_grad():
            result: tuple[Selection | None, ...] = resample(
                runtime.upcoming(resample.held_key.clone() if kept else None), *weights
            )
    finally:
        for owner, training in modes.items():
            owner.training = training
    return result


def record_of(sub: nn.Module) -> Subnetwork:
    """What ``sub`` was cut out of.

    Raises:
        ValueError: It is no subnetwork.
    """
    found = vars(sub).get(RECORD)
    if not isinstance(found, Subnetwork):
        raise ValueError(f"sub: expected what fx_approx.subnetworks.extract returned, got a {type(sub).__name__}")
    return found


def identity_of(model: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of all parameters: what tells one model from another."""
    return tuple((name, tuple(p.shape)) for name, p in model.named_parameters())


def versions_of(model: nn.Module) -> dict[str, int]:
    """How often each parameter was changed in place."""
    return {name: p._version for name, p in model.named_parameters()}


def _check(approx: ApproxModule, chosen: tuple[Selection | None, ...]) -> None:
    shared = list(approx._fx_approx.resample.each()) if approx._fx_approx.resample is not None else []
    if len(chosen) != len(shared):
        raise ValueError(f"selections: expected {len(shared)}, one for each that the model makes, got {len(chosen)}")
    for place, (one, given) in enumerate(zip(shared, chosen, strict=True)):
        if given is None:
            continue
        index = given.indices
        if index.dim() != 2 or index.shape[0] != one.groups or int(index.max()) >= one.pairs or int(index.min()) < 0:
            raise ValueError(
                f"selections[{place}]: expected indices [{one.groups}, k] below {one.pairs}, got shape "
                f"{tuple(index.shape)} with values from {int(index.min())} to {int(index.max())}"
            )
        if any(len(row.unique()) != row.numel() for row in index):
            raise ValueError(f"selections[{place}]: expected units once each, got some of them twice")


def _finished(
    approx: ApproxModule, maker: Specializer, graph: fx.Graph, chosen: tuple[Selection | None, ...], example: Any
) -> nn.Module:
    root, reason = maker.root, "; ".join(dict.fromkeys(maker.reasons))
    _tie(approx, root, maker.cuts)
    module = fx.GraphModule(root, graph, f"{type(root).__name__}Subnetwork")
    module.train(approx.training)
    own = False
    if not reason and example is None:
        reason = "no example_inputs were given, to see whether the model's own Python serves"
    if not reason:
        reason = _differs(root, module, example)
        own = not reason
    sub: nn.Module = root if own else module
    vars(sub)[RECORD] = Subnetwork(maker.cuts, chosen, identity_of(approx), own, reason, versions_of(approx))
    return sub


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
    """Why the forward of ``root`` does not compute what the graph does; empty if it does."""
    args = (example,) if isinstance(example, Tensor) else example
    args, kwargs = ((), dict(args)) if isinstance(args, Mapping) else (tuple(args), {})
    try:
        results = []
        for module in (root, graph):
            states = {name: buffer.clone() for name, buffer in module.named_buffers()}
            training = module.training
            module.eval()
            with torch.no_grad():
                results.append(module(*args, **kwargs))
            module.train(training)
            for name, buffer in module.named_buffers():
                buffer.copy_(states[name])
    except Exception as error:  # whatever a forward says of narrow layers
        return f"the model's own Python does not run on narrow layers: {type(error).__name__}: {error}"
    one, other = (tree_leaves(result) for result in results)
    same = len(one) == len(other) and all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-5) if isinstance(a, Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )
    return "" if same else "the model's own Python gives other numbers on narrow layers"
