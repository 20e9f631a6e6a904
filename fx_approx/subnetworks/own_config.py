"""The config of a narrow model: one that makes a model of exactly these shapes, if there is one."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fx_approx.capture.trace import kept_random_state

_BUILDS = 48
_UNSET = re.compile(r"inner|intermediate|ffn|mlp|hidden|dim")
_PLAIN = (bool, int, float, tuple, list)

Shapes = dict[str, tuple[int, ...]]
Place = tuple[tuple[str, ...], str]
"""Where a config holds a value: the names of the configs inside of which it is, and its own."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What was changed, so that a copy is what its config makes.

    Attributes:
        changes: Objects, name of an attribute, its value before and now.
    """

    changes: tuple[tuple[Any, str, Any, Any], ...]

    def undo(self) -> None:
        """Puts all values back."""
        for one, name, before, _ in self.changes:
            setattr(one, name, before)


def has_config(model: nn.Module) -> bool:
    """Whether a model is made from a config, as those of Hugging Face are."""
    return callable(getattr(getattr(model, "config", None), "to_dict", None))


def fit_config(root: nn.Module, full: nn.Module) -> Fitted | None:
    """Changes values of the config of a narrow copy, so that a fresh model from it has exactly the narrow shapes.

    What is tried is built on the meta device, where nothing is computed. Attributes of modules that follow from the
    config, such as a number of heads, are set as they are in that fresh model.

    Args:
        root: A narrow copy of ``full``, with a config of its own; changed in place.
        full: The model.

    Returns:
        What was changed; None, and nothing is changed, if no such config was found.
    """
    if not has_config(full):
        return None
    aim = _shapes(root)
    plain = _built(full, full.config)
    if plain is None or _shapes(plain) != _shapes(full):
        return None
    found = _search(full, plain, aim)
    if found is None:
        return None
    made, config = found
    changes = list(_attributes(root, plain, made))
    seen: set[int] = set()
    for module in root.modules():
        own = vars(module).get("config")
        if type(own) is not type(config) or id(own) in seen:
            continue
        seen.add(id(own))
        for place in _places(full.config):
            before, now = (_get(one, place) for one in (full.config, config))
            holder = _holder(own, place[0])
            if before != now and getattr(holder, place[1]) == before:
                changes.append((holder, place[1], before, now))
    for one, name, _, now in changes:
        setattr(one, name, now)
    return Fitted(tuple(changes))


def _search(full: nn.Module, plain: nn.Module, aim: Shapes) -> tuple[nn.Module, Any] | None:
    """A fresh model of the shapes ``aim``, and its config; values are changed one by one as long as it gets nearer."""
    config, made = full.config, plain
    start = _shapes(plain)
    left = _distance(start, aim)
    pairs = {pair for name in aim for pair in zip(start.get(name, ()), aim[name], strict=False) if pair[0] != pair[1]}
    builds, nearer = 0, True
    while left and nearer:
        nearer = False
        for place in _places(config):
            for value in _options(place[1], _get(config, place), pairs):
                trial = copy.deepcopy(config)
                setattr(_holder(trial, place[0]), place[1], value)
                builds += 1
                if builds > _BUILDS:
                    return None
                fresh = _built(full, trial)
                distance = left if fresh is None else _distance(_shapes(fresh), aim)
                if fresh is not None and distance < left:
                    config, made, left, nearer = trial, fresh, distance, True
                    break
    return (made, config) if not left else None


def _options(name: str, value: Any, pairs: set[tuple[int, int]]) -> list[int]:
    """What a value may be in a narrow model, where sizes go from one number to another."""
    if value is None:
        return sorted({new for _, new in pairs}) if _UNSET.search(name) else []
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        return []
    same = {new for old, new in pairs if old == value}
    # Units of several channels, as heads.
    units = {
        new * value // old
        for old, new in pairs
        if "head" in name and old != value and old % value == 0 and new * value % old == 0
    }
    return sorted(same | units)


def _built(full: nn.Module, config: Any) -> nn.Module | None:
    """A fresh model of the class from a config, on the meta device; None if it cannot be made."""
    try:
        with kept_random_state(), warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            made: nn.Module = type(full)(copy.deepcopy(config))
    except Exception:  # whatever a class says of sizes that do not fit
        return None
    return made


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if hasattr(tensor, "shape")}


def _distance(shapes: Shapes, aim: Shapes) -> int:
    """How many tensors differ in shape, or are there in one only."""
    return sum(shapes.get(name) != aim.get(name) for name in {*shapes, *aim})


def _places(config: Any, above: tuple[str, ...] = ()) -> Iterator[Place]:
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if callable(getattr(value, "to_dict", None)):
            yield from _places(value, (*above, name))
        elif value is None or isinstance(value, int):
            yield above, name


def _holder(config: Any, above: tuple[str, ...]) -> Any:
    for name in above:
        config = getattr(config, name)
    return config


def _get(config: Any, place: Place) -> Any:
    return getattr(_holder(config, place[0]), place[1])


def _attributes(root: nn.Module, plain: nn.Module, made: nn.Module) -> Iterator[tuple[Any, str, Any, Any]]:
    """Attributes of modules that differ between two fresh models, where the copy has them as in the first."""
    own = dict(root.named_modules())
    narrow = dict(made.named_modules())
    for path, module in plain.named_modules():
        if path not in own or path not in narrow:
            continue
        for name, before in vars(module).items():
            now, here = (vars(one[path]).get(name) for one in (narrow, own))
            if isinstance(before, _PLAIN) and type(now) is type(before) and now != before and here == before:
                yield own[path], name, before, now
