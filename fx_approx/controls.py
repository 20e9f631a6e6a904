"""Switches of a transformed model: ratios, on and off, the random state, BatchNorm statistics."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from fx_approx.batchnorm import note_fresh, note_switch, reestimate
from fx_approx.checks import check_seed
from fx_approx.modules import Selector
from fx_approx.runtime import ApproxModule, Runtime, find
from fx_approx.state import EVERY, INCREMENT, SEED, STEP


def _selected(runtime: Runtime, patterns: Iterable[str]) -> dict[str, list[Selector]]:
    """The selectors of each glob, the first that matches; ValueError for a glob that matches none."""
    fqn = {candidate.name: candidate.fqn for candidate in runtime.candidates}
    found: dict[str, list[Selector]] = {pattern: [] for pattern in patterns}
    used = set()
    for name, selector in runtime.selectors.items():
        matching = [p for p in found if fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(fqn[name], p)]
        used.update(matching)
        if matching:
            found[matching[0]].append(selector)
    unused = [pattern for pattern in found if pattern not in used]
    if unused:
        there = ", ".join(runtime.selectors) or "none, nothing is sampled"
        raise ValueError(f"no sampled layer matches {', '.join(map(repr, unused))}; there are: {there}")
    return found


def set_ratio(model: nn.Module, ratio: float | Mapping[str, float]) -> None:
    """Changes the sample ratio of all sampled layers, or by glob on their names, from the next forward on.

    Where several globs match a layer, the first decides, as in :class:`fx_approx.policies.Override`.
    Each new number of pairs is one more compilation of a compiled model.

    Raises:
        ValueError: A ratio outside (0, 1] or a glob that matches no sampled layer; nothing is changed then.
        TypeError: A ratio that is no number.
    """
    approx = find(model)
    runtime = approx._fx_approx
    rules = dict(ratio) if isinstance(ratio, Mapping) else {"*": ratio}
    specs = [
        (selector, selector.spec.replace(ratio=rules[pattern]))
        for pattern, selectors in _selected(runtime, rules).items()
        for selector in selectors
    ]
    for selector, spec in specs:
        selector.set_spec(spec)
    runtime.lay_out()
    note_switch(approx, runtime)


def set_enabled(model: nn.Module, enabled: bool | Mapping[str, bool]) -> None:
    """Switches sampling on or off, for all sampled layers or by glob on their names, from the next forward on.

    Raises:
        TypeError: A value that is no bool.
        ValueError: A glob that matches no sampled layer; nothing is changed then.
    """
    approx = find(model)
    runtime = approx._fx_approx
    rules = dict(enabled) if isinstance(enabled, Mapping) else {"*": enabled}
    for pattern, value in rules.items():
        if not isinstance(value, bool):
            raise TypeError(f"enabled[{pattern!r}]: expected True or False, got {value!r}")
    for pattern, selectors in _selected(runtime, rules).items():
        for selector in selectors:
            selector.enabled = rules[pattern]
    note_switch(approx, runtime)


@contextlib.contextmanager
def hold(model: nn.Module) -> Iterator[None]:
    """Keeps one sample for all forwards inside, for example over the micro-batches of gradient accumulation.

    What is held are the random numbers; scores that read activations follow the activations.
    """
    state = find(model)._fx_approx.state
    before = state[INCREMENT].clone()
    state[INCREMENT] = 0
    try:
        yield
    finally:
        state[INCREMENT] = before
        # The next forward takes a new sample, unless this one was nested in another hold.
        state[STEP] += before * state[EVERY]


def sampler_state(model: nn.Module) -> dict[str, int]:
    """The random state of a transformed model, for exact resume: plain integers, to store beside the state_dict."""
    state = find(model)._fx_approx.state
    return {"step": int(state[STEP]), "every": int(state[EVERY]), "seed": int(state[SEED])}


def load_sampler_state(model: nn.Module, values: Mapping[str, int]) -> None:
    """Takes over the random state that :func:`sampler_state` gave.

    Raises:
        ValueError: Other keys than ``step``, ``every`` and ``seed``, or a value out of range.
        TypeError: A value that is no integer.
    """
    state = find(model)._fx_approx.state
    places = {"step": STEP, "every": EVERY, "seed": SEED}
    if set(values) != set(places):
        raise ValueError(f"values: expected the keys {sorted(places)}, got {sorted(values)}")
    check_seed(values["seed"], values["every"], values["step"])
    for name, place in places.items():
        state[place] = values[name]


def recalibrate(model: nn.Module, batches: Iterable[Any]) -> int:
    """Re-estimates all BatchNorm statistics on exact forwards, as an exact evaluation needs them.

    Args:
        model: A transformed model, or any other.
        batches: 20 or more training batches; each the input, a tuple that begins with it, or a dict of keywords.

    Returns:
        How many batches were used.

    Raises:
        ValueError: No batch; the statistics are then as before.
    """
    count = reestimate(model, batches)
    for module in model.modules():
        if isinstance(module, ApproxModule):
            note_fresh(module, module._fx_approx)
    return count
