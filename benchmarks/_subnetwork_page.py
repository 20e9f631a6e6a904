"""The times of subnetworks as tables, and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from _device import shown
from _subnetwork_cases import case_of
from _subnetwork_results import Timed
from tabulate import tabulate

HEADERS = [
    *("optimizer", "mode", "exact, ms", "kept", "subnetwork", "narrow"),
    *("subnetwork / kept", "subnetwork / narrow", "aims"),
]
KEPT, LIMIT, EAGER = 1.12, 0.95, 0.95
"""What is asked for: times as fast as with the kept selection in the graph, of the speed of the narrow network, and
eager of the compiled speed relative to exact."""

Group = dict[str, Timed]


def groups(found: Sequence[Timed]) -> Iterator[Group]:
    """The variants that are compared, by name: those of one model, scope, optimiser and mode."""
    made: dict[tuple[Any, ...], Group] = {}
    for one in found:
        made.setdefault((one.model, one.what, one.optimizer, one.compiled), {})[one.variant] = one
    yield from made.values()


def _row(own: Group) -> list[str]:
    exact, kept, sub, narrow = (own[name] for name in ("exact", "kept", "subnetwork", "narrow"))
    return [
        exact.optimizer,
        "compiled" if exact.compiled else "eager",
        f"{exact.milliseconds:.1f}",
        *(shown(one.over(exact)) for one in (kept, sub, narrow)),
        shown(sub.over(kept)),
        shown(sub.over(narrow)),
        aims(own),
    ]


def aims(own: Group) -> str:
    """What is asked for of the subnetwork, and whether it is there."""
    sub = own["subnetwork"]
    case = case_of(f"{sub.model}, {sub.what}")
    asked = case.compiled if sub.compiled else case.eager
    said = []
    if asked is not None:
        said.append(f"{asked:g} {_met(sub.over(own['exact'])[1], asked)}")
    said.append(f"{KEPT:g} of kept {_met(sub.over(own['kept'])[1], KEPT)}")
    said.append(f"{LIMIT:g} of narrow {_met(sub.over(own['narrow'])[1], LIMIT)}")
    return ", ".join(said)


def _met(value: float, asked: float) -> str:
    return "met" if value >= asked else "missed"


def table(found: Sequence[Timed], title: str, style: str = "simple") -> str:
    """Rows of one model and scope."""
    rows = tabulate([_row(own) for own in groups(found)], HEADERS, style, disable_numparse=True)
    return f"{title}\n{rows}" if title else rows


def _modes(found: Sequence[Timed]) -> list[list[str]]:
    """Eager against compiled, for the exact model and the subnetwork."""
    by_key = {one.key: one for one in found}
    rows = []
    for one in found:
        if one.variant != "exact" or one.compiled:
            continue
        keys = [
            (one.model, one.what, one.optimizer, variant, compiled)
            for variant in ("exact", "subnetwork")
            for compiled in (False, True)
        ]
        if not all(key in by_key for key in keys):
            continue
        exact, exact_compiled, sub, compiled = (by_key[key] for key in keys)
        own, relative = exact.over(exact_compiled), sub.over(exact)[1] / compiled.over(exact_compiled)[1]
        asked = f"{EAGER:g} {_met(relative, EAGER)}" if own[1] >= EAGER else ""
        rows.append(
            [one.model, one.what, one.optimizer, shown(own), shown(sub.over(compiled)), f"{relative:.2f}", asked]
        )
    return rows


def markdown(found: Sequence[Timed], environment: Mapping[str, Any]) -> str:
    """The page."""
    about = ", ".join(f"{name} {value}" for name, value in environment.items() if value is not None)
    parts = [
        "# Subnetworks: time of a whole training step",
        "Written by `python benchmarks/subnetworks.py --json docs/results/subnetworks.json --markdown "
        "docs/results/subnetworks.md`, which says how. Ratio 0.5, scores by weight, forward, loss, backward and the "
        "optimiser's step (SGD with momentum 0.9; AdamW), all variants in turn in one process.",
        f"The last of the runs: {about}.",
        "*kept*, *subnetwork*, *narrow*: times as fast as the exact model, eager or compiled as the row; medians over "
        "neighbouring steps, quartiles in brackets. *kept*: the selection kept in the graph of the transformed model. "
        "*narrow*: a network written by hand whose parameters have the shapes of the subnetwork's; at scope `value` it "
        "reads the first half of the residual stream, a view, where the subnetwork gathers what is selected. "
        "*subnetwork / kept* and *subnetwork / narrow*: times as fast as those.",
    ]
    for title in dict.fromkeys(f"{one.model}, {one.what}" for one in found):
        own = [one for one in found if f"{one.model}, {one.what}" == title]
        counts = {one.variant: one.parameters for one in own}
        runs = "; ".join(dict.fromkeys(one.measured for one in own if one.measured))
        form = "of the model's own class" if own[0].own_forward else f"a graph: {own[0].reason}"
        parts += [
            f"## {title}",
            f"{counts['exact']:,} parameters, of the subnetwork {counts['subnetwork']:,}. The subnetwork is {form}."
            + (f" Measured {runs}." if runs else ""),
            table(own, "", "github"),
        ]
    modes = _modes(found)
    if modes:
        headers = ["model", "what", "optimizer", "exact: eager / compiled", "subnetwork: eager / compiled"]
        parts += [
            "## Eager against compiled",
            "Speed of eager over that of compiled code. *relative*: the eager subnetwork's speed-up over the compiled "
            f"one's; where the exact model's eager speed is {EAGER:g} of its compiled one, as much is asked for.",
            tabulate(modes, [*headers, "relative", "aim"], "github", disable_numparse=True),
        ]
    return "\n\n".join(parts) + "\n"
