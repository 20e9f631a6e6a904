"""What a subnetwork costs beside its full model: parameters, operations, memory of a training step, time."""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.optim import Optimizer

from fx_approx._compat import storage_key, tree_leaves
from fx_approx.capture.error_text import describe
from fx_approx.capture.module_snapshot import AttributeSnapshot, TensorSnapshot, kept_training_flags
from fx_approx.capture.trace import kept_random_state
from fx_approx.core.flops import measured_flops
from fx_approx.runtime.validation import check_inputs
from fx_approx.subnetworks.rebuild import plain
from fx_approx.subnetworks.record import check_origin, record_of, subnetwork_in, tensors_of
from fx_approx.utils.tables import human
from fx_approx.utils.timing import in_turn, seconds

_COLUMNS = 100
_ROUNDS, _WARMUP = 20, 3
_BLOCK = 2e-3  # seconds: shorter calls are repeated within a measurement
_KINDS = {
    name.lower(): one
    for name, one in vars(torch.optim).items()
    if isinstance(one, type) and issubclass(one, Optimizer) and one is not Optimizer
}

OptimizerLike = str | type[Optimizer] | Optimizer


@dataclasses.dataclass(frozen=True)
class Latency:
    """Seconds of one forward in evaluation: median and quartiles."""

    low: float
    median: float
    high: float


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a model costs; None for what was not asked for.

    Attributes:
        parameters: How many numbers they are.
        forward: Operations of a forward in training; a multiply-add is two.
        training: Operations of a training step, forward and backward.
        weights: Bytes of parameters and buffers.
        gradients: Bytes of the gradients of all parameters that are trained.
        optimizer: Bytes of the state of the optimiser after a step.
        activations: Bytes that autograd keeps from forward to backward in an eager step, parameters and buffers not
            counted; each piece of memory once. Working memory of single operations is not known.
        resting: Bytes of the full model's parameters and buffers, which wait while a subnetwork is trained; the full
            moments of an optimiser that was moved are not counted, see :func:`fx_approx.subnetworks.narrow_optimizer`.
        latency: Of a forward in evaluation.
    """

    parameters: int
    forward: int | None
    training: int | None
    weights: int
    gradients: int
    optimizer: int | None
    activations: int | None
    resting: int
    latency: Latency | None

    @property
    def step(self) -> int | None:
        """Bytes of a training step: weights, gradients, the optimiser's state if it was asked for, and activations."""
        if self.activations is None:
            return None
        return self.weights + self.gradients + (self.optimizer or 0) + self.activations

    @property
    def step_and_resting(self) -> int | None:
        """The same where the full model rests beside."""
        return None if self.step is None else self.step + self.resting


@dataclasses.dataclass(frozen=True)
class Summary:
    """A subnetwork beside its full model; printed, it is a table.

    Attributes:
        model: Name of the full model's class.
        form: ``"own class"`` or ``"graph"``, with the reason why it, or a part of it, is a graph.
        optimizer: Name of the optimiser's class; None if it was not asked for.
        full: Costs of the full model, exact.
        sub: Costs of the subnetwork.
    """

    model: str
    form: str
    optimizer: str | None
    full: Costs
    sub: Costs

    def to_dict(self) -> dict[str, Any]:
        """All numbers as lists, dicts, numbers and strings."""
        both = {}
        for name, costs in (("full", self.full), ("sub", self.sub)):
            both[name] = {
                **dataclasses.asdict(costs),
                "step": costs.step,
                "step_and_resting": costs.step_and_resting,
            }
        return {"model": self.model, "form": self.form, "optimizer": self.optimizer, **both}

    def __str__(self) -> str:
        step = "sum" if self.optimizer else "sum, without an optimiser"
        names = {
            "parameters": "parameters",
            "forward": "operations, forward",
            "training": "operations, training step",
            "weights": "bytes: weights",
            "gradients": "bytes: gradients",
            "optimizer": f"bytes: optimiser state ({self.optimizer})",
            "activations": "bytes: activations kept for backward",
            "step": f"bytes: {step}",
            "resting": "bytes: full weights at rest",
            "step_and_resting": f"bytes: {step}, with those at rest",
        }
        rows = []
        for name, label in names.items():
            one, other = getattr(self.full, name), getattr(self.sub, name)
            if one is None and other is None:
                continue
            share = f"{other / one:.2f}" if one else ""
            rows.append((label, human(one), human(other), share))
        if self.full.latency is not None and self.sub.latency is not None:
            one, other = self.full.latency, self.sub.latency
            share = f"{other.median / one.median:.2f}"
            rows.append(("ms: forward in eval()", _ms(one.median), _ms(other.median), share))
            rows.append(("ms: its quartiles", _quartiles(one), _quartiles(other), ""))
        table = tabulate(
            rows,
            headers=("", "full", "subnetwork", "share"),
            colalign=("left", "right", "right", "right"),
            disable_numparse=True,
        )
        form, _, reason = self.form.partition(": ")
        lines = [f"{self.model} and its subnetwork ({form})"]
        for part in filter(None, reason.split("; ")):
            lines += textwrap.wrap(part, _COLUMNS, initial_indent="  ", subsequent_indent="    ")
        return "\n".join([*lines, table])


