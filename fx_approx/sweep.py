"""Short trainings with several policies: which accuracy each gives in which time."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import itertools
import math
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fx_approx.api import report, transform
from fx_approx.capture import kept_random_state
from fx_approx.checks import check_model
from fx_approx.controls import recalibrate
from fx_approx.disk_cache import DiskCache
from fx_approx.errors import NoEffectWarning
from fx_approx.gradients import Loss
from fx_approx.overhead import seconds
from fx_approx.passes import check_policy
from fx_approx.plan import Plan, Policy
from fx_approx.schedules import check_step
from fx_approx.sweep_report import EXACT, SweepResult, SweepRun, SweepTime

_VERSION = 1
_WARM = 3


def sweep(
    model: nn.Module | Callable[[], nn.Module],
    data: Iterable[Any] | Callable[[int], Iterable[Any]],
    policies: Mapping[str, Policy],
    *,
    loss: Loss,
    evaluate: Callable[[nn.Module], float],
    example_inputs: Any,
    steps: int,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    seeds: Sequence[int] = (0,),
    compile: bool = False,
    recalibration: int = 20,
    repeats: int = 15,
    directory: str | Path | None = None,
    tag: str = "",
    progress: bool = True,
) -> SweepResult:
    """Trains a model exactly and with each policy, and times a step of each in turn with the exact one.

    Every run starts from the same parameters (or from what the factory makes under the run's seed). Times are measured
    apart from the trainings: steps of one policy and of the exact model in turn, in one process, with the optimiser and
    without compilation. Where the model has BatchNorm, a sampled run is evaluated after :func:`fx_approx.recalibrate`.
    The model given and all random states are as before afterwards.

    Args:
        model: The exact model on its device, or a function that makes one.
        data: Training batches, which can be gone through again and again; or a function that gives them for a seed.
        policies: By name.
        loss: Called with a model and a batch; returns the scalar to train on.
        evaluate: Called with the model in ``eval()``; returns the accuracy, higher is better.
        example_inputs: As in :func:`fx_approx.transform`.
        steps: Of each training.
        optimizer: Called with the parameters; SGD with rate 0.05 and momentum 0.9 by default.
        seeds: One training each; for random numbers of torch, Python and the samplers.
        compile: Train and time models under ``torch.compile``.
        recalibration: Batches for ``recalibrate``; 0: leave it out.
        repeats: Steps that are timed, of each.
        directory: Where finished runs are kept, so that a sweep that was interrupted goes on with what is missing. Runs
            are told apart by policy, seed, steps, model (class, names and shapes of the parameters), ``compile`` and
            ``tag``.
        tag: Names what these do not tell apart: data, loss, optimiser.
        progress: Show a bar (with tqdm, if it is there; else a line for each run).

    Returns:
        ``print`` it, ``plot()`` it.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: No policies, one called ``exact``, no seeds, numbers out of range, no batches, a loss that is no
            scalar, or an evaluation that gives no number.
        OSError: ``directory`` cannot be written to.
    """
    _check(policies, loss, evaluate, seeds)
    for name, value, least in (("steps", steps, 1), ("recalibration", recalibration, 0), ("repeats", repeats, 2)):
        check_step(name, value, least)
    if not isinstance(model, nn.Module) and not callable(model):
        raise TypeError(f"model: expected a module or a function that makes one, got {model!r}")
    if not callable(data) and not isinstance(data, Iterable):
        raise TypeError(f"data: expected batches, or a function of a seed that gives them, got {data!r}")
    made = optimizer if optimizer is not None else _sgd
    job = _Job(model, data, loss, evaluate, example_inputs, steps, made, compile, recalibration, repeats)
    cache = DiskCache(None if directory is None else _writable(Path(directory)))
    todo: list[tuple[str, Policy | None]] = [(EXACT, None), *policies.items()]
    with kept_random_state():
        base = {"version": _VERSION, "model": job.described(), "compile": compile, "tag": tag}
        runs, times = [], []
        for (name, policy), seed in _shown([(one, seed) for one in todo for seed in seeds], progress):
            key = {
                **base,
                "what": "run",
                "policy": _named(policy),
                "seed": seed,
                "steps": steps,
                "again": recalibration,
            }
            found = cache.get(key, functools.partial(job.train, policy, seed))
            runs.append(SweepRun(name, seed, **found))
        for name, policy in todo:
            key = {**base, "what": "time", "policy": _named(policy), "repeats": repeats}
            times.append(SweepTime(name, **_tuples(cache.get(key, functools.partial(job.time, policy)))))
    return SweepResult(tuple(runs), tuple(times))


def _check(policies: Any, loss: Any, evaluate: Any, seeds: Any) -> None:
    if not isinstance(policies, Mapping):
        raise TypeError(f"policies: expected names with policies, got {policies!r}")
    if not policies:
        raise ValueError("policies: expected at least one, got none")
    for name, policy in policies.items():
        if not isinstance(name, str):
            raise TypeError(f"policies: expected names as keys, got {name!r}")
        if name == EXACT:
            raise ValueError(f"policies: {EXACT!r} is the name of the baseline, which is trained anyway; rename it")
        try:
            check_policy(policy)
        except TypeError as error:
            raise TypeError(f"policies[{name!r}]: {error}") from None
    for name, function in (("loss", loss), ("evaluate", evaluate)):
        if not callable(function):
            raise TypeError(f"{name}: expected a function, got {function!r}")
    if not isinstance(seeds, Sequence) or isinstance(seeds, (str, bytes)) or not seeds:
        raise ValueError(f"seeds: expected at least one integer, got {seeds!r}")
    for seed in seeds:
        check_step("seeds", seed)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected different ones, got {list(seeds)}")


def _sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05, momentum=0.9)


def _writable(folder: Path) -> Path:
    """OSError if nothing can be kept there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return folder


def _named(policy: Policy | None) -> str:
    if isinstance(policy, Plan):
        return "plan " + hashlib.sha256(policy.to_json().encode()).hexdigest()
    return repr(policy)


def _tuples(found: Mapping[str, Any]) -> dict[str, Any]:
    return {**found, "speedup": tuple(found["speedup"])}


def _shown(todo: Sequence[tuple[Any, int]], progress: bool) -> Iterator[tuple[Any, int]]:
    if not progress:
        yield from todo
    elif importlib.util.find_spec("tqdm") is not None:
        yield from importlib.import_module("tqdm").tqdm(todo, desc="runs")
    else:
        for number, one in enumerate(todo):
            print(f"run {number + 1} of {len(todo)}: {one[0][0]}, seed {one[1]}", flush=True)
            yield one


@dataclasses.dataclass(frozen=True)
class _Job:
    """All that the runs have in common; the fields are those of :func:`sweep`."""

    model: nn.Module | Callable[[], nn.Module]
    data: Any
    loss: Loss
    evaluate: Callable[[nn.Module], float]
    example_inputs: Any
    steps: int
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    compile: bool
    recalibration: int
    repeats: int

    def build(self, seed: int) -> nn.Module:
        """A fresh exact model, in training mode, the random states those of ``seed``."""
        torch.manual_seed(seed)
        random.seed(seed)
        if isinstance(self.model, nn.Module):
            return copy.deepcopy(self.model).train()
        made: Any = self.model()
        if not isinstance(made, nn.Module):
            raise TypeError(f"model: expected the function to make a module, got {made!r}")
        return made.train()

    def described(self) -> str:
        """What tells models apart."""
        model = self.build(0)
        check_model(model)
        shapes = [(name, tuple(p.shape), str(p.dtype), str(p.device)) for name, p in model.named_parameters()]
        return hashlib.sha256(repr((type(model).__qualname__, shapes)).encode()).hexdigest()

    def batches(self, seed: int) -> Iterator[Any]:
        """The training batches, round and round."""
        source = self.data(seed) if callable(self.data) else self.data
        for turn in itertools.count():
            count = 0
            for batch in source:
                yield batch
                count += 1
            if not count:
                what = "it gives no batches" if turn == 0 else "it can be gone through once only; give a list"
                raise ValueError(f"data: {what}")

    def approximate(self, model: nn.Module, policy: Policy | None, seed: int) -> nn.Module:
        """``model`` transformed by ``policy``; itself without one."""
        if policy is None:
            return model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoEffectWarning)
            return transform(model, policy, self.example_inputs, seed=seed)

    def train(self, policy: Policy | None, seed: int) -> dict[str, Any]:
        """One training: accuracy, loss, and whether it diverged."""
        model = self.approximate(self.build(seed), policy, seed)
        step, value = self._stepper(model), math.nan
        for batch in itertools.islice(self.batches(seed), self.steps):
            value = step(batch)
            if not math.isfinite(value):
                return {"accuracy": None, "loss": value, "diverged": True}
        if policy is not None and self.recalibration and any(isinstance(m, _BatchNorm) for m in model.modules()):
            recalibrate(model, itertools.islice(self.batches(seed), self.recalibration))
        with torch.no_grad():
            accuracy = self.evaluate(model.eval())
        if isinstance(accuracy, Tensor) and accuracy.numel() == 1:
            accuracy = accuracy.item()
        if isinstance(accuracy, bool) or not isinstance(accuracy, (int, float)):
            raise ValueError(f"evaluate: expected it to return a number, got {accuracy!r}")
        return {"accuracy": float(accuracy), "loss": value, "diverged": False}

    def time(self, policy: Policy | None) -> dict[str, Any]:
        """Steps in turn with exact ones."""
        models = [self.build(0), self.approximate(self.build(0), policy, 0)]
        steppers = [self._stepper(model) for model in models]
        source, device = self.batches(0), next(models[0].parameters()).device
        times: list[list[float]] = [[], []]
        for number in range(_WARM + self.repeats):
            batch = next(source)
            for place, step in enumerate(steppers):
                spent = seconds(lambda step=step, batch=batch: step(batch), device)  # type: ignore[misc]
                if number >= _WARM:
                    times[place].append(spent)
        speedup = statistics.quantiles([one / other for one, other in zip(*times, strict=True)], n=4)
        totals = None if policy is None else report(models[1])
        return {
            "seconds": statistics.median(times[1]),
            "speedup": [1.0] * 3 if policy is None else speedup,
            "saved": 0.0 if totals is None else totals.totals.saved_net,
            "sampled": 0 if totals is None else sum(1 for row in totals.rows if row.samples),
        }

    def _stepper(self, model: nn.Module) -> Callable[[Any], float]:
        called: Any = torch.compile(model, dynamic=False) if self.compile else model
        optimizer = self.optimizer(model.parameters())

        def step(batch: Any) -> float:
            optimizer.zero_grad()
            value = self.loss(called, batch)
            if not isinstance(value, Tensor) or value.numel() != 1:
                what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(f"loss: expected it to return a scalar tensor, got {what}")
            value.backward()
            optimizer.step()
            return float(value.detach())

        return step
