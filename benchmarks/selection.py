"""What choosing costs: the time of all selections of a forward as a share of the training step, eager and compiled.

python benchmarks/selection.py --json selection.json
python benchmarks/selection.py --models resnet50 --scores weight --repeats 9
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import warnings
from collections.abc import Sequence

import torch
from _header import add_json_option, header, store
from _models import MODELS
from tabulate import tabulate

import fx_approx
from fx_approx.policies import Uniform


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["wrn_16_4", "vit_b_block"], choices=list(MODELS))
    parser.add_argument("--scores", nargs="+", default=["weight", "ema", "online"])
    parser.add_argument("--repeats", type=int, default=11, help="how often each is timed (11)")
    parser.add_argument("--no-compile", action="store_true", help="eager only")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats: expected 1 or more, not {options.repeats}")
    print(header("Selections"), flush=True)
    found = []
    for name in options.models:
        torch.manual_seed(0)
        exact, inputs, _ = MODELS[name]()
        for scores in options.scores:
            policy = Uniform(0.5, min_k=16, scores=scores, scope="layer" if scores == "online" else "value")
            approx = fx_approx.transform(copy.deepcopy(exact), policy, inputs)
            for compiled in [False] if options.no_compile else [False, True]:
                model = torch.compile(approx, dynamic=False) if compiled else approx
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    time = fx_approx.analysis.selection_time(model, inputs, repeats=options.repeats)
                found.append({"model": name, "scores": scores, "share": time.share, **dataclasses.asdict(time)})
    lines = [
        [
            one["model"],
            one["scores"],
            "compiled" if one["compiled"] else "eager",
            f"{1000 * one['seconds']:.2f}",
            f"{1000 * one['step']:.0f}",
            "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * share for share in (one["share"], *one["quartiles"]))),
        ]
        for one in found
    ]
    print(f"\n{tabulate(lines, ['model', 'scores', '', 'ms', 'of ms', 'per cent'], disable_numparse=True)}")
    store(options.json, found)


if __name__ == "__main__":
    main()
