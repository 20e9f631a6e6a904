"""The Triton kernels of sampled linear layers beside the gather-then-multiply reference and the exact product.

    python benchmarks/kernels.py --device cuda --dtype bfloat16 --json kernels.json
    python benchmarks/kernels.py --device cuda --rows 16384 --sizes 4096x11008 --ratios 0.25 0.5
    TRITON_INTERPRET=1 python benchmarks/kernels.py --quick

Every kernel is first checked against float64. Then exact, reference (eager and compiled) and Triton take turns; a
speed-up above 1 is faster than the exact product. Which of reference and Triton wins belongs into the lowering table
(fx_approx/kernels/table.py). On a CPU the Triton kernels run by the interpreter, if it is asked for as in the last
line: that checks them, and its times say nothing, so they are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence

import torch
from _device import add_device_options, precision, quartiles, refuse_device_options, speedup, timed
from _header import add_json_option, header, store
from tabulate import tabulate
from torch import Tensor

from fx_approx import kernels

ROUNDING = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}


@dataclasses.dataclass(frozen=True)
class Timed:
    """One kernel: seconds of a call, and exact / this by neighbouring calls, as quartiles."""

    product: str
    shape: tuple[int, int, int]
    ratio: float
    variant: str
    seconds: float
    speedup: tuple[float, float, float]


Calls = dict[str, Callable[[], Tensor]]


def variants(product: str, shape: tuple[int, int, int], ratio: float, options: argparse.Namespace) -> Calls:
    """The calls to time, each checked; the first is the exact product."""
    rows, inputs, outputs = shape
    place = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    x, w, grad = (torch.randn(size, **place) for size in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    pairs = {"output": inputs, "grad_weight": rows, "norms": inputs}[product]
    index = torch.randperm(pairs, device=options.device)[: max(1, round(ratio * pairs))].sort().values
    calls: Calls
    if product == "norms":
        calls = {
            "exact": lambda: kernels.column_norms(x),
            "triton": lambda: kernels.column_norms(x, kernel="column_norms"),
        }
        expected = x.double().norm(dim=0)
    elif product == "output":
        calls = {
            "exact": lambda: x @ w.T,
            "reference": lambda: kernels.gathered_k_matmul(x, w, index),
            "triton": lambda: kernels.gathered_k_matmul(x, w, index, kernel="gathered_k_matmul"),
        }
        expected = x.double()[:, index] @ w.double()[:, index].T
    else:
        calls = {
            "exact": lambda: grad.T @ x,
            "reference": lambda: kernels.gathered_rows_matmul(grad, x, index),
            "triton": lambda: kernels.gathered_rows_matmul(grad, x, index, kernel="gathered_rows_matmul"),
        }
        expected = grad.double()[index].T @ x.double()[index]
    if options.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        del calls["triton"]
    for name in calls.keys() - {"exact"}:
        error = float((calls[name]().double() - expected).abs().max() / expected.abs().max())
        if error > (1e-3 if options.tf32 else ROUNDING[options.dtype]):
            raise AssertionError(f"{product} {shape}, {name}: {error:.1e} off")
    if "reference" in calls and not options.quick:
        calls["reference, compiled"] = torch.compile(calls["reference"], dynamic=False)
    if options.device == "cpu":
        calls.pop("triton", None)
    return calls


def measure(product: str, shape: tuple[int, int, int], ratio: float, options: argparse.Namespace) -> list[Timed]:
    """Checks and times all kernels of one product in turn."""
    torch._dynamo.reset()
    calls = variants(product, shape, ratio, options)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(options.runs + 3):
        for name, call in calls.items():
            seconds = timed(call, options.device)
            if run >= 3:
                times[name].append(seconds)
    return [
        Timed(product, shape, ratio, name, quartiles(taken)[1], speedup(times["exact"], taken))
        for name, taken in times.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[4096, 16384], help="rows of the input")
    parser.add_argument("--sizes", nargs="+", default=["1024x1024", "4096x4096", "4096x11008"], help="inputs x outputs")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5, 0.75])
    parser.add_argument("--runs", type=int, default=15, help="calls of each (15)")
    parser.add_argument("--quick", action="store_true", help="one small shape, nothing compiled")
    add_device_options(parser)
    add_json_option(parser)
    options = parser.parse_args(arguments)
    refuse_device_options(parser, options)
    if options.runs < 2 or not all(0 < ratio < 1 for ratio in options.ratios):
        parser.error("--runs: expected 2 or more; --ratios: expected numbers in (0, 1)")
    if options.quick:
        options.rows, options.sizes, options.ratios, options.runs = [64], ["48x32"], [0.5], 2
    sizes = [tuple(map(int, size.split("x"))) for size in options.sizes]
    if not all(len(size) == 2 for size in sizes):
        parser.error(f"--sizes: expected inputs x outputs such as 4096x11008, not {options.sizes}")
    print(header("Kernels of sampled linear layers"), flush=True)
    found: list[Timed] = []
    torch.manual_seed(0)
    with precision(options.tf32), torch.no_grad():
        for rows in options.rows:
            for inputs, outputs in sizes:
                for ratio in options.ratios:
                    for product in ("output", "grad_weight"):
                        found += measure(product, (rows, inputs, outputs), ratio, options)
                found += measure("norms", (rows, inputs, outputs), 0.5, options)
                print(".", end="", flush=True)
    lines = [
        [
            one.product,
            "x".join(map(str, one.shape)),
            f"{one.ratio:g}" if one.product != "norms" else "",
            one.variant,
            f"{1e6 * one.seconds:.0f}",
            "{1:.2f} [{0:.2f}, {2:.2f}]".format(*one.speedup),
        ]
        for one in found
    ]
    print(f"\n{tabulate(lines, ['product', 'shape', 'ratio', 'kernel', 'us', 'exact / this'], disable_numparse=True)}")
    store(options.json, [dataclasses.asdict(one) for one in found])


if __name__ == "__main__":
    main()
