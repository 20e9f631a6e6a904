"""Training steps of several variants of a model, timed in turn in one process."""

from __future__ import annotations

import argparse
import dataclasses
import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from _device import (
    Quartiles,
    add_autocast_option,
    add_device_options,
    autocast,
    precision,
    quartiles,
    refuse_device_options,
    shown,
    speedup,
)
from _header import add_json_option
from _models import MODELS
from _peak import peak_bytes
from _profile import KINDS, longest, milliseconds_by_kind
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fx_approx.utils.timing import in_turn


@dataclasses.dataclass(frozen=True)
class Measured:
    """One variant: seconds of a step, and exact / this by neighbouring steps, as quartiles."""

    model: str
    variant: str
    compiled: bool
    seconds: float
    spread: tuple[float, float]
    speedup: Quartiles | None
    of_compiled: Quartiles | None
    flops: float | None
    peak: int | None
    profile: dict[str, float] | None
    longest: list[tuple[str, float, float]] | None


class Step:
    """A training step of one variant, without the optimiser; the forward pass under autocast where it is asked for."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        compiled: bool,
        lower: str | None = None,
        backend: Any = "inductor",
        graphs: bool = False,
    ) -> None:
        self.original, self.inputs, self.graphs = model, inputs, graphs and compiled
        mode = {"mode": "reduce-overhead"} if self.graphs else {}
        self.model = torch.compile(model, dynamic=False, backend=backend, **mode) if compiled else model
        self.lower = lower

    def __call__(self) -> None:
        """Forward, loss, backward; gradients are dropped."""
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with autocast(self.inputs.device.type, self.lower):
            result = self.model(self.inputs)
        result.float().square().mean().backward()
        for tensor in (self.inputs, *self.original.parameters()):
            tensor.grad = None


def train_step(run: Any, inputs: Tensor, optimizer: torch.optim.Optimizer, lower: str | None = None) -> None:
    """Forward, under autocast where it is asked for, loss, backward and the optimiser's step."""
    with autocast(inputs.device.type, lower):
        result = run(inputs)
    result.float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def add_step_options(parser: argparse.ArgumentParser, models: Sequence[str]) -> None:
    """The options of all benchmarks of training steps."""
    parser.add_argument("--models", nargs="+", default=list(models), choices=list(MODELS), help="which models")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5], help="sample ratios (0.5)")
    parser.add_argument("--scores", default="weight", choices=["weight", "ema", "uniform"])
    parser.add_argument("--batch", type=int, help="examples in a step (64, 8 or 8, by model)")
    parser.add_argument(
        "--minimal-k", dest="min_k", type=int, default=16, help="layers with fewer pairs stay exact (16)"
    )
    parser.add_argument("--runs", type=int, default=15, help="steps of each variant (15)")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each before (3)")
    add_device_options(parser)
    add_autocast_option(parser)
    parser.add_argument(
        "--channels-last", action=argparse.BooleanOptionalAction, help="layout of images (by default the model's own)"
    )
    parser.add_argument("--compile", action="store_true", help="time compiled models, too")
    parser.add_argument("--compiled-only", action="store_true", help="time compiled models only")
    parser.add_argument("--cuda-graphs", action="store_true", help='compiled with mode="reduce-overhead"')
    parser.add_argument("--memory", action="store_true", help="peak memory of a step, too")
    parser.add_argument("--profile", action="store_true", help="where the time goes, in a second table")
    parser.add_argument("--no-narrow", action="store_true", help="leave out the narrower network")
    add_json_option(parser)


