"""Exact against approximate training of an MLP and a small CNN on images that need no download.

Both models of a pair start from the same weights, see the same batches and take turns, step by step, in
one process: what disturbs the machine disturbs both, so trust the ratio of their step times more than either.

    python examples/demo.py
    python examples/demo.py --ratio 0.3 --sampler systematic
    python examples/demo.py --data folder/with/mnist --limit 5000

It needs the extra ``demo`` (scikit-learn, tqdm). On 2 cores it takes about a minute.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import shutil
import statistics
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from data import Images, digits, idx_folder
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fx_approx
from fx_approx.policies import Paper
from fx_approx.sampling import SAMPLERS

BATCH = 64
RECALIBRATION_BATCHES = 20
WARM_UP = 8
"""Steps at the beginning whose time does not count: memory pools fill, a compiled model compiles."""


class MLP(nn.Sequential):
    """Two hidden layers of ``16 * width`` units."""

    def __init__(self, images: Images, width: int) -> None:
        hidden = 16 * width
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1, self.relu1 = nn.Linear(images.train[0].numel(), hidden), nn.ReLU()
        self.fc2, self.relu2 = nn.Linear(hidden, hidden), nn.ReLU()
        self.fc3 = nn.Linear(hidden, images.classes)


class CNN(nn.Sequential):
    """Four blocks of convolution, BatchNorm and ReLU with ``width`` to ``4 * width`` channels."""

    def __init__(self, images: Images, width: int) -> None:
        large = images.train.shape[-1] > 16
        super().__init__()
        self.block1 = _block(1, width, stride=2 if large else 1)
        self.block2 = _block(width, 2 * width)
        self.pool = nn.MaxPool2d(2)
        self.block3 = _block(2 * width, 4 * width)
        self.block4 = _block(4 * width, 4 * width)
        self.mean, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.fc = nn.Linear(4 * width, images.classes)


NETWORKS: dict[str, tuple[type[nn.Sequential], float]] = {"MLP": (MLP, 0.05), "CNN": (CNN, 0.1)}
"""Each with its peak learning rate."""


def _block(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    block = nn.Sequential()
    block.conv = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
    block.bn, block.relu = nn.BatchNorm2d(out), nn.ReLU()
    return block


@dataclasses.dataclass
class Trainer:
    """A model with its optimiser and the time of each of its steps in seconds."""

    model: nn.Module
    run: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    seconds: list[float] = dataclasses.field(default_factory=list)

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Takes one step of training; returns the loss."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.run(images), labels)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.seconds.append(time.perf_counter() - start)
        return float(loss.detach())


def trainer(model: nn.Module, rate: float, steps: int, compiled: bool) -> Trainer:
    """SGD with momentum and a one-cycle schedule for ``model``."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    return Trainer(model, torch.compile(model) if compiled else model, optimizer, schedule)


