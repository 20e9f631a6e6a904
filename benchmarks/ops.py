"""Single products, exact against sampled: where sampling pays, and how far it stays below its limit.

    python benchmarks/ops.py --json ops.json --figure ops.png
    python benchmarks/ops.py --device cuda --dtype bfloat16 --compile --json ops.json
    python benchmarks/ops.py --sizes 1024 2048 --networks --roles OUTPUT hoisted --ratios 0.5
    python benchmarks/ops.py --from ops.json --figure ops.png

Square linear layers, and the different convolutions (in ConvNeXt's blocks, linear layers) of four networks. OUTPUT,
GRAD_INPUT and GRAD_WEIGHT are the three products of a training step: both operands are gathered, and what is left is
multiplied. "hoisted" is the forward product of demand-driven sampling: the input comes narrow from the layer before,
and the weight is sliced on both sides. The selection is given: what scoring and drawing cost is in roles.py and
train_step.py.

First every product is compared with the same in float64, then all ratios take their turns with the exact product in one
process. TFLOP/s count what is executed. A speed-up is exact / this, of the compiled exact product where compiled; its
limit is 1 / ratio, hoisted 1 / ratio^2, and "of limit" is the share of it that is reached. torchao's float8 linear
layer (forward, compiled) stands beside them where it can be had.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _device import (
    Quartiles,
    add_device_options,
    calibrate,
    precision,
    quartiles,
    refuse_device_options,
    shown,
    speedup,
)
from _float8 import float8, float8_missing
from _header import add_json_option, environment, header, store
from _layers import (
    NETWORKS,
    ROLES,
    Layer,
    StepWorkload,
    check,
    network_layers,
    operands,
    square_layers,
    tolerance,
    work,
)
from tabulate import tabulate
from torch import Tensor, nn

from fx_approx.utils.timing import in_turn

SIZES = [512, 1024, 2048, 4096, 8192, 16384]
RATIOS = [0.25, 0.5, 0.75]
LONG_ENOUGH = 2e-3
"""Seconds: shorter calls are repeated within a measurement until they take about as long."""


@dataclasses.dataclass(frozen=True)
class Timed:
    """One product: seconds of a call and exact / this by neighbouring measurements, as quartiles.

    Attributes:
        network: Where the layer comes from, or ``square``.
        layer: Its sizes.
        role: One of :data:`_layers.ROLES`.
        variant: ``exact``, ``sampled`` or ``float8``.
        ratio: Of the pairs, None if not sampled.
        compiled: Whether this and the exact product are compiled.
        seconds: Median.
        spread: Lower and upper quartile.
        flops: Executed.
        intensity: Executed operations for each byte of the operands and result of the executed product.
        tflops: Executed, 10^12 a second, at the median.
        speedup: exact / this.
        limit: Operations of exact / this.
        of_limit: Median speed-up as a share of it.
    """

    network: str
    layer: str
    role: str
    variant: str
    ratio: float | None
    compiled: bool
    seconds: float
    spread: tuple[float, float]
    flops: float
    intensity: float
    tflops: float
    speedup: Quartiles
    limit: float
    of_limit: float


Variant = tuple[str, float | None]
Call = Callable[[], Tensor]


def float8_linear(w: Tensor) -> Callable[..., Tensor]:
    """The forward pass of torchao's layer with this weight."""
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, device=w.device, dtype=w.dtype)
    layer.weight.data = w
    converted = float8(nn.Sequential(layer))
    return lambda x, w, grad: converted(x)


def measure(layer: Layer, role: str, options: argparse.Namespace, compiled: bool, with_float8: bool) -> list[Timed]:
    """Checks and times one product of a layer at all ratios."""
    dtype = getattr(torch, options.dtype)
    x, w, grad = operands(layer, options.device, dtype, options.channels_last)
    works: dict[Variant, StepWorkload] = {("exact", None): work(layer, role, None, x, w, grad)}
    for ratio in options.ratios:
        works["sampled", ratio] = work(layer, role, ratio, x, w, grad)
    if with_float8 and compiled and role == "OUTPUT" and not layer.is_conv and not any(n % 16 for n in w.shape):
        works["float8", None] = dataclasses.replace(works["exact", None], function=float8_linear(w))
    calls: dict[Variant, Call] = {}
    torch._dynamo.reset()
    for (variant, ratio), one in works.items():
        function = torch.compile(one.function, fullgraph=True, dynamic=False) if compiled else one.function
        most = 0.1 if variant == "float8" else tolerance(dtype, options.tf32)
        check(f"{layer.label}, {role}, {variant}{'' if ratio is None else f' {ratio:g}'}", function, one, most)
        calls[variant, ratio] = lambda function=function, one=one: function(*one.arguments)
    times = dict(zip(calls, _seconds(list(calls.values()), options.runs, torch.device(options.device)), strict=True))
    entry = torch.empty(0, dtype=dtype).element_size()
    found = []
    for (variant, ratio), taken in times.items():
        one = works[variant, ratio]
        low, middle, high = quartiles(taken)
        against = speedup(times["exact", None], taken)
        limit = layer.flops / one.flops
        found.append(
            Timed(
                network=layer.network,
                layer=layer.label,
                role=role,
                variant=variant,
                ratio=ratio,
                compiled=compiled,
                seconds=middle,
                spread=(low, high),
                flops=one.flops,
                intensity=one.flops / (one.entries * entry),
                tflops=one.flops / middle / 1e12,
                speedup=against,
                limit=limit,
                of_limit=against[1] / limit,
            )
        )
    return found


