"""What a subnetwork knows of the model that it was cut out of."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from fx_approx._compat import keep_in_copies, version_of
from fx_approx.sampling.base import Selection
from fx_approx.subnetworks.cuts import Cut

RECORD = "_fx_approx_subnetwork"
"""Where a subnetwork keeps what it was cut out of."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a subnetwork was made from, beside tensors and selections, as plain data.

    Attributes:
        model: Name of the full model's class, for people.
        attributes: By layer, attributes that are other than in the full model, such as ``in_features``; those of an
            object that a layer holds with a dot, such as ``config.intermediate_size``.
        beyond: What differs beside tensors and attributes, in words; empty if nothing does.
        plan: What was decided for the model, see :meth:`fx_approx.core.plan.Plan.to_dict`; None if that was not one
            plan for the whole of it.
        prunes: ``prune_unread`` of the transform.
    """

    model: str
    attributes: Mapping[str, Mapping[str, Any]]
    beyond: str
    plan: Mapping[str, Any] | None
    prunes: bool


class ModelReference:
    """Tells one model from its copies; a copy of it refers to the same model, and a pickled one to none."""

    def __init__(self, model: nn.Module | None = None) -> None:
        """Refers weakly to ``model``."""
        self._model = None if model is None else weakref.ref(model)

    def means(self, model: nn.Module) -> bool:
        """Whether ``model`` is the one."""
        return self._model is not None and self._model() is model

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelReference:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return ModelReference, ()


@dataclasses.dataclass
class Subnetwork:
    """What a subnetwork knows of the model that it was cut out of; :func:`record_of` gives it.

    Attributes:
        cuts: By name of each narrowed parameter or buffer, what it holds of the full one.
        selections: The selections, in the order in which the model makes them.
        identity: What the full model must be: its layers and their shapes.
        own_forward: Its forward is the model's own Python, and it an instance of the model's class.
        reason: Why it is not, or why a part of it runs a graph, if so.
        versions: Of the full parameters and buffers when it was cut out; a change since is refused by :func:`merge`.
        merged: It has been written back since it was cut out.
        origin: What it was made from; None where that is not known.
        model: The model that it was cut out of; of a copy nobody knows whether it was changed.
        forms: By path of the model ("") or a section of it, how its forward was made; None for a graph.
        sliced: Weights that it holds whole and of which it reads a part, or other parts in other calls, and products
            of chosen pairs: no exact model computes what it does then.
        graphs: Of what a backend of ``torch.compile`` runs, the names of the tensors that each graph works with, in the
            order in which they make their selections; empty for a transformed model.
        notes: What its user should know, as that its config does not describe it, or that evaluation was not compared.
    """

    cuts: Mapping[str, Cut]
    selections: tuple[Selection | None, ...]
    identity: tuple[tuple[str, tuple[int, ...]], ...]
    own_forward: bool
    reason: str
    versions: dict[str, int]
    merged: bool = False
    origin: Origin | None = None
    model: ModelReference = dataclasses.field(default_factory=ModelReference)
    forms: dict[str, bool | None] = dataclasses.field(default_factory=dict)
    sliced: tuple[str, ...] = ()
    graphs: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()

    def cut_of(self, name: str) -> Cut:
        """What the parameter or buffer ``name`` holds of the full model's; all of it where nothing is cut off."""
        return self.cuts.get(name, Cut(name))

    def why_inexact(self) -> str:
        """Why no exact model computes what it does, where there is something ``sliced``."""
        more = f" and {len(self.sliced) - 1} more" if len(self.sliced) > 1 else ""
        return f"{self.sliced[0]}{more} takes part in a product with a selection of its own in each step"


def attach(sub: nn.Module, record: Subnetwork) -> None:
    """Makes ``sub`` a subnetwork, and its copies."""
    vars(sub)[RECORD] = record
    if isinstance(sub, fx.GraphModule):
        keep_in_copies(sub, RECORD)


def subnetwork_in(sub: nn.Module) -> nn.Module:
    """The subnetwork in ``sub``: itself, or inside ``torch.compile``, DistributedDataParallel, AveragedModel or alike.

    Raises:
        ValueError: There is none, or more than one.
    """
    modules = sub.modules() if isinstance(sub, nn.Module) else ()
    found = [module for module in modules if isinstance(vars(module).get(RECORD), Subnetwork)]
    if len(found) != 1:
        what = f"{type(sub).__name__}, which holds {len(found)}" if found else f"a {type(sub).__name__}"
        raise ValueError(f"sub: expected what fx_approx.subnetworks.extract returned, got {what}")
    return found[0]


def record_of(sub: nn.Module) -> Subnetwork:
    """What ``sub``, or the subnetwork in it, was cut out of.

    Raises:
        ValueError: It is no subnetwork, and holds none.
    """
    record: Subnetwork = vars(subnetwork_in(sub))[RECORD]
    return record


def check_origin(record: Subnetwork, model: nn.Module) -> None:
    """ValueError unless ``model`` is like the one that the subnetwork of ``record`` was cut out of."""
    if record.identity != identity_of(model):
        raise ValueError("sub: it was cut out of another model: names or shapes of the parameters differ")


def identity_of(model: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of all parameters: what tells one model from another."""
    return tuple((name, tuple(p.shape)) for name, p in model.named_parameters())


def versions_of(model: nn.Module) -> dict[str, int]:
    """How often each parameter and buffer was changed in place."""
    return {name: version_of(tensor) for name, tensor in tensors_of(model).items() if not tensor.is_inference()}


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, those of several names under each."""
    found = dict(module.named_parameters(remove_duplicate=False))
    return found | dict(module.named_buffers(remove_duplicate=False))
