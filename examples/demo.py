"""What a recipe saves, against exact training, on images that need no download.

Three networks, each trained twice from the same weights, exactly and by a recipe of fx_approx, on the same batches and
in turn, step by step: a CNN and a small vision transformer that know half of the classes are fine-tuned to all; an
MLP learns from scratch. Recipes measure first whether they pay; where they do not, the network is left exact, and the
table says so. A page `demo.html` has the curves and what each layer computes.

    python examples/demo.py
    python examples/demo.py --data folder/with/fashion-mnist --limit 5000
    python examples/demo.py --compile

It needs the extra ``demo`` (scikit-learn, tqdm). On 2 cores it takes a minute or two.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from data import Images, digits, idx_folder
from demo_page import page
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fx_approx
from fx_approx.errors import UnsupportedError
from fx_approx.recipes import Recipe

BATCH = 64
FIRST = 5
"""Steps of each phase whose time does not count: memory pools fill, a compiled model compiles."""


class CNN(nn.Sequential):
    """Four blocks of convolution, BatchNorm and ReLU with ``width`` to ``2 * width`` channels."""

    def __init__(self, images: Images, width: int) -> None:
        large = images.train.shape[-1] > 16
        super().__init__()
        self.block1 = _block(1, width, stride=2 if large else 1)
        self.block2 = _block(width, width)
        self.block3 = _block(width, 2 * width)
        self.pool = nn.MaxPool2d(2)
        self.block4 = _block(2 * width, 2 * width)
        self.mean, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.fc = nn.Linear(2 * width, images.classes)


def _block(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    block = nn.Sequential()
    block.conv = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
    block.bn, block.relu = nn.BatchNorm2d(out), nn.ReLU()
    return block


class ViT(nn.Module):
    """A vision transformer of three blocks on 49 or 64 patches; the mean over them is classified."""

    def __init__(self, images: Images, width: int) -> None:
        super().__init__()
        side = images.train.shape[-1]
        patch = max(1, side // 8)
        self.embed = nn.Conv2d(1, width, patch, patch)
        self.positions = nn.Parameter(0.5 * torch.randn((side // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, images.classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 1, H, W]`` to ``[N, classes]``."""
        x = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


class MLP(nn.Sequential):
    """Two hidden layers of ``4 * width`` units."""

    def __init__(self, images: Images, width: int) -> None:
        hidden = 4 * width
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1, self.relu1 = nn.Linear(images.train[0].numel(), hidden), nn.ReLU()
        self.fc2, self.relu2 = nn.Linear(hidden, hidden), nn.ReLU()
        self.fc3 = nn.Linear(hidden, images.classes)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW."""
    return torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)


@dataclasses.dataclass(frozen=True)
class Case:
    """One network of the demo.

    Attributes:
        build: Makes it of the images and a width.
        task: What it is trained for, in words.
        recipe: Sets up the training; is given the model, a batch, the steps, the optimiser and the options.
        optimizer: Makes the optimiser.
        epochs: Passes over the images, of those that are asked for.
        tuned: It begins with weights that tell half of the classes.
    """

    build: Callable[[Images, int], nn.Module]
    task: str
    recipe: Callable[..., Recipe]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    epochs: float = 1.0
    tuned: bool = False


def _finetune(model: nn.Module, batch: Tensor, steps: int, optimizer: Any, options: argparse.Namespace) -> Recipe:
    return fx_approx.recipes.finetune(
        model, batch, steps, options.ratio, optimizer=optimizer, compile=options.compile, seed=options.seed
    )


def _transformer(model: nn.Module, batch: Tensor, steps: int, optimizer: Any, options: argparse.Namespace) -> Recipe:
    return fx_approx.recipes.transformer(model, batch, steps, options.ratio, compile=options.compile, seed=options.seed)


def _pretrain(model: nn.Module, batch: Tensor, steps: int, optimizer: Any, options: argparse.Namespace) -> Recipe:
    return fx_approx.recipes.pretrain(model, batch, steps, compile=options.compile, seed=options.seed)


CASES = {
    "CNN": Case(CNN, "fine-tuned from half of the classes to all", _finetune, sgd, tuned=True),
    "ViT": Case(ViT, "fine-tuned from half of the classes to all", _transformer, adamw, 2.0, tuned=True),
    "MLP": Case(MLP, "from scratch", _pretrain, adamw, 0.5),
}


@dataclasses.dataclass
class Trainer:
    """One of the two trainings.

    Attributes:
        model: What is called; a recipe's may change from step to step.
        optimizer: Of its parameters.
        seconds: Of each step.
        losses: Of each step.
        kinds: Of each step, whether it was sampled.
    """

    model: Callable[[], nn.Module]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    recipe: Recipe | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    kinds: list[bool] = dataclasses.field(default_factory=list)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Takes one step of training."""
        self.kinds.append(self.recipe is not None and self.recipe.sampling)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model()(images), labels)
        loss.backward()
        self.optimizer.step()
        if self.recipe is not None:
            self.recipe.step()
        self.seconds.append(time.perf_counter() - start)
        self.schedule.step()
        self.losses.append(float(loss.detach()))


