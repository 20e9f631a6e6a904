"""Configuration files of the experiments: TOML to frozen models, each checked by name, value and what is right."""

from __future__ import annotations

import contextlib
import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Names = Annotated[tuple[str, ...], Strict(False)]
"""The tuples of a model are the lists of TOML."""


class ConfigError(ValueError):
    """A configuration that cannot be run: names the key, the value, and what would be right."""


def expect(name: str, value: Any, right: str, holds: bool) -> None:
    """ValueError that names ``name``, ``value`` and what is ``right`` unless it ``holds``."""
    if not holds:
        raise ValueError(f"{name}: expected {right}, got {value!r}")


def one_of(name: str, value: Any, known: Sequence[str]) -> None:
    """ValueError unless ``value`` is one of ``known``."""
    expect(name, value, f"one of {', '.join(known)}", value in known)


@contextlib.contextmanager
def needs(package: str) -> Iterator[None]:
    """Imports of what only some data and networks need; ConfigError that says how to get it if it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"this needs {package}: pip install {package} ({error})") from None


class Table(BaseModel):
    """A table of a configuration file. Types are as in TOML, but a whole number may stand for any number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Data(Table):
    """What is trained on.

    Attributes:
        kind: ``images``: IDX files, or CIFAR as python batches or packed; ``folder``: ImageFolder with train and val;
            ``characters``: one text, next-character prediction; ``speakers``: the same text, who speaks;
            ``labelled``: a label, a tab and a text in each line of a file.
        folder: Name of the folder below ``--data``, or that folder itself.
        limit: Use so many training examples, at most.
        test_limit: Use so many test examples, at most.
        augment: ``none``, ``crop`` (zero padding of 4, a random crop) or ``crop-flip`` (and mirrored half of the time).
        size: Pad images to this height and width; 0 leaves them.
        channels: Repeat grey images so often; 0 leaves them.
        length: Tokens of an example, for texts.
        workers: Processes that load a folder of images.
    """

    kind: Literal["images", "folder", "characters", "speakers", "labelled"]
    folder: str
    limit: Count = 0
    test_limit: Count = 0
    augment: Literal["none", "crop", "crop-flip"] = "none"
    size: Count = 0
    channels: Count = 0
    length: int = Field(128, ge=2)
    workers: Count = 2


