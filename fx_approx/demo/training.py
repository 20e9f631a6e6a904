"""Each network of the demo, trained twice from the same weights, in turn: exactly, and by a recipe."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fx_approx
from fx_approx.demo.images import Images
from fx_approx.demo.nets import CNN, MLP, ViT

BATCH = 64
FIRST = 5
"""Steps of each phase whose time does not count: memory pools fill, a compiled model compiles."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the trainings have in common.

    Attributes:
        epochs: Passes over the images, at least 1.
        width: Channels of the first layers, at least 1.
        ratio: Share of the channels or patches to keep, between 0 and 1.
        compile: Whether all models are compiled.
        seed: Of weights, batches and samples.
    """

    epochs: int = 8
    width: int = 64
    ratio: float = 0.5
    compile: bool = False
    seed: int = 0


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
    recipe: Callable[..., fx_approx.recipes.Recipe]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    epochs: float = 1.0
    tuned: bool = False


def _finetune(
    model: nn.Module, batch: Tensor, steps: int, optimizer: Any, options: Options
) -> fx_approx.recipes.Recipe:
    return fx_approx.recipes.finetune(
        model, batch, steps, options.ratio, optimizer=optimizer, compile=options.compile, seed=options.seed
    )


def _transformer(
    model: nn.Module, batch: Tensor, steps: int, optimizer: Any, options: Options
) -> fx_approx.recipes.Recipe:
    return fx_approx.recipes.transformer(model, batch, steps, options.ratio, compile=options.compile, seed=options.seed)


def _pretrain(
    model: nn.Module, batch: Tensor, steps: int, optimizer: Any, options: Options
) -> fx_approx.recipes.Recipe:
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
    recipe: fx_approx.recipes.Recipe | None = None
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
    recipe: fx_approx.recipes.Recipe
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


def compare(
    name: str,
    images: Images,
    options: Options,
    progress: Callable[[str, int, int], None] = lambda name, step, steps: None,
) -> Result:
    """Trains one network exactly and by its recipe, in turn.

    Args:
        name: One of :data:`CASES`.
        images: What it learns.
        options: Those of the trainings.
        progress: Called after each step with the name, the steps that are done, and all of them.
    """
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
    runs: nn.Module = cast(nn.Module, torch.compile(model)) if options.compile else model
    exact = _trainer(lambda: runs, case.optimizer(model), steps)
    sampled = _trainer(lambda: recipe.model, optimizer, steps, recipe)
    for step, (x, y) in enumerate(batches(images, steps, options.seed)):
        # The one that goes second finds the batch in the cache, so they swap.
        for one in (exact, sampled) if step % 2 == 0 else (sampled, exact):
            one.step(x, y)
        progress(name, step + 1, steps)
    done = recipe.finish()
    try:
        narrow = recipe.ship()
    except fx_approx.errors.UnsupportedError:
        narrow = None
    return Result(
        name,
        case.task,
        recipe,
        exact,
        sampled,
        (accuracy(model, images), accuracy(done, images), None if narrow is None else accuracy(narrow, images)),
        (_count(model), None if narrow is None else _count(narrow)),
        _latency(model, narrow, images.test[:BATCH]),
        setup,
    )


def _trainer(
    model: Callable[[], nn.Module], optimizer: Any, steps: int, recipe: fx_approx.recipes.Recipe | None = None
) -> Trainer:
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps + 1, cycle_momentum=False)
    return Trainer(model, optimizer, schedule, recipe)


def _learn_half(model: nn.Module, case: Case, images: Images, options: Options) -> None:
    """Trains on the first half of the classes, exactly: the weights that are fine-tuned."""
    known = images.train_labels < images.classes // 2
    half = dataclasses.replace(images, train=images.train[known], train_labels=images.train_labels[known])
    steps = max(1, round(options.epochs * case.epochs * (len(half.train) // BATCH)))
    trainer = _trainer(lambda: model, case.optimizer(model), steps)
    for x, y in batches(half, steps, options.seed) if len(half.train) >= BATCH else ():
        trainer.step(x, y)


def _count(model: nn.Module) -> int:
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