def batches(images: Images, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Full batches in a random order, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images.train), generator=generator)
        for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
            if steps == 0:
                return
            steps -= 1
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
    """What one network came to.

    Attributes:
        name: Of the network.
        task: What it was trained for.
        recipe: As it ended.
        exact: The exact training.
        sampled: That by the recipe.
        accuracies: Percentages of the test images: exact, by the recipe, the network that ships (None without one).
        parameters: Of the network, and of the one that ships.
        latency: Seconds of a test batch in evaluation, of the network and of the one that ships.
        setup: Seconds that the recipe took to set up, its measuring included.
    """

    name: str
    task: str
    recipe: Recipe
    exact: Trainer
    sampled: Trainer
    accuracies: tuple[float, float, float | None]
    parameters: tuple[int, int | None]
    latency: tuple[float, float | None]
    setup: float

    @property
    def step_ratio(self) -> tuple[float, float, float] | None:
        """Time of a sampled step as a share of the exact one beside it: median and quartiles; None where none was."""
        pairs = zip(self.exact.seconds, self.sampled.seconds, self.sampled.kinds, strict=True)
        found = [own / exact for exact, own, kind in pairs if kind][FIRST:]
        if len(found) < 2:
            return None
        low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
        return middle, low, high

    @property
    def training_ratio(self) -> float:
        """Time of the whole training, without setting up, as a share of the exact one."""
        return sum(self.sampled.seconds) / sum(self.exact.seconds)


