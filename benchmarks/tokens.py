"""A whole training step with some tokens left out, against the exact model.

    python benchmarks/tokens.py
    python benchmarks/tokens.py --models vit_b_16 gpt --compiled-only --first 0 1 --json tokens.json
    python benchmarks/tokens.py --models vit_b_16 --memory --batch 16
    python benchmarks/tokens.py --models vit_b_16 --device cuda --autocast bfloat16 --batch 128 --compiled-only

All variants of a model take their steps in turn in one process, on the same parameters, without an optimiser and with
each that is asked for; a ratio above 1 is faster than the exact model with the same optimiser, eager or compiled as the
variant itself. `both` samples tokens and, of the channels that the layers read, half (scope value). Blocks before
`--first` compute all tokens. Before anything is timed, the step at ratio 1 is compared with the exact model's, and the
operations that the report counts with those that torch counts. `--memory` measures instead the most that forward,
backward and the optimiser's step allocate at one time, in a process for each variant. Numbers of other settings that
stand in the file already are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from _device import (
    add_autocast_option,
    add_device_options,
    autocast,
    precision,
    quartiles,
    refuse_device_options,
    shown,
    speedup,
)
from _header import add_json_option, environment, header, parse_ratio, store
from _models import PlainBlock, torchvision_models
from _peak import peak_bytes
from _steps import train_step
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fx_approx
from fx_approx.policies import Tokens, Uniform
from fx_approx.utils.timing import in_turn

Made = tuple[nn.Module, Tensor]


@dataclasses.dataclass(frozen=True)
class Measured:
    """One variant.

    Attributes:
        model: Name of the model.
        batch: Examples in a step.
        variant: What is sampled.
        first: Blocks at the beginning that compute all tokens.
        compiled: The model is compiled.
        optimizer: Whose update is part of the step.
        processor: What it ran on.
        seconds: Of a step, median.
        speedup: Exact / this, quartiles.
        operations: Share of the operations that is left.
        peak: Bytes that a step allocates at one time.
        of_exact: The same as a share of the exact model's.
    """

    model: str
    batch: int
    variant: str
    first: int
    compiled: bool
    optimizer: str
    processor: str
    seconds: float | None = None
    speedup: tuple[float, float, float] | None = None
    operations: float | None = None
    peak: int | None = None
    of_exact: float | None = None

    @property
    def setting(self) -> tuple[Any, ...]:
        """What was measured."""
        what = self.model, self.batch, self.variant, self.first, self.compiled, self.optimizer
        return (*what, self.peak is None)


class CausalBlock(PlainBlock):
    """A block of a language model."""

    def forward(self, x: Tensor) -> Tensor:
        """``[N, tokens, width]``."""
        h = self.norm1(x)
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, 64)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).flatten(2))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class Language(nn.Module):
    """A GPT-2-like model of six blocks."""

    def __init__(self, blocks: int = 6, width: int = 768, vocabulary: int = 2048, length: int = 512) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Parameter(torch.zeros(1, length, width))
        self.blocks = nn.Sequential(*(CausalBlock(width // 64, width, 4 * width) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, tokens]`` to ``[N, tokens, vocabulary]``."""
        result: Tensor = self.head(self.norm(self.blocks(self.embed(tokens) + self.position)))
        return result


