"""What a recipe returns: the model of each step, the way to the next one, and what is left at the end."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fx_approx._compat import forget_compiled
from fx_approx.compiler.transform import explain, report
from fx_approx.errors import NoEffectWarning, UnsupportedError
from fx_approx.policies.uniform import Exact
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.controls import (
    follow_modes,
    load_sampler_state_dict,
    sampler_state_dict,
    set_sampling,
    synchronize_scores,
)
from fx_approx.runtime.handle import GraphHandle, pieces_of
from fx_approx.savings.report import SavingsReport
from fx_approx.schedules.preserve import LEFT_WHOLE
from fx_approx.schedules.ratio_scheduler import RatioScheduler
from fx_approx.subnetworks.extract import extract
from fx_approx.subnetworks.from_backend import NothingToCutOutError
from fx_approx.subnetworks.stale import StaleWatch

_KEYS = {"steps", "made", "model", "sampler", "driver"}


@dataclasses.dataclass(frozen=True)
class Choice:
    """One thing that a recipe chose.

    Attributes:
        what: What it set, in words.
        why: What speaks for it.
    """

    what: str
    why: str


FROZEN = Choice("frozen weights are left whole", "they stay as they are, so nothing is set to zero in them")


class Driver(Protocol):
    """What moves the ratios: a :class:`fx_approx.schedules.RatioScheduler`, or :class:`Swapping`."""

    def step(self) -> None:
        """Goes on to the next step."""
        ...

    def changes_next(self) -> tuple[bool, bool]:
        """Whether the next step changes a ratio, and whether some layers read more then."""
        ...

    def get_last_ratio(self) -> dict[str, float]:
        """The ratio in force by layer, 1 where it is exact."""
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
        swaps: ``model`` is another module from phase to phase, as with an optimiser.
        rises: The next :meth:`step` makes layers read more, and sets to zero what they did not read.
        unserved: Why calls were not served by the graph that was made, if some were: layers are sampled one by one.
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
        made: Sequence[str] = (),
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
            made: What it was asked for, in words: a state of another one is refused.
        """
        self.name, self.steps, self.choices = name, steps, choices
        self.taken = 0
        self._made = (name, *made)
        self._full, self._handle, self._batch = full, handle, batch
        self._scheduler, self._phases = scheduler, phases
        self._driver: Driver | None = scheduler if phases is None else phases
        self._saved: dict[tuple[tuple[str, float], ...], float] = {}
        self._narrow: nn.Module | None = None
        self._pieces: Sequence[ApproxModule] = ()
        self._why_wide = ""
        self._said = self._asked = False
        self._watch = StaleWatch(full)
        self._tell_stale()

    def __repr__(self) -> str:
        return f"<{self.name}: {self.taken} of {self.steps} steps, {'exact' if self.exact else 'sampled'}>"

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
    def swaps(self) -> bool:
        return self._phases is not None

    @property
    def rises(self) -> bool:
        return self._driver is not None and self.taken + 1 < self.steps and self._driver.changes_next()[1]

    @property
    def unserved(self) -> tuple[str, ...]:
        return tuple(sorted(self._handle._fx_approx.warned)) if isinstance(self._handle, ApproxModule) else ()

    @property
    def model(self) -> nn.Module:
        self._asked = True
        return self._model

    @property
    def _model(self) -> nn.Module:
        if self._phases is not None:
            return self._phases.model
        return self._handle if isinstance(self._handle, nn.Module) else self._full

    def step(self) -> None:
        """Goes on; to be called after each step of the optimiser, by all ranks alike where there are several.

        Raises:
            ValueError: There are no more steps; or, with an optimiser, the full model was changed meanwhile.

        Warns:
            NoEffectWarning: ``model`` is in evaluation mode, in which nothing is sampled, or was never used; or, with
                an optimiser, that one does not step, or no narrow network can be made any more: the rest is exact.
        """
        if self.taken >= self.steps:
            raise ValueError(f"step: all {self.steps} steps of the recipe were taken; call finish()")
        if not (self.exact or self._said):
            self._check_sampled()
        if self._driver is not None and self.taken + 1 < self.steps:
            self._go_on(self._driver)
            self._tell_stale()
        self.taken += 1

    def _tell_stale(self) -> None:
        """The user's model, of which Phases may know another with the same weights, has old ones during a phase."""
        if self._phases is not None and isinstance(self._handle, nn.Module):
            self._watch.set(self._phases.subnetwork is not None)

    def _check_sampled(self) -> None:
        """Warns, once, where the step seems to have been exact though it should have sampled."""
        if not self._model.training:
            self._tell(
                "step: recipe.model is in evaluation mode, in which nothing is sampled and BatchNorm learns nothing; "
                "call recipe.model.train() before a step of training"
            )
        elif self.sampling and self._handle is self._model and not self._asked:
            self._tell("step: recipe.model was never used; call it in the place of the model, which trains exactly")

    def _tell(self, message: str) -> None:
        self._said = True
        warnings.warn(message, NoEffectWarning, stacklevel=4)

    def _go_on(self, driver: Driver) -> None:
        changed, rising = driver.changes_next()
        if changed and torch.distributed.is_available() and torch.distributed.is_initialized():
            assert self._handle is not None
            synchronize_scores(self._handle)  # ranks that choose others would set other weights to zero
        kept = self._narrow, self._why_wide
        if rising:
            self._keep_narrow()
        try:
            with warnings.catch_warnings():
                if FROZEN in self.choices:  # it was said at the beginning
                    warnings.filterwarnings("ignore", f".*{LEFT_WHOLE}", NoEffectWarning)
                driver.step()
        except BaseException as error:
            self._narrow, self._why_wide = kept
            whole = self._phases is not None and self._phases.subnetwork is None
            if not (whole and isinstance(error, NothingToCutOutError)):
                raise
            self._give_up(error)

    def _give_up(self, error: NothingToCutOutError) -> None:
        """Goes on exactly: what could be cut out at the beginning cannot be now, as where torch compiled too often."""
        self._why_wide = str(error)
        self.choices = (Choice("exact from here on: there is no narrow network any more", str(error)), *self.choices)
        self._handle = self._scheduler = self._phases = self._driver = None
        forget_compiled(self._full)
        warnings.warn(
            f"step: no narrow network can be made any more, so the recipe goes on exactly ({error}); hooks of the "
            "model, or inputs of many shapes, make torch.compile give up",
            NoEffectWarning,
            stacklevel=4,
        )

    def report(self) -> SavingsReport:
        """What each layer saves in a sampled step, whatever step this is, see :func:`fx_approx.report`.

        Where nothing is sampled, all layers are exact, and a note says why.

        Raises:
            ValueError: A backend has compiled nothing yet.
        """
        if self._handle is None:
            found = explain(self._full, Exact(), self._batch).report
            return dataclasses.replace(found, notes=(*found.notes, *(f"{one.what}: {one.why}" for one in self.choices)))
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

    def scalars(self) -> dict[str, float]:
        """Numbers of this step for a log, in training mode.

        Returns:
            ``mean_ratio``, the mean of the ratios in force, and ``saved_flops``, the share of the operations of a step
            that is saved, selections included.
        """
        ratios = {} if self._driver is None else self._driver.get_last_ratio()
        if self._handle is None or not ratios:
            return {"mean_ratio": 1.0, "saved_flops": 0.0}
        key = tuple(ratios.items())
        if key not in self._saved:
            self._saved[key] = report(self._handle).totals.saved_net
        return {"mean_ratio": sum(ratios.values()) / len(ratios), "saved_flops": self._saved[key]}

    def finish(self) -> nn.Module:
        """The user's own model, which has the trained weights; the recipe ends.

        Raises:
            ValueError: Steps are left: the exact ones at the end are part of the recipe.
        """
        if self.taken < self.steps:
            raise ValueError(f"finish: {self.steps - self.taken} of {self.steps} steps are left; take them, or ship()")
        if self._phases is not None:
            self._phases.finish()
            self._tell_stale()
        elif self._handle is not None:
            set_sampling(self._handle, enabled=False)
        if isinstance(self._handle, nn.Module):
            follow_modes(self._full, self._handle)
        elif self._handle is not None:
            self._pieces = pieces_of(self._handle)  # the backend has them only as long as the model is compiled
            forget_compiled(self._full)
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
            why = self._why_wide or ("nothing was sampled yet" if self._handle is not None else "nothing is sampled")
            if self._handle is not None and any(piece._fx_approx.tokens for piece in pieces_of(self._handle)):
                why = "tokens are left out in training, and a narrow network leaves out channels; finetune() makes one"
            raise UnsupportedError(f"ship: there is no narrow network: {why}")
        return copy.deepcopy(self._narrow)

    def state_dict(self, *, model: bool = True) -> dict[str, Any]:
        """All that goes on from here, but for the optimiser's state; its tensors are the model's own, not copies.

        Args:
            model: With the model's state; False where it is stored beside this. Without it, and without an optimiser,
                this is plain values for JSON.
        """
        return {
            "steps": (self.taken, self.steps),
            "made": list(self._made),
            **({"model": self._full.state_dict()} if model else {}),
            "sampler": {} if self._handle is None else sampler_state_dict(self._handle),
            "driver": {} if self._driver is None else self._driver.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another such recipe was; the optimiser loads its own state after this.

        Where the state has no model's, the model has loaded its own before this.

        Raises:
            ValueError: ``state`` is none of a recipe, or of one that was made otherwise, or of another model. Nothing
                is changed then.
        """
        if set(state) | {"model"} != _KEYS:
            raise ValueError(f"state: expected what Recipe.state_dict gives, got the keys {sorted(map(str, state))}")
        taken, steps = state["steps"]
        if steps != self.steps:
            raise ValueError(f"state: expected that of a recipe of {self.steps} steps, got one of {steps}")
        if bool(state["driver"]) != (self._driver is not None):
            one, other, remedy = (
                ("samples", f"does not ({self.choices[0].what})", "make it with check=False")
                if state["driver"]
                else ("was exact", "samples", "train the model itself, as that one did")
            )
            raise ValueError(
                f"state: of a recipe that {one}, and this one {other}; {remedy}: measurements differ from run to run"
            )
        if tuple(state["made"]) != self._made:
            own, other = "; ".join(self._made), "; ".join(map(str, state["made"]))
            raise ValueError(
                f"state: expected that of a recipe that was made alike ({own}), got one of another ({other})"
            )
        if "model" in state:
            _check_tensors(self._full, state["model"])
            self._full.load_state_dict(state["model"])
        if self._handle is not None and self._driver is not None:
            load_sampler_state_dict(self._handle, state["sampler"])
            self._driver.load_state_dict(state["driver"])
        self.taken = taken
        self._tell_stale()
        self._narrow, self._why_wide = None, ""
        if self._driver is not None and taken and not self.sampling:
            self._why_wide = "it goes on from a state in which nothing was sampled, or no longer"

    def _keep_narrow(self) -> None:
        """Keeps the narrow network of this step, for :meth:`ship`."""
        assert self._handle is not None
        try:
            if self._phases is not None:
                assert self._phases.subnetwork is not None
                made = copy.deepcopy(self._phases.subnetwork)
            else:
                with _own_forward(self._model):
                    made = extract(self._handle, example_inputs=self._batch)
        except Exception as error:  # whatever it is, the training goes on without one
            self._why_wide = f"{type(error).__name__}: {error}"
        else:
            if _size(made) < _size(self._full):
                self._narrow = made
            else:
                self._why_wide = "; ".join(["no layer of it is narrower", *self.unserved])


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _check_tensors(model: nn.Module, state: Mapping[str, Any]) -> None:
    """ValueError unless ``state`` has what ``model`` has, by names and shapes."""
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state.keys())
    for name, value in own.items():
        if not wrong and isinstance(value, Tensor) and value.shape != getattr(state[name], "shape", None):
            wrong = [name]
    if wrong:
        raise ValueError(f"state: of another model: {wrong[0]} is missing, unknown or of another shape")


@contextlib.contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Takes off what a trainer has put around the forward of this instance for mixed precision, and on again."""
    own = vars(model)
    taken = {name: own.pop(name) for name in ("forward", "_original_forward") if "_original_forward" in own}
    try:
        yield
    finally:
        own.update(taken)