def summary(
    sub: nn.Module,
    model: nn.Module,
    example_inputs: Any = None,
    *,
    optimizer: OptimizerLike | None = None,
    latency: bool = False,
) -> Summary:
    """What ``sub`` costs beside its full model.

    With ``example_inputs`` each of both runs forward and backward once, in training mode, and what it does is counted;
    parameters, gradients, buffers and random states are as before at the end.

    Args:
        sub: What :func:`fx_approx.subnetworks.extract` returned; of what wraps it, the subnetwork inside is measured.
        model: The plain full model, or the transformed one; its exact form is what is measured.
        example_inputs: A batch as the model is called with it. Without it there are no operations and activations.
        optimizer: Count its state: a class of ``torch.optim`` or its name (``"adamw"``), with its defaults, or an
            optimiser of parameters of ``model`` or ``sub``, whose groups are taken over. It makes a step on stand-ins.
        latency: Time forwards in evaluation, in turn, without gradients.

    Raises:
        ValueError: ``sub`` is no subnetwork, or of another model; ``latency`` without ``example_inputs``; a name that
            stands for no optimiser, one of other parameters, or one that cannot make a step on them.
        TypeError: ``optimizer`` is something else.
    """
    record, full = record_of(sub), plain(model)
    check_origin(record, full)
    sub = subnetwork_in(sub)
    if latency and example_inputs is None:
        raise ValueError("example_inputs: expected a batch as the model is called with it, for latency=True, got None")
    args, kwargs = check_inputs(full, example_inputs)
    named = _optimizer(optimizer)
    owners = {id(p): name for one in (full, sub) for name, p in one.named_parameters(remove_duplicate=False)}
    for parameter in _parameters_of(named) if isinstance(named, Optimizer) else ():
        if id(parameter) not in owners:
            shape = tuple(parameter.shape)
            raise ValueError(f"optimizer: a parameter of shape {shape} is neither one of model nor of sub")
    resting = _bytes(tensors_of(full).values())
    times: list[Latency | None] = [None, None]
    if latency:
        times = [*_latencies([full, sub], args or (), kwargs)]
    costs = []
    for one, time in zip((full, sub), times, strict=True):
        counted = (None, None, None) if args is None else _counted(one, args, kwargs)
        trained = [parameter for parameter in one.parameters() if parameter.requires_grad]
        costs.append(
            Costs(
                sum(parameter.numel() for parameter in one.parameters()),
                counted[0],
                counted[1],
                _bytes(tensors_of(one).values()),
                sum(parameter.nbytes for parameter in trained),
                None if named is None else _state(named, one, owners),
                counted[2],
                0 if one is full else resting,
                time,
            )
        )
    kind = None if named is None else (named if isinstance(named, type) else type(named)).__name__
    form = ": ".join(filter(None, ("own class" if record.own_forward else "graph", record.reason)))
    return Summary(type(full).__name__, form, kind, *costs)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def _ms(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _quartiles(latency: Latency) -> str:
    return f"{_ms(latency.low)} to {_ms(latency.high)}"


# ---- one step


def _counted(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int, int]:
    """Operations of a forward and of a step in training, and bytes that it keeps in between."""
    left_out = {storage_key(tensor.untyped_storage()) for tensor in tensors_of(module).values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage_key(storage) not in left_out:
            kept[storage_key(storage)] = storage  # it lives on, so that no other takes its place
        return tensor

    def forward() -> Any:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return module(*args, **kwargs)

    attributes, buffers = AttributeSnapshot(module.modules()), TensorSnapshot(module.buffers())
    with kept_random_state(), kept_training_flags(module.modules()), attributes.kept():
        module.train()
        try:
            flops = measured_flops(forward, [], list(module.parameters()))
        finally:
            buffers.restore()
    return flops.output, flops.total, sum(storage.nbytes() for storage in kept.values())


# ---- the optimiser


def _optimizer(given: OptimizerLike | None) -> type[Optimizer] | Optimizer | None:
    if given is None or isinstance(given, Optimizer):
        return given
    if isinstance(given, str):
        found = _KINDS.get(given.lower())
        if found is None:
            raise ValueError(f"optimizer: expected a name from {', '.join(sorted(_KINDS))}, got {given!r}")
        return found
    if isinstance(given, type) and issubclass(given, Optimizer):
        return given
    raise TypeError(f"optimizer: expected an optimiser, a class of them or its name, got {given!r}")


def _state(optimizer: type[Optimizer] | Optimizer, module: nn.Module, owners: Mapping[int, str]) -> int:
    """Bytes of the state of an optimiser of ``module`` after a step; on tensors without memory where it takes them."""
    try:
        return _state_on(optimizer, module, owners, "meta")
    except Exception:  # it reads values, or asks for a device
        pass
    try:
        return _state_on(optimizer, module, owners, "cpu")
    except Exception as error:  # whatever an optimiser says of parameters that it does not take
        name = (optimizer if isinstance(optimizer, type) else type(optimizer)).__name__
        raise ValueError(f"optimizer: {name} makes no step on these parameters: {describe(error)}") from error


def _state_on(optimizer: type[Optimizer] | Optimizer, module: nn.Module, owners: Mapping[int, str], device: str) -> int:
    own = dict(module.named_parameters(remove_duplicate=False))
    stand_ins: dict[int, nn.Parameter] = {}
    for parameter in own.values():
        if id(parameter) not in stand_ins:
            made = nn.Parameter(torch.zeros_like(parameter, device=device), parameter.requires_grad)
            made.grad = torch.zeros_like(made) if made.requires_grad else None
            stand_ins[id(parameter)] = made
    if isinstance(optimizer, Optimizer):
        clone = _clone(optimizer, lambda name: stand_ins[id(own[name])] if name in own else None, owners)
    else:
        trained = [parameter for parameter in stand_ins.values() if parameter.requires_grad]
        clone = optimizer(trained)  # type: ignore[call-arg]
    clone.step()
    leaves = tree_leaves([dict(state) for state in clone.state.values()])
    return _bytes(leaf for leaf in leaves if isinstance(leaf, Tensor))


def _parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _clone(
    optimizer: Optimizer, stand_in: Callable[[str], nn.Parameter | None], owners: Mapping[int, str]
) -> Optimizer:
    """An optimiser with the same groups of other parameters, before its first step."""
    memo: dict[int, Any] = {id(optimizer.state): defaultdict(dict)}
    memo |= {id(parameter): stand_in(owners[id(parameter)]) for parameter in _parameters_of(optimizer)}
    clone = copy.deepcopy(optimizer, memo)
    for group in clone.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter is not None]
    return clone


# ---- time


def _latencies(modules: list[nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Latency]:
    device = next((tensor.device for tensor in tensors_of(modules[0]).values()), torch.device("cpu"))
    calls = [functools.partial(module, *args, **kwargs) for module in modules]
    every = [inside for module in modules for inside in module.modules()]
    with torch.no_grad(), kept_random_state(), kept_training_flags(every), AttributeSnapshot(every).kept():
        for module in modules:
            module.eval()
        counts = []
        for call in calls:
            call()
            counts.append(max(1, min(1000, int(_BLOCK / max(seconds(call, device), 1e-7)))))
        taken = in_turn(calls, device, _ROUNDS, warmup=_WARMUP, counts=counts, back_and_forth=True)
    return [Latency(*statistics.quantiles(own, n=4)) for own in taken]
