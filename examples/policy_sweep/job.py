"""What the runs of a sweep do: build a model, train it, evaluate it, time its steps."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import functools
import hashlib
import itertools
import math
import random
import re
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fx_approx._compat import tree_map_only
from fx_approx.compiler.transform import report, transform
from fx_approx.core.plan import Policy
from fx_approx.errors import NoEffectWarning
from fx_approx.runtime.approx_module import find
from fx_approx.runtime.batchnorm import tracked
from fx_approx.runtime.controls import recalibrate_batchnorm
from fx_approx.runtime.step_gradient import Loss, scalar
from fx_approx.runtime.validation import check_model
from fx_approx.utils.timing import in_turn

ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")
"""What Python writes for an object that has no ``repr`` of its own; another in each process."""

_WARM = 3


@dataclasses.dataclass(frozen=True)
class Job:
    """All that the runs of a sweep have in common; the fields are those of ``sweep``."""

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
        """A fresh exact model in training mode (parts of it that are not, are not), random states those of ``seed``."""
        torch.manual_seed(seed)
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed % 2**32)
        made: Any = copy.deepcopy(self.model) if isinstance(self.model, nn.Module) else self.model()
        if not isinstance(made, nn.Module):
            raise TypeError(f"model: expected the function to make a module, got {made!r}")
        return made if made.training else made.train()

    def described(self) -> str:
        """What tells models, optimisers and example inputs apart: structure, first values, settings.

        Raises:
            TypeError: ``optimizer`` makes something else.
        """
        model = self.build(0)
        check_model(model)
        optimizer = self._made(model)
        shapes = tree_map_only(Tensor, lambda t: (tuple(t.shape), str(t.dtype), str(t.device)), self.example_inputs)
        words = [type(model).__qualname__, *map(repr, (model, optimizer, shapes))]
        found = hashlib.sha256(ADDRESS.sub("", "\n".join(words)).encode())
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            found.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.device}".encode())
            if tensor.layout is torch.strided:
                plain = tensor.detach().cpu().contiguous()
                found.update(ctypes.string_at(plain.data_ptr(), plain.nbytes))
        return found.hexdigest()

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

    def rehearse(self, seed: int, policies: Mapping[str, Policy | None]) -> None:
        """Each part of a run once, so that what cannot work is an error before any training."""
        for name, policy in policies.items():
            try:
                model = self.approximate(self.build(seed), policy, seed)
                batch = next(self.batches(seed))
                self._stepper(model, compiled=False)(batch)
                self._recalibrate(model, policy, [batch])
            except Exception as error:
                error.add_note(f"(in a first step with policies[{name!r}])")
                raise
        self._accuracy(self.build(seed))

    def train(self, policy: Policy | None, seed: int) -> dict[str, Any]:
        """One training: accuracy, loss, and whether it diverged."""
        model = self.approximate(self.build(seed), policy, seed)
        step, value = self._stepper(model, self.compile), math.nan
        for batch in itertools.islice(self.batches(seed), self.steps):
            value = step(batch)
            if not math.isfinite(value):
                return {"accuracy": None, "loss": None, "diverged": True}
        self._recalibrate(model, policy, itertools.islice(self.batches(seed), self.recalibration))
        accuracy = self._accuracy(model)
        if not math.isfinite(accuracy):  # the last step can be the one that breaks it
            return {"accuracy": None, "loss": value, "diverged": True}
        return {"accuracy": accuracy, "loss": value, "diverged": False}

    def time(self, policy: Policy | None) -> dict[str, Any]:
        """Steps in turn with exact ones, on one batch: one of another shape would be one more compilation."""
        models = [self.build(0), self.approximate(self.build(0), policy, 0)]
        steppers = [self._stepper(model, self.compile) for model in models]
        batch, device = next(self.batches(0)), next(models[0].parameters()).device
        steps = [functools.partial(step, batch) for step in steppers]
        times = in_turn(steps, device, self.repeats, warmup=_WARM, back_and_forth=True)
        ratios = [exact / own for exact, own in zip(*times, strict=True)]
        totals = None if policy is None else report(models[1])
        return {
            "seconds": statistics.median(times[1]),
            "speedup": [1.0] * 3 if policy is None else statistics.quantiles(ratios, n=4, method="inclusive"),
            "saved": 0.0 if totals is None else totals.totals.saved_net,
            "sampled": 0 if totals is None else sum(1 for row in totals.rows if row.samples),
        }

    def _recalibrate(self, model: nn.Module, policy: Policy | None, batches: Iterable[Any]) -> None:
        """Mends the BatchNorm statistics of a model that was sampled."""
        if policy is not None and self.recalibration and find(model)._fx_approx.samples and tracked(model):
            recalibrate_batchnorm(model, batches)

    def _accuracy(self, model: nn.Module) -> float:
        with torch.no_grad():
            found: Any = self.evaluate(model.eval())
        if isinstance(found, Tensor) and found.numel() == 1:
            found = found.item()
        try:
            if isinstance(found, (bool, str, bytes)):
                raise TypeError
            return float(found)
        except (TypeError, ValueError):
            raise ValueError(f"evaluate: expected it to return a number, got {found!r}") from None

    def _made(self, model: nn.Module) -> torch.optim.Optimizer:
        made: Any = self.optimizer(model.parameters())
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected the function to make a torch.optim.Optimizer, got {made!r}")
        return made

    def _stepper(self, model: nn.Module, compiled: bool) -> Callable[[Any], float]:
        called: Any = torch.compile(model, dynamic=False) if compiled else model
        optimizer = self._made(model)

        def step(batch: Any) -> float:
            optimizer.zero_grad()
            value = scalar(self.loss, called, batch)
            value.backward()
            optimizer.step()
            return float(value.detach())

        return step
