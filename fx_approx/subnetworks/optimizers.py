"""Moves an optimiser of the full model to a subnetwork and back: its moments are cut out, and put back."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Container, Iterator, Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from fx_approx.errors import UnsupportedError
from fx_approx.runtime.handle import GraphHandle
from fx_approx.runtime.sharding import is_shard
from fx_approx.subnetworks.cuts import Cut
from fx_approx.subnetworks.full_model import full_model
from fx_approx.subnetworks.moments import (
    State,
    check_kind,
    check_moments,
    cut_gradient,
    cut_moments,
    put_gradient,
    put_moments,
)
from fx_approx.subnetworks.record import Subnetwork, check_origin, record_of, subnetwork_in

Rest = Literal["cpu", "keep", "drop"]


@dataclasses.dataclass
class _Moved:
    """An optimiser that works on a subnetwork.

    Attributes:
        full: By each narrow parameter, the full one, its name, and what the narrow one holds of it.
        waiting: By name, the full state as it was (the part that the subnetwork has is never read).
        rest: Where that state is.
    """

    full: dict[Tensor, tuple[nn.Parameter, str, Cut]]
    waiting: dict[str, State]
    rest: Rest


_moved: weakref.WeakKeyDictionary[Optimizer, _Moved] = weakref.WeakKeyDictionary()


def narrow_optimizer(
    optimizer: Optimizer, sub: nn.Module, model: nn.Module | GraphHandle, *, rest: Rest = "cpu"
) -> None:
    """Has an optimiser of the full model train ``sub`` instead, with its moments cut out.

    It stays the same object with the same groups, so that schedulers of rates, gradient scalers and hooks go on.
    Parameters in it that are none of ``model``, or that its forward never reads, stay where they are. A gradient that
    waits for a step is cut out, too; the rest of it is dropped, as ``sub`` holds the rest of the weights.
    :func:`widen_optimizer` takes it back.

    Moments that belong to single entries are cut exactly, so that SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop,
    Adagrad, Adadelta, ASGD, Rprop and Lion go on as the full optimiser would with all else held. Adafactor's means over
    rows and columns are those of the part of the second moment that they stand for (its rank-one estimate), and its
    steps follow the size of the narrow parameter. Muon's momentum is cut exactly, but its step is that of the narrow
    matrix: what it makes orthogonal depends on all entries, so that no entry moves as in the full matrix.

    Args:
        optimizer: Of parameters of ``model``, all or some; changed in place.
        sub: What :func:`fx_approx.subnetworks.extract` returned, or what wraps it.
        model: The model that it was cut out of; of a backend's, the model itself or the backend.
        rest: Where the full moments wait: ``"cpu"``; ``"keep"``, where they are; ``"drop"``, nowhere: what ``sub`` does
            not have begins as in a new optimiser, but for the count of steps.

    Raises:
        ValueError: ``sub`` is of another model or sharded, no parameter is one of ``model``, or the optimiser has been
            moved already.
        UnsupportedError: A state is not of the parameter's shape (LBFGS, Shampoo), or it is not known how it follows
            the scale of an unbiased sampler; or a gradient that waits is sparse. Nothing is changed then.
    """
    if rest not in ("cpu", "keep", "drop"):
        raise ValueError(f"rest: expected 'cpu', 'keep' or 'drop', got {rest!r}")
    moved = check_optimizer(optimizer, sub, model, rest)
    compacts = {id(full): compact for compact, (full, _, _) in moved.full.items()}
    for group, place, parameter in _places(optimizer):
        compact = compacts.get(id(parameter))
        if compact is None:
            continue
        _, name, cut = moved.full[compact]
        before = optimizer.state.pop(parameter, {})
        if parameter.grad is not None:
            _add_gradient(compact, cut_gradient(parameter.grad, cut))
            parameter.grad = None
        group["params"][place] = compact
        if before:
            optimizer.state[compact] = cut_moments(optimizer, before, cut)
            moved.waiting[name] = _put_away(before, rest)
    _moved[optimizer] = moved


def check_optimizer(optimizer: Optimizer, sub: nn.Module, model: nn.Module | GraphHandle, rest: Rest = "cpu") -> _Moved:
    """Where the parts of an optimiser would be that :func:`narrow_optimizer` moves; errors as there."""
    record = record_of(sub)
    approx = full_model(record, model)
    check_origin(record, approx)
    if optimizer in _moved:
        raise ValueError("optimizer: it works on a subnetwork already; call widen_optimizer first")
    moved = _Moved(_counterparts(sub, record, approx), {}, rest)
    compacts = {id(full): compact for compact, (full, _, _) in moved.full.items()}
    check_parameters(optimizer, compacts)
    for _, _, parameter in _places(optimizer):
        if id(parameter) in compacts:
            _, _, cut = moved.full[compacts[id(parameter)]]
            check_moments(optimizer, optimizer.state.get(parameter, {}), cut, parameter.shape)
            _check_gradient(parameter)
    return moved


def check_parameters(optimizer: Optimizer, known: Container[int]) -> None:
    """Nothing if an optimiser is of a model, by the ids of its parameters, and of a kind that can be moved.

    Raises:
        ValueError: No parameter is one of the model.
        UnsupportedError: It is of another kind.
    """
    places = list(_places(optimizer))
    if not any(id(parameter) in known for _, _, parameter in places):
        raise ValueError(
            f"optimizer: none of its {len(places)} parameters is one of model, such as that of shape "
            f"{tuple(places[0][2].shape)}; expected an optimiser built on model.parameters()"
        )
    check_kind(optimizer)


def widen_optimizer(optimizer: Optimizer, sub: nn.Module) -> None:
    """Has an optimiser that trains ``sub`` train the full model again, with its moments put back at their places.

    Parameters of ``sub`` that were added to it meanwhile (``add_param_group``) become those of the full model, too. A
    gradient that waits for a step goes to its places, with zeros around it.

    Args:
        optimizer: After :func:`narrow_optimizer`; changed in place.
        sub: The subnetwork, or what wraps it.

    Raises:
        ValueError: The optimiser is not one of ``sub``.
        UnsupportedError: As in :func:`narrow_optimizer`, of a state that has come since. Nothing is changed then.
    """
    moved = check_widening(optimizer, sub)
    for group, place, compact in _places(optimizer):
        if compact not in moved.full:
            continue
        parameter, name, cut = moved.full[compact]
        state = optimizer.state.pop(compact, {})
        group["params"][place] = parameter
        if state:
            before = moved.waiting.get(name, {})
            optimizer.state[parameter] = put_moments(optimizer, state, cut, before, parameter, group)
        if compact.grad is not None:
            _add_gradient(parameter, put_gradient(compact.grad, cut, parameter))
            compact.grad = None
    del _moved[optimizer]


def check_widening(optimizer: Optimizer, sub: nn.Module) -> _Moved:
    """Where the parts are of an optimiser that :func:`widen_optimizer` takes back; errors as there."""
    moved = _moved.get(optimizer)
    if moved is None or not moved.full.keys() <= set(sub.parameters()):
        raise ValueError("optimizer: it does not work on this subnetwork; call narrow_optimizer first")
    for _, _, compact in _places(optimizer):
        if compact in moved.full:
            check_moments(optimizer, optimizer.state.get(compact, {}), moved.full[compact][2], compact.shape)
            _check_gradient(compact)
    return moved


def full_moments(optimizer: Optimizer) -> dict[str, State]:
    """By name, the full moments that wait while an optimiser works on a subnetwork; to store in a checkpoint."""
    moved = _moved.get(optimizer)
    return {} if moved is None else dict(moved.waiting)


def restore_moments(optimizer: Optimizer, moments: Mapping[str, State]) -> None:
    """Puts what :func:`full_moments` gave in the place of the moments that wait."""
    moved = _moved[optimizer]
    moved.waiting = {name: _put_away(dict(state), moved.rest) for name, state in moments.items()}


def _counterparts(sub: nn.Module, record: Subnetwork, approx: nn.Module) -> dict[Tensor, tuple[nn.Parameter, str, Cut]]:
    own = dict(subnetwork_in(sub).named_parameters(remove_duplicate=False))
    sharded = next((name for name, compact in own.items() if is_shard(compact)), None)
    if sharded is not None:
        raise ValueError(
            f"sub: {sharded} is sharded, and no optimiser of whole parameters goes on with it; build one on "
            "sub.parameters()"
        )
    return {own[name]: (full, name, record.cut_of(name)) for name, full in approx.named_parameters() if name in own}


def _places(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], int, nn.Parameter]]:
    """Each parameter of an optimiser with its group and its place there."""
    for group in optimizer.param_groups:
        for place, parameter in enumerate(group["params"]):
            yield group, place, parameter


def _check_gradient(parameter: Tensor) -> None:
    if parameter.grad is not None and parameter.grad.is_sparse:
        raise UnsupportedError(
            f"optimizer: a parameter of shape {tuple(parameter.shape)} has a sparse gradient, of which no part can be "
            "cut out; take the optimiser's step and call zero_grad first"
        )


def _add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _put_away(state: State, rest: Rest) -> State:
    if rest == "drop":
        return {}
    if rest == "keep":
        return dict(state)
    return {key: value.cpu() if isinstance(value, Tensor) and value.dim() else value for key, value in state.items()}
