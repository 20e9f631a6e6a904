"""One model of the coverage table: as a subnetwork, and pruned by Torch-Pruning."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _coverage_models import Built, Entry
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fx_approx
from fx_approx.core.candidates import Candidate
from fx_approx.core.flops import measured_flops
from fx_approx.core.plan import Decision
from fx_approx.policies import Uniform
from fx_approx.policies.base import exact
from fx_approx.subnetworks import extract, record_of

RATIO, MIN_K = 0.5, 16
PEER = "Torch-Pruning"
SCOPES = ("value", "group")
SAME = 1e-5  # of the largest output
_LONGEST = 300


@dataclasses.dataclass
class Outcome:
    """What became of a model under one method.

    Attributes:
        failed: Why there is no narrow model; "" if there is.
        form: ``class`` for an instance of the model's own class, ``graph`` for a ``GraphModule``.
        reason: Why it is a graph.
        same: The largest difference of an output from the model with the kept selection, over its largest entry; of
            float64, where that of float32 is above ``SAME``.
        trains: What is wrong with a step of training; "" if nothing is.
        exports: What is wrong with ``torch.export`` in eval mode; "" if nothing is.
        parameters: Relative to the full model.
        flops: Of a training step, relative to the full model.
    """

    failed: str = ""
    form: str = ""
    reason: str = ""
    same: float | None = None
    trains: str = ""
    exports: str = ""
    parameters: float | None = None
    flops: float | None = None

    @property
    def works(self) -> bool:
        """Whether there is a narrow model, and it trains."""
        right = self.same is None or self.same <= SAME
        return not self.failed and not self.trains and right


@dataclasses.dataclass(frozen=True)
class OfParameters(Uniform):
    """``Uniform``, with products of two activations exact, and those by weights that the step computes.

    Their scores follow the step, so that no fixed network has their selections.
    """

    def decide(self, candidates: Sequence[Candidate]) -> list[Decision]:
        """As ``Uniform`` for the others."""
        why = "its right operand is no parameter"
        return [
            one
            if candidate.facts is None or candidate.facts.rhs_is_parameter
            else exact(candidate, why, "OfParameters")
            for candidate, one in zip(candidates, super().decide(candidates), strict=True)
        ]


@dataclasses.dataclass
class Result:
    """A row of the table: a model, and what became of it under each method."""

    name: str
    family: str
    parameters: int = 0
    thin: bool = False
    exports: str = ""
    outcomes: dict[str, Outcome] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    failure: str = ""


def short(error: BaseException) -> str:
    """An error in one line."""
    said = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {said}"[:_LONGEST]


def loss_of(result: Any) -> Tensor:
    """A scalar that depends on every floating-point output."""
    made = [one for one in tree_leaves(result) if isinstance(one, Tensor) and one.is_floating_point()]
    return torch.stack([one.float().square().mean() for one in made]).sum()


def flops_of(model: nn.Module, inputs: Tensor) -> float:
    """Operations of forward and backward."""
    return float(measured_flops(lambda: loss_of(model(inputs)), [], list(model.parameters())).total)


def train(model: nn.Module, inputs: Tensor, names: set[str]) -> str:
    """What is wrong with a step of plain SGD; those named must have a gradient, and the loss change."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    loss = loss_of(model(inputs))
    if not bool(loss.isfinite()):
        return f"the loss is {float(loss)}"
    loss.backward()
    own = {name: p for name, p in model.named_parameters() if name in names}
    still = [name for name, p in own.items() if p.grad is None or not bool(p.grad.any())]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        after = float(loss_of(model(inputs)))
    if after == float(loss):
        return "a step changes nothing"
    return f"{len(still)} of {len(own)} parameters have no gradient: {still[0]}" if still else ""


def export(model: nn.Module, inputs: Tensor) -> str:
    """What is wrong with ``torch.export`` in eval mode."""
    training = model.training
    try:
        torch.export.export(model.eval(), (inputs,), strict=False)
    except Exception as error:  # whatever tracing says
        return short(error)
    finally:
        model.train(training)
    return ""


def _difference(one: Any, other: Any) -> float:
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return max(
        (float((a - b).abs().max()) / max(float(b.abs().max()), 1e-12) for a, b in pairs if isinstance(a, Tensor)),
        default=0.0,
    )


def as_subnetwork(built: Built, scope: str, full: tuple[int, float], exported: bool, moving: set[str]) -> Outcome:
    """The subnetwork at one scope."""
    outcome, inputs = Outcome(), built.inputs
    try:
        approx, sub = _extracted(built, scope)
    except Exception as error:  # to be told in the table
        outcome.failed = short(error)
        return outcome
    record = record_of(sub)
    outcome.form, outcome.reason = "class" if record.own_forward else "graph", record.reason
    try:
        outcome.same = _kept(approx, sub, inputs)
        del approx
        if outcome.same > SAME:  # rounding, which models of random weights may enlarge, or another network?
            double = dataclasses.replace(built, model=copy.deepcopy(built.model).double(), inputs=inputs.double())
            outcome.same = _kept(*_extracted(double, scope), double.inputs)
        narrow = {name for name, _ in sub.named_parameters() if name in record.cuts}
        return _finished(outcome, sub, inputs, full, exported, narrow & moving)
    except Exception as error:
        outcome.trains = short(error)
    return outcome


