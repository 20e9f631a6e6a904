"""What a subnetwork knows of the model that it was cut out of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor, nn

from fx_approx._compat import version_of
from fx_approx.runtime.approx_module import find, unwrapped
from fx_approx.runtime.handle import GraphHandle
from fx_approx.sampling.base import Selection
from fx_approx.subnetworks.cuts import Cut

RECORD = "_fx_approx_subnetwork"
"""Where a subnetwork keeps what it was cut out of."""


@dataclasses.dataclass
class Subnetwork:
    """What a subnetwork knows of the model that it was cut out of; :func:`record_of` gives it.

    Attributes:
        cuts: By name of each narrowed parameter or buffer, what it holds of the full one.
        selections: The selections, in the order in which the model makes them.
        identity: What the full model must be: its layers and their shapes.
        own_forward: Its forward is the model's own Python, and it an instance of the model's class.
        reason: Why it is not, or why a part of it runs a graph, if so.
        versions: Of the full parameters when it was cut out; a change since is refused by :func:`merge`.
        merged: It has been written back since it was cut out.
        forms: By path of the model ("") or a section of it, how its forward was made; None for a graph.
        graphs: Of what a backend of ``torch.compile`` runs, the names of the tensors that each graph works with, in the
            order in which they make their selections; empty for a transformed model.
        notes: What its user should know, as that its config does not describe it.
    """

    cuts: Mapping[str, Cut]
    selections: tuple[Selection | None, ...]
    identity: tuple[tuple[str, tuple[int, ...]], ...]
    own_forward: bool
    reason: str
    versions: dict[str, int]
    merged: bool = False
    forms: dict[str, bool | None] = dataclasses.field(default_factory=dict)
    graphs: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()

    def cut_of(self, name: str) -> Cut:
        """What the parameter or buffer ``name`` holds of the full model's; all of it where nothing is cut off."""
        return self.cuts.get(name, Cut(name))


def record_of(sub: nn.Module) -> Subnetwork:
    """What ``sub`` was cut out of.

    Raises:
        ValueError: It is no subnetwork.
    """
    found = vars(sub).get(RECORD)
    if not isinstance(found, Subnetwork):
        raise ValueError(f"sub: expected what fx_approx.subnetworks.extract returned, got a {type(sub).__name__}")
    return found


def full_model(record: Subnetwork, model: nn.Module | GraphHandle) -> nn.Module:
    """The full model of a subnetwork in ``model``: the transformed one, or the user's own that a backend compiles.

    Raises:
        TypeError: ``model`` is no module, and no backend whose graphs the subnetwork was cut out of.
        ValueError: It is not transformed, or the backend has compiled no model, or several.
    """
    if not record.graphs:
        return find(model)  # type: ignore[arg-type]
    if isinstance(model, GraphHandle):
        return model.model("a subnetwork")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected the model that the backend compiles, or the backend, got {model!r}")
    return unwrapped(model)


def check_origin(record: Subnetwork, model: nn.Module) -> None:
    """ValueError unless ``model`` is like the one that the subnetwork of ``record`` was cut out of."""
    if record.identity != identity_of(model):
        raise ValueError("sub: it was cut out of another model: names or shapes of the parameters differ")


def identity_of(model: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of all parameters: what tells one model from another."""
    return tuple((name, tuple(p.shape)) for name, p in model.named_parameters())


def versions_of(model: nn.Module) -> dict[str, int]:
    """How often each parameter was changed in place."""
    return {name: version_of(p) for name, p in model.named_parameters()}


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, those of several names under each."""
    found = dict(module.named_parameters(remove_duplicate=False))
    return found | dict(module.named_buffers(remove_duplicate=False))