def parse_step_options(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, or an error that says what is wrong with them."""
    options = parser.parse_args(arguments)
    options.compile |= options.compiled_only or options.cuda_graphs
    if options.batch is not None and options.batch < 1:
        parser.error(f"--batch: expected 1 or more, not {options.batch}")
    if options.runs < 2 or not all(0 < ratio < 1 for ratio in options.ratios):
        parser.error("--runs: expected 2 or more; --ratios: expected numbers in (0, 1)")
    if options.autocast is not None and options.dtype != "float32":
        parser.error("--autocast: only with --dtype float32")
    refuse_device_options(parser, options)
    return options


def build(name: str, options: argparse.Namespace) -> tuple[nn.Module, Tensor, nn.Module | None]:
    """The exact model, a batch and the narrower rival (None without one), as the options have them."""
    torch.manual_seed(0)
    exact, inputs, narrow = MODELS[name]()
    images = inputs.dim() == 4
    last = images and inputs.is_contiguous(memory_format=torch.channels_last)
    if options.channels_last is not None:
        last = images and options.channels_last
    form = torch.channels_last if last else torch.contiguous_format
    if options.batch is not None:
        inputs = torch.randn(options.batch, *inputs.shape[1:], requires_grad=inputs.requires_grad)
    place = {"device": options.device, "dtype": getattr(torch, options.dtype), "memory_format": form}
    narrow = None if narrow is None or options.no_narrow else narrow.to(**place)
    placed = inputs.detach().to(**place).requires_grad_(inputs.requires_grad)
    return exact.to(**place), placed, narrow


def measure(
    name: str,
    models: Mapping[str, nn.Module],
    inputs: Tensor,
    options: argparse.Namespace,
    backends: Mapping[str, Any] | None = None,
) -> list[Measured]:
    """Times all ``models``, variants of one of which the first is ``"exact"``, in turn.

    Those named in ``backends`` are timed compiled only, by that backend.
    """
    backends = {} if backends is None else backends
    with precision(options.tf32):
        flops = {
            variant: _flops(Step(model, inputs, False, options.autocast))
            for variant, model in models.items()
            if variant not in backends
        }
        steps: dict[tuple[str, bool], Step] = {}
        for compiled in [False] * (not options.compiled_only) + [True] * options.compile:
            for variant, model in models.items():
                if compiled or variant not in backends:
                    backend = backends.get(variant, "inductor")
                    graphs = options.cuda_graphs and variant not in backends
                    steps[variant, compiled] = Step(model, inputs, compiled, options.autocast, backend, graphs)
        seconds = in_turn(list(steps.values()), torch.device(options.device), options.runs, warmup=options.warmup)
        times = dict(zip(steps, seconds, strict=True))
        found = []
        for (variant, compiled), taken in times.items():
            gc.collect()
            low, middle, high = quartiles(taken)
            found.append(
                Measured(
                    model=name,
                    variant=variant,
                    compiled=compiled,
                    seconds=middle,
                    spread=(low, high),
                    speedup=speedup(times["exact", compiled], taken),
                    of_compiled=speedup(times["exact", True], taken) if options.compile else None,
                    flops=flops["exact"] / flops[variant] if variant in flops else None,
                    peak=peak_bytes(steps[variant, compiled], options.device) if options.memory else None,
                    profile=milliseconds_by_kind(steps[variant, compiled]) if options.profile else None,
                    longest=longest(steps[variant, compiled]) if options.profile else None,
                )
            )
            print(".", end="", flush=True)
    return found


def _flops(step: Step) -> float:
    for _ in range(2):  # the first step of learnt scores is exact
        with FlopCounterMode(display=False) as counter:
            step()
    return float(counter.get_total_flops())


def show(found: Sequence[Measured], profile: bool) -> None:
    """Prints the tables."""
    print(f"\n{tabulate(_rows(found), HEADERS, disable_numparse=True)}")
    if profile:
        print(f"\nMilliseconds by kind of work\n{tabulate(_profiles(found), PROFILE, disable_numparse=True)}")


def _rows(found: Sequence[Measured]) -> list[list[str]]:
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
                "" if one.flops is None else f"{one.flops:.2f}",
                _text(one.speedup),
                _text(one.of_compiled),
                "" if one.peak is None or not whole else f"{one.peak / 2**20:.0f} ({one.peak / whole:.2f})",
            ]
        )
    return lines


def _text(ratios: Quartiles | None) -> str:
    return "" if ratios is None else shown(ratios)


def _profiles(found: Sequence[Measured]) -> list[list[str]]:
    """One line for each variant, in milliseconds by kind of work."""
    return [
        [one.model, one.variant, "compiled" if one.compiled else "eager", *(f"{ms:.1f}" for ms in one.profile.values())]
        for one in found
        if one.profile is not None
    ]


PROFILE = ["model", "variant", "", *KINDS, "the rest"]
HEADERS = ["model", "variant", "", "ms", "FLOPs", "exact / this", "of compiled exact", "peak MiB (of exact)"]
