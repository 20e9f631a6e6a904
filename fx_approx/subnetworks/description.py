"""A subnetwork as plain data: what tells how it follows from the full model, without a tensor and without code."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fx_approx._compat import HOOKS, buffers_of, parameters_of
from fx_approx.core.version import VERSION
from fx_approx.errors import UnsupportedError
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.exact import exact_copy
from fx_approx.sampling.base import Selection
from fx_approx.subnetworks.cuts import Cut
from fx_approx.subnetworks.record import Origin, Subnetwork, identity_of, record_of

FORMAT = "fx_approx.subnetwork/1"
"""What a description says that it is; another number stands for another layout."""

_KEYS = (
    *(
        "format",
        "fx_approx",
        "torch",
        "model",
        "parameters",
        "form",
        "forms",
        "graphs",
        "reason",
        "rebuilt_by",
        "beyond",
    ),
    *("selections", "chosen", "cuts", "attributes", "plan", "prune_unread"),
)
_PLAIN = (bool, int, float, str, type(None))
_OPAQUE = (nn.Module, Tensor, type)
_DEPTH = 3
"""How deep objects that a layer holds are looked into."""


def description(sub: nn.Module) -> dict[str, Any]:
    """How ``sub`` follows from its full model: lists, dicts, numbers and strings only, as JSON has them.

    With it, :func:`fx_approx.subnetworks.rebuild` makes the subnetwork from the full model's code, for
    ``sub.state_dict()`` to be loaded into. :func:`fx_approx.subnetworks.save` writes both.

    Args:
        sub: What :func:`fx_approx.subnetworks.extract` returned, or what wraps it.

    Returns:
        ``format``, versions, names and shapes of the model's ``parameters``, the ``form`` (``"class"`` or ``"graph"``)
        with its ``reason``, the ``forms`` of its parts and the ``graphs`` of a backend (see
        :class:`fx_approx.subnetworks.Subnetwork`), index lists in ``selections``, which ``cuts`` and ``chosen`` refer
        to by number, changed ``attributes`` of layers, and ``rebuilt_by``: ``"narrowing"`` of a copy, or ``"tracing"``
        of the model by its ``plan`` where something is other ``beyond`` that.

    Raises:
        ValueError: ``sub`` is no subnetwork.
        UnsupportedError: Neither way makes it again.
    """
    record = record_of(sub)
    origin = record.origin
    if origin is None or (origin.beyond and origin.plan is None):
        why = "" if origin is None else f", and {origin.beyond}"
        raise UnsupportedError(f"sub: it does not follow from one plan for the whole model{why}; merge it instead")
    table = _Table()
    return {
        "format": FORMAT,
        "fx_approx": VERSION,
        "torch": str(torch.__version__),
        "model": origin.model,
        "parameters": [[name, list(shape)] for name, shape in record.identity],
        "form": "class" if record.own_forward else "graph",
        "forms": dict(record.forms),
        "graphs": [list(names) for names in record.graphs],
        "reason": record.reason,
        "rebuilt_by": "tracing" if origin.beyond else "narrowing",
        "beyond": origin.beyond,
        "cuts": {
            name: {
                "inputs": table.number(cut.inputs),
                "outputs": table.number(cut.outputs),
                "groups": cut.groups,
                "depthwise": cut.depthwise,
                "transposed": cut.transposed,
            }
            for name, cut in record.cuts.items()
        },
        "chosen": [table.number(one) for one in record.selections],
        "selections": table.rows,
        "attributes": {path: dict(values) for path, values in origin.attributes.items()},
        "plan": None if origin.plan is None else dict(origin.plan),
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
    if missing:
        raise ValueError(
            f"description: expected what fx_approx.subnetworks.description gives, but it has no {missing[0]!r}"
        )
    identity = tuple((name, tuple(shape)) for name, shape in data["parameters"])
    _compare(dict(identity), dict(identity_of(model)), data["model"])
    selections = [_selection(row) for row in data["selections"]]

    def of(number: int | None) -> Selection | None:
        return None if number is None else selections[number]

    cuts = {
        name: Cut(name, of(one["inputs"]), of(one["outputs"]), one["groups"], one["depthwise"], one["transposed"])
        for name, one in data["cuts"].items()
    }
    origin = Origin(data["model"], data["attributes"], data["beyond"], data["plan"], data["prune_unread"])
    chosen = tuple(of(number) for number in data["chosen"])
    return Subnetwork(
        cuts,
        chosen,
        identity,
        data["form"] == "class",
        data["reason"],
        {},
        origin=origin,
        forms=dict(data["forms"]),
        graphs=tuple(tuple(names) for names in data["graphs"]),
    )


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


def origin_of(full: nn.Module, sub: nn.Module) -> Origin:
    """What ``sub`` was made from, a subnetwork of ``full``, a transformed model or one of a backend."""
    if not isinstance(full, ApproxModule):
        return origin_between(full, sub, None, True)
    record = full._fx_approx.record
    return origin_between(exact_copy(full), sub, record.plan.to_dict(), record.prunes)


def origin_between(full: nn.Module, sub: nn.Module, plan: Mapping[str, Any] | None, prunes: bool) -> Origin:
    """What ``sub`` was made from, a subnetwork of ``full``.

    Args:
        full: The plain model.
        sub: The subnetwork.
        plan: What was decided for the model, None if that was not one plan.
        prunes: ``prune_unread`` of the transform.
    """
    name = type(full).__qualname__
    if type(sub) is not type(full):
        return Origin(name, {}, "it is a graph", plan, prunes)
    one, other = (dict(model.named_modules(remove_duplicate=False)) for model in (full, sub))
    for path in dict.fromkeys((*one, *other)):
        if path not in one or path not in other or _kind(one[path]) != _kind(other[path]):
            return Origin(name, {}, f"the layer {path or name} is of another kind", plan, prunes)
    changed = {path: found for path in one if (found := dict(_changed(vars(one[path]), vars(other[path]))))}
    return Origin(name, changed, "", plan, prunes)


def _kind(module: nn.Module) -> Any:
    """What narrowing leaves as it is."""
    hooks = [len(getattr(module, name)) for name in HOOKS]
    return type(module), set(parameters_of(module)), set(buffers_of(module)), hooks, "forward" in vars(module)


def _changed(before: Mapping[str, Any], now: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Names of plain values that differ, with those now; of objects inside, with a dot."""
    for name, value in now.items():
        old = before.get(name)
        if name not in before or name == "training" or old is value:
            continue
        if _is_plain(value):
            if old != value:
                yield name, list(value) if isinstance(value, tuple) else value
        elif (
            depth < _DEPTH
            and type(old) is type(value)
            and hasattr(value, "__dict__")
            and not isinstance(value, _OPAQUE)
        ):
            yield from ((f"{name}.{key}", found) for key, found in _changed(vars(old), vars(value), depth + 1))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


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
