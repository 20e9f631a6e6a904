"""Switches of a transformed model: ratios, on and off, the random state, BatchNorm statistics."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fx_approx._compat import RECOMPILE_LIMIT, compilations_of, recompile_limit
from fx_approx.core.candidates import Candidate, Role, matches
from fx_approx.core.token_sampling import check_ratio
from fx_approx.errors import RecompilationWarning
from fx_approx.runtime.approx_module import ApproxModule, find
from fx_approx.runtime.batchnorm import reestimate
from fx_approx.runtime.handle import GraphHandle, pieces_of
from fx_approx.runtime.rng import INCREMENT, SEED, SELECTION_INTERVAL, STEP
from fx_approx.runtime.selector import Selector
from fx_approx.runtime.token_selection import TokenSelection
from fx_approx.runtime.validation import check_seed
from fx_approx.sampling.spec import SamplerConfig


def _selectors(pieces: Iterable[ApproxModule]) -> Iterator[tuple[Candidate, Selector]]:
    """All selectors of all graphs, each with the candidate that it serves."""
    for runtime in (approx._fx_approx for approx in pieces):
        candidates = {candidate.name: candidate for candidate in runtime.record.candidates}
        for (name, _), selector in runtime.selectors.items():
            yield candidates[name], selector


def _selected(
    pieces: Iterable[ApproxModule], patterns: Iterable[str], role: Role | None, strict: bool = True
) -> dict[str, list[Selector]]:
    """The selectors (of one role) of each glob, the first that matches; ValueError for a glob that matches none."""
    found: dict[str, list[Selector]] = {pattern: [] for pattern in patterns}
    used: set[str] = set()
    names: dict[str, None] = {}
    for candidate, selector in _selectors(pieces):
        if role is not None and selector.role is not role:
            continue
        names[candidate.name] = None
        matching = [pattern for pattern in found if matches(pattern, candidate)]
        used.update(matching)
        if matching:
            found[matching[0]].append(selector)
    unused = [pattern for pattern in found if pattern not in used]
    if unused and strict:
        there = ", ".join(names) or "none, nothing is sampled"
        raise ValueError(f"no sampled layer matches {', '.join(map(repr, unused))}; there are: {there}")
    return found


@contextlib.contextmanager
def _counted(approx: ApproxModule) -> Iterator[None]:
    """Warns if what changes inside is one more compilation, and ``torch.compile`` will do no more after that."""
    runtime = approx._fx_approx
    runtime.settings.add(runtime.setting)
    yield
    if runtime.setting in runtime.settings:
        return
    runtime.settings.add(runtime.setting)
    made = compilations_of(type(approx).forward.__code__)
    limit = recompile_limit()
    if made >= limit - 1:
        warnings.warn(
            f"the model was compiled {made} times (every new number of pairs, mode or shape counts) and torch.compile "
            f"ends at {limit} ({RECOMPILE_LIMIT}): what comes then runs uncompiled, or is an error "
            "under fullgraph=True. Raise that limit, or use fewer ratios.",
            RecompilationWarning,
            stacklevel=5,
        )


def set_sampling(
    model: nn.Module | GraphHandle,
    ratio: float | Mapping[str, float] | None = None,
    *,
    enabled: bool | Mapping[str, bool] | None = None,
    role: Role | str | None = None,
    tokens: float | None = None,
) -> None:
    """Changes the sample ratio, or switches sampling on or off, from the next forward on.

    Both are for all sampled layers, or by glob on their names; where several globs match a layer, the first decides, as
    in :class:`fx_approx.policies.Override`. Each new number of pairs is one more compilation of a compiled model.

    Args:
        model: A transformed model, what wraps it, or a backend. Of a backend graphs that appear later are set so, too.
        ratio: Share of the column-row pairs to keep, in (0, 1]; None leaves the ratios as they are.
        enabled: Whether the layers sample at all, a bool also whether tokens are sampled; None leaves the switches as
            they are.
        role: The product that changes, ``"output"``, ``"grad_input"`` or ``"grad_weight"``; None for all of a layer.
        tokens: Share of the tokens to keep in a model that samples them, in (0, 1]; None leaves it as it is.

    Warns:
        RecompilationWarning: The model is compiled, and this is the last setting that ``torch.compile`` will compile.

    Raises:
        ValueError: A ratio outside (0, 1], a glob that matches no sampled layer, an unknown role, or nothing to change;
            nothing is changed then. Of a backend without graphs nobody knows the layers yet: its report has a note of
            each glob that has matched none.
        TypeError: A ratio that is no number, a switch that is no bool, or a glob that is no string.
    """
    if ratio is None and enabled is None and tokens is None:
        raise ValueError("ratio, enabled, tokens: expected one of them at least, got None for all")
    pieces, only = pieces_of(model), None if role is None else _role(role)
    ratios = {} if ratio is None else dict(ratio) if isinstance(ratio, Mapping) else {"*": ratio}
    switches = {} if enabled is None else dict(enabled) if isinstance(enabled, Mapping) else {"*": enabled}
    _check_settings(ratios, switches, tokens)
    chosen = [one for approx in pieces for one in approx._fx_approx.tokens]
    if tokens is not None and not chosen and pieces:
        raise ValueError("tokens: the model samples no tokens; transform it with fx_approx.policies.Tokens")
    strict = (bool(pieces) or not isinstance(model, GraphHandle)) and not (chosen and isinstance(enabled, bool))
    settings = _settings(pieces, ratios, switches, only, strict)
    if isinstance(model, GraphHandle):
        for kind, rules in (("ratio", ratios), ("enabled", switches)):
            if rules:
                key = tuple(rules), only, kind
                model.settings.pop(key, None)  # the last one counts
                model.settings[key] = rules
        if tokens is not None:
            model.settings[(), None, "tokens"] = {"*": tokens}
    if settings:
        set_each(model, settings)
    switch = enabled if isinstance(enabled, bool) and only is None else None
    for approx in pieces:
        set_tokens(approx, tokens, switch)


def _check_settings(ratios: Mapping[str, Any], switches: Mapping[str, Any], tokens: Any) -> None:
    """Raises the errors of :func:`set_sampling` for what can be wrong of any model."""
    for name, patterns in (("ratio", ratios), ("enabled", switches)):
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"{name}: expected globs such as 'layer1.*', got the key {pattern!r}")
    for value in ratios.values():
        SamplerConfig(ratio=value)
    if tokens is not None:
        check_ratio(tokens)
    for pattern, on in switches.items():
        if not isinstance(on, bool):
            raise TypeError(f"enabled[{pattern!r}]: expected True or False, got {on!r}")


def set_tokens(approx: ApproxModule, ratio: float | None, enabled: bool | None) -> None:
    """Share of the tokens to keep in one graph, and whether tokens are sampled; None leaves it as it is."""
    runtime = approx._fx_approx
    if not runtime.tokens or (ratio is None and enabled is None):
        return
    with _counted(approx):
        for one in runtime.tokens:
            if ratio is not None and one.ratio != ratio:
                one.set_ratio(ratio)
            if enabled is not None:
                one.enabled = enabled
        runtime.lay_out()
        runtime.batchnorm.note_switch(approx, runtime.samples)


def _role(role: Role | str) -> Role:
    try:
        return Role(role)
    except ValueError:
        known = ", ".join(repr(one.value) for one in Role)
        raise ValueError(f"role: expected one of {known}, or None for all, got {role!r}") from None


def _settings(
    pieces: Iterable[ApproxModule],
    ratios: Mapping[str, float],
    switches: Mapping[str, bool],
    role: Role | None,
    strict: bool,
) -> dict[Selector, tuple[float, bool]]:
    """What ratio and switch each selector is to have."""
    by_ratio = _selected(pieces, ratios, role, strict)
    by_switch = _selected(pieces, switches, role, strict)
    settings = {one: (ratios[pattern], one.enabled) for pattern, own in by_ratio.items() for one in own}
    for pattern, own in by_switch.items():
        for one in own:
            settings[one] = (settings[one][0] if one in settings else one.spec.ratio, switches[pattern])
    return settings


def apply_settings(handle: GraphHandle, approx: ApproxModule) -> None:
    """Sets a graph that has appeared as it was asked for before, and gives it the state that waits for it."""
    for (_, role, kind), rules in handle.settings.items():
        if kind == "tokens":
            set_tokens(approx, rules["*"], None)
            continue
        if kind == "enabled" and role is None and set(rules) == {"*"}:
            set_tokens(approx, None, rules["*"])
        ratios, switches = (rules, {}) if kind == "ratio" else ({}, rules)
        _put(approx, _settings((approx,), ratios, switches, role, strict=False))
    names = layers_of(approx)
    for state in handle.states:
        if state["layers"] == names:
            handle.states.remove(state)
            load_sampler_state_dict(approx, state["state"])
            break


def unmatched(handle: GraphHandle) -> list[str]:
    """The globs that were set and match no sampled layer of any graph so far."""
    there = [(candidate, selector.role) for candidate, selector in _selectors(handle.pieces)]
    asked = {(pattern, role): None for patterns, role, _ in handle.settings for pattern in patterns}
    return [
        pattern
        for pattern, role in asked
        if not any(role in (None, own) and matches(pattern, candidate) for candidate, own in there)
    ]


def layers_of(approx: ApproxModule) -> list[str]:
    """What tells a graph of a backend from others, in another process too: the names of all that multiplies in it."""
    return sorted(candidate.name for candidate in approx._fx_approx.record.candidates)


def follow_modes(model: nn.Module, other: nn.Module) -> None:
    """Puts each module of ``model`` into the mode of that of its name in ``other``, or of ``other`` itself.

    So parts that were set to ``eval()`` by themselves, such as frozen BatchNorm, stay so.
    """
    there = dict(other.named_modules(remove_duplicate=False))
    if model.training != other.training:
        model.train(other.training)
    for name, module in model.named_modules(remove_duplicate=False):
        if name in there:
            module.training = there[name].training


def set_each(model: nn.Module | GraphHandle, settings: Mapping[Selector, tuple[float, bool]]) -> None:
    """Ratio and switch of single selectors of ``model``, all at once; for names that globs cannot tell apart."""
    for selector, (ratio, _) in settings.items():
        selector.spec.replace(ratio=ratio)  # every ratio is checked before any is set
    for approx in pieces_of(model):
        own = {one: settings[one] for one in approx._fx_approx.selectors.values() if one in settings}
        if own:
            with _counted(approx):
                _put(approx, own)


def _put(approx: ApproxModule, settings: Mapping[Selector, tuple[float, bool]]) -> None:
    runtime = approx._fx_approx
    for selector, (ratio, enabled) in settings.items():
        spec = selector.spec.replace(ratio=ratio)
        if selector.spec != spec:
            selector.set_spec(spec)
        selector.enabled = enabled
    runtime.lay_out()
    runtime.batchnorm.note_switch(approx, runtime.samples)


@contextlib.contextmanager
def reuse_selection(model: nn.Module | GraphHandle) -> Iterator[None]:
    """Keeps one sample for all forwards inside, for example over the micro-batches of gradient accumulation.

    What is kept are the random numbers, and the selections that are made ahead, as with ``selection_interval`` of
    :func:`fx_approx.transform`; scores that read activations follow the activations. (Of a sampler whose count is
    random, the random numbers only.)

    Args:
        model: A transformed model, what wraps it, or a backend, with the graphs that appear meanwhile.
    """
    with contextlib.ExitStack() as stack:
        for approx in pieces_of(model):
            stack.enter_context(_reusing(approx))
        if isinstance(model, GraphHandle):

            def join(approx: ApproxModule, new: bool) -> None:
                stack.enter_context(_reusing(approx))

            model.follow(join)
            stack.callback(model.leave, join)
        yield


@contextlib.contextmanager
def _reusing(approx: ApproxModule) -> Iterator[None]:
    runtime = approx._fx_approx
    state, resample = runtime.state, runtime.resample
    outer = resample is not None and resample.held
    before = state[INCREMENT].clone()
    state[INCREMENT] = 0
    if resample is not None:
        resample.held = True
    try:
        yield
    finally:
        if resample is not None:
            resample.held = outer
        state[INCREMENT] = before
        # The next forward takes a new sample, unless this one was nested in another one.
        state[STEP] += before * state[SELECTION_INTERVAL]


def sampler_state_dict(model: nn.Module | GraphHandle) -> dict[str, Any]:
    """The sampling state of a transformed model, for exact resume, to store beside the state_dict.

    Args:
        model: A transformed model, what wraps it, or a backend.

    Returns:
        Of a backend ``graphs``, a list with the ``layers`` and the ``state`` of each graph. Of a transformed model
        ``step``, ``selection_interval`` and ``seed``, integers; where scores keep running norms, also ``running``,
        lists of numbers by the candidate's name and the role, such as ``"fc1/grad_weight"``; where selections made
        ahead are kept or learn, ``resample``, what is kept; where tokens are chosen by scores that learn, ``tokens``,
        what each stretch of blocks has learnt.
    """
    if isinstance(model, GraphHandle):
        made = _each_state(model)
        return {"graphs": [{"layers": layers_of(one), "state": sampler_state_dict(one)} for one in made]}
    runtime = find(model)._fx_approx
    state = runtime.state
    extra: dict[str, Any] = {}
    running = {
        f"{name}/{role.value}": selector.running.tolist()
        for (name, role), selector in runtime.selectors.items()
        if selector.running is not None
    }
    if running:
        extra["running"] = running
    resample = runtime.resample
    if resample is not None and (resample.remembers or resample.held_key[0] >= 0):
        extra["resample"] = resample.state()
    if any(one.learns for one in runtime.tokens):
        extra["tokens"] = [one.state() for one in runtime.tokens]
    numbers = {"step": int(state[STEP]), "selection_interval": int(state[SELECTION_INTERVAL]), "seed": int(state[SEED])}
    return {**numbers, **extra}


def load_sampler_state_dict(model: nn.Module | GraphHandle, values: Mapping[str, Any]) -> None:
    """Takes over the sampling state that :func:`sampler_state_dict` gave.

    Args:
        model: A transformed model, what wraps it, or a backend, which gives each graph its state when it appears.
        values: The state.

    Raises:
        ValueError: Other keys than ``step``, ``selection_interval``, ``seed``, and ``running``, ``resample`` and
            ``tokens`` (which may be left out), a value out of range, or running norms of a site that is not there;
            nothing is changed then.
        TypeError: A value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"values: expected what sampler_state_dict gave, a dict, got {values!r}")
    if isinstance(model, GraphHandle):
        _load_graphs(model, values)
        return
    runtime = find(model)._fx_approx
    places = {"step": STEP, "selection_interval": SELECTION_INTERVAL, "seed": SEED}
    if set(values) - {"running", "resample", "tokens"} != set(places):
        raise ValueError(f"values: expected the keys {sorted(places)}, running, resample, tokens, got {sorted(values)}")
    check_seed(values["seed"], values["selection_interval"], values["step"])
    sites = {f"{name}/{role.value}": selector for (name, role), selector in runtime.selectors.items()}
    for name in ("running", "resample"):
        if not isinstance(values.get(name, {}), Mapping):
            raise TypeError(f"{name}: expected what sampler_state_dict gave, a dict, got {values[name]!r}")
    running = values.get("running", {})
    learning = [s for s, selector in sites.items() if selector.score.learns and selector.role is not Role.OUTPUT]
    unknown = sorted(set(running) - set(learning))
    if unknown:
        there = ", ".join(learning) or "none"
        raise ValueError(f"running: no running norms are kept at {', '.join(unknown)}; there are: {there}")
    norms = {site: torch.tensor(numbers, dtype=torch.float32) for site, numbers in running.items()}
    tokens = [one for one in runtime.tokens if one.learns]
    _check_tokens(tokens, values.get("tokens"))
    resample = runtime.resample
    if "resample" in values and resample is None:
        raise ValueError("resample: selections are kept of no layer of this model")
    if resample is not None and "resample" in values:
        resample.load_state(values["resample"])
    elif resample is not None:
        resample.forget()
    if resample is not None:
        resample.held = values["selection_interval"] > 1
    for name, place in places.items():
        runtime.state[place] = values[name]
    for site in learning:
        found = norms.get(site)
        sites[site].running = None if found is None else found.to(runtime.state.device)
    for selection, learnt in zip(tokens, values.get("tokens") or [None] * len(tokens), strict=True):
        selection.load_state(learnt)


