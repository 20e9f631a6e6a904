"""Budgets against one ratio for all: the error of the whole gradient at equal operations, on ten networks.

    python benchmarks/budgets.py --json budgets.json
    python benchmarks/budgets.py --models resnet18 vgg11_bn --ratio 0.25

Each network is trained for some exact steps on scikit-learn's digits (scaled up to its size). Then all layers that may
be sampled are, at one ratio; FlopBudget gets just as many operations, once with errors predicted from the weights, once
with measured sensitivities (four batches, at that ratio). The error is that of the gradient by all parameters,
‖ĝ - g‖² / ‖g‖², over batches that neither saw.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _header import add_json_option, header, store
from _models import PlainBlock, torchvision_models, wide_resnet
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import FlopBudget, Override, Uniform
from fx_approx.policies.graph_policy import GraphPolicy

Batch = tuple[Tensor, Tensor]
TORCHVISION = ["resnet18", "resnet50", "vgg11_bn", "mobilenet_v2", "mnasnet1_0", "regnet_y_400mf", "efficientnet_b0"]


class Vit(nn.Module):
    """Four encoder blocks on patches of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 192, 8, 8)
        self.blocks = nn.Sequential(*(PlainBlock(3, 192, 768) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(192), nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, H, W]`` to ``[N, 10]``."""
        tokens = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        result: Tensor = self.head(self.norm(tokens).mean(1))
        return result


def _mlp() -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(3 * 64 * 64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def _torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision_models(), name)(num_classes=10)


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: _torchvision(name) for name in TORCHVISION},
    "wrn_16_2": lambda: wide_resnet(16, 2),
    "vit_4": Vit,
    "mlp_4": _mlp,
}


def batches(count: int, size: int, examples: int) -> list[Batch]:
    """Digits as images ``[examples, 3, size, size]`` with their classes."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    images, classes = (images - images.mean()) / images.std(), torch.tensor(digits.target)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    found = []
    for number in range(count):
        own = order[torch.arange(number * examples, (number + 1) * examples) % len(order)]
        scaled = F.interpolate(images[own], size=(size, size), mode="bilinear", align_corners=False)
        found.append((scaled.expand(-1, 3, -1, -1).contiguous(), classes[own]))
    return found


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def gradient(model: nn.Module, batch: Batch) -> Tensor:
    """By all parameters, in one vector."""
    found = torch.autograd.grad(loss(model, batch), list(model.parameters()), allow_unused=True)
    return torch.cat([grad.flatten() for grad in found if grad is not None])


def gradient_error(model: nn.Module, plan: fx_approx.Plan, unseen: Sequence[Batch]) -> float:
    """Mean of ‖ĝ - g‖² / ‖g‖²."""
    errors = []
    for batch in unseen:
        exact = gradient(copy.deepcopy(model), batch)
        sampled = gradient(fx_approx.transform(copy.deepcopy(model), plan, batch[0]), batch)
        errors.append(float((sampled - exact).square().sum() / exact.square().sum()))
    return statistics.mean(errors)


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One network: operations and errors of the three plans."""
    torch.manual_seed(0)
    model = MODELS[name]().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    data = batches(options.steps + 8, 32 if name.startswith("wrn") else 64, options.batch)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for batch in data[: options.steps]:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    seen, unseen, inputs = data[options.steps : options.steps + 4], data[-4:], data[0][0]
    free = FlopBudget(1.0)
    plan = fx_approx.explain(model, free, inputs).plan
    kept = [d.name for d in plan if d.reason != "within the budget without it"]
    one = Uniform(options.ratio, min_k=free.min_k, round_to=free.round_to, scope=free.scope)
    rules = dict.fromkeys(kept, fx_approx.policies.Exact())
    uniform = fx_approx.explain(model, Override(rules, one), inputs)
    totals = uniform.report.totals
    budget = (totals.executed.total + totals.selection) / totals.exact.total
    start = time.perf_counter()
    sensitivity = fx_approx.analysis.sensitivity(model, seen, loss, inputs, ratio=options.ratio, **_options(free))
    measured = time.perf_counter() - start
    found: dict[str, Any] = {"model": name, "budget": budget, "sensitivity_seconds": measured}
    policies = {"predicted": FlopBudget(budget), "measured": FlopBudget(budget, sensitivity=sensitivity)}
    found["uniform"] = {"flops": budget, "error": gradient_error(model, uniform.plan, unseen)}
    for label, policy in policies.items():
        start = time.perf_counter()
        made = fx_approx.explain(model, policy, inputs)
        spent, own = time.perf_counter() - start, made.report.totals
        flops = (own.executed.total + own.selection) / own.exact.total
        found[label] = {"flops": flops, "error": gradient_error(model, made.plan, unseen), "seconds": spent}
    return found


def _options(policy: GraphPolicy) -> dict[str, Any]:
    names = ("sampler", "scores", "scope", "min_k", "round_to", "keep_first", "keep_last")
    return {name: getattr(policy, name) for name in names}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ratio", type=float, default=0.5, help="the one ratio (0.5)")
    parser.add_argument("--steps", type=int, default=30, help="of exact training before (30)")
    parser.add_argument("--batch", type=int, default=32, help="examples in a batch (32)")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    if not 0 < options.ratio < 1 or options.steps < 0 or options.batch < 2:
        parser.error("--ratio: expected a number in (0, 1); --steps: 0 or more; --batch: 2 or more")
    print(header("Budgets against one ratio for all"), flush=True)
    found = []
    for name in options.models:
        found.append(compare(name, options))
        store(options.json, found)
        print(".", end="", flush=True)
    lines = []
    for one in found:
        error = one["uniform"]["error"]
        cells = [
            f"{one[label]['error']:.3g} ({one[label]['error'] / error:.2f})" for label in ("predicted", "measured")
        ]
        flops = [f"{100 * one[label]['flops'] / one['budget'] - 100:+.2f} %" for label in ("predicted", "measured")]
        lines.append([one["model"], f"{one['budget']:.3f}", f"{error:.3g}", cells[0], flops[0], cells[1], flops[1]])
    titles = ["model", "FLOPs", "uniform", "predicted (of uniform)", "FLOPs", "measured (of uniform)", "FLOPs"]
    print(f"\n{tabulate(lines, titles, disable_numparse=True)}")
    for label in ("predicted", "measured"):
        better = sum(one[label]["error"] < one["uniform"]["error"] for one in found)
        print(f"{label}: less error than uniform on {better} of {len(found)}")


if __name__ == "__main__":
    main()