def compare(name: str, images: Images, options: argparse.Namespace) -> Result:
    """Trains one network exactly and by its recipe, in turn."""
    case = CASES[name]
    torch.manual_seed(options.seed)
    model = case.build(images, options.width)
    steps = max(1, round(options.epochs * case.epochs * (len(images.train) // BATCH)))
    if case.tuned:
        _learn_half(model, case, images, options)
    other = copy.deepcopy(model)
    optimizer = case.optimizer(other)
    start = time.perf_counter()
    recipe = case.recipe(other, images.train[:BATCH], steps, optimizer, options)
    setup = time.perf_counter() - start
    runs = torch.compile(model) if options.compile else model
    exact = _trainer(lambda: runs, case.optimizer(model), steps)
    sampled = _trainer(lambda: recipe.model, optimizer, steps, recipe)
    with tqdm(total=steps, desc=name, unit="step", file=sys.stderr, leave=False) as bar:
        for step, (x, y) in enumerate(batches(images, steps, options.seed)):
            # The one that goes second finds the batch in the cache, so they swap.
            for one in (exact, sampled) if step % 2 == 0 else (sampled, exact):
                one.step(x, y)
            bar.update()
    done = recipe.finish()
    try:
        narrow = recipe.ship()
    except UnsupportedError:
        narrow = None
    return Result(
        name,
        case.task,
        recipe,
        exact,
        sampled,
        (accuracy(model, images), accuracy(done, images), None if narrow is None else accuracy(narrow, images)),
        (_parameters(model), None if narrow is None else _parameters(narrow)),
        _latency(model, narrow, images.test[:BATCH]),
        setup,
    )


def _trainer(model: Callable[[], nn.Module], optimizer: Any, steps: int, recipe: Recipe | None = None) -> Trainer:
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps + 1, cycle_momentum=False)
    return Trainer(model, optimizer, schedule, recipe)


def _learn_half(model: nn.Module, case: Case, images: Images, options: argparse.Namespace) -> None:
    """Trains on the first half of the classes, exactly: the weights that are fine-tuned."""
    known = images.train_labels < images.classes // 2
    half = dataclasses.replace(images, train=images.train[known], train_labels=images.train_labels[known])
    steps = max(1, round(options.epochs * case.epochs * (len(half.train) // BATCH)))
    trainer = _trainer(lambda: model, case.optimizer(model), steps)
    for x, y in batches(half, steps, options.seed) if len(half.train) >= BATCH else ():
        trainer.step(x, y)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def _latency(model: nn.Module, narrow: nn.Module | None, batch: Tensor) -> tuple[float, float | None]:
    models = [model.eval()] if narrow is None else [model.eval(), narrow.eval()]
    taken: list[list[float]] = [[] for _ in models]
    for _ in range(20):
        for one, own in zip(models, taken, strict=True):
            start = time.perf_counter()
            one(batch)
            own.append(time.perf_counter() - start)
    full, *rest = map(statistics.median, taken)
    return full, rest[0] if rest else None


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


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description="Train networks exactly and by recipes side by side, and compare.")
    parser.add_argument("--data", type=Path, metavar="DIR", help="a folder with MNIST or Fashion-MNIST as IDX files")
    parser.add_argument(
        "--limit",
        type=_whole(BATCH),
        default=2000,
        metavar="N",
        help="training images at most; test images too (2000)",
    )
    parser.add_argument("--ratio", type=_share, default=0.5, help="share of the channels or patches to keep (0.5)")
    parser.add_argument("--epochs", type=_whole(1), default=8, metavar="N", help="passes over the images (8)")
    parser.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="of weights, batches and samples (0)")
    parser.add_argument("--width", type=_whole(1), default=64, metavar="N", help="channels of the first layers (64)")
    parser.add_argument("--networks", nargs="+", choices=list(CASES), default=list(CASES), help="only these")
    parser.add_argument("--compile", action="store_true", help="torch.compile all models")
    parser.add_argument("--html", type=Path, default=Path("demo.html"), metavar="FILE", help="the page (demo.html)")
    return parser.parse_args(arguments)


def _whole(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got {text!r}")
        return int(text)

    return convert


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text!r}")
    return value


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
    how = "compiled" if options.compile else "eager"
    height, width = images.train.shape[-2:]
    where = f"{how}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{images.name}: {len(images.train)} images of {height} x {width} pixels, batches of {BATCH}; {where}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.BatchNormWarning)
        results = [compare(name, images, options) for name in options.networks]
    print(f"\n{table(results)}\n")
    options.html.write_text(page(images.name, where, results), encoding="utf-8")
    for one in results:
        last = one.recipe.choices[-1]
        said = f"{last.what}: {last.why}" if one.recipe.exact else one.recipe.choices[0].what
        print(textwrap.fill(f"{one.name}, {one.task}. {said}.", 100))
    note = (
        "Step times are medians of steps in turn, quartiles in brackets. Where accuracy falls, training is too short "
        f"for what is left out: see the curves. More: {options.html}"
    )
    print(f"\n{textwrap.fill(note, 100)}")
    print(f"{time.perf_counter() - start:.0f} s in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
