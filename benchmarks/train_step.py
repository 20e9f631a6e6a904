r"""One training step, forward and backward: exact, module swap with online TopK, and demand-driven sampling.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --models wrn_16_4 --scopes value group --ratios 0.5 --compile
    python benchmarks/train_step.py --models resnet50 --runs 9 --json resnet50.json
    python benchmarks/train_step.py --compile --dynamo --no-swap
    python benchmarks/train_step.py --device cuda --autocast bfloat16 --channels-last --compile
    python benchmarks/train_step.py --models gated_mlp --batch 16384 --scopes value --backward --dtype bfloat16 \
        --device cuda --compiled-only --memory

All variants take their steps in turn in one process; a ratio above 1 is faster than the exact model, eager or compiled
as the variant itself, and "of compiled exact" compares with the compiled exact model whatever the variant is. Before
anything is timed, the demand-driven model is checked against the same selections without demand, in float64 on at most
8 examples. `narrow` is the same network at half the (inner) width, trained exactly: what a user could do
instead. With `--backward` one more variant samples both gradients and leaves the forward pass exact.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import warnings
from collections.abc import Sequence

from _header import header, store
from _steps import Measured, add_step_options, build, parse_step_options, show
from _steps import measure as measure_all
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import GradientSampling, Paper, Uniform

warnings.filterwarnings("ignore", category=fx_approx.errors.BatchNormWarning)


def policy(scope: str, ratio: float, scores: str, min_k: int) -> Uniform:
    """TopK on every layer, made ahead."""
    return Uniform(ratio, min_k=min_k, scores=scores, scope=scope)


def swapped(exact: nn.Module, inputs: Tensor, ratio: float, min_k: int) -> nn.Module:
    """Each layer by itself with the paper's online TopK."""
    return fx_approx.transform(copy.deepcopy(exact), Paper(ratio, min_k=min_k), inputs)


def demanded(exact: nn.Module, inputs: Tensor, scope: str, ratio: float, options: argparse.Namespace) -> nn.Module:
    """Demand-driven, and checked."""
    chosen = policy(scope, ratio, options.scores, options.min_k)
    check(f"demand, {scope} {ratio:g}", exact, chosen, inputs)
    return fx_approx.transform(copy.deepcopy(exact), chosen, inputs)


def check(name: str, exact: nn.Module, chosen: Uniform, inputs: Tensor) -> None:
    """The demand-driven model gives the numbers of the same selections without demand."""
    few = inputs.detach()[:8].double()
    found = fx_approx.analysis.verify(fx_approx.transform(copy.deepcopy(exact).double(), chosen, few), few)
    if not found.passed:
        raise AssertionError(f"{name}: {found}")


def measure(name: str, options: argparse.Namespace) -> list[Measured]:
    """Checks and times all variants of one model."""
    exact, inputs, narrow = build(name, options)
    models: dict[str, nn.Module] = {"exact": exact}
    if narrow is not None:
        models["narrow"] = narrow
    backends = {}
    for ratio in options.ratios:
        if not options.no_swap:
            models[f"swap, online TopK {ratio:g}"] = swapped(exact, inputs, ratio, options.min_k)
        if options.backward:
            policy_of_gradients = GradientSampling.backward(ratio, scores="uniform")
            models[f"backward {ratio:g}"] = fx_approx.transform(copy.deepcopy(exact), policy_of_gradients, inputs)
        for scope in options.scopes:
            models[f"demand, {scope} {ratio:g}"] = demanded(exact, inputs, scope, ratio, options)
            if options.dynamo and options.compile:
                variant = f"Dynamo, {scope} {ratio:g}"
                models[variant] = copy.deepcopy(exact)
                backends[variant] = fx_approx.backend(policy(scope, ratio, options.scores, options.min_k))
    return measure_all(name, models, inputs, options, backends)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_step_options(parser, ["wrn_16_4"])
    parser.add_argument("--scopes", nargs="+", default=["value", "group"], choices=["layer", "value", "group"])
    parser.add_argument("--dynamo", action="store_true", help="through fx_approx.backend, too (with --compile)")
    parser.add_argument("--backward", action="store_true", help="backward mode, too: both gradients sampled")
    parser.add_argument("--no-swap", action="store_true", help="leave out the module swap")
    options = parse_step_options(parser, arguments)
    print(header("Training step"), flush=True)
    found = [one for name in options.models for one in measure(name, options)]
    show(found, options.profile)
    store(options.json, [dataclasses.asdict(one) for one in found])


if __name__ == "__main__":
    main()