def _check_tokens(learning: Sequence[TokenSelection], given: Any) -> None:
    if given is None:
        return
    if not isinstance(given, (tuple, list)) or len(given) != len(learning):
        raise ValueError(f"tokens: expected the scores of {len(learning)} stretches of blocks, got {given!r}")
    for one in given:
        if not isinstance(one, Mapping) or set(one) != {"running", "held_key", "held"}:
            raise ValueError(f"tokens: expected running, held_key and held of each stretch of blocks, got {one!r}")


def _load_graphs(handle: GraphHandle, values: Mapping[str, Any]) -> None:
    if set(values) != {"graphs"}:
        raise ValueError(f"values: expected what sampler_state_dict gives of a backend, got the keys {sorted(values)}")
    for one in values["graphs"]:
        if set(one) != {"layers", "state"} or not isinstance(one["state"], Mapping):
            raise ValueError(f"graphs: expected the layers and the state of each graph, got {one!r}")
    waiting = list(values["graphs"])
    for approx in _each_state(handle):
        own = next((one for one in waiting if one["layers"] == layers_of(approx)), None)
        if own is not None:
            load_sampler_state_dict(approx, own["state"])
            waiting.remove(own)
    handle.states = waiting


def _each_state(model: nn.Module | GraphHandle) -> list[ApproxModule]:
    """The transformed model or graphs; of those for other shapes of the same layers, with one state, the first."""
    made: dict[int, ApproxModule] = {}
    for approx in pieces_of(model):
        made.setdefault(approx._fx_approx.state.data_ptr(), approx)
    return list(made.values())