class Training(Table):
    """How it is trained, the exact network and all others alike.

    Attributes:
        batch: Examples of a step; what is left of an epoch is left out.
        epochs: Of a full training; with ``steps`` 0.
        steps: Of a full training, instead of ``epochs``.
        optimizer: ``sgd`` or ``adamw``.
        rate: Peak learning rate.
        momentum: Of SGD.
        nesterov: Of SGD.
        weight_decay: As torch's optimisers have it.
        decay_all: Whether biases and what normalises decay, too.
        schedule: ``onecycle``, ``cosine``, ``stairs``, ``trapezoid`` (constant, then linear to 0; also called
            warmup-stable-decay) or ``constant``; its length is that of the training at hand.
        warmup: Share of the steps with a rate that rises from 0.
        milestones: Shares of the steps after which ``stairs`` multiplies the rate by ``factor``; the one after which
            ``trapezoid`` falls.
        factor: See ``milestones``.
        label_smoothing: Of the cross entropy.
        clip: Largest norm of the gradient; 0 for no limit.
    """

    batch: Size
    epochs: float = 0
    steps: Count = 0
    optimizer: Literal["sgd", "adamw"] = "sgd"
    rate: Positive = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    decay_all: bool = True
    schedule: Literal["onecycle", "cosine", "stairs", "trapezoid", "constant"] = "onecycle"
    warmup: Share = 0.0
    milestones: Annotated[tuple[float, ...], Strict(False)] = ()
    factor: float = 0.1
    label_smoothing: Share = 0.0
    clip: float = 0.0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        expect("epochs", self.epochs, "more than 0, or steps instead", (self.epochs > 0) != (self.steps > 0))
        ordered = list(self.milestones) == sorted(self.milestones) and all(0 < m < 1 for m in self.milestones)
        expect("milestones", self.milestones, "shares in (0, 1) in order", ordered)
        falls = self.schedule != "trapezoid" or (len(self.milestones) == 1 and self.warmup <= self.milestones[0])
        expect("milestones", self.milestones, "one share, not before warmup, from which a trapezoid falls", falls)
        return self

    def full_steps(self, examples: int) -> int:
        """Of a full training on so many examples."""
        return self.steps or max(1, round(self.epochs * (examples // self.batch)))


class Variant(Table):
    """One way to train the network.

    Attributes:
        policy: What is sampled: ``kind`` and the fields of that policy; none is exact training.
        exact: Globs on layers that stay exact whatever the policy says.
        warmup: Share of the steps, at the beginning, that are exact.
        tail: Share of the steps, at the end, that are exact.
        interleave: Every so many-th step is exact; 0 for none.
        end_ratio: The ratio moves from the policy's to this one before the tail; 0: it does not.
        along: ``linear`` or ``cosine``: how it moves.
        levels: How many ratios it takes on the way.
        preserve: Where the ratio rises, what was left out begins again from zero, so that nothing jumps.
        every: Steps that keep one selection; 0: all that have the same ratio.
        subnetwork: Where it is not exact, what is trained is the narrow network of the selections, made anew for each
            ratio and selected anew after ``every`` steps (:class:`fx_approx.subnetworks.Phases`).
        demand: Compute only what will be read.
        rate: Factor on the learning rate.
        distill: Share of soft labels in the loss of a step after an exact one: it has the exact one's batch again, and
            what the exact network answered. An exact step that ends an epoch teaches none.
        sensitivity: Batches that a budget's errors are measured on before the training, in single precision, with the
            weights that it begins with; 0: they are predicted.
        frozen: Globs on parameters that are not trained, which fine-tuning may leave as they are.
        dropout: Rates, above 0 and below 1, of dropout on what the layers of these globs read in training.
        examples: What of the data an epoch reads: ``rule``, ``importance`` or ``infobatch``, and the options of that
            rule of :class:`fx_approx.data.ImportanceSampler`; none: everything.
        equal: A baseline that is trained exactly and costs what the variant ``to`` does, in ``flops`` or ``time``.
        to: See ``equal``.
        by: A baseline is made cheaper ``by`` fewer ``epochs``, or less ``width``.
        epochs: Share of the steps of a full training.
        width: Factor on the width of the network.
        tries: Lists of values of these fields, ``policy.ratio`` and the like among them, each of which is tried with
            each value of the others; the best on the held-out examples is taken. None: the fields are as they are.
    """

    policy: dict[str, Any] = {}
    exact: Names = ()
    warmup: Share = 0.0
    tail: Share = 0.0
    interleave: Count = 0
    end_ratio: Share = 0.0
    along: Literal["linear", "cosine"] = "linear"
    levels: int = Field(3, ge=2)
    preserve: bool = False
    every: Count = 1
    subnetwork: bool = False
    demand: bool = True
    rate: Positive = 1.0
    distill: float = Field(0.0, ge=0, le=1)
    sensitivity: Count = 0
    frozen: Names = ()
    dropout: dict[str, Rate] = {}
    examples: dict[str, Any] = {}
    equal: Literal["", "flops", "time"] = ""
    to: str = ""
    by: Literal["", "epochs", "width"] = ""
    epochs: Positive = 1.0
    width: Positive = 1.0
    tries: dict[str, Any] = {}

    @model_validator(mode="after")
    def _tries_fit(self) -> Self:
        if not self.tries:
            return self
        expect("tries", self.tries, "lists of values by the names of fields", bool(self.grid))
        fields = [name for name in Variant.model_fields if name not in _UNTRIED]
        for key, values in self.grid.items():
            one_of(f"tries.{key}", key.partition(".")[0], fields)
            different = isinstance(values, list) and all(one not in values[:place] for place, one in enumerate(values))
            expect(f"tries.{key}", values, "a list of one or more different values", different and bool(values))
        try:
            list(self.alternatives())
        except ValidationError as error:
            raise ValueError(f"tries: {'; '.join(_told(Variant, one) for one in error.errors())}") from None
        return self

    @model_validator(mode="after")
    def _subnetwork_fits(self) -> Self:
        if self.subnetwork and not self.tries:
            expect("policy", self.policy, "one beside subnetwork", bool(self.policy))
            expect("interleave", self.interleave, "0 beside subnetwork", not self.interleave)
            expect("every", self.every, "0 or 2 or more beside subnetwork", self.every != 1)
            learnt = self.policy.get("scores") != "ema" or self.warmup > 0
            expect("warmup", self.warmup, "more than 0 beside subnetwork, for the scores ema to be known", learnt)
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.tries:  # each of them has to fit, and not what they replace
            return self
        expect("tail", self.tail, f"less than what warmup = {self.warmup:g} leaves", self.warmup + self.tail < 1)
        expect("interleave", self.interleave, "0, or 2 or more", self.interleave != 1)
        teaches = self.interleave > 0 or not self.distill
        expect("distill", self.distill, "0 without interleave, whose exact steps teach", teaches)
        alone = not (self.policy or self.equal or self.epochs != 1)
        expect("examples", self.examples, "none beside policy, equal or epochs", alone or not self.examples)
        measurable = self.budgeted and not self.exact
        expect("sensitivity", self.sensitivity, "0 without a budget for all layers", measurable or not self.sensitivity)
        if self.equal:
            expect("by", self.by, "epochs or width beside equal", bool(self.by))
            expect("policy", self.policy, "none beside equal: a baseline is exact", not self.policy)
            given = self.epochs if self.by == "epochs" else self.width
            expect(self.by, given, f"none beside equal and by = {self.by!r}, which find it", given == 1)
        elif self.to or self.by:
            raise ValueError(f"equal: expected flops or time beside to = {self.to!r}, by = {self.by!r}, got ''")
        # The hooks of a dropout are not part of a layer's sampling, and a narrower rival is another network.
        plain_training = not (self.policy or self.equal)
        expect("dropout", self.dropout, "none beside policy or equal", plain_training or not self.dropout)
        for name, other in (("equal", self.equal), ("preserve", self.preserve)):
            # What a frozen network costs is not known there; weights that are zeroed could not be learnt again.
            expect("frozen", self.frozen, f"none beside {name}", not (self.frozen and other))
        rises = self.tail > 0 or self.end_ratio > 0 or self.subnetwork
        right = "false without tail, end_ratio or subnetwork"
        expect("preserve", self.preserve, right, rises or not self.preserve)
        expect("preserve", self.preserve, "false beside interleave", not (self.preserve and self.interleave))
        if not self.policy and (self.exact or self.tail or self.warmup or self.interleave or self.end_ratio):
            raise ValueError("policy: expected one beside exact, tail, warmup, interleave or end_ratio, got none")
        return self

    @property
    def budgeted(self) -> bool:
        """Whether its policy is a budget, whose plan depends on the weights."""
        return self.policy.get("kind") in ("flops", "time", "memory")

    @property
    def grid(self) -> dict[str, Any]:
        """The values that are tried, by dotted names of fields."""
        return dict(_flat(self.tries))

    def alternatives(self) -> Iterator[tuple[dict[str, Any], Variant]]:
        """Each try: its values by dotted names, and the variant that they make; without ``tries`` the variant alone."""
        for values in itertools.product(*self.grid.values()):
            chosen, table = dict(zip(self.grid, values, strict=True)), self.model_dump(exclude_unset=True)
            table.pop("tries", None)
            for key, value in chosen.items():
                _set(table, key, value)
            yield chosen, Variant.model_validate(table)


def _flat(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _set(table: dict[str, Any], key: str, value: Any) -> None:
    *tables, last = key.split(".")
    for name in tables:
        found = table.get(name)
        expect(f"tries.{key}", name, "a table that the variant has", isinstance(found, dict))
        table = found
    table[last] = value


_UNTRIED = ("equal", "to", "by", "tries")
_LATER = ("preserve", "frozen", "distill", "sensitivity", "subnetwork", "examples", "dropout")


def plain(variant: Variant) -> dict[str, Any]:
    """``variant`` for a record. Fields that came later are left out at their defaults: older runs stay known."""
    return {key: value for key, value in variant.model_dump(exclude={"tries"}).items() if value or key not in _LATER}


class Start(Table):
    """Where fine-tuning begins: the weights that an exact run of another configuration ended with.

    Attributes:
        config: File name of that configuration, beside this one.
        variant: Its variant.
        seed: Its seed; -1: the same as the run's own.
    """

    config: str
    variant: str = "exact"
    seed: int = -1


class Config(Table):
    """An experiment: one network on one data set, in several variants.

    Attributes:
        name: Of the file with its results.
        title: For people.
        data: What is trained on.
        network: ``kind`` and its options, see ``networks.py``.
        training: How.
        variants: By name, in order.
        seeds: Runs of each variant.
        validation: Training examples that are held out while tries are compared; the runs of ``seeds`` train on them,
            too, and then see the test examples once, at the end.
        choice_seeds: Runs of each try.
        start: Weights to begin with.
        path: The file.
    """

    name: str
    title: str
    data: Data
    network: dict[str, Any] = Field(min_length=1)
    training: Training
    variants: dict[str, Variant] = Field(min_length=1)
    seeds: Annotated[tuple[Count, ...], Strict(False)] = (0, 1, 2)
    validation: Count = 0
    choice_seeds: Annotated[tuple[Count, ...], Strict(False)] = (100,)
    start: Start | None = None
    path: Path

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for key, seeds in (("seeds", self.seeds), ("choice_seeds", self.choice_seeds)):
            different = 0 < len(seeds) == len(set(seeds))
            expect(key, list(seeds), "one or more different integers", different)
        known = [name for name, variant in self.variants.items() if not variant.equal]
        for name, variant in self.variants.items():
            right = f"1 or more examples, for the tries of variants.{name!r}"
            expect("validation", self.validation, right, self.validation > 0 or not variant.tries)
            if variant.equal:
                one_of(f"variants.{name!r}.to", variant.to, known)
                others = (other for _, other in self.variants[variant.to].alternatives())
                drawn = any(other.examples.get("rule") == "infobatch" for other in others)
                expect(f"variants.{name!r}.to", variant.to, "a variant whose steps are known before", not drawn)
        return self


Checked = TypeVar("Checked", bound=BaseModel)
_TABLES: dict[Any, type[Table]] = {"data": Data, "training": Training, "variants": Variant, "start": Start}


def filled(model: type[Checked], table: Mapping[str, Any], where: str) -> Checked:
    """The ``model`` with the fields of a TOML table.

    Raises:
        ConfigError: Unknown keys, missing ones, and values that do not fit, by name, one a line.
    """
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}{_told(model, one)}" for one in error.errors())) from None


def _told(model: type[BaseModel], error: Any) -> str:
    parts = [str(part) if isinstance(part, int) or part.isidentifier() else repr(part) for part in error["loc"]]
    if parts[:1] == ["variants"] and len(parts) > 1:
        parts[1] = repr(error["loc"][1])
    place = ".".join(parts)
    if error["type"] == "value_error":  # of several fields; it names the one that does not fit
        return f"{place}{'.' * bool(place)}{error['ctx']['error']}"
    if error["type"] == "missing":
        return f"{place}: missing"
    if error["type"] == "extra_forbidden":
        known = _TABLES.get(parts[0], model) if len(parts) > 1 else model
        return f"{place}: no such key, got {error['input']!r}; expected one of {', '.join(known.model_fields)}"
    words = {
        "Input should be": "expected",
        "tuple": "list",
        "Tuple": "list",
        "dictionary": "table",
        "Dictionary": "table",
    }
    message = error["msg"]
    for word, other in words.items():
        message = message.replace(word, other)
    return f"{place}: {message}, got {error['input']!r}"


def load(path: Path, changes: Sequence[str] = ()) -> Config:
    """The configuration in ``path``; ``changes`` are of the form ``training.epochs=3``, the value as in TOML.

    A key ``base`` names another file beside it, whose tables this one's keys are put over (``variants`` as a whole).

    Raises:
        ConfigError: Names key, value and what would be right.
        FileNotFoundError: There is no such file.
    """
    table = _read(path)
    for change in changes:
        _put(table, change)
    return filled(Config, {"name": path.stem, "title": path.stem, **table, "path": path}, f"{path.name}: ")


def _read(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path.name}: no TOML: {error}") from None
    if "base" not in table:
        return table
    below = _read(path.parent / str(table.pop("base")))
    for key, value in table.items():
        merge = isinstance(value, dict) and isinstance(below.get(key), dict) and key != "variants"
        below[key] = {**below[key], **value} if merge else value
    below.setdefault("name", path.stem)
    if "name" not in table:
        below["name"] = path.stem
    return below


def _put(table: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    *tables, last = key.strip().split(".")
    if not equals or not last:
        raise ConfigError(f"--set {change}: expected KEY=VALUE such as training.epochs=3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {change}: {name} is no table")
    if last == "steps" and "epochs" in table:
        del table["epochs"]  # one of them says how long
    if last == "epochs" and "steps" in table:
        del table["steps"]
    table[last] = value
