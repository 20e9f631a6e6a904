"""A whole training step with some tokens left out, against the exact model, with the optimiser.

    python benchmarks/tokens.py
    python benchmarks/tokens.py --models vit_b_16 gpt --compile --json tokens.json

All variants of a model take their steps in turn in one process; a ratio above 1 is faster than the exact model, eager
or compiled as the variant itself. `both` samples tokens and, of the channels that the layers read, half (scope value).
Before anything is timed, the step at ratio 1 is compared with the exact model's, and the operations that the report
counts with those that torch counts.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch
from _device import quartiles, shown, speedup
from _header import add_json_option, header, parse_ratio, store
from _models import PlainBlock, torchvision_models
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
    """One variant: seconds of a step and exact / this, as quartiles, and the share of the operations that is left."""

    model: str
    variant: str
    compiled: bool
    seconds: float
    speedup: tuple[float, float, float]
    operations: float


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

    def __init__(self, blocks: int = 4, width: int = 768) -> None:
        super().__init__()
        self.embed = nn.Embedding(2048, width)
        self.blocks = nn.Sequential(*(PlainBlock(width // 64, width, 4 * width) for _ in range(blocks)))
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, tokens]`` to ``[N, 2]``."""
        result: Tensor = self.head(self.blocks(self.embed(tokens)).mean(1))
        return result


def _vit() -> Made:
    return torchvision_models().vit_b_16(), torch.randn(2, 3, 224, 224)


def _gpt() -> Made:
    return Language(), torch.randint(2048, (1, 512))


def _bert() -> Made:
    return Encoder(), torch.randint(2048, (8, 128))


def _small() -> Made:
    return Encoder(3, 64), torch.randint(2048, (2, 16))


MODELS: dict[str, Callable[[], Made]] = {"vit_b_16": _vit, "gpt": _gpt, "bert": _bert, "small": _small}


def operations(model: nn.Module, inputs: Tensor) -> int:
    """Of a training step, as torch counts them."""
    with FlopCounterMode(display=False) as counted:
        model(inputs).sum().backward()
    model.zero_grad(set_to_none=True)
    return int(counted.get_total_flops())


def check(name: str, exact: nn.Module, inputs: Tensor, ratio: float) -> None:
    """At ratio 1 the output is the exact one, and the report counts what torch does."""
    whole = fx_approx.transform(exact, Tokens(1.0), inputs)
    with torch.no_grad():
        if not torch.equal(whole(inputs), exact(inputs)):
            raise AssertionError(f"{name}: at ratio 1 the output differs from that of the exact model")
    some = fx_approx.transform(exact, Tokens(ratio), inputs)
    told, counted = fx_approx.report(some).totals.executed.total, operations(some, inputs)
    if abs(told - counted) > 0.01 * counted:
        raise AssertionError(f"{name}: the report says {told} operations, torch counts {counted}")


def measure(name: str, options: argparse.Namespace) -> list[Measured]:
    """All variants of one model, eager and compiled."""
    torch.manual_seed(0)
    exact, inputs = MODELS[name]()
    check(name, exact, inputs, options.ratio)
    tokens = Tokens(options.ratio)
    policies = {"tokens": tokens, "both": dataclasses.replace(tokens, layers=Uniform(0.5, min_k=16))}
    models = {"exact": exact}
    for variant in options.variants:
        models[variant] = fx_approx.transform(copy.deepcopy(exact), policies[variant], inputs)
    counts = {variant: operations(model, inputs) for variant, model in models.items()}
    found = []
    for compiled in (False, True) if options.compile else (False,):
        calls = []
        for model in models.values():
            run = torch.compile(model, dynamic=False) if compiled else model
            optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
            calls.append(lambda r=run, o=optimizer: train_step(r, inputs, o))
        times = in_turn(calls, torch.device("cpu"), options.runs, warmup=options.warmup, before=1)
        for variant, own in zip(models, times, strict=True):
            share = counts[variant] / counts["exact"]
            found.append(Measured(name, variant, compiled, quartiles(own)[1], speedup(times[0], own), share))
        torch.compiler.reset()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_b_16", "gpt", "bert"], choices=list(MODELS))
    parser.add_argument("--variants", nargs="+", default=["tokens", "both"], choices=["tokens", "both"])
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the tokens (0.5)")
    parser.add_argument("--runs", type=int, default=11, help="steps of each variant (11)")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each before (2)")
    parser.add_argument("--compile", action="store_true", help="compiled, too")
    add_json_option(parser)
    options = parse_ratio(parser, arguments)
    print(header("Tokens: a whole training step"), flush=True)
    found = list(itertools.chain.from_iterable(measure(name, options) for name in options.models))
    rows = [
        [
            *(one.model, "compiled" if one.compiled else "eager", one.variant),
            *(f"{1000 * one.seconds:.0f}", shown(one.speedup), f"{one.operations:.2f}"),
        ]
        for one in found
    ]
    headers = ["model", "mode", "variant", "ms", "exact / this [quartiles]", "operations"]
    print(tabulate(rows, headers, disable_numparse=True))
    store(options.json, [dataclasses.asdict(one) for one in found])


if __name__ == "__main__":
    main()