class Encoder(nn.Module):
    """Blocks of BERT-base behind an embedding, read by the mean."""

    def __init__(self, blocks: int = 12, width: int = 768) -> None:
        super().__init__()
        self.embed = nn.Embedding(2048, width)
        self.blocks = nn.Sequential(*(PlainBlock(width // 64, width, 4 * width) for _ in range(blocks)))
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, tokens]`` to ``[N, 2]``."""
        result: Tensor = self.head(self.blocks(self.embed(tokens)).mean(1))
        return result


def _vit(batch: int = 2) -> Made:
    return torchvision_models().vit_b_16(), torch.randn(batch, 3, 224, 224)


def _gpt(batch: int = 1) -> Made:
    return Language(), torch.randint(2048, (batch, 512))


def _bert(batch: int = 8) -> Made:
    return Encoder(), torch.randint(2048, (batch, 128))


def _small(batch: int = 2) -> Made:
    return Encoder(3, 64), torch.randint(2048, (batch, 16))


MODELS: dict[str, Callable[..., Made]] = {"vit_b_16": _vit, "gpt": _gpt, "bert": _bert, "small": _small}
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None] = {
    "none": None,
    "sgd": lambda parameters: torch.optim.SGD(parameters, 1e-5),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-5),
}


def build(name: str, batch: int | None) -> Made:
    """A model and its inputs."""
    torch.manual_seed(0)
    return MODELS[name]() if batch is None else MODELS[name](batch)


def policy(variant: str, ratio: float, first: int) -> Tokens:
    """What is sampled."""
    tokens = Tokens(ratio, first=first)
    return tokens if variant == "tokens" else dataclasses.replace(tokens, layers=Uniform(0.5, min_k=16))


class Step:
    """Forward, backward and the optimiser's step."""

    def __init__(
        self, model: Any, inputs: Tensor, optimizer: torch.optim.Optimizer | None, lower: str | None = None
    ) -> None:
        self.model, self.inputs, self.optimizer, self.lower = model, inputs, optimizer, lower

    def __call__(self) -> None:
        """One step."""
        if self.optimizer is not None:
            train_step(self.model, self.inputs, self.optimizer, self.lower)
            return
        with autocast(self.inputs.device.type, self.lower):
            result = self.model(self.inputs)
        result.float().square().mean().backward()
        self.model.zero_grad(set_to_none=True)


def operations(model: nn.Module, inputs: Tensor) -> int:
    """Of a training step, as torch counts them."""
    with FlopCounterMode(display=False) as counted:
        model(inputs).sum().backward()
    model.zero_grad(set_to_none=True)
    return int(counted.get_total_flops())


def check(name: str, exact: nn.Module, inputs: Tensor, ratio: float, first: int) -> None:
    """At ratio 1 the output is the exact one, and the report counts what torch does."""
    whole = fx_approx.transform(exact, Tokens(1.0, first=first), inputs)
    with torch.no_grad():
        if not torch.equal(whole(inputs), exact(inputs)):
            raise AssertionError(f"{name}: at ratio 1 the output differs from that of the exact model")
    some = fx_approx.transform(exact, Tokens(ratio, first=first), inputs)
    told, counted = fx_approx.report(some).totals.executed.total, operations(some, inputs)
    if abs(told - counted) > 0.01 * counted:
        raise AssertionError(f"{name}: the report says {told} operations, torch counts {counted}")


def measure(name: str, compiled: bool, options: argparse.Namespace) -> list[Measured]:
    """All variants of one model, eager or compiled, with each optimiser."""
    exact, inputs = (one.to(options.device) for one in build(name, options.batch))
    models: dict[tuple[str, int], nn.Module] = {("exact", 0): exact}
    for first in options.first:
        check(name, exact, inputs, options.ratio, first)
        for variant in options.variants:
            models[variant, first] = fx_approx.transform(exact, policy(variant, options.ratio, first), inputs)
    counts = {kind: operations(model, inputs) for kind, model in models.items()}
    made = {kind: make and make(exact.parameters()) for kind in options.optimizers for make in [OPTIMIZERS[kind]]}
    runs = {kind: torch.compile(model, dynamic=False) if compiled else model for kind, model in models.items()}
    steps = {
        (kind, optimizer): Step(run, inputs, own, options.autocast)
        for optimizer, own in made.items()
        for kind, run in runs.items()
    }
    device = torch.device(options.device)
    taken = in_turn([*steps.values()], device, options.runs, warmup=options.warmup, back_and_forth=True)
    times = dict(zip(steps, taken, strict=True))
    torch.compiler.reset()
    return [
        Measured(
            *(name, len(inputs), *kind, compiled, optimizer, str(environment()["processor"])),
            seconds=quartiles(own)[1],
            speedup=speedup(times[("exact", 0), optimizer], own),
            operations=counts[kind] / counts["exact", 0],
        )
        for (kind, optimizer), own in times.items()
    ]


def peak(name: str, batch: int | None, variant: str, first: int, ratio: float, optimizer: str) -> int:
    """Bytes that a step allocates at one time, eager."""
    model, inputs = build(name, batch)
    if variant != "exact":
        model = fx_approx.transform(model, policy(variant, ratio, first), inputs)
    make = OPTIMIZERS[optimizer]
    step = Step(model, inputs, None if make is None else make(model.parameters()))
    step()
    return peak_bytes(step, "cpu")


def measure_memory(name: str, options: argparse.Namespace) -> list[Measured]:
    """All variants of one model, each in a process of its own."""
    kinds = [("exact", 0), *((variant, first) for first in options.first for variant in options.variants)]
    batch = len(build(name, options.batch)[1])
    found: list[Measured] = []
    for optimizer in options.optimizers:
        whole = None
        for variant, first in kinds:
            own = json.dumps([name, batch, variant, first, options.ratio, optimizer])
            done = subprocess.run([sys.executable, __file__, "--peak", own], capture_output=True, text=True, check=True)
            bytes_ = int(done.stdout)
            whole = bytes_ if whole is None else whole
            setting = name, batch, variant, first, False, optimizer, str(environment()["processor"])
            found.append(Measured(*setting, peak=bytes_, of_exact=bytes_ / whole))
    return found


def rows(found: Sequence[Measured]) -> list[list[str]]:
    """The lines of the table."""
    return [
        [
            *(f"{one.model}, batch {one.batch}", "compiled" if one.compiled else "eager", one.optimizer, one.variant),
            "" if one.variant == "exact" else str(one.first),
            *("" if one.operations is None else f"{one.operations:.2f}",),
            *("" if one.seconds is None or one.speedup is None else f"{1000 * one.seconds:.0f}",),
            *("" if one.speedup is None else shown(one.speedup),),
            *("" if one.peak is None else f"{one.peak / 1e6:.0f} ({one.of_exact:.2f})",),
        ]
        for one in found
    ]


HEADERS = ["model", "mode", "optimiser", "variant", "first", "operations", "ms", "exact / this", "peak MB (of exact)"]


def add_to(path: Path | None, found: Sequence[Measured]) -> None:
    """Writes them beside the numbers of other settings that are there."""
    old = [] if path is None or not path.exists() else json.loads(path.read_text(encoding="utf-8"))["results"]
    results = {one.setting: one for one in (*(Measured(**row) for row in old), *found)}
    store(path, [dataclasses.asdict(one) for one in results.values()])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_b_16", "gpt", "bert"], choices=list(MODELS))
    parser.add_argument("--variants", nargs="+", default=["tokens", "both"], choices=["tokens", "both"])
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the tokens (0.5)")
    parser.add_argument("--first", nargs="+", type=int, default=[1], help="blocks that compute all tokens (1)")
    parser.add_argument("--batch", type=int, help="examples in a step (that of the model)")
    parser.add_argument("--optimizers", nargs="+", default=["none", "adamw"], choices=list(OPTIMIZERS))
    parser.add_argument("--runs", type=int, default=11, help="steps of each variant (11)")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each before (2)")
    parser.add_argument("--compile", action="store_true", help="compiled, too")
    parser.add_argument("--compiled-only", action="store_true", help="compiled only")
    parser.add_argument("--memory", action="store_true", help="memory instead of time")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    add_device_options(parser)
    add_autocast_option(parser)
    add_json_option(parser)
    options = parse_ratio(parser, arguments)
    refuse_device_options(parser, options)
    if options.memory and options.device != "cpu":
        parser.error("--memory: only on the CPU, whose allocations are counted one by one")
    if min(options.first) < 0:
        parser.error(f"--first: expected 0 or more, got {min(options.first)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    options = parse(arguments)
    if options.peak is not None:
        print(peak(*json.loads(options.peak)))
        return
    print(header("Tokens: a whole training step"), flush=True)
    modes = [False] * (not options.compiled_only) + [True] * (options.compile or options.compiled_only)
    found: list[Measured] = []
    for name in options.models:
        if options.memory:
            found += measure_memory(name, options)
        else:
            for compiled in modes:
                with precision(options.tf32):
                    found += measure(name, compiled, options)
        add_to(options.json, found)
    print(tabulate(rows(found), HEADERS, disable_numparse=True))


if __name__ == "__main__":
    main()
