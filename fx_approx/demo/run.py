"""What a recipe saves, against exact training, on images that need no download.

Three networks, each trained twice from the same weights, exactly and by a recipe, on the same batches and in turn, step
by step: a CNN and a small vision transformer that know half of the classes are fine-tuned to all; an MLP learns from
scratch. Recipes measure first whether they pay; where they do not, the network is left exact, and the table says so. A
page has the curves and what each layer computes.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import sys
import textwrap
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import fx_approx
from fx_approx.demo.images import digits, idx_folder
from fx_approx.demo.page import page
from fx_approx.demo.training import BATCH, Options, Result, compare
from fx_approx.utils.timing import device_key


def table(results: Sequence[Result]) -> str:
    """What came of it, for a terminal of 100 columns."""
    rows = []
    for one in results:
        ratio = one.step_ratio
        saved = "" if one.recipe.exact else f"{100 * one.recipe.report().totals.saved:.0f} %"
        exact, own, shipped = one.accuracies
        full, narrow = one.parameters
        slow, fast = one.latency
        rows.append(
            [
                one.name,
                saved or "left exact",
                "" if ratio is None else f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]",
                "" if one.recipe.exact else f"{one.training_ratio:.2f}",
                f"{exact:.1f} → {own:.1f} %",
                "" if narrow is None else f"{narrow / full:.2f}",
                "" if fast is None else f"{fast / slow:.2f}",
                "" if shipped is None else f"{shipped:.1f} %",
            ]
        )
    heads = ["", "operations\nsaved", "step, share\nof exact", "training,\nshare", "accuracy,\nexact → recipe"]
    return tabulate(rows, [*heads, "shipped:\nweights", "its\nlatency", "its\naccuracy"], disable_numparse=True)


def record(images: str, options: Options, results: Sequence[Result]) -> dict[str, Any]:
    """What came of it, as plain values: machine and versions, options, and each network's numbers.

    Args:
        images: What the networks were trained on.
        options: Of the trainings.
        results: Of each network.
    """
    versions = {"python": platform.python_version(), "fx_approx": fx_approx.__version__}
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    networks = [
        {
            "name": one.name,
            "task": one.task,
            "left_exact": one.recipe.exact,
            "saved": None if one.recipe.exact else one.recipe.report().totals.saved,
            "step_ratio": one.step_ratio,
            "training_ratio": one.training_ratio,
            "accuracies": one.accuracies,
            "parameters": one.parameters,
            "latency": one.latency,
            "setup": one.setup,
        }
        for one in results
    ]
    return {
        "environment": {**device_key(torch.device("cpu")), **versions, "date": date},
        "images": images,
        "options": dataclasses.asdict(options),
        "results": networks,
    }


def run(
    networks: Sequence[str],
    html: Path,
    data: Path | None = None,
    limit: int = 2000,
    options: Options | None = None,
    numbers: Path | None = None,
) -> None:
    """Trains the networks, prints the table and writes the page.

    Args:
        networks: Names of :data:`fx_approx.demo.training.CASES`.
        html: The file of the page.
        data: A folder with MNIST or Fashion-MNIST as IDX files; None for the digits.
        limit: Training images at most; in a folder, test images too.
        options: Of the trainings.
        numbers: A file for what :func:`record` gives, as JSON; None for none.

    Raises:
        OSError: A file is missing, or cannot be written.
        ValueError: A file is not what it should be.
    """
    options = Options() if options is None else options
    images = digits(limit, options.seed) if data is None else idx_folder(data, limit, options.seed)
    for file in (html, numbers):
        if file is not None:
            file.touch()  # what cannot be written is found out before the training
    start = time.perf_counter()
    how = "compiled" if options.compile else "eager"
    height, width = images.train.shape[-2:]
    where = f"{how}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{images.name}: {len(images.train)} images of {height} x {width} pixels, batches of {BATCH}; {where}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.BatchNormWarning)
        results = [compare(name, images, options, _progress) for name in networks]
    print(f"\n{table(results)}\n")
    html.write_text(page(images.name, where, results), encoding="utf-8")
    if numbers is not None:
        numbers.write_text(json.dumps(record(images.name, options, results), indent=2) + "\n", encoding="utf-8")
    for one in results:
        last = one.recipe.choices[-1]
        said = f"{last.what}: {last.why}" if one.recipe.exact else one.recipe.choices[0].what
        print(textwrap.fill(f"{one.name}, {one.task}. {said}.", 100))
    note = (
        "Step times are medians of steps in turn, quartiles in brackets. Where accuracy falls, training is too short "
        f"for what is left out: see the curves. More: {html}"
    )
    print(f"\n{textwrap.fill(note, 100)}")
    print(f"{time.perf_counter() - start:.0f} s in all.")


def _progress(name: str, step: int, steps: int) -> None:
    """One line on stderr that overwrites itself; nothing where that is no terminal."""
    if sys.stderr.isatty():
        done = 30 * step // steps
        line = f"{name} [{'#' * done}{'.' * (30 - done)}] step {step} of {steps}"
        print(f"\r{line}", end="" if step < steps else f"\r{' ' * len(line)}\r", file=sys.stderr, flush=True)
