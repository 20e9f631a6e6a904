"""The coverage table as lines and as a page."""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any

from _coverage_run import PEER, SAME, SCOPES, Outcome, Result
from tabulate import tabulate

_METHODS = (*SCOPES, PEER)
_LONGEST = 110
_COLUMNS = ["model", "parameters, M", *(f"{name}: {what}" for name in _METHODS for what in ("made", "size"))]


def state(outcome: Outcome | None) -> str:
    """A method on a model, in a word or two."""
    if outcome is None:
        return ""
    if outcome.failed:
        return "**fails**"
    said = [outcome.form]
    if outcome.trains:
        said.append("**does not train**")
    if outcome.same is not None and outcome.same > SAME:
        said.append("**other numbers**")
    if outcome.exports:
        said.append("no export")
    return ", ".join(said)


def size(outcome: Outcome | None) -> str:
    """Parameters and operations relative to the full model."""
    if outcome is None or outcome.parameters is None or outcome.flops is None:
        return ""
    return f"{100 * outcome.parameters:.0f} / {100 * outcome.flops:.0f} %"


def wrong(outcome: Outcome) -> str:
    """What is wrong, in a line."""
    if outcome.failed:
        return outcome.failed
    if outcome.trains:
        return outcome.trains
    if outcome.same is not None and outcome.same > SAME:
        return f"differs by {outcome.same:.1e} from the model with the kept selection"
    return f"torch.export: {outcome.exports}" if outcome.exports else ""


def summary(result: Result) -> str:
    """One result in one line, with what went wrong."""
    if result.failure:
        return f"{result.name:34} {result.failure}"
    parts = [f"{name}: {state(one)} {size(one)}" for name, one in result.outcomes.items()]
    said = [f"\n    {name}: {wrong(one)}" for name, one in result.outcomes.items() if wrong(one)]
    return f"{result.name:34} {result.seconds:5.0f} s  {'; '.join(parts)}{''.join(said)}"


def _short(text: str) -> str:
    text = re.sub(r"(?<![\w.~:/-])/\S*/", "", text)  # folders of one machine
    cut = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return cut.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;").replace("_", "\\_")


def _totals(results: Sequence[Result]) -> list[list[str]]:
    rows = []
    for name in _METHODS:
        tried = [one for one in results if name in one.outcomes]
        if not tried:
            continue
        own = [(one, one.outcomes[name]) for one in tried]
        able = [outcome for one, outcome in own if not one.exports and not outcome.failed]
        rows.append(
            [
                name if name == PEER else f"subnetwork, {name}",
                f"{sum(1 for _, one in own if not one.failed)} of {len(own)}",
                f"{sum(1 for _, one in own if one.works)}",
                f"{sum(1 for _, one in own if one.form == 'class')}",
                f"{sum(1 for one in able if not one.exports)} of {len(able)}",
                *(_median([getattr(one, what) for _, one in own if one.works]) for what in ("parameters", "flops")),
            ]
        )
    return rows


def _median(shares: Sequence[float | None]) -> str:
    known = sorted(one for one in shares if one is not None)
    return f"{100 * known[len(known) // 2]:.0f} %" if known else ""


def _reasons(results: Sequence[Result]) -> list[list[Any]]:
    """Why subnetworks are graphs, and in how many models."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for one in results:
        for name in SCOPES:
            outcome = one.outcomes.get(name)
            for reason in dict.fromkeys((outcome.reason if outcome else "").split("; ")):
                if reason:
                    counts[name, re.sub(r"(?<=[a-z])_?\d+\b", "", reason)] += 1
    return [[name, _short(reason), count] for (name, reason), count in counts.most_common(25)]


def markdown(results: Sequence[Result], environment: Mapping[str, Any], known: int) -> str:
    """The page.

    Args:
        results: A row each.
        environment: Of the last run.
        known: How many models the table is to have.
    """
    about = ", ".join(f"{name} {value}" for name, value in environment.items() if value is not None)
    thin = [one.name for one in results if one.thin]
    parts = [
        "# Subnetworks: which models, beside Torch-Pruning",
        "Written by `python benchmarks/subnetwork_coverage.py --json docs/results/subnetwork-coverage.jsonl "
        "--markdown docs/results/subnetwork-coverage.md`, which says how. `Uniform(0.5, min_k=16)` at scopes "
        "`value` and `group`, with products of two activations exact, and those by weights that the step computes, as "
        "of standardised convolutions; Torch-Pruning's `BasePruner` at `pruning_ratio=0.5` by magnitude, with the "
        "layers that make the output ignored and heads given, as in its examples. It traces in eval mode and does not "
        "see auxiliary heads that only training has, as of GoogLeNet and Inception, which its examples build without. "
        "Random weights, float32, two small images.",
        f"The last of the runs: {about}.",
        "*made*: `class`, an instance of the model's own class; `graph`, a `torch.fx.GraphModule`; it trains for "
        "a step, computes what the model computes with the kept selection (to 1e-5 of the largest output, in float64 "
        "where float32 is not enough), and `torch.export` takes it in eval mode where it takes the full model, unless "
        "something else is said. *size*: parameters / operations of a training step, of the full model's.",
        tabulate(
            _totals(results),
            ["", "narrow", "and trains", "own class", "exports, of those whose original does", "parameters", "FLOPs"],
            "github",
            disable_numparse=True,
        ),
        "Medians of parameters and FLOPs are over the models that train.",
    ]
    if len(results) < known:
        parts.append(f"**{len(results)} of {known} models so far**; the same command goes on with the others.")
    if thin:
        parts.append(f"A quarter as wide, being too large as they are: {', '.join(thin)}.")
    for family in dict.fromkeys(one.family for one in results):
        own = [one for one in results if one.family == family]
        rows = [
            [
                one.name,
                "" if one.failure else f"{one.parameters / 1e6:.1f}",
                *(cell(one.outcomes.get(name)) for name in _METHODS for cell in (state, size)),
            ]
            for one in own
        ]
        parts += [f"## {family} ({len(own)})", tabulate(rows, _COLUMNS, "github", disable_numparse=True)]
    said = [f"- {one.name}: {_short(one.failure)}" for one in results if one.failure]
    said += [
        f"- {one.name}, {name}: {_short(wrong(outcome))}"
        for one in results
        for name, outcome in one.outcomes.items()
        if wrong(outcome)
    ]
    if said:
        parts += ["## What went wrong", "\n".join(said)]
    reasons = _reasons(results)
    if reasons:
        parts += ["## Why a subnetwork is a graph", tabulate(reasons, ["scope", "reason", "models"], "github")]
    return "\n\n".join(parts) + "\n"
