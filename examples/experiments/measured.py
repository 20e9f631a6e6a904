"""What a step of each variant costs beside a step of exact training: in turn, in one process, as it is trained."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from typing import Any

import costs
import variants
from sources import REPOSITORY
from training import Run

import fx_approx.distributed
from fx_approx.utils.timing import in_turn

EXACT = "exact training"
"""The name of what all others are compared with; it need not be among the variants."""


def measure(runs: Sequence[Run], repeats: int) -> dict[str, Any]:
    """The costs of the phases of ``runs``, the first of which is exact; they are not trained.

    Every phase takes a step, then every phase takes the next one, ``repeats`` times after three that do not count.
    ``ms`` are quartiles; ``speedup`` are those of the exact step's time over that of the step beside it.
    ``peak_bytes`` is the most that is allocated in a step, above what stood before; ``gradient_bytes`` is what a step
    of data-parallel training would send.
    """
    named = {EXACT: runs[0], **{run.name: run for run in runs[1:]}}
    steps, found = {}, {}
    for name, run in named.items():
        run.count()
        for phase, first in run.phases.first.items():
            if phase == variants.EXACT and run.sampled:
                continue  # takes what the exact step takes
            steps[name, phase] = _step(run, first)
            run.ratios.jump(first)
            found[name, phase] = {"flops": run.flops[phase], "gradient_bytes": _gradient_bytes(run)}
    device = runs[0].device
    seconds = in_turn(list(steps.values()), device, repeats, warmup=costs.WARM, clock=runs[0].settings.now)
    taken = dict(zip(steps, seconds, strict=True))
    base = taken[EXACT, variants.EXACT]
    peak = runpy.run_path(str(REPOSITORY / "benchmarks" / "_peak.py"))["peak_bytes"]
    made: dict[str, Any] = {}
    for (name, phase), seconds in taken.items():
        named[name].model.zero_grad(set_to_none=True)  # a step would free them, and seem to need less
        made.setdefault(name, {})[phase] = {
            **found[name, phase],
            "ms": [1000 * one for one in costs.quartiles(seconds)],
            "speedup": costs.quartiles([one / own for one, own in zip(base, seconds, strict=True)]),
            "peak_bytes": peak(steps[name, phase], device.type),
        }
    return made


def _step(run: Run, first: int) -> Any:
    x, y = run.example
    optimizer = costs.optimizer_of(run.training, run.model, 0.0)

    def step() -> None:
        run.ratios.jump(first)
        run.step(x, y, optimizer)

    return step


def _gradient_bytes(run: Run) -> int:
    if not run.sampled or not run.layers:
        return sum(one.nbytes for one in run.model.parameters() if one.requires_grad)
    return fx_approx.distributed.estimate_traffic(run.model).predicted
