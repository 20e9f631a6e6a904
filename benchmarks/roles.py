"""Forward and backward of one layer with sampled gradients, against the exact layer.

    python benchmarks/roles.py
    python benchmarks/roles.py --ratio 0.25 --runs 40 --json roles.json
    python benchmarks/roles.py --compile

Linear layers of 512 and 2048 rows, 2048 to 2048 features, and a 3x3 convolution of 256 to 256 channels on 32 examples
of 16x16, as `transform` makes them; with `--compile` both they and the exact layer go through `torch.compile`. All
variants take their steps in turn in one process. A ratio above 1 is faster than exact. With both gradients at ratio r
the limit is 3 / (1 + 2 r).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Sequence

import torch
from _device import shown, speedup
from _header import add_json_option, header, parse_ratio, store
from tabulate import tabulate
from torch import Tensor, nn

import fx_approx
from fx_approx import SamplerConfig
from fx_approx.core.plan import Policy
from fx_approx.policies import GradientSampling, Uniform
from fx_approx.runtime.approx_module import find
from fx_approx.utils.timing import in_turn


@dataclasses.dataclass(frozen=True)
class Measured:
    """Times of one variant in seconds, and exact / this by pairs of neighbouring steps, as quartiles."""

    layer: str
    variant: str
    seconds: float
    speedup: tuple[float, float, float]


def variants(ratio: float) -> dict[str, Policy]:
    """What is measured beside the exact layer."""
    early_input = SamplerConfig("systematic", ratio, scores="weight")
    early_weight = SamplerConfig("systematic", ratio, scores="input")
    uniform = SamplerConfig("systematic", ratio, scores="uniform")
    positions = SamplerConfig("systematic", ratio, scores="input", positions=True)
    return {
        "both gradients, online": GradientSampling.backward(ratio),
        "both gradients, early": GradientSampling(grad_input=early_input, grad_weight=early_weight),
        "both gradients, uniform": GradientSampling(grad_input=uniform, grad_weight=uniform),
        "input gradient, early": GradientSampling(grad_input=early_input),
        "weight gradient, early": GradientSampling(grad_weight=early_weight),
        "weight gradient, positions": GradientSampling(grad_weight=positions),
        "straight-through, topk": GradientSampling.straight(ratio),
        "forward mode, topk": Uniform(ratio, scores="online"),
    }


def layers() -> dict[str, tuple[nn.Module, Tensor]]:
    """Layer and input by name; the input needs a gradient."""
    torch.manual_seed(0)
    images = torch.randn(32, 256, 16, 16)
    last = torch.channels_last
    return {
        "linear": (nn.Linear(2048, 2048), torch.randn(512, 2048)),
        "linear, 2048 rows": (nn.Linear(2048, 2048), torch.randn(2048, 2048)),
        "conv": (nn.Conv2d(256, 256, 3, padding=1), images),
        "conv, channels_last": (
            nn.Conv2d(256, 256, 3, padding=1).to(memory_format=last),
            images.contiguous(memory_format=last),
        ),
    }


def step(layer: nn.Module, x: Tensor, towards: Tensor) -> list[Tensor]:
    """Output's gradients with respect to the input and the parameters."""
    return list(torch.autograd.grad(layer(x), [x, *layer.parameters()], towards))


def check(layer: nn.Module, approx: nn.Module, x: Tensor, towards: Tensor) -> None:
    """At ratio 1 the gradients are bitwise those of the exact layer."""
    exact = step(layer, x, towards)
    ratios = {key: selector.spec.ratio for key, selector in find(approx)._fx_approx.selectors.items()}
    fx_approx.set_sampling(approx, 1.0)
    if not all(torch.equal(one, two) for one, two in zip(step(approx, x, towards), exact, strict=True)):
        raise AssertionError("at ratio 1 the gradients are not those of the exact layer")
    fx_approx.set_sampling(approx, next(iter(ratios.values())))


def measure(name: str, layer: nn.Module, x: Tensor, ratio: float, runs: int, compiled: bool) -> list[Measured]:
    """Times all variants of ``layer`` in turn."""
    x.requires_grad_()
    towards = torch.randn_like(layer(x))
    models: dict[str, nn.Module] = {"exact": layer}
    for variant, policy in variants(ratio).items():
        models[variant] = fx_approx.transform(layer, policy, x)
        check(layer, models[variant], x, towards)
    if compiled:
        models = {variant: torch.compile(model, fullgraph=True, dynamic=False) for variant, model in models.items()}
    steps = [functools.partial(step, model, x, towards) for model in models.values()]
    exact, *_ = times = in_turn(steps, torch.device("cpu"), runs, warmup=2)
    return [
        Measured(name, variant, statistics.median(taken), speedup(exact, taken))
        for variant, taken in zip(models, times, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description="Time of one layer with sampled gradients.")
    parser.add_argument("--ratio", type=float, default=0.5, help="sample ratio (0.5)")
    parser.add_argument("--runs", type=int, default=20, help="steps of each variant (20)")
    parser.add_argument("--compile", action="store_true", help="compile the exact layer and all variants")
    add_json_option(parser)
    options = parse_ratio(parser, arguments)
    title = f"Forward and backward of one layer, ratio {options.ratio:g}{', compiled' if options.compile else ''}"
    print(header(title), flush=True)
    found = [
        one
        for name, (layer, x) in layers().items()
        for one in measure(name, layer, x, options.ratio, options.runs, options.compile)
    ]
    rows = [[one.layer, one.variant, f"{1000 * one.seconds:.1f}", shown(one.speedup)] for one in found]
    print(f"\n{tabulate(rows, ['layer', 'variant', 'median ms', 'exact / this'], disable_numparse=True)}")
    store(options.json, [dataclasses.asdict(one) for one in found])


if __name__ == "__main__":
    main()
