"""A whole training step, with the optimiser: exact, with a kept selection in the graph, and as a subnetwork.

    python benchmarks/subnetworks.py
    python benchmarks/subnetworks.py --models wrn_16_4 resnet50 --compile --json subnetworks.json

All variants take their steps in turn in one process; a ratio above 1 is faster than the exact model, eager or compiled as
the variant itself. `kept` is the transformed model under `reuse_selection`, `subnetwork` what `subnetworks.extract` makes
of it, and `narrow` the same network written by hand at the narrow (inner) width: the limit. Before anything is timed,
five steps of plain SGD in float64 on at most 8 examples are compared, subnetwork against kept selection.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _device import quartiles, shown, speedup
from _header import add_json_option, header, store
from _models import MODELS
from tabulate import tabulate
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Exact, Override, Uniform
from fx_approx.subnetworks import extract, merge, record_of
from fx_approx.utils.timing import in_turn

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 1e-3, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-4),
}
TOLERANCE = 1e-10


@dataclasses.dataclass(frozen=True)
class Measured:
    """One variant: seconds of a step and exact / this, as quartiles, and how many parameters are trained."""

    model: str
    scope: str
    optimizer: str
    variant: str
    compiled: bool
    seconds: float
    speedup: tuple[float, float, float]
    parameters: int
    own_forward: bool | None


def mlp() -> tuple[nn.Module, Tensor, nn.Module]:
    """784-512-512-10, batch 64, and the same at half of the hidden units."""

    def made(width: int) -> nn.Module:
        hidden = nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        return nn.Sequential(*hidden, nn.Linear(width, 10))

    return made(512), torch.randn(64, 784), made(256)


def policy(name: str, scope: str, ratio: float, min_k: int) -> Any:
    """One ratio for all layers, but the pixels of the MLP."""
    uniform = Uniform(ratio, scope=scope, min_k=min_k)
    return Override({"0": Exact()}, uniform) if name == "mlp" else uniform


def loss_of(output: Tensor) -> Tensor:
    """The mean of the squares."""
    return output.float().square().mean() if output.dtype is torch.bfloat16 else output.square().mean()


def check(name: str, approx: nn.Module, inputs: Tensor) -> None:
    """Plain SGD moves the weights of the subnetwork as those of the model under one kept selection."""
    few = inputs.detach()[:8].double()
    one = copy.deepcopy(approx).double()
    other, sub = copy.deepcopy(one), extract(one)
    before = [p.detach().clone() for p in one.parameters()]
    with fx_approx.reuse_selection(other):
        for model in (other, sub):
            optimizer = torch.optim.SGD(model.parameters(), 1e-3)
            for _ in range(5):
                optimizer.zero_grad()
                loss_of(model(few)).backward()
                optimizer.step()
    merge(sub, one)
    pairs = list(zip(one.parameters(), other.parameters(), before, strict=True))
    moved = max(float((q.detach() - b).abs().max()) for _, q, b in pairs)
    error = max(float((p.detach() - q.detach()).abs().max()) for p, q, _ in pairs) / moved
    if not error <= TOLERANCE:
        raise AssertionError(f"{name}: the subnetwork is off by {error:.1e} of the largest change")


def step(model: nn.Module, run: Any, inputs: Tensor, optimizer: torch.optim.Optimizer, kept: bool) -> None:
    """Forward, backward and the optimiser's step."""
    with fx_approx.reuse_selection(model) if kept else contextlib.nullcontext():
        loss_of(run(inputs)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    inputs.grad = None


def measure(name: str, scope: str, options: argparse.Namespace) -> list[Measured]:
    """All variants of one model and scope, eager and compiled, with each optimiser."""
    torch.manual_seed(0)
    exact, inputs, narrow = mlp() if name == "mlp" else MODELS[name]()
    if options.batch is not None:
        inputs = torch.randn(options.batch, *inputs.shape[1:], requires_grad=inputs.requires_grad)
    approx = fx_approx.transform(copy.deepcopy(exact), policy(name, scope, options.ratio, options.min_k), inputs)
    check(f"{name}, {scope}", approx, inputs)
    sub = extract(approx, example_inputs=inputs.detach())
    models = {"exact": exact, "kept": approx, "subnetwork": sub}
    if narrow is not None:
        models["narrow"] = narrow
    found = []
    for compiled in (False, True) if options.compile else (False,):
        for optimizer in options.optimizers:
            calls = []
            for variant, model in models.items():
                run = torch.compile(model, dynamic=False) if compiled else model
                made = OPTIMIZERS[optimizer](model.parameters())
                calls.append(lambda m=model, r=run, o=made, k=variant == "kept": step(m, r, inputs, o, k))
            device = torch.device("cpu")
            times = in_turn(calls, device, options.runs, warmup=options.warmup, before=1)
            for (variant, model), own in zip(models.items(), times, strict=True):
                trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
                forward = record_of(sub).own_forward if variant == "subnetwork" else None
                found.append(
                    Measured(
                        *(name, scope, optimizer, variant, compiled, quartiles(own)[1]),
                        speedup(times[0], own),
                        *(trained, forward),
                    )
                )
            torch.compiler.reset()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mlp", "wrn_16_4"], choices=["mlp", *MODELS])
    parser.add_argument("--scopes", nargs="+", default=["value", "group"], choices=["value", "group"])
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--ratio", type=float, default=0.5, help="sample ratio (0.5)")
    parser.add_argument(
        "--minimal-k", dest="min_k", type=int, default=16, help="layers with fewer pairs stay exact (16)"
    )
    parser.add_argument("--batch", type=int, help="examples in a step")
    parser.add_argument("--runs", type=int, default=15, help="steps of each variant (15)")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each before (3)")
    parser.add_argument("--compile", action="store_true", help="compiled, too")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    if options.runs < 2 or not 0 < options.ratio < 1:
        parser.error("--runs: expected 2 or more; --ratio: expected a number in (0, 1)")
    print(header("Subnetworks: a whole training step"), flush=True)
    found = [one for name in options.models for scope in options.scopes for one in measure(name, scope, options)]
    rows = [
        [
            *(one.model, one.scope, one.optimizer, "compiled" if one.compiled else "eager", one.variant),
            *(f"{1000 * one.seconds:.1f}", shown(one.speedup), f"{one.parameters / 1e6:.2f}"),
        ]
        for one in found
    ]
    headers = ["model", "scope", "optimizer", "mode", "variant", "ms", "exact / this [quartiles]", "parameters, M"]
    print(tabulate(rows, headers, disable_numparse=True))
    store(options.json, [dataclasses.asdict(one) for one in found])


if __name__ == "__main__":
    main()
