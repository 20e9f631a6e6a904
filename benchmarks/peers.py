"""One training step of one model by the rules of several systems, side by side in one process.

    python benchmarks/peers.py --compile --memory --json peers.json
    python benchmarks/peers.py --models wrn_16_4 --ratios 0.25 0.5 --runs 9
    python benchmarks/peers.py --device cuda --autocast bfloat16 --compile --memory

- exact; and "narrow", the same network at half the (inner) width, trained exactly: what a user could do instead;
- "paper": each layer by itself with TopK by online scores, in the forward pass (Adelman et al., NeurIPS 2021);
- "ssProp": exact forward, the backward pass from the output channels of largest mean |dY| (2024);
- "WTA-CRS": exact but for the weight gradients of linear layers, from a sample of the rows (NeurIPS 2023);
- "demand": this package's demand-driven TopK, whose selections are shared at value or group scope;
- "float8": torchao's float8 linear layers, where they can be had.

Each is at the same ratio, which does not mean equal error or accuracy: this says what a step costs, not what it is
worth. First ssProp's and WTA-CRS's gradients are held to their definitions, their models to the exact output, and the
demand-driven models to the same selections without demand. Columns as in train_step.py.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
from collections.abc import Sequence

import torch
from _device import precision
from _float8 import float8, float8_missing
from _header import header, store
from _peers import check_rules, ssprop, swap, wta_crs
from _steps import Measured, add_step_options, build, measure, parse_step_options, show
from torch import Tensor, nn
from train_step import demanded, swapped


def check_output(name: str, model: nn.Module, exact: nn.Module, inputs: Tensor) -> None:
    """The forward pass is exact."""
    with torch.no_grad(), precision(tf32=False):
        found, wanted = model(inputs).float(), exact(inputs).float()
    close = 1e-4 if inputs.dtype is torch.float32 else 2e-2
    if not torch.allclose(found, wanted, rtol=close, atol=close * float(wanted.abs().max())):
        raise AssertionError(f"{name}: the output is not that of the exact model")


def variants(
    exact: nn.Module, inputs: Tensor, narrow: nn.Module | None, options: argparse.Namespace
) -> dict[str, nn.Module]:
    """The models to time, by name."""
    made: dict[str, nn.Module] = {"exact": exact}
    if narrow is not None:
        made["narrow"] = narrow
    if float8_missing(options.device) is None:
        made["float8"] = float8(copy.deepcopy(exact))
    for ratio in options.ratios:
        made[f"paper {ratio:g}"] = swapped(exact, inputs, ratio, options.min_k)
        for label, rule, kinds in (("ssProp", ssprop, (nn.Conv2d, nn.Linear)), ("WTA-CRS", wta_crs, (nn.Linear,))):
            name = f"{label} {ratio:g}"
            made[name] = swap(exact, functools.partial(rule, ratio=ratio), kinds, options.min_k)
            check_output(name, made[name], exact, inputs)
        for scope in ("value", "group"):
            made[f"demand, {scope} {ratio:g}"] = demanded(exact, inputs, scope, ratio, options)
    return made


def compare(name: str, options: argparse.Namespace) -> list[Measured]:
    """Checks and times all variants of one model."""
    exact, inputs, narrow = build(name, options)
    return measure(name, variants(exact, inputs, narrow, options), inputs, options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_step_options(parser, ["wrn_16_4", "vit_b_plain"])
    options = parse_step_options(parser, arguments)
    print(header("Peers, one training step"), flush=True)
    missing = float8_missing(options.device)
    if missing is not None:
        print(f"float8       left out: {missing}")
    for ratio in options.ratios:
        check_rules(ratio)
    found = [one for name in options.models for one in compare(name, options)]
    show(found, options.profile)
    store(options.json, [dataclasses.asdict(one) for one in found])


if __name__ == "__main__":
    main()
