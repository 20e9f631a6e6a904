"""Configuration files of the experiments: TOML to frozen records, each checked by name, value and what is right."""

from __future__ import annotations

import contextlib
import dataclasses
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


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


@dataclasses.dataclass(frozen=True)
class Data:
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

    kind: str
    folder: str
    limit: int = 0
    test_limit: int = 0
    augment: str = "none"
    size: int = 0
    channels: int = 0
    length: int = 128
    workers: int = 2

    def __post_init__(self) -> None:
        """Checks the fields."""
        one_of("kind", self.kind, ("images", "folder", "characters", "speakers", "labelled"))
        one_of("augment", self.augment, ("none", "crop", "crop-flip"))
        for name in ("limit", "test_limit", "size", "channels", "workers"):
            expect(name, getattr(self, name), "0 or more", getattr(self, name) >= 0)
        expect("length", self.length, "2 or more", self.length >= 2)


@dataclasses.dataclass(frozen=True)
class Training:
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

    batch: int
    epochs: float = 0
    steps: int = 0
    optimizer: str = "sgd"
    rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    decay_all: bool = True
    schedule: str = "onecycle"
    warmup: float = 0.0
    milestones: tuple[float, ...] = ()
    factor: float = 0.1
    label_smoothing: float = 0.0
    clip: float = 0.0

    def __post_init__(self) -> None:
        """Checks the fields."""
        expect("batch", self.batch, "1 or more", self.batch >= 1)
        expect("steps", self.steps, "0 or more", self.steps >= 0)
        expect("epochs", self.epochs, "more than 0, or steps instead", (self.epochs > 0) != (self.steps > 0))
        one_of("optimizer", self.optimizer, ("sgd", "adamw"))
        one_of("schedule", self.schedule, ("onecycle", "cosine", "stairs", "trapezoid", "constant"))
        expect("rate", self.rate, "more than 0", self.rate > 0)
        expect("warmup", self.warmup, "a share in [0, 1)", 0 <= self.warmup < 1)
        ordered = list(self.milestones) == sorted(self.milestones) and all(0 < m < 1 for m in self.milestones)
        expect("milestones", self.milestones, "shares in (0, 1) in order", ordered)
        falls = self.schedule != "trapezoid" or (len(self.milestones) == 1 and self.warmup <= self.milestones[0])
        expect("milestones", self.milestones, "one share, not before warmup, from which a trapezoid falls", falls)
        expect("label_smoothing", self.label_smoothing, "a number in [0, 1)", 0 <= self.label_smoothing < 1)


