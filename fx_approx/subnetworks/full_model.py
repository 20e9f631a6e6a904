"""Finds the full model of a subnetwork."""

from __future__ import annotations

from torch import nn

from fx_approx.runtime.approx_module import find, unwrapped
from fx_approx.runtime.handle import GraphHandle
from fx_approx.subnetworks.record import Subnetwork


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
