"""Many architectures at ratio 0.5, scope ``value``: what is sampled, and whether every number is right.

    python benchmarks/model_zoo.py --json docs/results/model-zoo.json --markdown docs/results/model-zoo.md
    python benchmarks/model_zoo.py --family timm nets
    python benchmarks/model_zoo.py --model resnet18 yolo

Each model is built small, from its configuration, with random weights in float64 and without dropout. It is transformed
(models of Hugging Face: compiled by the Dynamo backend), trained for one step, checked by ``fx_approx.analysis.verify``
(with against without demand), and compared with an independent oracle: the original model run by plain torch, in which
the weight columns that were not read are zero. Outputs and all gradients must agree to rounding. Results that FILE of
``--json`` holds of other models are kept. Exit status 1 if a model failed. This is not a time measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _header import environment, header
from _zoo_images import image_entries
from _zoo_nets import net_entries
from _zoo_run import Entry, Result, examine
from _zoo_table import markdown, summary
from _zoo_transformers import transformer_entries

FAMILIES = ("nets", "timm", "transformers", "torchvision", "segmentation", "video", "flow", "detection")
_LIBRARIES = ("torchvision", "timm", "transformers", "peft")


def entries() -> list[Entry]:
    """The whole zoo, family by family."""
    every = [*net_entries(), *transformer_entries(), *image_entries()]
    return sorted(every, key=lambda one: FAMILIES.index(one.family))


def versions() -> dict[str, Any]:
    """Hardware and versions, those of the libraries that the models are from included."""
    found = environment()
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def stored(path: Path | None) -> dict[tuple[str, str], Result]:
    """The results of a file, by family and name."""
    if path is None or not path.exists():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["results"]
    made = []
    for row in rows:
        stops = tuple((str(reason), int(count)) for reason, count in row["stops"])
        made.append(Result(**{**row, "stops": stops, "untraced": tuple(row["untraced"])}))
    return {(one.family, one.name): one for one in made}


def write(path: Path | None, results: Sequence[Result]) -> None:
    """Writes the results with hardware and versions; does nothing without a path."""
    if path is not None:
        content = {"environment": versions(), "results": [dataclasses.asdict(one) for one in results]}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def line(result: Result) -> str:
    """One result in one line, with what went wrong."""
    said = "ok" if result.passed else f"FAILED: {result.failure or result.error_at}"
    error = "" if result.error is None else f"{result.error:.1e}"
    share = f"{result.sampled}/{result.products}"
    return f"{result.name:34} {share:>9} {100 * result.saved:5.1f} % {error:>8} {result.seconds:5.0f} s  {said}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Tries the models and prints the table; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, help="only these (all)")
    parser.add_argument("--model", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results and the environment there, too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    options = parser.parse_args(arguments)
    chosen = [one for one in entries() if options.family is None or one.family in options.family]
    if options.model is not None:
        unknown = sorted(set(options.model) - {one.name for one in chosen})
        if unknown:
            parser.error(f"--model: no model is called {', '.join(unknown)}; there are: {', '.join(names(chosen))}")
        chosen = [one for one in chosen if one.name in options.model]
    torch.set_num_threads(1)
    print(header(f"{len(chosen)} models, topk 0.5, weight scores, scope value"), flush=True)
    order = {(one.family, one.name): place for place, one in enumerate(entries())}
    tried: list[Result] = []
    results: list[Result] = []
    for entry in chosen:
        result = examine(entry)
        tried.append(result)
        print(line(result), flush=True)
        known = {**stored(options.json), **{(one.family, one.name): one for one in tried}}
        results = [known[key] for key in sorted(known, key=lambda key: order.get(key, len(order)))]
        write(options.json, results)
    print(f"\n{summary(tried)}")
    if options.markdown is not None:
        options.markdown.write_text(markdown(results, versions()), encoding="utf-8")
    return 0 if all(one.passed for one in tried) else 1


def names(chosen: Sequence[Entry]) -> list[str]:
    """The names of models."""
    return [one.name for one in chosen]


if __name__ == "__main__":
    sys.exit(main())
