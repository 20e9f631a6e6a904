"""The results of the zoo as a table."""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any

from _zoo_run import Result
from tabulate import tabulate

_COLUMNS = ("model", "sampled", "narrowed", "FLOPs saved", "untraced", "where demand stopped", "verify", "error")
_MOST = 25  # reasons of all models
_SHOWN = 3  # reasons of one model
_LONGEST = 70  # characters of a reason


def summary(results: Sequence[Result]) -> str:
    """Figures of all models together, and what failed."""
    passed = [one for one in results if one.passed]
    lines = [f"{len(passed)} of {len(results)} models: every output and gradient as the oracle's, to rounding."]
    lines += [f"FAILED {one.name}: {_wrong(one)}" for one in results if not one.passed]
    if passed:
        worst = max(passed, key=lambda one: (one.error or 0.0) / one.tolerance)
        lines.append(f"The largest error relative to its bound: {worst.error:.1e} of {worst.name} ({worst.error_at}).")
    products, sampled = sum(one.products for one in results), sum(one.sampled for one in results)
    whole = sum(1 for one in results if not one.untraced)
    lines.append(f"{sampled} of {products} products are sampled; {whole} models have no part that is not traced.")
    return "\n".join(lines)


def _wrong(one: Result) -> str:
    if one.failure:
        return one.failure
    if one.verified is False:
        return f"verify: {one.verify_error:.1e}"
    return f"{one.error_at}: {one.error:.1e}" if one.error is not None else "not compared"


def reasons(results: Sequence[Result]) -> list[tuple[str, int, int]]:
    """Why demand stopped: the reason, how often, and in how many models."""
    counts: collections.Counter[str] = collections.Counter()
    models: collections.Counter[str] = collections.Counter()
    for one in results:
        own = collections.Counter[str]()
        for reason, count in one.stops:
            own[_kind(reason)] += count
        counts.update(own)
        models.update(own.keys())
    return [(reason, count, models[reason]) for reason, count in counts.most_common()]


def _kind(reason: str) -> str:
    """A reason without the numbers in names of values."""
    return re.sub(r"_?N(?=_|\b)|N(?=[a-z])", "", reason).removeprefix("_")


def row(one: Result) -> list[str]:
    """One model."""
    stops = "; ".join(f"{_short(_kind(reason))} ({count})" for reason, count in one.stops[:_SHOWN])
    verified = {None: "nothing left out", True: f"{one.verify_error or 0.0:.0e}", False: "**differs**"}[one.verified]
    error = "**" + _short(_wrong(one)) + "**" if not one.passed else f"{one.error:.1e}"
    if one.passed and one.tolerance > 1e-6:
        error += " (float32 inside)"
    return [
        one.name,
        f"{one.sampled} of {one.products}",
        str(one.narrowed),
        f"{100 * one.saved:.0f} %",
        str(len(one.untraced)) if one.untraced else "",
        stops,
        verified,
        error,
    ]


def _short(text: str) -> str:
    text = re.sub(r"(?<![\w.~:/-])/\S*/", "", text)  # folders of one machine
    cut = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return cut.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def markdown(results: Sequence[Result], environment: Mapping[str, Any]) -> str:
    """The page: what was done, a table for each family, the reasons together, what was not traced."""
    about = ", ".join(f"{name} {value}" for name, value in environment.items() if value is not None)
    parts = [
        "# Models: what is sampled, and whether it is right",
        "Written by `python benchmarks/model_zoo.py --json docs/results/model-zoo.json --markdown "
        "docs/results/model-zoo.md`, which says how. Policy: `Uniform(0.5, 'topk', scores='weight', scope='value')`; "
        "float64, random weights, small images and configurations, layers a quarter as wide where a constructor has no "
        "option for it. So the FLOPs saved are those of these small models.",
        f"{about}.",
        "*sampled*: products with a selection, of all products. *narrowed*: products that compute some of their "
        "outputs only. *untraced*: parts, or graphs, that were not traced or stayed exact (below). *verify*: the "
        "largest difference with and without demand. *error*: the largest of any output or gradient against the "
        "oracle, relative to the largest entry of that tensor.",
        summary(results).replace("\n", "\n\n"),
    ]
    for family in dict.fromkeys(one.family for one in results):
        own = [one for one in results if one.family == family]
        frontends = " and ".join(sorted({f"`{one.frontend}`" for one in own}))
        table = tabulate([row(one) for one in own], _COLUMNS, "github", disable_numparse=True)
        parts += [f"## {family} ({len(own)}, by {frontends})", table]
    found = [(_short(reason), count, models) for reason, count, models in reasons(results)][:_MOST]
    parts += ["## Where demand stopped", tabulate(found, ["reason", "values", "models"], "github")]
    notes = [f"- {one.name}: {_short(note)}" for one in results for note in one.untraced]
    if notes:
        parts += ["## What was not traced", "\n".join(notes)]
    return "\n\n".join(parts) + "\n"
