"""Which models become subnetworks at ratio 0.5, beside Torch-Pruning: extracts, trains, counts, exports.

    python benchmarks/subnetwork_coverage.py --json docs/results/subnetwork-coverage.jsonl --markdown FILE.md
    python benchmarks/subnetwork_coverage.py --models resnet18 yolo

torchvision's classification and segmentation models, 25 of timm, and detectors of the YOLO kind, in their own sizes on
small images, two in a batch, without dropout; those of more than 100 million parameters a quarter as wide. Each is made
a subnetwork at both scopes; its outputs are compared with those of the model with the kept selection, in float64 where
float32 differs by more than 1e-5 of the largest; it is trained for one step and exported. Products of two activations
stay exact, and those by weights that the step computes, as of standardised convolutions. Beside it the same model is
pruned by Torch-Pruning at half of the channels (pip install torch-pruning; without it that column stays empty; the same
of ultralytics and its row).

Each model has a process of its own with a limit of time and memory. The lines of FILE of `--json` are kept, and their
models are left out, so that a run that was stopped goes on; `--again` tries them anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from _coverage_models import Entry, entries
from _coverage_page import markdown, summary
from _coverage_run import Outcome, Result, examine, peer_version
from _header import environment, header


def stored(path: Path | None) -> dict[str, Result]:
    """The lines of a file, by name of the model."""
    if path is None or not path.exists():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        outcomes = {name: Outcome(**one) for name, one in row.pop("outcomes").items()}
        found[row["name"]] = Result(**row, outcomes=outcomes)
    return found


def write(path: Path | None, results: Sequence[Result]) -> None:
    """Writes all lines; does nothing without a path."""
    if path is not None:
        lines = [json.dumps(dataclasses.asdict(one)) for one in results]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _child(entry: Entry, memory: int, pipe: multiprocessing.connection.Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    pipe.send(examine(entry))


def within(entry: Entry, seconds: float, memory: int) -> Result:
    """What :func:`_coverage_run.examine` gives in a process of its own, or that it took too long or too much."""
    context = multiprocessing.get_context("fork")  # torch and the models' libraries are imported once
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(entry, memory, theirs))
    process.start()
    theirs.close()
    try:
        found: Result = ours.recv() if ours.poll(seconds) else _not_done(entry, f"not done within {seconds:g} s")
    except EOFError:
        process.join()
        found = _not_done(entry, f"its process ended with {process.exitcode}")
    process.kill()
    process.join()
    return found


def _not_done(entry: Entry, why: str) -> Result:
    return Result(entry.name, entry.family, failure=why)


def main(arguments: Sequence[str] | None = None) -> int:
    """Tries the models and writes lines and page; 1 if one could not be examined."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--families", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--again", action="store_true", help="those that have a line, too")
    parser.add_argument("--seconds", type=float, default=120, help="limit for each model (120)")
    parser.add_argument("--gigabytes", type=float, default=6, help="limit for each model (6)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a line for each model, kept")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    options = parser.parse_args(arguments)
    every = entries()
    for name, known in (("models", {one.name for one in every}), ("families", {one.family for one in every})):
        unknown = sorted(set(getattr(options, name) or ()) - known)
        if unknown:
            parser.error(f"--{name}: there is no {unknown[0]}; there are: {', '.join(sorted(known))}")
    chosen = [one for one in every if options.models is None or one.name in options.models]
    chosen = [one for one in chosen if options.families is None or one.family in options.families]
    found = stored(options.json)
    torch.set_num_threads(1)
    print(header(f"{len(chosen)} models as subnetworks at 0.5"), flush=True)
    order = {one.name: place for place, one in enumerate(every)}
    failed = False
    for entry in chosen:
        if entry.name in found and not options.again:
            continue
        result = within(entry, options.seconds, int(options.gigabytes * 2**30))
        failed |= bool(result.failure)
        found[entry.name] = result
        print(summary(result), flush=True)
        write(options.json, sorted(found.values(), key=lambda one: order.get(one.name, len(order))))
    versions = {**environment(), "torch-pruning": peer_version()}
    rows = sorted(found.values(), key=lambda one: order.get(one.name, len(order)))
    if options.markdown is not None:
        options.markdown.write_text(markdown(rows, versions, len(every)), encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
