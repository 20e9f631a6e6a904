"""Cost models against the clock: the speed-up of whole training steps as predicted and as measured.

    python benchmarks/predictions.py --json predictions.json
    python benchmarks/predictions.py --models wrn_16_4 --ratios 0.5 --compile
    python benchmarks/predictions.py --subnetwork --optimizer adamw --models mlp wrn_16_4 --scopes value group

With --subnetwork the plan is run as a subnetwork, with --optimizer its update is part of every step.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from _header import add_json_option, header, store
from _models import MODELS
from _subnetwork_cases import perceptron
from subnetworks import OPTIMIZERS
from tabulate import tabulate

import fx_approx
from fx_approx.policies import Exact, MeasuredModel, Override, RooflineModel, Uniform, calibrate

TITLES = ["model", "scope", "ratio", "clock", "RooflineModel", "MeasuredModel"]
NAMES = ["resnet50", "wrn_16_4", "vgg11_bn", "mobilenet_v2", "vit_b_16"]


def _policy(name: str, scope: str, ratio: float, min_k: int) -> Any:
    """One ratio for all layers; the first layer of the perceptron reads all pixels."""
    uniform = Uniform(ratio, scope=scope, min_k=min_k)
    return Override({"0": Exact()}, uniform) if name == "mlp" else uniform


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=NAMES, choices=["mlp", *MODELS], help="which models")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5, 0.75], help="sample ratios")
    parser.add_argument("--runs", type=int, default=7, help="steps of each (7)")
    parser.add_argument(
        "--minimal-k", dest="min_k", type=int, default=16, help="layers with fewer pairs stay exact (16)"
    )
    parser.add_argument("--batch", type=int, help="examples in a step")
    parser.add_argument("--scopes", nargs="+", default=["value"], choices=["value", "group"])
    parser.add_argument("--subnetwork", action="store_true", help="run as a subnetwork, and not in the graph")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), help="its update is part of the step")
    parser.add_argument("--compile", action="store_true", help="compiled steps, and not eager ones")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    if options.runs < 1 or not all(0 < ratio < 1 for ratio in options.ratios):
        parser.error("--runs: expected 1 or more; --ratios: expected numbers in (0, 1)")
    print(header("Predicted and measured speed-ups"), f"\n{calibrate()}\n", flush=True)
    costs = {"roofline": RooflineModel(options.compile), "measured": MeasuredModel(options.compile)}
    found = []
    for name in options.models:
        torch.manual_seed(0)
        model, inputs, _ = (perceptron(), torch.randn(64, 784), None) if name == "mlp" else MODELS[name]()
        if options.batch is not None:
            form = torch.channels_last if inputs.is_contiguous(memory_format=torch.channels_last) else None
            shape, wanted = (options.batch, *inputs.shape[1:]), inputs.requires_grad
            inputs = torch.randn(shape).contiguous(memory_format=form or torch.contiguous_format).requires_grad_(wanted)
        for scope, ratio in itertools.product(options.scopes, options.ratios):
            one: dict[str, object] = {"model": name, "scope": scope, "ratio": ratio, "compiled": options.compile}
            one["subnetwork"], one["optimizer"] = options.subnetwork, options.optimizer
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for label, cost in costs.items():
                    check = label == "measured"
                    made = fx_approx.analysis.estimate_step_time(
                        model,
                        _policy(name, scope, ratio, options.min_k),
                        inputs,
                        cost=cost,
                        check=check,
                        compiled=options.compile,
                        repeats=options.runs,
                        subnetwork=options.subnetwork,
                        optimizer=OPTIMIZERS.get(options.optimizer),
                    )
                    one[f"{label}_ms"] = 1000 * made.exact.seconds, 1000 * made.now.seconds
                    one[label] = made.speedup
                    if made.measured is not None:
                        one["clock"], one["clock_ms"] = made.measured.speedup, 1000 * made.measured.seconds
            found.append(one)
            torch._dynamo.reset()
            print(".", end="", flush=True)
    lines, errors = [], {label: [] for label in costs}
    for one in found:
        low, middle, high = one["clock"]
        cells = []
        for label in costs:
            errors[label].append(abs(one[label] / middle - 1))
            cells.append(f"{one[label]:.2f} ({100 * (one[label] / middle - 1):+.0f} %)")
        lines.append([one["model"], one["scope"], f"{one['ratio']:g}", f"{middle:.2f} [{low:.2f}, {high:.2f}]", *cells])
    print(f"\n{tabulate(lines, TITLES, disable_numparse=True)}")
    for label, own in errors.items():
        print(f"{label}: median error {100 * statistics.median(own):.1f} %, largest {100 * max(own):.1f} %")
    store(options.json, found)


if __name__ == "__main__":
    main()
