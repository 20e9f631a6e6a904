"""Short trainings with several policies: which accuracy each gives in which time."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fx_approx.capture.trace import kept_random_state
from fx_approx.core.plan import Plan, Policy
from fx_approx.passes.apply_policy import check_policy
from fx_approx.runtime.step_gradient import Loss
from fx_approx.runtime.validation import check_seed
from fx_approx.schedules.schedule import check_step
from fx_approx.utils.disk_cache import DiskCache
from policy_sweep.job import ADDRESS, Job
from policy_sweep.result import EXACT, SweepResult, SweepRun, SweepTime

_FORMAT = 2


def sweep(  # noqa: PLR0913  (each argument is a choice of the user)
    model: nn.Module | Callable[[], nn.Module],
    data: Iterable[Any] | Callable[[int], Iterable[Any]],
    policies: Mapping[str, Policy],
    *,
    loss: Loss,
    evaluate: Callable[[nn.Module], float],
    example_inputs: Any = None,
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
    apart from the trainings: steps of one policy and of the exact model in turn, in one process, on the first batch,
    with the optimiser and without compilation. Where layers are sampled and the model has BatchNorm, a run is evaluated
    after :func:`fx_approx.recalibrate_batchnorm`. Before the first training, each policy makes one step and
    ``evaluate`` is called once, so that errors come early. The model given and all random states are as before
    afterwards.

    Args:
        model: The exact model on its device, or a function that makes one. Parts in evaluation mode stay so, unless
            all of it is.
        data: Training batches, which can be gone through again and again; or a function that gives them for a seed.
        policies: By name.
        loss: Called with a model and a batch; returns the scalar to train on.
        evaluate: Called with the model in ``eval()``; returns the accuracy, higher is better.
        example_inputs: As in :func:`fx_approx.transform`.
        steps: Of each training.
        optimizer: Called with the parameters; SGD with rate 0.05 and momentum 0.9 by default.
        seeds: One training each; for random numbers of torch, Python, numpy and the samplers.
        compile: Train and time models under ``torch.compile``.
        recalibration: Batches for ``recalibrate_batchnorm``; 0: leave it out.
        repeats: Steps that are timed, of each.
        directory: Where finished runs are kept, so that a sweep that was interrupted goes on with what is missing. Runs
            are told apart by policy, seed, steps, model (its ``repr``, the first values of parameters and buffers),
            optimiser (its ``repr``), ``example_inputs`` (their shapes), ``recalibration``, ``compile``, the versions of
            torch and fx_approx, and ``tag``; times by the number of threads, too.
        tag: Names what these do not tell apart: data, loss, evaluation.
        progress: Show a bar (with tqdm, if it is there; else a line for each run).

    Returns:
        ``print`` it, ``plot()`` it.

    Raises:
        TypeError: An argument of the wrong type, or a function that returns something else than it should.
        ValueError: No policies, one called ``exact``, no seeds, numbers out of range, no batches, a loss that is no
            scalar, an evaluation that gives no number, or, with ``directory``, a policy without a ``repr`` of its own.
        OSError: ``directory`` cannot be written to.
    """
    _check_policies(policies, directory is not None)
    made = _sgd if optimizer is None else optimizer
    _check_functions(model, data, loss=loss, evaluate=evaluate, optimizer=made)
    _check_seeds(seeds)
    for name, value, least in (("steps", steps, 1), ("recalibration", recalibration, 0), ("repeats", repeats, 2)):
        check_step(name, value, least)
    for name, given, kind in (("compile", compile, bool), ("progress", progress, bool), ("tag", tag, str)):
        if not isinstance(given, kind):
            what = "True or False" if kind is bool else "a string"
            raise TypeError(f"{name}: expected {what}, got {given!r}")
    job = Job(model, data, loss, evaluate, example_inputs, steps, made, compile, recalibration, repeats)
    cache = DiskCache(None if directory is None else _writable(directory))
    todo: dict[str, Policy | None] = {EXACT: None, **policies}
    with kept_random_state():
        base = {
            "format": _FORMAT,
            "versions": [importlib.metadata.version("fx_approx"), torch.__version__],
            "job": job.described(),
            "compile": compile,
            "tag": tag,
        }
        rehearse = functools.cache(functools.partial(job.rehearse, seeds[0], todo))

        def kept(make: Callable[[], Any], **key: Any) -> Any:
            def fresh() -> Any:
                rehearse()
                return make()

            return cache.get({**base, **key}, fresh)

        runs, times = [], []
        for name, seed in _shown([(name, seed) for name in todo for seed in seeds], progress):
            policy, key = todo[name], {"seed": seed, "steps": steps, "recalibration": recalibration}
            found = kept(functools.partial(job.train, policy, seed), what="run", policy=_named(policy), **key)
            runs.append(SweepRun(name, seed, **found))
        for name, policy in todo.items():
            key = {"repeats": repeats, "threads": torch.get_num_threads()}
            found = kept(functools.partial(job.time, policy), what="time", policy=_named(policy), **key)
            times.append(SweepTime(name, **{**found, "speedup": tuple(found["speedup"])}))
    return SweepResult(tuple(runs), tuple(times))


def _check_policies(policies: Any, kept: bool) -> None:
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
        if kept and ADDRESS.search(_named(policy)):
            raise ValueError(
                f"policies[{name!r}]: its runs cannot be known again in directory by {_named(policy)}; expected a "
                "policy whose repr tells all its settings, such as a dataclass"
            )


def _check_functions(model: Any, data: Any, **functions: Any) -> None:
    if not isinstance(model, nn.Module) and not callable(model):
        raise TypeError(f"model: expected a module or a function that makes one, got {model!r}")
    if not callable(data) and not isinstance(data, Iterable):
        raise TypeError(f"data: expected batches, or a function of a seed that gives them, got {data!r}")
    if isinstance(data, Iterator):
        raise ValueError(f"data: it can be gone through once only; expected a list or a DataLoader, got {data!r}")
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name}: expected a function, got {function!r}")


def _check_seeds(seeds: Any) -> None:
    if not isinstance(seeds, Sequence) or isinstance(seeds, (str, bytes)) or not seeds:
        raise ValueError(f"seeds: expected at least one integer, got {seeds!r}")
    for seed in seeds:
        check_step("seeds", seed)
        check_seed(seed, 1)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected different ones, got {list(seeds)}")


def _sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05, momentum=0.9)


def _writable(directory: Any) -> Path:
    """The folder, made if it is not there; OSError if nothing can be kept in it."""
    if not isinstance(directory, (str, Path)):
        raise TypeError(f"directory: expected a folder's path or None, got {directory!r}")
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        what = f"directory: expected a folder that can be written to, got {str(folder)!r} ({error.strerror})"
        raise OSError(error.errno, what) from None


def _named(policy: Policy | None) -> str:
    if isinstance(policy, Plan):
        return "plan " + hashlib.sha256(policy.to_json().encode()).hexdigest()
    return repr(policy)


def _shown(todo: Sequence[tuple[str, int]], progress: bool) -> Iterator[tuple[str, int]]:
    if not progress:
        yield from todo
    elif importlib.util.find_spec("tqdm") is not None:
        yield from importlib.import_module("tqdm").tqdm(todo, desc="runs")
    else:
        for number, (name, seed) in enumerate(todo):
            print(f"run {number + 1} of {len(todo)}: {name}, seed {seed}", flush=True)
            yield name, seed
