"""One operation between two layers: whether the first computes what the second reads only, and whether it is right.

The oracle is the original model with those columns of its weights zeroed that were not read. It knows nothing of
selections, layouts or demand: which columns were read is seen from the gradients of the weights.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from fx_approx.policies import Uniform
from tests.helpers.hoisting import loss_of, perturbed

AHEAD = Uniform(0.5)
WIDTH = 16

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Fn(nn.Module):
    """A function of a value and of named parameters and buffers, as an operation of a sandwich."""

    def __init__(
        self,
        call: Callable[..., Any],
        layers: dict[str, nn.Module] | None = None,
        buffers: dict[str, Tensor] | None = None,
        groups: int = 1,
        **parameters: Tensor,
    ) -> None:
        super().__init__()
        self.call, self.groups = call, groups
        for name, layer in (layers or {}).items():
            self.add_module(name, layer)
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))
        for name, value in (buffers or {}).items():
            self.register_buffer(name, value)

    def forward(self, *values: Tensor) -> Any:
        code = getattr(self.call, "__code__", None)
        with_self = code is not None and code.co_argcount > len(values) and code.co_varnames[0] == "self"
        return self.call(self, *values) if with_self else self.call(*values)


@dataclasses.dataclass(frozen=True)
class Row:
    """One operation.

    Attributes:
        name: Of the row.
        make: Builds the operation.
        goes: ``passes``; ``blocks`` (it passes by whole groups of channels); ``stops`` (it mixes channels); ``open``
            (mathematics would allow it to pass, it stops all the same).
        dims: Positions between convolutions have so many axes; 0 for linear layers on ``[N, T, features]``.
        reads: Channels that the last layer reads.
        flat: The last layer is linear, behind convolutions.
        streams: The operation has so many operands, each made by a first layer of its own.
    """

    name: str
    make: Callable[[], nn.Module]
    goes: str = "passes"
    dims: int = 2
    reads: int = WIDTH
    flat: bool = False
    streams: int = 1


class Sandwich(nn.Module):
    """``last(operation(first(x)))``; with two streams ``last(operation(first(x), second(x)))``."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.first = self._begin(row)
        self.second = self._begin(row) if row.streams > 1 else None
        self.operation = row.make()
        linear = row.flat or not row.dims
        self.last = nn.Linear(row.reads, 6) if linear else _CONVS[row.dims](row.reads, 6, 1)

    @staticmethod
    def _begin(row: Row) -> nn.Module:
        return _CONVS[row.dims](4, WIDTH, 3, padding=1) if row.dims else nn.Linear(4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        streams = (self.first(x),) if self.second is None else (self.first(x), self.second(x))
        result: Tensor = self.last(self.operation(*streams))
        return result


def built(row: Row, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """The sandwich in float64 and an input for it."""
    torch.manual_seed(seed)
    model = perturbed(Sandwich(row)).double()
    shape = (3, 5, 4) if not row.dims else (3, 4, *(8, 6, 4)[: row.dims])
    return model, torch.randn(shape, dtype=torch.float64)


class Widths(TorchDispatchMode):
    """How many outputs the products have that are computed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            self.found.append(result.shape[1])
        elif name in ("addmm", "mm", "bmm"):
            self.found.append(result.shape[-1])
        return result


class Compiled:
    """A model that is compiled, as far as AOTAutograd goes, through a backend of ours or none.

    Attributes:
        widths: As :class:`Widths`, of the convolutions of the compiled graph; filled by the first call.
    """

    def __init__(self, model: nn.Module, through: Callable[[Any], Any] = lambda inner: inner) -> None:
        self.widths = Widths()
        inner = aot_autograd(fw_compiler=self._forward, bw_compiler=lambda gm, _: make_boxed_func(gm.forward))
        self.call = torch.compile(model, backend=through(inner), fullgraph=True)

    def _forward(self, gm: fx.GraphModule, inputs: Any) -> Any:
        convolution = torch.ops.aten.convolution.default
        self.widths.found += [n.meta["val"].shape[1] for n in gm.graph.nodes if n.target is convolution]
        return make_boxed_func(gm.forward)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one training step showed.

    Attributes:
        computed: Outputs that the first layer computed.
        read: Columns of the last layer's weight that were read.
        error: Largest difference to the oracle, of outputs and of gradients, each relative to the largest entry.
    """

    computed: int
    read: int
    error: float


def outcome(model: nn.Module, approx: nn.Module, x: Tensor, compiled: Compiled | None = None) -> Outcome:
    """One step of ``approx``, transformed from ``model``, against the oracle; statistics are compared, too."""
    before = {name: value.clone() for name, value in approx.named_buffers()}
    wanted = {name: p for name, p in approx.named_parameters() if p.requires_grad}
    if compiled is None:
        with Widths() as widths:
            output = approx(x)
    else:
        widths, output = compiled.widths, compiled.call(x)
    grads = dict(zip(wanted, _grads(output, list(wanted.values())), strict=True))
    groups = _groups(model)
    read = {
        name: _columns(grad, groups.get(name, 1))
        for name, grad in grads.items()
        if grad.dim() > 1 and grad.shape[1] > 1
    }
    exact = copy.deepcopy(model)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in exact.named_parameters()}
    zeroed = {name: p * read[name] if name in read else p for name, p in leaves.items()}
    whole = torch.func.functional_call(exact, zeroed, (x,))
    expected = dict(zip(leaves, _grads(whole, list(leaves.values())), strict=True))
    errors = [_error([output], [whole]), _error(list(grads.values()), [expected[name] for name in grads])]
    after = dict(exact.named_buffers())
    for name, value in approx.named_buffers():
        if value.is_floating_point():
            moved = value != before[name]
            errors.append(_error([value[moved]], [after[name][moved]]))
            assert moved.any() == (after[name] != before[name]).any(), f"{name} stands still"
        else:
            assert torch.equal(value, after[name]), name
    return Outcome(widths.found[0], int(read["last.weight"][0].sum()), max(errors))


def _grads(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss_of(output), leaves, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]


def _groups(model: nn.Module) -> dict[str, int]:
    """Groups of the convolutions, by the path of their weight."""
    found = {f"{path}.weight": module.groups for path, module in model.named_modules() if hasattr(module, "groups")}
    operation = model.get_submodule("operation")
    return {**found, "operation.w": getattr(operation, "groups", 1)}


def _columns(grad: Tensor, groups: int) -> Tensor:
    """1 for each column of a group that has a gradient, 0 for the others; broadcasts over the weight."""
    found = (grad != 0).flatten(2).any(2) if grad.dim() > 2 else grad != 0
    found = found.view(groups, -1, grad.shape[1]).any(1).repeat_interleave(grad.shape[0] // groups, 0)
    return found.to(grad.dtype).view(*grad.shape[:2], *[1] * (grad.dim() - 2))


def _error(mine: list[Tensor], other: list[Tensor]) -> float:
    scale = max((float(t.detach().abs().max()) for t in other if t.numel()), default=0.0) or 1.0
    found = [float((a - b).detach().abs().max()) for a, b in zip(mine, other, strict=True) if a.numel()]
    return max(found, default=0.0) / scale
