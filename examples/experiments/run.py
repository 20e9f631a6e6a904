"""Trains the variants of a configuration, exact ones and baselines among them, and writes a line of JSON for each run.

    python examples/experiments/run.py examples/experiments/configs/mnist-mlp.toml --data FOLDER
    python examples/experiments/run.py CONFIG --data FOLDER --seeds 0 1 --only exact "value 0.25, tail"
    python examples/experiments/run.py CONFIG --data FOLDER --device cuda --compile --autocast bfloat16
    python examples/experiments/run.py CONFIG --data FOLDER --set training.epochs=1 --set data.limit=2000
    python examples/experiments/run.py CONFIG --data FOLDER --choose

The last one runs the tries of the variants that have some, without the examples that are held out, and says which is
best on these; what is chosen is what the other commands train.

Runs that are recorded are not repeated, and a run that was interrupted goes on from its last checkpoint; several
processes may work on the same folder. ``tables.py`` makes tables and figures of it. It needs torch, numpy, tqdm,
tabulate, networkx and pydantic; some data and networks torchvision, Pillow or tokenizers, and they say so.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import itertools
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import choices
import costs
import measured
import reading
import torch
import variants
from choices import FORMAT, Choices, NotChosen
from config import Config, ConfigError, load, plain
from networks import Network, network
from records import Records, digest, told
from sources import REPOSITORY, open_source
from training import Budget, Run, Settings

import fx_approx


class Experiment:
    """A configuration on its data: what its runs are, and how each is done.

    Where ``options`` say ``choose``, examples are held out, and runs are tested on these.
    """

    def __init__(self, config: Config, settings: Settings, options: argparse.Namespace) -> None:
        """Opens the data, and checks every variant, with each of its tries."""
        self.settings = settings
        self.network: Network = network(config.network, config.path.name)
        self.device = torch.device(settings.device)
        self._validation = config.validation if options.choose else 0
        _check(config, variants.policy_of)
        _check(config, lambda one, name: variants.schedule_of(one, name, 1000))
        self.source = open_source(config, options.data, self.device, options.download, self._validation)
        _check(config, lambda one, name: reading.sampler_of(one, name, self.source.size, 0))
        self.choices = Choices(config, settings.identity, options.out, wait=not options.list)
        self._finals = Records(options.out, config.name)
        self.records = self.choices.records if options.choose else self._finals
        self._out = options.out
        self.full = config.training.full_steps(self.source.size)
        x, y = next(iter(self.source.epoch(0, 0, config.training.batch)))
        self.example = x, y
        self._take(config)

    def _take(self, config: Config) -> None:
        self.config = config
        self._exact = functools.cache(lambda: self._flops_of(1.0)[0])
        self._total = functools.cache(self._total_flops)

    def of(self, config: Config) -> Experiment:
        """The same with other variants."""
        made = copy.copy(self)
        made._take(config)
        return made

    def key(self, name: str, seed: int) -> str:
        """Tells runs apart: all that their results depend on, but for code and versions."""
        return choices.key(self._described(name), seed, self._validation)

    def _described(self, name: str) -> dict[str, Any]:
        return choices.described(self.config, name, self.settings.identity)

    def do(self, name: str, seed: int, progress: bool, said: Mapping[str, Any]) -> str:
        """Does one run unless it is recorded, or another process is at it; says which.

        ``said`` is for the record, too.
        """
        key = self.key(name, seed)
        if self.records.find(key):
            return "recorded already"
        with self.records.claim(key) as mine:
            if not mine:
                return "another process is at it"
            if self.records.find(key):
                return "recorded already"
            weights = self._weights(seed)
            with self._named(name):
                budget = self.budget(name, seed)
                run = Run(self.config, name, seed, self.source, self.network, self.settings, budget, weights)
            found = run.train(self.records, key, progress)
            variant = self.config.variants[name]
            exact = not (variant.policy or variant.equal or variant.examples)
            if exact and not (found["diverged"] or self._validation):  # what fine-tuning may begin with
                self.records.save(key, {k: v.cpu() for k, v in run.model.state_dict().items()}, "final")
            self.records.append({**self._head(name, seed, key, budget), **said, **found})
            self.records.forget(key)
        final = found["final"]
        mended = f", recalibrated {final['recalibrated']:.2f}" if final.get("recalibrated") is not None else ""
        return "diverged" if found["diverged"] else f"{final['accuracy']:.2f} %{mended}"

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        try:
            yield
        except ConfigError:
            raise
        except ValueError as error:  # a budget that cannot be met, a width that is not there
            raise ConfigError(f"{self.config.path.name}: variants.{name!r}: {error}") from error

    def _head(self, name: str, seed: int, key: str, budget: Budget) -> dict[str, Any]:
        header = runpy.run_path(str(REPOSITORY / "benchmarks" / "_header.py"))
        common = self._described(name)
        variant = common.pop("variant")
        common.pop("to", None)
        return {
            "format": FORMAT,
            "run": key,
            "config": self.config.name,
            "title": self.config.title,
            "setting": digest(common),
            "variant": name,
            "seed": seed,
            "options": variant,
            "common": common,
            "budget": dataclasses.asdict(budget),
            "full_steps": self.full,
            "exact_flops": self._exact() * self.full,
            "examples": self.source.size,
            "environment": header["environment"](),
        }

    def _weights(self, seed: int) -> dict[str, torch.Tensor] | None:
        start = self.config.start
        if start is None:
            return None
        path = self.config.path.parent / start.config
        other = load(path)
        seed = seed if start.seed < 0 else start.seed
        folder = Records(self._out, other.name)
        ended = [r for r in folder.all() if r["variant"] == start.variant and r["seed"] == seed]
        same = [r for r in ended if r["common"]["network"] == dict(other.network)]
        found = folder.load(same[-1]["run"], "final") if same else None
        if found is None:
            raise ConfigError(
                f"{self.config.path.name}: start: expected the weights of {start.variant!r}, seed {seed}, of "
                f"{other.name} in {folder.scratch}; first: run.py {path} --only {start.variant!r} --seeds {seed}"
            )
        return dict(found)

    def measure(self, names: Sequence[str], repeats: int) -> str:
        """Records what a step of each variant costs beside one of exact training; says what was measured."""
        runs = [Run(self._with_plain(), "", 0, self.source, self.network, self.settings, Budget(self.full, 1.0))]
        for name in names:
            if self.config.variants[name] != _PLAIN:
                with self._named(name):
                    runs.append(self._run(name, 0, self.budget(name, 0)))
        found = measured.measure(runs, repeats)
        head = self._head(next(iter(self.config.variants)), 0, "", Budget(self.full, 1.0))
        kept = {key: head[key] for key in ("format", "config", "title", "setting", "common", "environment")}
        options = {name: plain(self.config.variants[name]) for name in names}
        Records(self._out, f"{self.config.name}-costs").append(
            {**kept, "clock": self.settings.clock, "repeats": repeats, "options": options, "costs": found}
        )
        return ", ".join(found)

    def report(self, name: str) -> str:
        """What a variant saves in each of its phases, layer by layer."""
        if not self.config.variants[name].policy:
            return "all layers are exact"
        with self._named(name):
            run = self._run(name, 0, self.budget(name, 0))
        found = []
        for phase, first in run.phases.first.items():
            if phase != variants.EXACT:
                run.ratios.jump(first)
                found.append(f"phase {phase}, {run.phases.counts[phase]} steps:\n{fx_approx.report(run.model)}")
        return "\n\n".join(found)

    # ---- what baselines cost

    def budget(self, name: str, seed: int) -> Budget:
        """Steps and width of a variant; those of a baseline follow from what it is to equal."""
        variant = self.config.variants[name]
        if variant.examples:
            return Budget(reading.steps_of(self.config, name, self.source.size), variant.width)
        if not variant.equal:
            return Budget(max(1, round(variant.epochs * self.full)), variant.width)
        if variant.equal == "flops":
            target = self._total(variant.to, seed)
            if variant.by == "epochs":
                return Budget(max(1, int(target / self._exact())), variant.width, target)
            x, y = self.example
            steps = max(1, round(variant.epochs * self.full))
            width, _ = costs.narrowed(self.network, self.source.classes, x, y, target / steps)
            return Budget(steps, width, target)
        target = self._seconds(variant.to)
        if variant.by == "epochs":
            whole = Budget(self.full, variant.width)
            return Budget(max(1, int(target / self._step_seconds("", whole)["exact"])), variant.width, target)
        steps = max(1, round(variant.epochs * self.full))
        width, _ = costs.quicker(
            lambda width: self._step_seconds("", Budget(self.full, width))["exact"], target / steps
        )
        return Budget(steps, width, target)

    def _flops_of(self, width: float) -> tuple[float, float]:
        return costs.exact_flops(self.network, self.source.classes, *self.example, width)

    def _run(self, name: str, seed: int, budget: Budget) -> Run:
        return Run(
            self.config, name, seed, self.source, self.network, self.settings, budget, self._deciding(name, seed)
        )

    def _deciding(self, name: str, seed: int) -> dict[str, torch.Tensor] | None:
        """The weights that the plan of a variant, and so its cost, depends on."""
        return self._weights(seed) if name and self.config.variants[name].budgeted else None

    def _total_flops(self, name: str, seed: int) -> float:
        run = self._run(name, seed, self.budget(name, seed))
        run.count()
        return run.prepared["flops"] + sum(run.flops[phase] * count for phase, count in run.phases.counts.items())

    def _seconds(self, name: str) -> float:
        """Of a whole training of ``name``, from the times of its steps."""
        budget = self.budget(name, 0)
        step = self._step_seconds(name, budget)
        schedule = variants.schedule_of(self.config, name, budget.steps)
        counts = variants.phases(self.config.variants[name], schedule, budget.steps).counts
        return sum(step[phase] * count for phase, count in counts.items())

    def _step_seconds(self, name: str, budget: Budget) -> dict[str, float]:
        """Median seconds of a step of each phase; measured once, for all seeds and processes. No name: exact."""
        config = self.config if name else self._with_plain()
        described = [self._described(name) if name else self._described_exact(), budget.width, torch.get_num_threads()]
        key = f"time-{digest(described)}"
        with self._finals.claim(key, wait=True):
            found = self._finals.load(key, "seconds")
            if found is None:
                settings = dataclasses.replace(self.settings, probe=max(20, self.settings.probe), cold=False)
                weights = self._deciding(name, 0)
                run = Run(config, name, 0, self.source, self.network, settings, budget, weights)
                run.measure(count=False)
                found = {phase: quartiles[1] for phase, quartiles in run.seconds.items()}
                self._finals.save(key, found, "seconds")
        return dict(found)

    def _with_plain(self) -> Config:
        """The configuration with exact training under no name."""
        return self.config.model_copy(update={"variants": {**self.config.variants, "": _PLAIN}})

    def _described_exact(self) -> dict[str, Any]:
        first = next(iter(self.config.variants))
        return {**self._described(first), "variant": None, "to": None}


def _check(config: Config, check: Callable[[Config, str], Any]) -> None:
    """Has ``check`` look at each try of each variant; an error says which try it was."""
    for name, variant in config.variants.items():
        for values, tried in variant.alternatives():
            try:
                check(choices.put(config, name, tried), name)
            except ConfigError as error:
                raise ConfigError(f"{error}, in the try {told(values)}" if values else str(error)) from None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("config", type=Path, help="a TOML file such as those in configs/")
    made.add_argument("--data", type=Path, default=REPOSITORY / ".data", metavar="FOLDER", help="where data sets are")
    made.add_argument("--download", action="store_true", help="get what is missing through torchvision")
    made.add_argument("--out", type=Path, default=REPOSITORY / ".data" / "runs", metavar="FOLDER", help="for results")
    made.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="instead of those of the configuration")
    made.add_argument("--only", nargs="+", metavar="VARIANT", help="some of the variants, by name")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the configuration")
    made.add_argument("--list", action="store_true", help="show the runs, with what is recorded, and end")
    other = made.add_mutually_exclusive_group()
    other.add_argument("--choose", action="store_true", help="run the tries, tested on examples that are held out")
    other.add_argument(
        "--costs", type=int, default=0, metavar="STEPS", help="time so many steps of each, train nothing"
    )
    other.add_argument("--report", action="store_true", help="print what each saves by layer, train nothing")
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    made.add_argument("--compile", action="store_true", help="train under torch.compile")
    made.add_argument("--autocast", default="", choices=("bfloat16",), help="precision of the products")
    made.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="what training seconds are")
    made.add_argument("--cold", action="store_true", help="take no step before; the seconds have compiling in, too")
    made.add_argument("--no-curve", action="store_true", help="evaluate at the end of the last epoch only")
    made.add_argument("--probe", type=int, default=10, metavar="STEPS", help="steps that are timed first (10)")
    made.add_argument("--checkpoint", type=float, default=30, metavar="SECONDS", help="between checkpoints (30)")
    made.add_argument("--quiet", action="store_true", help="no progress bars")
    return made


_PLAIN = variants.Variant()


def _names(config: Config, options: argparse.Namespace) -> list[str]:
    """The variants that are asked for."""
    known = [name for name, variant in config.variants.items() if variant.tries or not options.choose]
    if not known:
        raise ConfigError(f"--choose: expected variants with tries in {config.path.name}, got none")
    unknown = [name for name in options.only or () if name not in known]
    if unknown:
        tries = " with tries, beside --choose" * options.choose
        raise ConfigError(f"--only: expected some of {', '.join(known)}{tries}, got {unknown[0]!r}")
    if options.choose and options.seeds:
        raise ConfigError(f"--seeds: expected none beside --choose, which has choice_seeds, got {options.seeds}")
    return options.only or known


def _list(experiment: Experiment, names: Sequence[str], options: argparse.Namespace) -> None:
    """Shows tries and runs, with what is recorded."""
    config, found = experiment.config, experiment.choices
    for name in choices.ordered(config, names):
        if not config.variants[name].tries:
            continue
        try:
            for one, seed in itertools.product(found.tries(name), config.choice_seeds):
                reached = found.accuracy(name, one, seed)
                said = "missing" if reached is None else choices.percent(reached)
                print(f"{config.name}: {name}, {told(one.values)}, seed {seed}, held out: {said}")
            print(f"{config.name}: {name}: {found.taken(name)}")
        except NotChosen as error:
            print(error)
    for seed, name in itertools.product(() if options.choose else options.seeds or config.seeds, names):
        try:
            key = experiment.of(found.settled([name])).key(name, seed)
            said = "missing" if experiment.records.find(key) is None else "recorded"
        except NotChosen:
            said = "missing, and so is its choice"
        print(f"{config.name}: {name}, seed {seed}: {said}")


def _choose(experiment: Experiment, names: Sequence[str], progress: bool) -> None:
    """Does the runs of tries that are missing, and says what is chosen."""
    config, found = experiment.config, experiment.choices
    for name in choices.ordered(config, names):
        for one, seed in itertools.product(found.tries(name), config.choice_seeds):
            about = {"validation": config.validation, "tried": dict(one.values)}
            said = experiment.of(one.config).do(name, seed, progress, about)
            print(f"{config.name}: {name}, {told(one.values)}, seed {seed}, held out: {said}", flush=True)
    for name in names:
        print(f"{config.name}: {name}: {found.taken(name)}", flush=True)


def _train(experiment: Experiment, names: Sequence[str], seeds: Sequence[int], progress: bool) -> None:
    """Does the runs that are missing, as was chosen."""
    config, found = experiment.config, experiment.choices
    about = {}
    for name in names:
        grid = config.variants[name].tries
        about[name] = {"chosen": dict(found.chosen(name).values), "tries": len(found.tries(name))} if grid else {}
    settled = experiment.of(found.settled(names))
    for seed, name in itertools.product(seeds, names):
        said = settled.do(name, seed, progress, about[name])
        print(f"{config.name}: {name}, seed {seed}: {said}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Does the runs that are missing."""
    made = parser()
    options = made.parse_args(arguments)
    torch.set_flush_denormal(True)  # squares of small gradients made AdamW on CPUs take a third of the step
    try:
        config = load(options.config, options.set)
        names = _names(config, options)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device: expected cpu, since torch finds no GPU, got 'cuda'")
        if options.costs < 0 or options.costs == 1:
            raise ConfigError(f"--costs: expected 2 or more, got {options.costs}")
        settings = Settings(
            options.device,
            options.compile,
            options.autocast,
            options.clock,
            options.probe,
            options.checkpoint,
            options.cold,
            not options.no_curve and (options.choose or not config.validation),
        )
        narrow = [name for name in names if any(one.subnetwork for _, one in config.variants[name].alternatives())]
        if narrow and options.compile and not options.cold and not options.report:
            raise ConfigError(
                f"--compile: expected --cold beside it, got {narrow[0]!r}, whose networks are made and compiled on the "
                "way: the seconds of all must have compiling in"
            )
        if narrow and options.costs:
            raise ConfigError(f"--costs: expected variants without subnetwork, got {narrow[0]!r}")
        experiment = Experiment(config, settings, options)
        if options.compile:
            torch._dynamo.config.recompile_limit = 64  # one graph for each phase of each run
        if options.device == "cuda":
            torch.backends.cudnn.benchmark = True
        if options.list:
            _list(experiment, names, options)
        elif options.choose:
            _choose(experiment, names, not options.quiet)
        elif options.costs or options.report:
            settled = experiment.of(experiment.choices.settled(names))
            if options.costs:
                print(f"{config.name}: {settled.measure(names, options.costs)}: measured", flush=True)
            for name in names if options.report else ():
                print(f"{config.name}: {name}\n\n{settled.report(name)}\n", flush=True)
        else:
            _train(experiment, names, options.seeds or config.seeds, not options.quiet)
    except ConfigError as error:
        made.exit(2, f"{error}\n")
    finally:
        torch.set_flush_denormal(False)


if __name__ == "__main__":
    main(sys.argv[1:])