def synchronize_scores(model: nn.Module | GraphHandle, group: Any = None) -> None:
    """Averages the running norms of scores that learn over all ranks, so that they choose the same channels and tokens.

    To be called by all ranks alike: once is enough where all see data of one kind; where the shared selection is relied
    upon, before every step. Nothing to do for other scores, which are the same on all ranks by themselves.

    Args:
        model: A transformed model, what wraps it, or a backend whose graphs are the same on all ranks.
        group: A process group of torch.distributed; None for all ranks.

    Raises:
        RuntimeError: There is no process group.
    """
    runtimes = [approx._fx_approx for approx in _each_state(model)]
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RuntimeError("group: torch.distributed is not initialised; call torch.distributed.init_process_group")
    resamples = [runtime.resample for runtime in runtimes if runtime.resample is not None]
    learnt = [one for resample in resamples for one in resample.each() if one.running is not None]
    norms = [one.running for one in learnt if one.running is not None]
    norms += [one.running for runtime in runtimes for one in runtime.tokens if one.running is not None]
    ages = [one.age for one in learnt if one.age is not None]
    if not norms:
        return
    running = torch.cat([own.flatten() for own in norms])  # of all selections at once: each is short
    known = (running >= 0).to(running.dtype)
    sums = torch.stack((running * known, known))
    torch.distributed.all_reduce(sums, group=group)
    mean = torch.where(sums[1] > 0, sums[0] / sums[1].clamp(min=1), running)
    for own, value in zip(norms, mean.split([own.numel() for own in norms]), strict=True):
        own.copy_(value.view_as(own))
    if not ages:
        return
    age = torch.cat(ages)
    torch.distributed.all_reduce(age, torch.distributed.ReduceOp.MIN, group=group)
    for own, value in zip(ages, age.split([own.numel() for own in ages]), strict=True):
        own.copy_(value)


def recalibrate_batchnorm(model: nn.Module | GraphHandle, batches: Iterable[Any]) -> int:
    """Re-estimates all BatchNorm statistics on exact forwards, as an exact evaluation needs them.

    Args:
        model: A transformed model, or any other, or a backend, whose model it is then.
        batches: 20 or more training batches; each the input, a tuple that begins with it, or a dict of keywords.

    Returns:
        How many batches were used.

    Raises:
        TypeError: ``model`` is no module, or ``batches`` one tensor.
        ValueError: No batch; the statistics are then as before.
    """
    if not isinstance(model, (nn.Module, GraphHandle)):
        raise TypeError(f"model: expected a module or a backend, got {model!r}")
    if isinstance(batches, torch.Tensor) or not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected an iterable of batches, such as a loader or a list, got {type(batches)}")
    pieces = model.pieces if isinstance(model, GraphHandle) else ()
    module = model.model("recalibrate_batchnorm") if isinstance(model, GraphHandle) else model
    count = reestimate(module, batches)
    for one in (*module.modules(), *pieces):
        if isinstance(one, ApproxModule):
            one._fx_approx.batchnorm.note_fresh(one, one._fx_approx.samples)
    return count
