"""The oracle of the demand pass: the graph that computes all channels, under the same selections."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fx_approx
from fx_approx import ops
from fx_approx.core.candidates import Candidate, Role
from fx_approx.core.plan import Decision, Policy
from fx_approx.sampling import SamplerConfig
from tests.helpers.models import tensors


@dataclasses.dataclass(frozen=True)
class Layers:
    """Samples all linear and convolution layers, those at both ends too, and no product of two activations."""

    sampler: str = "topk"
    ratio: float = 0.5
    scores: str = "weight"
    scope: str = "layer"
    needs_shapes = True

    def decide(self, candidates: Sequence[Candidate]) -> list[Decision]:
        spec = SamplerConfig(self.sampler, self.ratio, scores=self.scores)
        kinds = ("linear", "conv")
        return [
            Decision(c.name, {Role.OUTPUT: spec} if c.kind.startswith(kinds) else {}, scope=self.scope)
            for c in candidates
        ]


@dataclasses.dataclass
class Made:
    """All that one training step makes."""

    outputs: list[Tensor]
    grads: dict[str, Tensor]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def loss_of(output: Any) -> Tensor:
    """A scalar that depends on every entry of every output, differently."""
    total = []
    for tensor in tensors(output):
        if tensor.is_floating_point():
            weights = torch.linspace(0.5, 1.5, tensor.numel(), dtype=tensor.dtype, device=tensor.device)
            total.append((tensor * weights.view_as(tensor)).sum() + tensor.square().mean())
    return torch.stack(total).sum()


def training_step(model: nn.Module, x: Any) -> Made:
    """One step that leaves no gradients behind."""
    before = {name: b.clone() for name, b in model.named_buffers()}
    output = model(x)
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss_of(output), list(wanted.values()), allow_unused=True)
    found = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(wanted.items(), grads, strict=True)}
    outputs = [t.detach().clone() for t in tensors(output)]
    return Made(outputs, found, before, {name: b.clone() for name, b in model.named_buffers()})


def _largest(values: list[Tensor]) -> float:
    return max((float(t.detach().abs().max()) for t in values if t.numel()), default=0.0) or 1.0


def assert_same_numbers(one: Made, other: Made, tolerance: float) -> None:
    """``one`` computed some channels, ``other`` all: same outputs and gradients, and statistics where computed."""
    assert len(one.outputs) == len(other.outputs)
    scale = _largest(other.outputs)
    for mine, whole in zip(one.outputs, other.outputs, strict=True):
        assert mine.shape == whole.shape
        assert mine.isfinite().all()
        assert _largest([mine - whole, torch.zeros(1)]) <= tolerance * scale or torch.equal(mine, whole)
    scale = _largest(list(other.grads.values()))
    assert one.grads.keys() == other.grads.keys()
    for name, mine in one.grads.items():
        error = float((mine - other.grads[name]).abs().max()) if mine.numel() else 0.0
        assert error <= tolerance * scale, f"gradient of {name}: {error / scale:.1e} of the largest"
    moving = {name: t for name, t in one.after.items() if t.is_floating_point()}
    changed = {name: t != one.before[name] for name, t in moving.items()}
    scale = _largest([other.after[name][mask] for name, mask in changed.items()])
    for name, after in one.after.items():
        if name not in moving:
            assert torch.equal(after, other.after[name]), name
            continue
        # Computed, and from the same value before: a channel that one model left out has another.
        mask = changed[name] & (one.before[name] == other.before[name])
        error = float((after - other.after[name])[mask].abs().max()) if mask.any() else 0.0
        assert error <= tolerance * scale, f"{name}: {error / scale:.1e}"


def move(models: tuple[nn.Module, ...], grads: dict[str, Tensor], rate: float = 0.01) -> None:
    """The same small step on the parameters of several models, so that they stay the same numbers."""
    scale = _largest(list(grads.values()))
    with torch.no_grad():
        for model in models:
            for name, p in model.named_parameters():
                p.sub_(grads[name], alpha=rate / scale)


def perturbed(model: nn.Module) -> nn.Module:
    """The model with noise on all parameters: what starts at zero hides everything behind it."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
                module.weight.add_(torch.randn_like(module.weight), alpha=0.3)
                module.bias.add_(torch.randn_like(module.bias), alpha=0.3)
    return model


def pair(model: nn.Module, policy: Policy, x: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The same model transformed with and without demand."""
    hoisted = fx_approx.transform(copy.deepcopy(model), policy, x, **options)
    whole = fx_approx.transform(copy.deepcopy(model), policy, x, prune_unread=False, **options)
    assert [name for name, _ in whole._fx_approx.program.stages] == ["capture", "share"]
    return hoisted, whole


def assert_hoisting_changes_nothing(
    model: nn.Module, policy: Policy, x: Any, *, steps: int = 2, tolerance: float = 1e-10, **options: Any
) -> nn.Module:
    """Trains with and without demand, side by side; returns the model that was hoisted."""
    hoisted, whole = pair(model, policy, x, **options)
    for _ in range(steps):
        one, other = training_step(hoisted, x), training_step(whole, x)
        assert_same_numbers(one, other, tolerance)
        move((hoisted, whole), other.grads)
        del one, other  # else two steps' gradients are in memory at once
    return hoisted


def narrow_producers(model: nn.Module) -> set[str]:
    """The layers that compute some of their outputs only."""
    found = set()
    for node in model._fx_approx.program.graph.nodes:
        given = [*node.args, *node.kwargs.values()]
        slices = [a for a in given if isinstance(a, torch.fx.Node) and a.target is ops.slice_weights]
        if slices and slices[0].args[3] is not None and node.op == "call_module":
            found.add(str(node.target))
    return found


def narrow_values(model: nn.Module) -> set[str]:
    """The values of the captured graph of which some channels are not computed."""
    demand = model._fx_approx.record.analysis.demand
    return {node.name for node, have in demand.have.items() if any(place != -1 for place in have)}