@dataclasses.dataclass(frozen=True)
class Variant:
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
        demand: Compute only what will be read.
        rate: Factor on the learning rate.
        distill: Share of soft labels in the loss of a step after an exact one: it has the exact one's batch again, and
            what the exact network answered. An exact step that ends an epoch teaches none.
        sensitivity: Batches that a budget's errors are measured on before the training, in single precision, with the
            weights that it begins with; 0: they are predicted.
        frozen: Globs on parameters that are not trained, which fine-tuning may leave as they are.
        equal: A baseline that is trained exactly and costs what the variant ``to`` does, in ``flops`` or ``time``.
        to: See ``equal``.
        by: A baseline is made cheaper ``by`` fewer ``epochs``, or less ``width``.
        epochs: Share of the steps of a full training.
        width: Factor on the width of the network.
    """

    policy: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    exact: tuple[str, ...] = ()
    warmup: float = 0.0
    tail: float = 0.0
    interleave: int = 0
    end_ratio: float = 0.0
    along: str = "linear"
    levels: int = 3
    preserve: bool = False
    every: int = 1
    demand: bool = True
    rate: float = 1.0
    distill: float = 0.0
    sensitivity: int = 0
    frozen: tuple[str, ...] = ()
    equal: str = ""
    to: str = ""
    by: str = ""
    epochs: float = 1.0
    width: float = 1.0

    def __post_init__(self) -> None:
        """Checks the fields."""
        for name in ("warmup", "tail", "end_ratio"):
            expect(name, getattr(self, name), "a share in [0, 1)", 0 <= getattr(self, name) < 1)
        expect("tail", self.tail, f"less than what warmup = {self.warmup:g} leaves", self.warmup + self.tail < 1)
        expect("interleave", self.interleave, "0, or 2 or more", self.interleave == 0 or self.interleave >= 2)
        expect("every", self.every, "0 or more", self.every >= 0)
        expect("levels", self.levels, "2 or more", self.levels >= 2)
        for name in ("rate", "epochs", "width"):
            expect(name, getattr(self, name), "more than 0", getattr(self, name) > 0)
        one_of("along", self.along, ("linear", "cosine"))
        expect("distill", self.distill, "a share in [0, 1]", 0 <= self.distill <= 1)
        teaches = self.interleave > 0 or not self.distill
        expect("distill", self.distill, "0 without interleave, whose exact steps teach", teaches)
        expect("sensitivity", self.sensitivity, "0 or more", self.sensitivity >= 0)
        measurable = self.budgeted and not self.exact
        expect("sensitivity", self.sensitivity, "0 without a budget for all layers", measurable or not self.sensitivity)
        if self.equal:
            one_of("equal", self.equal, ("flops", "time"))
            one_of("by", self.by, ("epochs", "width"))
            expect("policy", dict(self.policy), "none beside equal: a baseline is exact", not self.policy)
            given = self.epochs if self.by == "epochs" else self.width
            expect(self.by, given, f"none beside equal and by = {self.by!r}, which find it", given == 1)
        elif self.to or self.by:
            raise ValueError(f"equal: expected flops or time beside to = {self.to!r}, by = {self.by!r}, got ''")
        for name, other in (("equal", self.equal), ("preserve", self.preserve)):
            # What a frozen network costs is not known there; weights that are zeroed could not be learnt again.
            expect("frozen", self.frozen, f"none beside {name}", not (self.frozen and other))
        rises = self.tail > 0 or self.end_ratio > 0
        expect("preserve", self.preserve, "false without tail or end_ratio", rises or not self.preserve)
        expect("preserve", self.preserve, "false beside interleave", not (self.preserve and self.interleave))
        if not self.policy and (self.exact or self.tail or self.warmup or self.interleave or self.end_ratio):
            raise ValueError("policy: expected one beside exact, tail, warmup, interleave or end_ratio, got none")

    @property
    def budgeted(self) -> bool:
        """Whether its policy is a budget, whose plan depends on the weights."""
        return self.policy.get("kind") in ("flops", "time", "memory")


_LATER = ("preserve", "frozen", "distill", "sensitivity")


def plain(variant: Variant) -> dict[str, Any]:
    """``variant`` for a record. Fields that came later are left out at their defaults: older runs stay known."""
    found = dataclasses.asdict(variant)
    return {key: value for key, value in found.items() if value or key not in _LATER}


@dataclasses.dataclass(frozen=True)
class Start:
    """Where fine-tuning begins: the weights that an exact run of another configuration ended with.

    Attributes:
        config: File name of that configuration, beside this one.
        variant: Its variant.
        seed: Its seed; -1: the same as the run's own.
    """

    config: str
    variant: str = "exact"
    seed: int = -1


@dataclasses.dataclass(frozen=True)
class Config:
    """An experiment: one network on one data set, in several variants.

    Attributes:
        name: Of the file with its results.
        title: For people.
        data: What is trained on.
        network: ``kind`` and its options, see ``networks.py``.
        training: How.
        variants: By name, in order.
        seeds: Runs of each variant.
        start: Weights to begin with.
        path: The file.
    """

    name: str
    title: str
    data: Data
    network: Mapping[str, Any]
    training: Training
    variants: Mapping[str, Variant]
    seeds: tuple[int, ...] = (0, 1, 2)
    start: Start | None = None
    path: Path = Path()


def filled(cls: type, table: Any, where: str) -> Any:
    """The record ``cls`` with the fields of a TOML table.

    Raises:
        ConfigError: An unknown key, a missing one, or a value that does not fit, by name.
    """
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: expected a table, got {table!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in table.items():
        if key not in fields:
            raise ConfigError(f"{where}.{key}: no such key, got {value!r}; expected one of {', '.join(fields)}")
        values[key] = _typed(f"{where}.{key}", value, hints[key])
    for name, field in fields.items():
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in values and not has_default:
            raise ConfigError(f"{where}.{name}: missing; expected a value of type {hints[name].__name__}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}.{error}") from None


def _typed(where: str, value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        return tuple(_typed(f"{where}[{place}]", one, arguments[0]) for place, one in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a table, got {value!r}")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where}: expected a value of type {hint.__name__}, got {value!r}")
    return value


_PARTS = ("name", "title", "seeds", "data", "network", "training", "variants", "start", "base")


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
    for key in table:
        if key not in _PARTS:
            raise ConfigError(f"{path.name}: {key}: no such key; expected one of {', '.join(_PARTS)}")
    for key in ("data", "network", "training", "variants"):
        if not isinstance(table.get(key), dict) or not table[key]:
            raise ConfigError(f"{path.name}: {key}: expected a table, got {table.get(key)!r}")
    where = path.name
    variants = {
        name: filled(Variant, found, f"{where}: variants.{name!r}") for name, found in table["variants"].items()
    }
    for name, variant in variants.items():
        if variant.equal and (variant.to not in variants or variants[variant.to].equal):
            known = ", ".join(other for other, found in variants.items() if not found.equal)
            raise ConfigError(f"{where}: variants.{name!r}.to: expected one of {known}, got {variant.to!r}")
    seeds = _typed(f"{where}: seeds", table.get("seeds", [0, 1, 2]), tuple[int, ...])
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(f"{where}: seeds: expected different integers of 0 or more, got {list(seeds)}")
    start = filled(Start, table["start"], f"{where}: start") if "start" in table else None
    return Config(
        name=str(table.get("name", path.stem)),
        title=str(table.get("title", path.stem)),
        data=filled(Data, table["data"], f"{where}: data"),
        network=table["network"],
        training=filled(Training, table["training"], f"{where}: training"),
        variants=variants,
        seeds=seeds,
        start=start,
        path=path,
    )


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
