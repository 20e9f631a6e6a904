"""Auto must not lose: measured steps of torchvision's classification networks, the smallest of each family.

    python benchmarks/auto.py --json auto.json
    python benchmarks/auto.py --models resnet18 --batches 1 16 --sweep

For each network at a small and a normal batch: what Auto decides, and the training step as it was timed afterwards, in
turn with the exact one, in steps that Auto's own check did not see. With --sweep also one ratio for all layers at each
scope, to see how near Auto is to the best of them at its ratio or above.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from _header import add_json_option, header, store
from _models import torchvision_models
from tabulate import tabulate
from torch import nn

import fx_approx
from fx_approx.compiler.transform import view_of
from fx_approx.policies import Auto, Exact, Uniform

FAMILIES = {
    **dict.fromkeys(["alexnet", "vgg11", "resnet18", "wide_resnet50_2", "resnext50_32x4d", "densenet121"], 224),
    **dict.fromkeys(["squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5"], 224),
    **dict.fromkeys(["efficientnet_b0", "regnet_y_400mf", "googlenet", "convnext_tiny", "vit_b_16", "swin_t"], 224),
    "inception_v3": 299,
}


def build(name: str, size: int) -> nn.Module:
    """The network, in training mode; auxiliary classifiers are left out."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name in ("googlenet", "inception_v3"):
        options["aux_logits"] = False
    if name == "vit_b_16":
        options["image_size"] = size
    made: nn.Module = getattr(torchvision_models(), name)(**options)
    return made.to(memory_format=torch.channels_last).train()


def measure(name: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """One network at one batch size."""
    size = options.size or FAMILIES[name]
    model = build(name, size)
    inputs = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    start = time.perf_counter()
    auto = fx_approx.explain(model, Auto(options.ratio, compiled=options.compile), inputs).plan
    decided = time.perf_counter() - start
    plans = {"auto": {decision.name: decision for decision in auto.sampled}}
    if options.sweep:
        for ratio in (0.5, 0.75):
            for scope in ("layer", "value", "group"):
                policy = Uniform(ratio, min_k=16, round_to=8, scope=scope)
                plan = fx_approx.explain(copy.deepcopy(model), policy, inputs).plan
                plans[f"{scope} {ratio:g}"] = {decision.name: decision for decision in plan.sampled}
    view, _ = view_of(model, Exact(), inputs)
    exact, *others = view.time(list(plans.values()), compiled=options.compile, repeats=options.runs)
    found: dict[str, Any] = {"model": name, "batch": batch, "seconds": exact.seconds, "decided": decided}
    found["sampled"], found["layers"] = len(auto.sampled), len(auto)
    found["reason"] = next((d.reason for d in auto.sampled), next((d.reason for d in auto if "saves" in d.reason), ""))
    found["speedup"] = {label: step.speedup for label, step in zip(plans, others, strict=True)}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--batches", nargs="+", type=int, default=[2, 8], help="batch sizes (2 8)")
    parser.add_argument("--size", type=int, help="of the images (224 or 299, by network)")
    parser.add_argument("--ratio", type=float, default=0.5, help="of Auto (0.5)")
    parser.add_argument("--runs", type=int, default=11, help="steps of each (11)")
    parser.add_argument("--compile", action="store_true", help="compiled steps, and not eager ones")
    parser.add_argument("--sweep", action="store_true", help="one ratio for all layers beside it")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    if min(options.batches) < 2 or options.runs < 2 or not 0 < options.ratio < 1:
        parser.error("--batches: expected 2 or more, for BatchNorm; --runs: 2 or more; --ratio: a number in (0, 1)")
    print(header("Auto"), flush=True)
    found, lines = [], []
    for name in options.models:
        for batch in options.batches:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                one = measure(name, batch, options)
            found.append(one)
            low, middle, high = one["speedup"]["auto"]
            cells = [f"{one['sampled']} of {one['layers']}", f"{middle:.2f} [{low:.2f}, {high:.2f}]"]
            if options.sweep:
                rest = {label: spread[1] for label, spread in one["speedup"].items() if label != "auto"}
                best = max(rest, key=lambda label: rest[label])
                cells.append(f"{best}: {rest[best]:.2f}")
            lines.append([name, batch, f"{1000 * one['seconds']:.0f}", f"{one['decided']:.0f}", *cells])
            print(".", end="", flush=True)
            torch._dynamo.reset()
            store(options.json, found)
    titles = ["model", "batch", "exact ms", "decided in s", "sampled", "exact / auto"] + [
        "best of one ratio"
    ] * options.sweep
    print(f"\n{tabulate(lines, titles, disable_numparse=True)}")
    lost = [one for one in found if one["speedup"]["auto"][1] < 1 / 1.02]
    print(f"slower than 1.02 times exact: {len(lost)} of {len(found)}")


if __name__ == "__main__":
    main()