def _seconds(calls: Sequence[Call], runs: int, device: torch.device) -> list[list[float]]:
    """Seconds of each call, taking turns; they are repeated as often as the first one, the exact product, is short."""
    (_, once), *_ = in_turn(calls, device, 2)
    count = min(200, max(1, math.ceil(LONG_ENOUGH / once)))
    return in_turn(calls, device, runs, warmup=1, counts=[count] * len(calls))


def rows(found: Sequence[Timed]) -> list[list[str]]:
    """One line for each variant."""
    return [
        [
            one.network,
            one.layer,
            one.role,
            one.variant if one.ratio is None else f"{one.ratio:g}",
            "compiled" if one.compiled else "eager",
            f"{1000 * one.seconds:.3g} [{1000 * one.spread[0]:.3g}, {1000 * one.spread[1]:.3g}]",
            f"{one.tflops:.3g}",
            shown(one.speedup),
            f"{one.of_limit:.2f}",
        ]
        for one in found
    ]


HEADERS = ["network", "layer", "role", "ratio", "", "ms", "TFLOP/s", "exact / this", "of limit"]


def layers(options: argparse.Namespace) -> list[Layer]:
    """All that were asked for."""
    networks = [layer for name in options.networks for layer in network_layers(name, options.batch)]
    return square_layers(options.sizes) + networks


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures everything; prints what is left out, and a table."""
    missing = float8_missing(options.device)
    with precision(options.tf32), torch.no_grad():
        peaks = calibrate(options.device, getattr(torch, options.dtype), options.quick)
        print(f"\npeaks        {peaks.flops / 1e12:.3g} TFLOP/s in products, {peaks.bytes / 1e9:.3g} GB/s in copies")
        if not (options.compile and missing is None):
            print(f"float8       left out: {missing or 'only with --compile'}")
        found: list[Timed] = []
        for layer in layers(options):
            if layer.flops / peaks.flops > options.most_seconds:
                print(f"left out: {layer.label} of {layer.network}, more than {options.most_seconds:g} s a product")
                continue
            for role in options.roles:
                for compiled in [False, True] if options.compile else [False]:
                    found += measure(layer, role, options, compiled, missing is None)
                    print(".", end="", flush=True)
    print(f"\n{tabulate(rows(found), HEADERS, disable_numparse=True)}")
    return {
        "device": options.device,
        "dtype": "tf32" if options.tf32 else options.dtype,
        "peaks": dataclasses.asdict(peaks),
        "float8": missing or ("measured" if options.compile else "only with --compile"),
        "ops": [dataclasses.asdict(one) for one in found],
    }


def draw(path: Path, content: dict[str, Any]) -> None:
    """The roofline figure, or a line that says that matplotlib is missing."""
    try:
        roofline = importlib.import_module("_roofline")
    except ImportError as error:
        print(f"no figure: {error}; pip install 'fx_approx[figures]'", file=sys.stderr)
        return
    roofline.draw(path, content)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, or reads what was measured; prints, stores, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", type=int, help="square linear layers (512 to 16384)")
    parser.add_argument("--networks", nargs="*", choices=list(NETWORKS), help="whose convolutions (all)")
    parser.add_argument("--batch", type=int, help="images, for the networks (32)")
    parser.add_argument("--roles", nargs="+", default=list(ROLES), choices=ROLES)
    parser.add_argument("--ratios", nargs="+", type=float, help="sample ratios (0.25 0.5 0.75)")
    parser.add_argument("--runs", type=int, help="measurements of each variant (11)")
    parser.add_argument("--most-seconds", type=float, help="leave out layers of longer products (2 on CPU, else none)")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True, help="layout of images")
    parser.add_argument("--compile", action="store_true", help="time compiled products, too")
    parser.add_argument("--quick", action="store_true", help="small and short: only to see that it runs")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw a roofline there (needs matplotlib)")
    parser.add_argument("--from", dest="stored", type=Path, metavar="JSON", help="measure nothing, draw these numbers")
    add_device_options(parser)
    add_json_option(parser)
    options = parser.parse_args(arguments)
    if options.stored is not None:
        if options.figure is None:
            parser.error("--from: only with --figure")
        draw(options.figure, json.loads(options.stored.read_text(encoding="utf-8")))
        return
    small = {"sizes": [256], "networks": ["wrn_16_4"], "batch": 2, "ratios": [0.5], "runs": 3, "most_seconds": math.inf}
    large = {"sizes": SIZES, "networks": list(NETWORKS), "batch": 32, "ratios": RATIOS, "runs": 11}
    large["most_seconds"] = 2.0 if options.device == "cpu" else math.inf
    for name, value in (small if options.quick else large).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.runs < 2 or options.batch < 1 or not all(0 < ratio < 1 for ratio in options.ratios):
        parser.error("--runs: expected 2 or more; --batch: 1 or more; --ratios: numbers in (0, 1)")
    if not all(size >= 2 for size in options.sizes) or not options.sizes + options.networks:
        parser.error("--sizes: expected numbers of 2 or more; without any, --networks is needed")
    refuse_device_options(parser, options)
    print(header("Single products"), flush=True)
    results = run(options)
    store(options.json, results)
    if options.figure is not None:
        draw(options.figure, {"environment": environment(), "results": results})


if __name__ == "__main__":
    main()
