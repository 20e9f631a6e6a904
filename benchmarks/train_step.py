"""One training step, forward and backward: exact, module swap with online TopK, and demand-driven sampling.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --models wrn_16_4 --scopes value group --ratios 0.5 --compile
    python benchmarks/train_step.py --models resnet50 --runs 9 --json resnet50.json

All variants take their steps in turn in one process; a ratio above 1 is faster than the exact model, eager or compiled
as the variant itself, and "of compiled exact" compares with the compiled exact model whatever the variant is. Before
anything is timed, the demand-driven model is checked against the same selections without demand. `narrow` is the same
network at half the (inner) width, trained exactly: what a user could do instead.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _header import add_json_option, header, store
from _models import MODELS
from _peak import peak_bytes
from _profile import KINDS, milliseconds_by_kind
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fx_approx
from fx_approx.policies import Paper, Uniform

warnings.filterwarnings("ignore", category=fx_approx.StaleStatisticsWarning)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One variant: seconds of a step, and exact / this by neighbouring steps, as quartiles."""

    model: str
    variant: str
    compiled: bool
    seconds: float
    spread: tuple[float, float]
    speedup: tuple[float, float, float] | None
    of_compiled: tuple[float, float, float] | None
    flops: float
    peak: int | None
    profile: dict[str, float] | None


class Step:
    """A training step of one variant, without the optimiser."""

    def __init__(self, model: nn.Module, inputs: Any, compiled: bool) -> None:
        self.original, self.inputs = model, inputs
        self.model = torch.compile(model, dynamic=False) if compiled else model

    def __call__(self) -> None:
        """Forward, loss, backward; gradients are dropped."""
        result = self.model(self.inputs)
        result.square().mean().backward()
        for parameter in self.original.parameters():
            parameter.grad = None


def policy(scope: str, ratio: float, scores: str, minimal_k: int) -> Uniform:
    """TopK on every layer, made ahead."""
    return Uniform("topk", ratio, minimal_k=minimal_k, scores=scores, share=scope)


def variants(
    exact: nn.Module, inputs: Tensor, options: argparse.Namespace, narrow: nn.Module | None
) -> dict[str, nn.Module]:
    """The models to time, by name."""
    made: dict[str, nn.Module] = {"exact": exact}
    if narrow is not None and not options.no_narrow:
        made["narrow"] = narrow
    for ratio in options.ratios:
        if not options.no_swap:
            made[f"swap, online TopK {ratio:g}"] = fx_approx.transform(
                copy.deepcopy(exact), Paper(ratio, minimal_k=options.minimal_k), inputs
            )
        for scope in options.scopes:
            chosen = policy(scope, ratio, options.scores, options.minimal_k)
            made[f"demand, {scope} {ratio:g}"] = fx_approx.transform(copy.deepcopy(exact), chosen, inputs)
    return made


def check(name: str, model: nn.Module, inputs: Tensor) -> None:
    """The demand-driven model gives the numbers of the same selections without demand."""
    found = fx_approx.verify(model, inputs)
    if not found.passed:
        raise AssertionError(f"{name}: {found}")


def measure(name: str, options: argparse.Namespace) -> list[Measured]:
    """Times all variants of one model in turn."""
    torch.manual_seed(0)
    build = MODELS[name]
    exact, inputs, narrow = build()
    if options.batch is not None:
        form = torch.channels_last if inputs.dim() == 4 else torch.contiguous_format
        inputs = torch.randn(options.batch, *inputs.shape[1:]).contiguous(memory_format=form)
    dtype = getattr(torch, options.dtype)
    exact, inputs = exact.to(options.device, dtype), inputs.to(options.device, dtype)
    narrow = None if narrow is None else narrow.to(options.device, dtype)
    models = variants(exact, inputs, options, narrow)
    for variant, model in models.items():
        if variant.startswith("demand") and dtype is torch.float32:
            check(variant, model, inputs)
    flops = {variant: _flops(model, inputs) for variant, model in models.items()}
    steps: dict[tuple[str, bool], Step] = {}
    for compiled in [False, True] if options.compile else [False]:
        for variant, model in models.items():
            steps[variant, compiled] = Step(model, inputs, compiled)
    times: dict[tuple[str, bool], list[float]] = {key: [] for key in steps}
    for run in range(options.runs + options.warmup):
        for key, step in steps.items():
            seconds = timed(step, options.device)
            if run >= options.warmup:
                times[key].append(seconds)
    found = []
    for (variant, compiled), taken in times.items():
        gc.collect()
        low, middle, high = statistics.quantiles(taken, n=4)
        found.append(
            Measured(
                model=name,
                variant=variant,
                compiled=compiled,
                seconds=middle,
                spread=(low, high),
                speedup=_ratios(times.get(("exact", compiled)), taken),
                of_compiled=_ratios(times.get(("exact", True)), taken),
                flops=flops["exact"] / flops[variant],
                peak=peak_bytes(steps[variant, compiled], options.device) if options.memory else None,
                profile=milliseconds_by_kind(steps[variant, compiled]) if options.profile else None,
            )
        )
        print(".", end="", flush=True)
    return found


