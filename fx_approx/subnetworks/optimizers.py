"""Moves an optimiser of the full model to a subnetwork and back: its moments are cut out, and put back."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fx_approx.errors import UnsupportedError
from fx_approx.runtime.handle import GraphHandle
from fx_approx.subnetworks.cuts import Cut
from fx_approx.subnetworks.record import check_origin, full_model, record_of

Rest = Literal["cpu", "keep", "drop"]

_ORDER = {
    **dict.fromkeys(("momentum_buffer", "exp_avg", "grad_avg"), 1),
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"), 2),
}
"""How a moment grows with the gradient: of a weight that was scaled by s, the gradient is 1/s as large."""


@dataclasses.dataclass
class _Moved:
    """An optimiser that works on a subnetwork.

    Attributes:
        full: By the narrow parameter, the full one, its name, and its state as it was (the rest of it is never read).
        rest: Where that state is.
    """

    full: dict[Tensor, tuple[nn.Parameter, str, dict[str, Any]]]
    rest: Rest


_moved: weakref.WeakKeyDictionary[Optimizer, _Moved] = weakref.WeakKeyDictionary()


def narrow_optimizer(
    optimizer: Optimizer, sub: nn.Module, model: nn.Module | GraphHandle, *, rest: Rest = "cpu"
) -> None:
    """Has an optimiser of the full model train ``sub`` instead, with its moments cut out.

    It stays the same object with the same groups, so that schedulers of rates and gradient scalers go on.
    :func:`widen_optimizer` takes it back.

    Args:
        optimizer: Of parameters of ``model``; changed in place. Its state has one tensor of the parameter's shape for
            each moment, as in SGD, Adam, AdamW, RMSprop, Adagrad or Lion.
        sub: What :func:`fx_approx.subnetworks.extract` returned.
        model: The model that it was cut out of; of a backend's, the model itself or the backend.
        rest: Where the full moments wait: ``"cpu"``; ``"keep"``, where they are; ``"drop"``, nowhere: what ``sub`` does
            not have begins at zero again.

    Raises:
        ValueError: ``sub`` is of another model, a parameter is none of ``model``, or the optimiser has been moved
            already.
        UnsupportedError: Its state is not of the parameter's shape (Adafactor, Shampoo). Nothing is changed then.
    """
    if rest not in ("cpu", "keep", "drop"):
        raise ValueError(f"rest: expected 'cpu', 'keep' or 'drop', got {rest!r}")
    record = record_of(sub)
    full = full_model(record, model)
    check_origin(record, full)
    if optimizer in _moved:
        raise ValueError("optimizer: it works on a subnetwork already; call widen_optimizer first")
    names = {id(parameter): name for name, parameter in full.named_parameters()}
    own = dict(sub.named_parameters(remove_duplicate=False))
    pairs: dict[int, nn.Parameter] = {}
    states: dict[nn.Parameter, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                raise ValueError(f"optimizer: a parameter of shape {tuple(parameter.shape)} is none of model")
            cut, compact = record.cut_of(name), own[name]
            pairs[id(parameter)] = compact
            state = optimizer.state.get(parameter, {})
            states[compact] = {key: _cut(value, cut, parameter, key, optimizer) for key, value in state.items()}
    moved = _Moved({}, rest)
    for group in optimizer.param_groups:
        for place, parameter in enumerate(group["params"]):
            compact = pairs[id(parameter)]
            before = optimizer.state.pop(parameter, {})
            moved.full[compact] = parameter, names[id(parameter)], _put_away(before, rest)
            parameter.grad = None
            group["params"][place] = compact
            if states[compact]:
                optimizer.state[compact] = states[compact]
    _moved[optimizer] = moved


def widen_optimizer(optimizer: Optimizer, sub: nn.Module) -> None:
    """Has an optimiser that trains ``sub`` train the full model again, with its moments put back at their places.

    Args:
        optimizer: After :func:`narrow_optimizer`; changed in place.
        sub: The subnetwork.

    Raises:
        ValueError: The optimiser is not one of ``sub``.
    """
    record, moved = record_of(sub), _moved.get(optimizer)
    if moved is None or not set(moved.full) <= set(sub.parameters()):
        raise ValueError("optimizer: it does not work on this subnetwork; call narrow_optimizer first")
    for group in optimizer.param_groups:
        for place, compact in enumerate(group["params"]):
            parameter, name, before = moved.full[compact]
            state = optimizer.state.pop(compact, {})
            group["params"][place] = parameter
            if state:
                optimizer.state[parameter] = {
                    key: _widened(value, before.get(key), record.cut_of(name), parameter, key)
                    for key, value in state.items()
                }
            compact.grad = None
    del _moved[optimizer]


def full_moments(optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """By name, the full moments that wait while an optimiser works on a subnetwork; to store in a checkpoint."""
    moved = _moved.get(optimizer)
    return {} if moved is None else {name: before for _, name, before in moved.full.values()}


def restore_moments(optimizer: Optimizer, moments: Mapping[str, dict[str, Any]]) -> None:
    """Puts what :func:`full_moments` gave in the place of the moments that wait."""
    moved = _moved[optimizer]
    for compact, (parameter, name, _) in list(moved.full.items()):
        moved.full[compact] = parameter, name, _put_away(moments.get(name, {}), moved.rest)


def _cut(value: Any, cut: Cut, parameter: Tensor, key: str, optimizer: Optimizer) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value.clone() if isinstance(value, Tensor) else value
    if value.shape != parameter.shape:
        raise UnsupportedError(
            f"optimizer: {type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for a parameter of "
            f"shape {tuple(parameter.shape)}, and nothing tells which part of it belongs to a part of the parameter"
        )
    part = cut.taken(value)
    return part if not _scaled(cut) else part / cut.scale(parameter) ** _order(key)


def _widened(value: Any, before: Any, cut: Cut, parameter: Tensor, key: str) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    full = torch.zeros_like(parameter, dtype=value.dtype) if before is None else before.to(parameter.device)
    cut.put(full, value if not _scaled(cut) else value * cut.scale(parameter) ** _order(key), scaled=False)
    return full


def _scaled(cut: Cut) -> bool:
    return cut.inputs is not None and cut.inputs.scale is not None


def _order(key: str) -> int:
    if key not in _ORDER:
        raise UnsupportedError(f"optimizer: it is not known how {key!r} follows the scale of an unbiased sampler")
    return _ORDER[key]


def _put_away(state: dict[str, Any], rest: Rest) -> dict[str, Any]:
    if rest == "drop":
        return {}
    if rest == "keep":
        return dict(state)
    return {key: value.cpu() if isinstance(value, Tensor) and value.dim() else value for key, value in state.items()}