def _extracted(built: Built, scope: str) -> tuple[nn.Module, nn.Module]:
    """The transformed model, and its subnetwork."""
    policy = OfParameters(RATIO, scope=scope, min_k=MIN_K)
    approx = fx_approx.transform(copy.deepcopy(built.model), policy, built.inputs)
    return approx, extract(approx, example_inputs=built.inputs)


def _kept(approx: nn.Module, sub: nn.Module, inputs: Tensor) -> float:
    """By how much a subnetwork differs from the model with the kept selection."""
    with fx_approx.reuse_selection(approx), torch.no_grad():
        return _difference(copy.deepcopy(sub)(inputs), approx(inputs))


def _finished(
    outcome: Outcome, model: nn.Module, inputs: Tensor, full: tuple[int, float], exported: bool, names: set[str]
) -> Outcome:
    """Counts, trains and exports what was made narrow."""
    parameters, flops = full
    outcome.parameters = sum(p.numel() for p in model.parameters()) / parameters
    outcome.flops = flops_of(model, inputs) / flops
    if exported:
        outcome.exports = export(model, inputs)
    outcome.trains = train(model, inputs, names)
    return outcome


def peer_version() -> str | None:
    """Of Torch-Pruning; None where it is not installed."""
    import importlib.metadata

    try:
        return importlib.metadata.version("torch-pruning")
    except importlib.metadata.PackageNotFoundError:
        return None


def as_pruned(built: Built, full: tuple[int, float], exported: bool, moving: set[str]) -> Outcome:
    """Pruned by Torch-Pruning at half of the channels, as its own examples call it."""
    import torch_pruning

    outcome = Outcome()
    model = copy.deepcopy(built.model).eval()
    before = {name: tuple(p.shape) for name, p in model.named_parameters()}
    try:
        pruner = torch_pruning.pruner.BasePruner(
            model,
            built.inputs,
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=RATIO,
            ignored_layers=_outputs(model, built.classes),
            num_heads=_heads(model),
            round_to=_rounding(model),
            unwrapped_parameters=_unwrapped(model),
        )
        pruner.step()
        _told_sizes(model, pruner.num_heads)
        model.train()
        model(built.inputs)
    except Exception as error:  # to be told in the table
        outcome.failed = short(error)
        return outcome
    outcome.form = "class"
    try:
        narrow = {name for name, p in model.named_parameters() if before.get(name) != tuple(p.shape)}
        return _finished(outcome, model, built.inputs, full, exported, narrow & moving)
    except Exception as error:
        outcome.trains = short(error)
    return outcome


def _outputs(model: nn.Module, classes: int) -> list[nn.Module]:
    """The layers that make the output."""

    def ends(module: nn.Module) -> bool:
        widths = getattr(module, "out_features", None), getattr(module, "out_channels", None)
        return classes in widths or type(module).__name__ == "Detect"

    return [module for module in model.modules() if ends(module)]


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    """Attention of timm, by the layer that projects, and its heads."""
    found: dict[nn.Module, int] = {}
    for module in model.modules():
        if isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "num_heads"):
            found[module.qkv] = module.num_heads
    return found


def _rounding(model: nn.Module) -> int | None:
    """Multiples of the number of heads for torch's attention, which its width must divide; None without."""
    counts = {module.num_heads for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    return math.lcm(*counts) if counts else None


def _unwrapped(model: nn.Module) -> list[tuple[nn.Parameter, int]] | None:
    """The scales of ConvNeXt's blocks, whose channels stand first."""
    found = [(m.layer_scale, 0) for m in model.modules() if type(m).__name__ == "CNBlock"]
    return found or None


def _told_sizes(model: Any, heads: dict[nn.Module, int]) -> None:
    """Sizes that its examples set by hand: the width of a ViT, and of the heads of timm's."""
    if type(model).__name__ == "VisionTransformer" and hasattr(model, "conv_proj"):
        model.hidden_dim = model.conv_proj.out_channels
    for module in model.modules():
        qkv: Any = getattr(module, "qkv", None)
        if qkv in heads and hasattr(module, "head_dim"):
            module.num_heads = heads[qkv]
            module.head_dim = qkv.out_features // (3 * module.num_heads)
            if hasattr(module, "attn_dim"):
                module.attn_dim = qkv.out_features // 3


def examine(entry: Entry) -> Result:
    """All methods on one model."""
    start = time.perf_counter()
    result = Result(entry.name, entry.family)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            built = entry.make()
            result.thin = built.thin
            result.parameters = sum(p.numel() for p in built.model.parameters())
            full = result.parameters, flops_of(copy.deepcopy(built.model), built.inputs)
            result.exports = export(copy.deepcopy(built.model), built.inputs)
            moving = _moving(built)
        except Exception as error:
            result.failure = short(error)
            return result
        exported = not result.exports
        methods: dict[str, Callable[[], Outcome]] = {
            scope: lambda scope=scope: as_subnetwork(built, scope, full, exported, moving)  # type: ignore[misc]
            for scope in SCOPES
        }
        if importlib.util.find_spec("torch_pruning") is not None:
            methods[PEER] = lambda: as_pruned(built, full, exported, moving)
        for name, method in methods.items():
            result.outcomes[name] = method()
    result.seconds = round(time.perf_counter() - start, 1)
    return result


def _moving(built: Built) -> set[str]:
    """Parameters that a step of the full model moves; others need not move in a narrow one."""
    model = copy.deepcopy(built.model)
    loss_of(model(built.inputs)).backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