def batches(images: Images, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Full batches in a random order, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(images.train), generator=generator)
        for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
            yield images.train[chosen], images.train_labels[chosen]


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Percentage of the test images that ``model``, in evaluation mode, gets right."""
    model.eval()
    parts = zip(images.test.split(512), images.test_labels.split(512), strict=True)
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in parts)
    return 100 * right / len(images.test)


@dataclasses.dataclass(frozen=True)
class Result:
    """What one network came to. Accuracies are percentages of the test images.

    Attributes:
        report: Savings of the approximate model.
        exact: Accuracy of the exact model.
        as_trained: Accuracy of the approximate model.
        recalibrated: The same after :func:`fx_approx.recalibrate_batchnorm`; None for a network without BatchNorm.
        exact_ms: Step times of the exact model in milliseconds: quartiles.
        approx_ms: Those of the approximate model.
        ratio: Approximate over exact time of steps next to each other: quartiles.
        timed: How many pairs of steps the quartiles are over; 0 if all were warm-up or exact tail.
    """

    report: fx_approx.analysis.SavingsReport
    exact: float
    as_trained: float
    recalibrated: float | None
    exact_ms: list[float]
    approx_ms: list[float]
    ratio: list[float]
    timed: int


def compare(name: str, images: Images, options: argparse.Namespace) -> Result:
    """Trains the network ``name`` and its approximation side by side."""
    build, rate = NETWORKS[name]
    torch.manual_seed(options.seed)
    model = build(images, options.width)
    approx = fx_approx.transform(
        copy.deepcopy(model),
        Paper(options.ratio, sampler=options.sampler),
        images.train[:BATCH],
        seed=options.seed,
    )
    steps = options.epochs * (len(images.train) // BATCH)
    tail = steps - math.ceil(options.exact_tail * steps)
    pair = [trainer(each, rate, steps, options.compile) for each in (model, approx)]
    with tqdm(total=steps, desc=name, unit="step", file=sys.stderr) as bar:
        for step, (x, y) in enumerate(batches(images, options.epochs, options.seed)):
            if step == tail:
                fx_approx.set_sampling(approx, enabled=False)
            # The one that goes second finds the batch in the cache, so they swap.
            order = pair if step % 2 == 0 else pair[::-1]
            losses = {id(each): each.step(x, y) for each in order}
            bar.update()
            if step % 10 == 0:
                bar.set_postfix_str("loss exact {:.3f}, approximate {:.3f}".format(*(losses[id(e)] for e in pair)))
    if tail < steps:
        fx_approx.set_sampling(approx, enabled=True)  # the report is of the sampled steps
    return _result(approx, pair, images, slice(WARM_UP, tail))


def _result(approx: nn.Module, pair: Sequence[Trainer], images: Images, timed: slice) -> Result:
    exact_seconds, approx_seconds = (each.seconds[timed] for each in pair)
    quotients = [a / e for e, a in zip(exact_seconds, approx_seconds, strict=True)]
    with warnings.catch_warnings():
        # What it warns of is what is shown: the accuracy with statistics that do not fit.
        warnings.simplefilter("ignore", fx_approx.errors.BatchNormWarning)
        as_trained = accuracy(approx, images)
    recalibrated = None
    if any(isinstance(module, nn.BatchNorm2d) for module in approx.modules()):
        fx_approx.recalibrate_batchnorm(approx, images.train[: RECALIBRATION_BATCHES * BATCH].split(BATCH))
        recalibrated = accuracy(approx, images)
    return Result(
        report=fx_approx.report(approx),
        exact=accuracy(pair[0].model, images),
        as_trained=as_trained,
        recalibrated=recalibrated,
        exact_ms=_quartiles([1000 * s for s in exact_seconds]),
        approx_ms=_quartiles([1000 * s for s in approx_seconds]),
        ratio=_quartiles(quotients),
        timed=len(quotients),
    )


def _quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [math.nan] * 3


def describe(name: str, result: Result, options: argparse.Namespace) -> str:
    """``result`` as lines for a terminal."""
    width = shutil.get_terminal_size((110, 24)).columns
    lines = [f"\n{name}\n{'=' * len(name)}", result.report.to_text(width=width), "", "Test accuracy"]
    lines.append(f"  exact training                  {result.exact:5.1f} %")
    if result.recalibrated is None:
        lines.append(f"  approximate training            {result.as_trained:5.1f} %")
    else:
        lines.append(f"  approximate, recalibrated       {result.recalibrated:5.1f} %")
        lines.append(f"  approximate, not recalibrated   {result.as_trained:5.1f} %   (statistics of sampled steps)")
    if options.exact_tail:
        lines.append(f"  The last {100 * options.exact_tail:g} % of the approximate model's steps were exact.")
    how = "compiled" if options.compile else "eager"
    where = f"{how}, {torch.get_num_threads()} threads"
    lines += [
        "",
        f"Step time ({where}; median of {result.timed} alternating sampled steps, quartiles in brackets)",
    ]
    if result.timed < 2:
        return "\n".join([*lines, f"  too few steps to tell: the first {WARM_UP} do not count"])
    for label, (low, middle, high) in (("exact", result.exact_ms), ("approximate", result.approx_ms)):
        lines.append(f"  {label:14}  {middle:7.2f} ms  [{low:.2f}, {high:.2f}]")
    low, middle, high = result.ratio
    verdict = f"{100 * abs(1 - middle):.0f} % {'faster' if middle < 1 else 'slower'}"
    lines.append(f"  approx / exact  {middle:7.2f}     [{low:.2f}, {high:.2f}]   {verdict}")
    if high > 2 * low:
        lines.append("  The quartiles lie far apart: other work disturbs these times. OMP_NUM_THREADS=1 may help.")
    note = (
        f"FLOPs are not time: {100 * result.report.totals.saved:.0f} % of the products' FLOPs were left out, "
        "but scores, gathers and the layers between cost what they cost"
        f"{'' if options.compile else ', and eager calls have their overhead'}."
    )
    return "\n".join([*lines, *textwrap.wrap(note, max(40, width), initial_indent="  ", subsequent_indent="  ")])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description="Train exact and approximate models side by side and compare them.")
    parser.add_argument("--data", type=Path, metavar="DIR", help="a folder with MNIST or Fashion-MNIST as IDX files")
    parser.add_argument(
        "--limit",
        type=_whole(BATCH),
        default=2000,
        metavar="N",
        help="training images at most; test images too (2000)",
    )
    parser.add_argument("--ratio", type=_share, default=0.5, help="share of the column-row pairs to keep (0.5)")
    parser.add_argument("--sampler", choices=sorted(SAMPLERS), default="topk", help="topk is the paper's (topk)")
    parser.add_argument("--epochs", type=_whole(1), default=8, metavar="N", help="passes over the images (8)")
    parser.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="of weights, batches and samples (0)")
    parser.add_argument("--width", type=_whole(1), default=32, metavar="N", help="channels of the first block (32)")
    parser.add_argument("--compile", action="store_true", help="torch.compile both models")
    parser.add_argument(
        "--exact-tail",
        type=_share_or_none,
        default=0.0,
        metavar="SHARE",
        help="share of the steps at the end that are exact, such as 0.2; costs savings, gains accuracy (0)",
    )
    return parser.parse_args(arguments)


def _whole(least: int):
    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got {text!r}")
        return int(text)

    return convert


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text!r}")
    return value


def _share_or_none(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else _share(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit code."""
    options = parse(arguments)
    try:
        images = (
            digits(options.limit, options.seed)
            if options.data is None
            else idx_folder(options.data, options.limit, options.seed)
        )
    except (OSError, ValueError) as error:
        print(f"demo.py: --data: {error}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    height, width = images.train.shape[-2:]
    print(
        f"{images.name}: {len(images.train)} training and {len(images.test)} test images, "
        f"{height} x {width} pixels\n"
        f"{options.epochs} epochs of {len(images.train) // BATCH} batches of {BATCH}; "
        f"sampler {options.sampler}, ratio {options.ratio:g}, width {options.width}, seed {options.seed}; "
        f"torch {torch.__version__}"
    )
    for name in NETWORKS:
        print(describe(name, compare(name, images, options), options), flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