def _flops(model: nn.Module, inputs: Tensor) -> float:
    for _ in range(2):  # the first step of learnt scores is exact
        with FlopCounterMode(display=False) as counter:
            model(inputs).square().mean().backward()
    for parameter in model.parameters():
        parameter.grad = None
    return float(counter.get_total_flops())


def _ratios(exact: list[float] | None, taken: list[float]) -> tuple[float, float, float] | None:
    if exact is None:
        return None
    low, middle, high = statistics.quantiles([one / other for one, other in zip(exact, taken, strict=True)], n=4)
    return low, middle, high


def timed(function: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rows(found: Sequence[Measured]) -> list[list[str]]:
    """One line for each variant."""
    peaks = {(one.model, one.compiled): one.peak for one in found if one.variant == "exact"}
    lines = []
    for one in found:
        whole = peaks.get((one.model, one.compiled))
        lines.append(
            [
                one.model,
                one.variant,
                "compiled" if one.compiled else "eager",
                f"{1000 * one.seconds:.0f} [{1000 * one.spread[0]:.0f}, {1000 * one.spread[1]:.0f}]",
                f"{one.flops:.2f}",
                _text(one.speedup),
                _text(one.of_compiled),
                "" if one.peak is None or not whole else f"{one.peak / 2**20:.0f} ({one.peak / whole:.2f})",
            ]
        )
    return lines


def _text(ratios: tuple[float, float, float] | None) -> str:
    return "" if ratios is None else "{1:.2f} [{0:.2f}, {2:.2f}]".format(*ratios)


def profiles(found: Sequence[Measured]) -> list[list[str]]:
    """One line for each variant, in milliseconds by kind of work."""
    return [
        [one.model, one.variant, "compiled" if one.compiled else "eager", *(f"{ms:.1f}" for ms in one.profile.values())]
        for one in found
        if one.profile is not None
    ]


PROFILE = ["model", "variant", "", *KINDS, "the rest"]
HEADERS = ["model", "variant", "", "ms", "FLOPs", "exact / this", "of compiled exact", "peak MiB (of exact)"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["wrn_16_4"], choices=list(MODELS), help="which models")
    parser.add_argument("--scopes", nargs="+", default=["value", "group"], choices=["site", "value", "group"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5], help="sample ratios (0.5)")
    parser.add_argument("--scores", default="weight", choices=["weight", "stale", "uniform"])
    parser.add_argument("--batch", type=int, help="examples in a step (64, 8 or 8, by model)")
    parser.add_argument("--minimal-k", type=int, default=16, help="layers with fewer pairs stay exact (16)")
    parser.add_argument("--runs", type=int, default=15, help="steps of each variant (15)")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each before (3)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="time compiled models, too")
    parser.add_argument("--memory", action="store_true", help="peak memory of a step, too")
    parser.add_argument("--profile", action="store_true", help="where the time goes, in a second table")
    parser.add_argument("--no-swap", action="store_true", help="leave out the module swap")
    parser.add_argument("--no-narrow", action="store_true", help="leave out the narrower network")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    if options.batch is not None and options.batch < 1:
        parser.error(f"--batch: expected 1 or more, not {options.batch}")
    if options.runs < 2 or not all(0 < ratio < 1 for ratio in options.ratios):
        parser.error("--runs: expected 2 or more; --ratios: expected numbers in (0, 1)")
    print(header("Training step"), flush=True)
    found = [one for name in options.models for one in measure(name, options)]
    print(f"\n{tabulate(rows(found), HEADERS, disable_numparse=True)}")
    if options.profile:
        print(f"\nMilliseconds by kind of work\n{tabulate(profiles(found), PROFILE, disable_numparse=True)}")
    store(options.json, [dataclasses.asdict(one) for one in found])


if __name__ == "__main__":
    main()
