"""What a recipe returns: the model of each step, the way to the next one, and what is left at the end."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from fx_approx.compiler.transform import report
from fx_approx.errors import UnsupportedError
from fx_approx.runtime.controls import load_sampler_state_dict, sampler_state_dict, set_sampling
from fx_approx.runtime.handle import GraphHandle, pieces_of
from fx_approx.savings.report import SavingsReport
from fx_approx.schedules.ratio_scheduler import RatioScheduler
from fx_approx.subnetworks.extract import extract

_KEYS = {"steps", "model", "sampler", "driver"}


@dataclasses.dataclass(frozen=True)
class Choice:
    """One thing that a recipe chose.

    Attributes:
        what: What it set, in words.
        why: What speaks for it.
    """

    what: str
    why: str


class Driver(Protocol):
    """What moves the ratios: a :class:`fx_approx.schedules.RatioScheduler`, or :class:`Swapping`."""

    def step(self) -> None:
        """Goes on to the next step."""
        ...

    def changes_next(self) -> tuple[bool, bool]:
        """Whether the next step changes a ratio, and whether some layers read more then."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where it is."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        ...


class Swapping(Driver, Protocol):
    """What swaps between the full model and narrow networks: :class:`fx_approx.subnetworks.Phases`."""

    @property
    def model(self) -> nn.Module:
        """What is to be called in this step."""
        ...

    @property
    def subnetwork(self) -> nn.Module | None:
        """The narrow network of this step; None where the full model trains."""
        ...

    def finish(self) -> nn.Module:
        """Writes it back."""
        ...


