"""One run: builds the model of a variant, counts and times its steps, trains it, evaluates it, and can be resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import itertools
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import costs
import narrow
import reading
import torch
import torch.nn.functional as F
import variants
from config import Config, Variant, expect
from images import Source
from networks import Network, adopt
from records import Records
from torch import Tensor, nn
from tqdm import tqdm

import fx_approx
from fx_approx.utils.timing import in_turn, synchronise

RECALIBRATION = 20
"""Batches that the BatchNorm statistics are re-estimated on."""

_ENDS = 10  # steps whose mean is the loss at either end of an epoch


@dataclasses.dataclass(frozen=True)
class Settings:
    """How runs are computed, whatever they are.

    Attributes:
        device: ``cpu`` or ``cuda``.
        compile: Under ``torch.compile``.
        autocast: ``bfloat16``, or none for single precision.
        clock: ``wall``, or ``cpu``: the processor time of this process, for a machine that others use, too.
        probe: Steps of each phase that are timed before the training.
        checkpoint: Seconds between two checkpoints, at ends of epochs.
        cold: No step is taken before the training: its seconds have everything in, compiling, too.
        curve: Accuracy at the end of every epoch, and not of the last one alone.
    """

    device: str = "cpu"
    compile: bool = False
    autocast: str = ""
    clock: str = "wall"
    probe: int = 10
    checkpoint: float = 30.0
    cold: bool = False
    curve: bool = True

    @property
    def identity(self) -> dict[str, Any]:
        """What results may depend on."""
        cold = {"cold": True} if self.cold else {}
        return {"device": self.device, "compile": self.compile, "autocast": self.autocast, **cold}

    def now(self) -> float:
        """Seconds on the clock."""
        return time.process_time() if self.clock == "cpu" else time.perf_counter()

    def spent(self) -> dict[str, float]:
        """Seconds on the clock, with those of compilers that were started where they count, and on the wall."""
        times = os.times()
        ended = times.children_user + times.children_system if self.cold and self.clock == "cpu" else 0.0
        return {"seconds": self.now() + ended, "wall_seconds": time.perf_counter()}


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long a run is and how wide its network.

    Attributes:
        steps: Of this training.
        width: Factor on the width.
        target: What a baseline was to cost, in FLOPs or seconds; None for others.
    """

    steps: int
    width: float
    target: float | None = None


def freeze(model: nn.Module, globs: Sequence[str]) -> None:
    """Takes the parameters that any of ``globs`` matches out of the training.

    Raises:
        ValueError: One matches none, or together they leave nothing to train.
    """
    for glob in globs:
        found = [one for name, one in model.named_parameters() if fnmatch.fnmatchcase(name, glob)]
        expect("frozen", glob, f"a glob on parameters such as {next(iter(model.state_dict()))}", bool(found))
        for one in found:
            one.requires_grad_(False)
    trained = any(one.requires_grad for one in model.parameters())
    expect("frozen", list(globs), "globs that leave parameters to train", trained)


def drop_inputs(model: nn.Module, rates: Mapping[str, float]) -> None:
    """Puts dropout, at the rate of its glob, in front of layers; in evaluation there is none.

    Raises:
        ValueError: A glob matches no layer.
    """
    layers = {name: layer for name, layer in model.named_modules() if [*layer.parameters(recurse=False)]}
    for glob, rate in rates.items():
        found = fnmatch.filter(layers, glob)
        expect("dropout", glob, f"a glob on layers such as {next(iter(layers))}", bool(found))
        for name in found:
            layers[name].register_forward_pre_hook(functools.partial(_dropped, rate))


