"""A whole training step, with the optimiser: exact, with a kept selection in the graph, and as a subnetwork.

    python benchmarks/subnetworks.py --json docs/results/subnetworks.json --markdown docs/results/subnetworks.md
    python benchmarks/subnetworks.py --models wrn_16_4 resnet50 --no-compile --runs 7
    python benchmarks/subnetworks.py --models resnet50 --device cuda --autocast bfloat16 --batch 256 --compiled-only

All variants of a model, eager and compiled, take their steps in turn in one process. A ratio above 1 is faster than
the exact model, eager or compiled as the variant itself. `kept` is the transformed model under `reuse_selection`,
`subnetwork` what `subnetworks.extract` makes of it, and `narrow` a network written by hand whose parameters have the
same shapes: the limit. Before anything is timed, five steps of plain SGD in float64 on a few examples are compared,
subnetwork against kept selection. Results that FILE of `--json` holds of other models are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _device import add_autocast_option, add_device_options, enlarged, precision, refuse_device_options
from _header import environment, header, parse_ratio
from _steps import train_step
from _subnetwork_cases import CASES, DEFAULT, Case, add_case_options, write
from _subnetwork_page import markdown, table
from _subnetwork_results import Timed, measured_on
from torch import Tensor, nn

import fx_approx
from fx_approx.subnetworks import extract, merge, record_of
from fx_approx.utils.timing import in_turn

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 1e-3, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-4),
}
TOLERANCE = 1e-10


def loss_of(output: Tensor) -> Tensor:
    """The mean of the squares."""
    return output.square().mean()


def check(name: str, approx: nn.Module, inputs: Tensor, examples: int = 4) -> None:
    """Plain SGD moves the weights of the subnetwork as those of the model under one kept selection."""
    few = inputs.detach()[:examples]
    few = few.double() if few.is_floating_point() else few
    one = copy.deepcopy(approx).double()
    other, sub = copy.deepcopy(one), extract(one)
    before = [p.detach().clone() for p in one.parameters()]
    with fx_approx.reuse_selection(other):
        for model in (other, sub):
            optimizer = torch.optim.SGD(model.parameters(), 1e-3)
            for _ in range(5):
                optimizer.zero_grad()
                loss_of(model(few)).backward()
                optimizer.step()
    merge(sub, one)
    pairs = list(zip(one.parameters(), other.parameters(), before, strict=True))
    moved = max(float((q.detach() - b).abs().max()) for _, q, b in pairs)
    error = max(float((p.detach() - q.detach()).abs().max()) for p, q, _ in pairs) / moved
    if not error <= TOLERANCE:
        raise AssertionError(f"{name}: the subnetwork is off by {error:.1e} of the largest change")


def same_shapes(sub: nn.Module, narrow: nn.Module) -> bool:
    """Whether both have parameters of the same shapes, in any order."""
    one, other = (sorted(tuple(p.shape) for p in model.parameters()) for model in (sub, narrow))
    return one == other


def step(
    model: nn.Module, run: Any, inputs: Tensor, optimizer: torch.optim.Optimizer, kept: bool, lower: str | None
) -> None:
    """A whole step, under one kept selection or not."""
    with fx_approx.reuse_selection(model) if kept else contextlib.nullcontext():
        train_step(run, inputs, optimizer, lower)


@dataclasses.dataclass(frozen=True)
class Variants:
    """What is timed of one case."""

    models: dict[str, nn.Module]
    inputs: Tensor
    own_forward: bool
    reason: str


def variants(case: Case, ratio: float, min_k: int, batch: int | None = None, device: str = "cpu") -> Variants:
    """The models of one case, after the check.

    Raises:
        AssertionError: The subnetwork computes other numbers, or the narrow network has other parameters.
    """
    torch.manual_seed(0)
    exact, inputs = case.build()
    exact, inputs = exact.to(device), enlarged(inputs, batch).to(device)
    approx = fx_approx.transform(copy.deepcopy(exact), case.policy(ratio, min_k), inputs)
    check(case.name, approx, inputs)
    sub, narrow = extract(approx, example_inputs=inputs), case.narrow().to(device)
    if ratio == 0.5 and not same_shapes(sub, narrow):
        raise AssertionError(f"{case.name}: the narrow network has other parameters than the subnetwork")
    models = {"exact": exact, "kept": approx, "subnetwork": sub, "narrow": narrow}
    return Variants(models, inputs, record_of(sub).own_forward, record_of(sub).reason)


def measure(case: Case, options: argparse.Namespace) -> list[Timed]:
    """All variants of one case, eager and compiled, with each optimiser."""
    measured = measured_on(environment())
    made = variants(case, options.ratio, options.min_k, options.batch, options.device)
    modes = [False] * (not options.compiled_only) + [True] * options.compile
    found = []
    for optimizer in options.optimizers:
        torch.compiler.reset()
        calls: dict[tuple[str, bool], Callable[[], None]] = {}
        for variant, model in made.models.items():
            own = OPTIMIZERS[optimizer](model.parameters())
            for compiled in modes:
                run = torch.compile(model, dynamic=False) if compiled else model
                kept = variant == "kept"
                what = model, run, made.inputs, own, kept, options.autocast
                calls[variant, compiled] = functools.partial(step, *what)
        clock = time.process_time if options.processor_time else time.perf_counter
        device = torch.device(options.device)
        taken = in_turn([*calls.values()], device, options.runs, warmup=options.warmup, before=1, clock=clock)
        for (variant, compiled), seconds in zip(calls, taken, strict=True):
            model = made.models[variant]
            found.append(
                Timed(
                    *(case.model, case.what, optimizer, variant, compiled),
                    seconds=[round(one, 7) for one in seconds],
                    parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
                    own_forward=made.own_forward,
                    reason=made.reason,
                    measured=measured,
                )
            )
    return found


def stored(path: Path | None) -> list[Timed]:
    """What a file of results holds; rows that do not say on what they were measured were in the file's last run."""
    if path is None or not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    last = measured_on(content["environment"])
    return [Timed(**{"measured": last, **row}) for row in content["results"]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_options(parser, "examples in a step")
    parser.add_argument("--scopes", nargs="+", choices=["value", "group"], help="only these")
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--runs", type=int, default=15, help="steps of each variant (15)")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each before (3)")
    parser.add_argument("--threads", type=int, help="threads of torch (its default)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="compiled, too")
    parser.add_argument("--compiled-only", action="store_true", help="compiled only")
    add_device_options(parser)
    add_autocast_option(parser)
    parser.add_argument(
        "--processor-time", action="store_true", help="of all threads, for a look on a machine that others use, too"
    )
    options = parse_ratio(parser, arguments)
    refuse_device_options(parser, options)
    chosen = [one for one in CASES if (one.name in DEFAULT if options.models is None else one.model in options.models)]
    chosen = [one for one in chosen if options.scopes is None or one.scope in options.scopes]
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    print(header("Subnetworks: a whole training step"), flush=True)
    order = [one.name for one in CASES]
    tried: list[Timed] = []
    for case in chosen:
        with precision(options.tf32):
            own = measure(case, options)
        tried += own
        print(f"\n{table(own, f'{case.model}, {case.what}')}", flush=True)
        fresh = {one.key for one in tried}
        every = [*(one for one in stored(options.json) if one.key not in fresh), *tried]
        every.sort(key=lambda one: order.index(f"{one.model}, {one.what}"))
        write(options, every, markdown)


if __name__ == "__main__":
    main()
