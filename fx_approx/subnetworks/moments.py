"""How the moments of an optimiser are cut out of those of the full model, and put back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fx_approx.errors import UnsupportedError
from fx_approx.subnetworks.cuts import Cut

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Moment:
    """What is known of one kind of moment.

    Attributes:
        order: It grows with this power of the gradient: of a weight that was scaled by s, the gradient is 1/s as large.
        start: What it is of an entry that was never trained, from the full parameter and its group; None for zero.
    """

    order: int
    start: Callable[[Tensor, Mapping[str, Any]], Any] | None = None


_MOMENTS = {
    **dict.fromkeys(("momentum_buffer", "exp_avg", "grad_avg", "exp_inf", "prev"), Moment(1)),
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "variance"), Moment(2)),
    "sum": Moment(2, lambda parameter, group: group.get("initial_accumulator_value", 0.0)),  # Adagrad
    "acc_delta": Moment(-2),  # Adadelta: squares of what the weight has moved
    "step_size": Moment(-1, lambda parameter, group: group["lr"]),  # Rprop
    "ax": Moment(-1, lambda parameter, group: parameter),  # ASGD: an average of the weight
}
"""By the name under which optimisers of torch, and those that follow them, keep it."""

_OF_ONE_CLASS = {(torch.optim.RMSprop, "momentum_buffer"): Moment(0)}  # of gradients divided by their own size

_ROW, _COLUMN, _FACTORED = "row_var", "col_var", "variance"
"""Adafactor keeps the second moment of a matrix as means over the last axis and over the last but one."""


def check_kind(optimizer: Optimizer) -> None:
    """UnsupportedError for an optimiser whose state belongs to no parameter."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedError(
            "optimizer: LBFGS keeps directions through all parameters at once, of which no part belongs to a part of "
            "them; build a new one on sub.parameters()"
        )


def check_moments(optimizer: Optimizer, state: State, cut: Cut, shape: torch.Size) -> None:
    """Nothing if the moments of a parameter of this shape can be cut and put back.

    Raises:
        UnsupportedError: They cannot; names the optimiser and the moment.
    """
    for key, value in _unfactored(state).items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        if value.shape != shape:
            raise UnsupportedError(
                f"optimizer: {type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for a parameter of "
                f"shape {tuple(shape)}, and nothing tells which part of it belongs to a part of the parameter; build a "
                "new one on sub.parameters()"
            )
        if cut.scaled and _moment(optimizer, key) is None:
            raise UnsupportedError(
                f"optimizer: {type(optimizer).__name__} keeps {key!r}, of which it is not known how it follows the "
                "scale of an unbiased sampler; expected a sampler without scaling, such as topk"
            )


def cut_moments(optimizer: Optimizer, state: State, cut: Cut) -> State:
    """The moments of the entries that a subnetwork has; copies."""
    found = {}
    for key, value in _unfactored(state).items():
        if isinstance(value, Tensor) and value.dim():
            found[key] = _rescaled(cut.taken(value), cut, value, -_order(optimizer, key))
        else:
            found[key] = value.clone() if isinstance(value, Tensor) else value
    return _factored(found, state)


def put_moments(
    optimizer: Optimizer, state: State, cut: Cut, before: State, parameter: Tensor, group: Mapping[str, Any]
) -> State:
    """The moments of a full parameter.

    Args:
        optimizer: Whose they are.
        state: Those of the subnetwork's parameter.
        cut: What that is of the full one.
        before: Those of the full one, of which the rest is taken; changed in place. Where one is missing, the rest
            begins as in a new optimiser.
        parameter: The full one.
        group: Of the optimiser.
    """
    own, rest, found = _unfactored(state), _unfactored(before), {}
    for key, value in own.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            found[key] = value
            continue
        full = _start(optimizer, key, value, parameter, group) if key not in rest else rest[key].to(parameter.device)
        cut.put(full, _rescaled(value, cut, full, _order(optimizer, key)), scaled=False)
        found[key] = full
    return _factored(found, state)


def cut_gradient(gradient: Tensor, cut: Cut) -> Tensor:
    """The part of a full gradient that belongs to a compact weight."""
    return _rescaled(cut.taken(gradient), cut, gradient, -1)


def put_gradient(gradient: Tensor, cut: Cut, parameter: Tensor) -> Tensor:
    """The gradient of a full parameter, zero where a subnetwork has nothing."""
    full = torch.zeros_like(parameter)
    cut.put(full, _rescaled(gradient, cut, full, 1), scaled=False)
    return full


def _rescaled(compact: Tensor, cut: Cut, full: Tensor, power: int) -> Tensor:
    return compact * cut.scale(full) ** power if cut.scaled and power else compact


def _moment(optimizer: Optimizer, key: str) -> Moment | None:
    for (kind, name), moment in _OF_ONE_CLASS.items():
        if isinstance(optimizer, kind) and name == key:
            return moment
    return _MOMENTS.get(key)


def _order(optimizer: Optimizer, key: str) -> int:
    moment = _moment(optimizer, key)
    return 0 if moment is None else moment.order


def _start(optimizer: Optimizer, key: str, value: Tensor, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    full = torch.zeros_like(parameter, dtype=value.dtype)
    moment = _moment(optimizer, key)
    if moment is not None and moment.start is not None:
        with torch.no_grad():
            full += moment.start(parameter, group)
    return full


def _unfactored(state: State) -> State:
    """The state with the second moment itself, row_var * col_var / mean(row_var), in the place of its means."""
    if not {_ROW, _COLUMN} <= state.keys():
        return state
    row, column = state[_ROW], state[_COLUMN]
    mean = row.mean(dim=-2, keepdim=True).clamp(min=torch.finfo(row.dtype).tiny)
    rest = {key: value for key, value in state.items() if key not in (_ROW, _COLUMN)}
    return {**rest, _FACTORED: row @ column / mean}


def _factored(found: State, like: State) -> State:
    """The inverse of :func:`_unfactored`, with the keys of ``like`` in their order."""
    if _ROW not in like:
        return found
    means = {_ROW: found[_FACTORED].mean(-1, keepdim=True), _COLUMN: found[_FACTORED].mean(-2, keepdim=True)}
    return {key: means[key] if key in means else found[key] for key in like}