def _dropped(rate: float, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return F.dropout(inputs[0], rate, layer.training), *inputs[1:]


class Run:
    """A variant of a configuration under a seed."""

    def __init__(
        self,
        config: Config,
        name: str,
        seed: int,
        source: Source,
        network: Network,
        settings: Settings,
        budget: Budget,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        """Builds the model."""
        self.config, self.name, self.seed, self.source = config, name, seed, source
        self.settings, self.budget = settings, budget
        self.device, self.training = torch.device(settings.device), config.training
        self.variant: Variant = config.variants[name]
        self.per_epoch = source.size // self.training.batch
        x, y = next(iter(source.epoch(seed, 0, self.training.batch)))
        self.example = x, y
        torch.manual_seed(seed)
        model = network.build(source.classes, x.cpu(), budget.width)
        if weights is not None:
            adopt(model, weights)
        freeze(model, self.variant.frozen)
        drop_inputs(model, self.variant.dropout)
        model = model.to(self.device).train()
        if x.dim() == 4:
            model = model.to(memory_format=torch.channels_last)
        policy = variants.policy_of(config, name, settings.compile)
        self.prepared, self.errors = {"seconds": 0.0, "wall_seconds": 0.0, "flops": 0.0}, {}
        if self.variant.sensitivity:
            policy = self._with_sensitivity(policy, model, network)
        with self._clocked(self.prepared, settings.cold):
            self.model = variants.approximate(model, policy, x, self.variant, seed)
        self.sampled = policy is not None
        self.layers = sum(bool(row.samples) for row in fx_approx.report(self.model).rows) if self.sampled else 0
        schedule = variants.schedule_of(config, name, budget.steps)
        self.phases = variants.phases(self.variant, schedule, budget.steps)
        self.peak = self.training.rate * self.variant.rate
        self.optimizer = costs.optimizer_of(self.training, self.model, self.peak)
        self.ratios: variants.Ratios | narrow.Subnetworks
        if self.variant.subnetwork:
            self.ratios = narrow.Subnetworks(self.model, self.optimizer, schedule, self.variant, budget.steps, x)
        else:
            self.ratios = variants.Ratios(self.model, schedule, self.variant.preserve)
        sampler = reading.sampler_of(config, name, source.size, seed)
        epochs, batch = int(self.training.epochs), self.training.batch
        self.reading = None if sampler is None else reading.Reading(sampler, epochs, batch)
        names = self.phases.names
        self._ships = max((step for step, name in enumerate(names, 1) if name != variants.EXACT), default=0)
        if settings.compile:
            torch._dynamo.reset()  # graphs of the runs before count towards its limit
        self.call = self._compiled(self.model)
        self._narrow: tuple[nn.Module, Callable[..., Any]] | None = None
        self.norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.model.modules())
        self.flops: dict[str, float] = {}
        self.forward_flops = 0.0
        self.seconds: dict[str, list[float]] = {}
        self.warm_seconds = 0.0

    # ---- before the training

    def _with_sensitivity(self, policy: Any, model: nn.Module, network: Network) -> Any:
        count = self.variant.sensitivity
        expect("sensitivity", count, f"at most the {self.per_epoch} batches of an epoch", count <= self.per_epoch)
        with self._clocked(self.prepared):
            batches = list(itertools.islice(self.source.epoch(self.seed, 0, self.training.batch), count))
            policy, steps = variants.with_sensitivity(policy, model, batches, self.training.label_smoothing)
        self.errors = dict(policy.sensitivity.errors)
        x, y = self.example
        each, _ = costs.exact_flops(network, self.source.classes, x, y, self.budget.width)
        self.prepared["flops"] = steps * each
        return policy

    def measure(self, count: bool = True) -> None:
        """Counts and times a step of each phase, and compiles on the way; everything is as before afterwards.

        A cold run is only counted. Of narrow networks one of each ratio is cut out, which is not in its time.
        """
        start = time.perf_counter()
        kept = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        sampling = fx_approx.sampler_state_dict(self.model) if self.sampled else None
        optimizers: dict[nn.Module, torch.optim.Optimizer] = {}
        if count:
            self.count()
        x, y = self.example

        def step(phase: str) -> None:
            self.ratios.jump(self.phases.first[phase])
            trained = self.ratios.model
            if trained not in optimizers:
                optimizers[trained] = costs.optimizer_of(self.training, trained, 0.0)
            self.step(x, y, optimizers[trained])

        steps = [functools.partial(step, phase) for phase in self.phases.first]
        if not self.settings.cold and (self.settings.probe or self.settings.compile):
            taken = in_turn(steps, self.device, self.settings.probe, warmup=costs.WARM, clock=self.settings.now)
            phases = zip(self.phases.first, taken, strict=True)
            self.seconds = {phase: costs.quartiles(own) for phase, own in phases if len(own) > 1}
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                value.copy_(kept[name])
        if sampling is not None:
            fx_approx.load_sampler_state_dict(self.model, sampling)
        self.ratios.jump(0)
        self.model.zero_grad(set_to_none=True)
        self.warm_seconds = time.perf_counter() - start

    def count(self) -> None:
        """Counts the operations of a step of each phase."""
        x, y = self.example
        random = "bernoulli" in repr(self.variant.policy)
        for phase, first in self.phases.first.items():
            self.ratios.jump(first)
            model = self.ratios.model
            if phase != variants.EXACT and self.sampled and not self.variant.subnetwork:
                costs.counted(model, x, y)  # stale scores begin with an exact step
            self.flops[phase], forward = costs.counted(model, x, y, 8 if random else 1)
            self.forward_flops = max(self.forward_flops, forward)

    # ---- the training

    def train(self, records: Records, key: str, progress: bool = True) -> dict[str, Any]:
        """Trains from the last checkpoint, or the beginning, to the end; returns what is to be recorded."""
        warnings.filterwarnings("ignore", category=fx_approx.errors.BatchNormWarning)  # both figures are recorded
        self.measure()
        state = records.load(key) or {"step": 0, **self.prepared, "epochs": [], "diverged": False}
        if state["step"]:
            self._resume(state)
        else:
            self.ratios.begin()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        saved = time.perf_counter()
        label = f"{self.config.name}: {self.name}, seed {self.seed}"
        with tqdm(total=self.budget.steps, initial=state["step"], desc=label, unit="step", disable=not progress) as bar:
            while not (self._over(state["step"], len(state["epochs"])) or state["diverged"]):
                self._epoch(state, bar)
                if time.perf_counter() - saved >= self.settings.checkpoint:
                    self._save(records, key, state)
                    saved = time.perf_counter()
        return self._finish(state)

    def _over(self, step: int, epochs: int) -> bool:
        """Whether a training ends behind so many steps and epochs."""
        return step >= self.budget.steps if self.reading is None else epochs >= self.reading.epochs

    def _epoch(self, state: dict[str, Any], bar: tqdm) -> None:
        number, losses = len(state["epochs"]), []
        torch.manual_seed(self.seed * 100_003 + number)
        with self._clocked(state):
            self._steps(state, number, losses, bar)
        each = torch.stack(losses)
        mean = float(each.mean())
        state["diverged"] = not math.isfinite(mean)
        ends = {"first_loss": float(each[:_ENDS].mean()), "last_loss": float(each[-_ENDS:].mean())}
        entry = {"step": state["step"], "loss": mean, **ends, "seconds": state["seconds"], "flops": state["flops"]}
        if not state["diverged"] and (self.settings.curve or self._over(state["step"], number + 1)):
            entry.update(self._evaluations(number, state["step"]))
        state["epochs"].append(entry)
        bar.set_postfix(loss=f"{mean:.3f}", accuracy=f"{entry.get('accuracy', math.nan):.2f}")

    @contextlib.contextmanager
    def _clocked(self, spent: dict[str, Any], counts: int = 1) -> Iterator[None]:
        """Adds the time that passes to ``spent``; takes it off where it ``counts`` -1."""
        synchronise(self.device)
        start = self.settings.spent()
        yield
        synchronise(self.device)
        for key, now in self.settings.spent().items():
            spent[key] = spent.get(key, 0.0) + counts * (now - start[key])

    def _steps(self, state: dict[str, Any], number: int, losses: list[Tensor], bar: tqdm) -> None:
        taught: tuple[Tensor, ...] = ()
        order = None if self.reading is None else self.reading.order(number)
        for place, (x, y) in enumerate(self.source.epoch(self.seed, number, self.training.batch, order)):
            step = state["step"]
            if step == self.budget.steps:
                break
            exact = self.phases.names[step] == variants.EXACT
            x, y, *soft = taught if taught and not exact else (x, y)
            for group in self.optimizer.param_groups:
                group["lr"] = self.peak * self._rate(step, place)
            loss, output = self._learn(x, y, place, *soft)
            losses.append(loss)
            taught = (x, y, output.float().softmax(-1)) if self.variant.distill and exact else ()
            if self.variant.subnetwork and step + 1 == self._ships:
                with self._clocked(state, -1):
                    state["shipped"] = self._shipped()
            self.ratios.step()
            state["flops"] += self.flops[self.phases.names[step]]
            state["step"] = step + 1
            bar.update()

    def _rate(self, step: int, place: int) -> float:
        """The learning rate of a step, the one at ``place`` in its epoch, as a share of the peak."""
        steps = self.budget.steps
        return costs.rate_at(self.training, step if self.reading is None else self.reading.share(place) * steps, steps)

    def _learn(self, x: Tensor, y: Tensor, place: int, soft: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A step of training; the sampler of the examples, if there is one, is told their losses."""
        if self.reading is None:
            return self.step(x, y, self.optimizer, soft)
        index, weights = self.reading.batch(place)
        loss, output = self.step(x, y, self.optimizer, soft, weights)
        self.reading.sampler.update(index, F.cross_entropy(output.float(), y, reduction="none"))
        return loss, output

    def step(
        self,
        x: Tensor,
        y: Tensor,
        optimizer: torch.optim.Optimizer,
        soft: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step of training, with probabilities ``soft`` of the classes beside the labels; loss and answers.

        ``weights`` are those of the examples.
        """
        optimizer.zero_grad(set_to_none=True)
        call = self._called()
        with self._precision():
            output = call(x)
        loss = costs.loss_of(output, y, self.training.label_smoothing, weights)
        if soft is not None:
            loss = torch.lerp(
                loss, F.cross_entropy(output.flatten(0, -2).float(), soft.flatten(0, -2)), self.variant.distill
            )
        loss.backward()
        if self.training.clip:
            nn.utils.clip_grad_norm_(self.ratios.model.parameters(), self.training.clip)
        optimizer.step()
        return loss.detach(), output.detach()

    def _compiled(self, model: nn.Module) -> Callable[..., Any]:
        return torch.compile(model, dynamic=False) if self.settings.compile else model

    def _called(self) -> Callable[..., Any]:
        """What runs in this step; a narrow network is compiled once, however often it is selected anew."""
        model = self.ratios.model
        if model is self.model:
            return self.call
        if self._narrow is None or self._narrow[0] is not model:
            self._narrow = model, self._compiled(model)
        return self._narrow[1]

    def _shipped(self) -> dict[str, Any]:
        """Of the narrow network as it is."""
        with self._precision():
            found = narrow.shipped(self.model, self.ratios.model, self.example[0], self.device, self.settings.now)
        return {**self.evaluate(), **found}

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if not self.settings.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.settings.autocast))

    # ---- accuracy

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Accuracy in per cent and loss of what is trained on the test examples, in evaluation mode, which is exact."""
        model = self.ratios.model.eval()
        right = total = 0
        loss = torch.zeros((), device=self.device)
        for x, y in self.source.test():
            with self._precision():
                # Compiled, each size of a batch would be one more graph.
                output = model(x)
            right += (output.argmax(-1) == y).sum()
            loss += costs.loss_of(output, y) * y.numel()
            total += y.numel()
        model.train()
        return {"accuracy": 100 * float(right) / total, "test_loss": float(loss) / total}

    def _evaluations(self, number: int, step: int) -> dict[str, float]:
        """As trained; where statistics come from sampled steps, also after re-estimating them, for the curve."""
        found = self.evaluate()
        recent = self.phases.names[max(0, step - RECALIBRATION) : step]
        sampled = self.sampled and not self.variant.subnetwork  # a narrow network's statistics are its own
        if self.norms and sampled and set(recent) != {variants.EXACT} and step < self.budget.steps:
            buffers = {name: value.clone() for name, value in self.model.named_buffers()}
            self._recalibrate(number)
            found["recalibrated"] = self.evaluate()["accuracy"]
            for name, value in self.model.named_buffers():
                value.copy_(buffers[name])
        return found

    def _recalibrate(self, number: int) -> None:
        with self._precision():
            fx_approx.recalibrate_batchnorm(self.model, self._fresh(number))

    def _fresh(self, number: int) -> Iterator[Tensor]:
        count = 0
        while count < RECALIBRATION:  # a small set is gone through again
            for x, _ in self.source.epoch(self.seed + 1, number + count, self.training.batch):
                yield x
                count += 1
                if count == RECALIBRATION:
                    return

    # ---- state

    def _save(self, records: Records, key: str, state: dict[str, Any]) -> None:
        sampling = fx_approx.sampler_state_dict(self.model) if self.sampled else None
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "sampling": sampling}
        parts["ratios"] = self.ratios.state()
        if self.reading is not None:
            parts["reading"] = self.reading.sampler.state_dict()
        records.save(key, {**state, **parts})

    def _resume(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state.pop("model"))
        sampling = state.pop("sampling")
        if sampling is not None:
            fx_approx.load_sampler_state_dict(self.model, sampling)
        self.ratios.resume(state["step"], state.pop("ratios", None))
        if self.reading is not None:
            self.reading.sampler.load_state_dict(state.pop("reading"))
        self.optimizer.load_state_dict(state.pop("optimizer"))
        for group in self.optimizer.param_groups:
            group["fused"] = True  # older checkpoints say otherwise

    def _finish(self, state: dict[str, Any]) -> dict[str, Any]:
        last = state["epochs"][-1]
        final: dict[str, Any] = {"accuracy": last.get("accuracy"), "test_loss": last.get("test_loss")}
        recalibration = 0.0
        if self.norms and not state["diverged"]:
            self._recalibrate(len(state["epochs"]))
            final["recalibrated"] = self.evaluate()["accuracy"]
            recalibration = RECALIBRATION * self.forward_flops
        cuda = self.device.type == "cuda"
        return {
            "final": final,
            "diverged": state["diverged"],
            "epochs": state["epochs"],
            "seconds": state["seconds"],
            "wall_seconds": state["wall_seconds"],
            "clock": self.settings.clock,
            "flops": state["flops"],
            "recalibration_flops": recalibration,
            "step_flops": self.flops,
            "step_ms": {phase: [1000 * q for q in own] for phase, own in self.seconds.items()},
            "phases": self.phases.counts,
            **({} if self.settings.cold else {"warm_seconds": self.warm_seconds}),
            **({"shipped": state["shipped"]} if "shipped" in state else {}),
            "parameters": sum(one.numel() for one in self.model.parameters()),
            "peak_memory": torch.cuda.max_memory_allocated(self.device) if cuda else None,
            "sampled_layers": self.layers,
            "prepared": self.prepared,
            "errors": self.errors,
        }