class Recipe:
    """A training that a function of :mod:`fx_approx.recipes` has set up; ``print(recipe)`` says how, and why.

    ::

        recipe = fx_approx.recipes.finetune(model, images, steps=1000, optimizer=optimizer)
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(recipe.model(images), labels).backward()
            optimizer.step()
            recipe.step()
        model = recipe.finish()

    Attributes:
        model: What is to be called, and trained, in this step.
        steps: How many steps the training has.
        taken: How many were taken.
        choices: What was chosen, and why.
        exact: The recipe samples nothing: ``model`` is the user's own.
        sampling: This step is sampled, and not one of the exact ones.
    """

    def __init__(
        self,
        name: str,
        full: nn.Module,
        steps: int,
        choices: tuple[Choice, ...],
        handle: nn.Module | GraphHandle | None = None,
        scheduler: RatioScheduler | None = None,
        phases: Swapping | None = None,
        batch: Any = None,
    ) -> None:
        """Made by the functions of :mod:`fx_approx.recipes`.

        Args:
            name: Of the function.
            full: The user's model, on whose parameters and buffers everything works.
            steps: How many there are.
            choices: What was chosen.
            handle: The transformed model, or the backend; None where nothing is sampled.
            scheduler: What moves its ratios, where the selections stay in the graph.
            phases: The same, where narrow networks train.
            batch: Example inputs, for subnetworks that run the model's own Python.
        """
        self.name, self.steps, self.choices = name, steps, choices
        self.taken = 0
        self._full, self._handle, self._batch = full, handle, batch
        self._scheduler, self._phases = scheduler, phases
        self._driver: Driver | None = scheduler if phases is None else phases
        self._narrow: nn.Module | None = None
        self._why_wide = ""

    def __str__(self) -> str:
        head = f"{self.name}: {self.steps} steps of {type(self._full).__name__}"
        return "\n".join([head, *(f"  {one.what}: {one.why}" for one in self.choices)])

    @property
    def exact(self) -> bool:
        return self._handle is None

    @property
    def sampling(self) -> bool:
        if self._phases is not None:
            return self._phases.subnetwork is not None
        ratios = {} if self._scheduler is None else self._scheduler.get_last_ratio()
        return any(ratio < 1 for ratio in ratios.values())

    @property
    def model(self) -> nn.Module:
        if self._phases is not None:
            return self._phases.model
        return self._handle if isinstance(self._handle, nn.Module) else self._full

    def step(self) -> None:
        """Goes on; to be called after each step of the optimiser.

        Raises:
            ValueError: There are no more steps; or, with an optimiser, the full model was changed meanwhile.
        """
        if self.taken >= self.steps:
            raise ValueError(f"step: all {self.steps} steps of the recipe were taken; call finish()")
        self.taken += 1
        if self._driver is None or self.taken == self.steps:
            return
        if self._driver.changes_next()[1]:
            self._keep_narrow()
        self._driver.step()

    def report(self) -> SavingsReport:
        """What each layer saves in a sampled step, whatever step this is, see :func:`fx_approx.report`.

        Raises:
            ValueError: Nothing is sampled (``print(recipe)`` says why), or a backend has compiled nothing yet.
        """
        if self._handle is None:
            raise ValueError(f"report: nothing is sampled. {self.choices[-1].what}: {self.choices[-1].why}")
        runtimes = [piece._fx_approx for piece in pieces_of(self._handle)]
        switches: list[Any] = [one for runtime in runtimes for one in (*runtime.selectors.values(), *runtime.tokens)]
        before = [one.enabled for one in switches]
        try:
            for one in switches:
                one.enabled = True
            return report(self._handle)
        finally:
            for one, enabled in zip(switches, before, strict=True):
                one.enabled = enabled

    def finish(self) -> nn.Module:
        """The user's own model, which has the trained weights; the recipe ends.

        Raises:
            ValueError: Steps are left: the exact ones at the end are part of the recipe.
        """
        if self.taken < self.steps:
            raise ValueError(f"finish: {self.steps - self.taken} of {self.steps} steps are left; take them, or ship()")
        if self._phases is not None:
            self._phases.finish()
        elif self._handle is not None:
            set_sampling(self._handle, enabled=False)
        if isinstance(self._handle, nn.Module):
            self._full.train(self._handle.training)
        return self._full

    def ship(self) -> nn.Module:
        """A narrow network of its own that computes what was trained before the exact steps at the end, or is now.

        It shares no memory with the model; :func:`fx_approx.subnetworks.save` writes it to a file.

        Raises:
            UnsupportedError: There is none; says why.
        """
        if self.sampling:
            self._keep_narrow()
        if self._narrow is None:
            why = self._why_wide or "nothing was sampled yet" if self._handle is not None else "nothing is sampled"
            raise UnsupportedError(f"ship: there is no narrow network: {why}")
        return copy.deepcopy(self._narrow)

    def state_dict(self) -> dict[str, Any]:
        """The model's state and all that goes on from here, but for the optimiser's."""
        return {
            "steps": (self.taken, self.steps),
            "model": self._full.state_dict(),
            "sampler": {} if self._handle is None else sampler_state_dict(self._handle),
            "driver": {} if self._driver is None else self._driver.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another such recipe was; the optimiser loads its own state after this.

        Raises:
            ValueError: ``state`` is none of a recipe, or of one with another number of steps.
        """
        if set(state) != _KEYS:
            raise ValueError(f"state: expected what Recipe.state_dict gives, got the keys {sorted(map(str, state))}")
        taken, steps = state["steps"]
        if steps != self.steps or bool(state["driver"]) != (self._driver is not None):
            raise ValueError(
                f"state: expected that of a recipe of {self.steps} steps with the same choices, got {steps}"
            )
        self._full.load_state_dict(state["model"])
        if self._handle is not None and self._driver is not None:
            load_sampler_state_dict(self._handle, state["sampler"])
            self._driver.load_state_dict(state["driver"])
        self.taken = taken

    def _keep_narrow(self) -> None:
        """Keeps the narrow network of this step, for :meth:`ship`."""
        assert self._handle is not None
        try:
            if self._phases is not None:
                assert self._phases.subnetwork is not None
                made = copy.deepcopy(self._phases.subnetwork)
            else:
                made = extract(self._handle, example_inputs=self._batch)
        except (UnsupportedError, ValueError) as error:
            self._why_wide = str(error)
        else:
            self._narrow = made
