"""A subnetwork as plain data: what tells how it follows from the full model, without a tensor and without code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fx_approx.core.version import VERSION
from fx_approx.errors import UnsupportedError
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.sampling.base import Selection
from fx_approx.subnetworks.cuts import Cut
from fx_approx.subnetworks.record import Origin, Subnetwork, identity_of, record_of

FORMAT = "fx_approx.subnetwork/1"
"""What a description says that it is; another number stands for another layout."""

_KEYS = (
    *("format", "fx_approx", "torch", "model", "parameters", "form", "reason"),
    *("selections", "chosen", "cuts", "attributes", "plan", "prune_unread"),
)
_FORMS = ("class", "graph")
_PLAIN = (bool, int, float, str, type(None))


def description(sub: nn.Module) -> dict[str, Any]:
    """How ``sub`` follows from its full model: lists, dicts, numbers and strings only, as JSON has them.

    With it, :func:`fx_approx.subnetworks.rebuild` makes the subnetwork from the full model's code, for
    ``sub.state_dict()`` to be loaded into. :func:`fx_approx.subnetworks.save` writes both.

    Args:
        sub: What :func:`fx_approx.subnetworks.extract` returned.

    Returns:
        ``format``, versions, names and shapes of the model's ``parameters``, the ``form`` (``"class"`` or
        ``"graph"``) with its ``reason``, index lists in ``selections``, which ``cuts`` and ``chosen`` refer to by
        number, changed ``attributes`` of layers, and the ``plan``.

    Raises:
        ValueError: ``sub`` is no subnetwork.
        UnsupportedError: It was not made from a plan, so that nothing can make it again.
    """
    record = record_of(sub)
    origin = record.origin
    if origin is None:
        raise UnsupportedError("sub: it was not cut out of a model with one plan, so that no description makes it anew")
    table = _Table()
    return {
        "format": FORMAT,
        "fx_approx": VERSION,
        "torch": str(torch.__version__),
        "model": origin.model,
        "parameters": [[name, list(shape)] for name, shape in record.identity],
        "form": "class" if record.own_forward else "graph",
        "reason": record.reason,
        "cuts": {
            name: {
                "inputs": table.number(cut.inputs),
                "outputs": table.number(cut.outputs),
                "groups": cut.groups,
                "depthwise": cut.depthwise,
            }
            for name, cut in record.cuts.items()
        },
        "chosen": [table.number(one) for one in record.selections],
        "selections": table.rows,
        "attributes": {path: dict(values) for path, values in origin.attributes.items()},
        "plan": dict(origin.plan),
        "prune_unread": origin.prunes,
    }


def record_from(data: Any, model: nn.Module) -> Subnetwork:
    """The record that ``data``, a description, stands for.

    Args:
        data: What :func:`description` gave, or what JSON made of it.
        model: The plain full model, to be compared with that of the description.

    Raises:
        ValueError: No description, one of another format, or of another model; names what differs.
    """
    found = data.get("format") if isinstance(data, Mapping) else None
    if found != FORMAT:
        by = f", written by fx_approx {data.get('fx_approx')}" if found is not None else ""
        what = f"the format {found!r}{by}" if isinstance(data, Mapping) else f"a {type(data).__name__}"
        raise ValueError(f"description: expected the format {FORMAT!r} of this fx_approx {VERSION}, got {what}")
    missing = [key for key in _KEYS if key not in data]
    if missing or data["form"] not in _FORMS:
        wrong = f"it has no {missing[0]!r}" if missing else f"form is {data['form']!r}, neither of {_FORMS}"
        raise ValueError(f"description: expected what fx_approx.subnetworks.description gives, but {wrong}")
    identity = tuple((name, tuple(shape)) for name, shape in data["parameters"])
    _compare(dict(identity), dict(identity_of(model)), data["model"])
    selections = [_selection(row) for row in data["selections"]]

    def of(number: int | None) -> Selection | None:
        return None if number is None else selections[number]

    cuts = {
        name: Cut(name, of(one["inputs"]), of(one["outputs"]), one["groups"], one["depthwise"])
        for name, one in data["cuts"].items()
    }
    origin = Origin(data["model"], data["attributes"], data["plan"], data["prune_unread"])
    chosen = tuple(of(number) for number in data["chosen"])
    return Subnetwork(cuts, chosen, identity, data["form"] == "class", data["reason"], {}, origin=origin)


def _compare(then: Mapping[str, Any], now: Mapping[str, Any], name: str) -> None:
    """ValueError that names the first parameter that is not as it was in the model, a ``name``, that was cut."""
    for key in dict.fromkeys((*then, *now)):
        if key not in now:
            raise ValueError(f"model: expected a parameter {key} as in the {name} that was cut; there is none")
        if key not in then:
            raise ValueError(f"model: expected no parameter {key}, as in the {name} that was cut")
        if then[key] != now[key]:
            raise ValueError(
                f"model: expected {key} of shape {then[key]} as in the {name} that was cut, got {now[key]}"
            )


def origin_of(approx: ApproxModule, root: nn.Module) -> Origin:
    """What a subnetwork of ``approx`` was made from, whose narrowed structure is ``root``."""
    full = dict(approx.named_modules(remove_duplicate=False))
    changed = {
        path: values
        for path, module in root.named_modules()
        if path in full and (values := _changed(vars(full[path]), vars(module)))
    }
    record = approx._fx_approx.record
    return Origin(approx.exact_class.__qualname__, changed, record.plan.to_dict(), record.prunes)


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in now.items()
        if name != "training" and isinstance(value, _PLAIN) and name in before and before[name] != value
    }


@dataclasses.dataclass
class _Table:
    """Selections by number, each once: many tensors are cut by the same one."""

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    numbers: dict[Any, int] = dataclasses.field(default_factory=dict)

    def number(self, chosen: Selection | None) -> int | None:
        if chosen is None:
            return None
        indices, scale = chosen.indices.tolist(), None
        if chosen.scale is not None:
            scale = {"dtype": str(chosen.scale.dtype).removeprefix("torch."), "values": chosen.scale.tolist()}
        key = repr((indices, scale))
        if key not in self.numbers:
            self.numbers[key] = len(self.rows)
            self.rows.append({"indices": indices, "scale": scale})
        return self.numbers[key]


def _selection(row: Mapping[str, Any]) -> Selection:
    scale = row["scale"]
    factors = None if scale is None else torch.tensor(scale["values"], dtype=getattr(torch, scale["dtype"]))
    return Selection(torch.tensor(row["indices"], dtype=torch.int64), factors)
