"""Tables of what policies predict and choose, and of a first comparison of accuracies."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from _page_parts import ONE, Content, quartiles, rows_to_table, signed


def predictions(content: Content) -> str:
    """Predicted speed-ups of steps beside measured ones."""
    rows = []
    off: dict[str, list[float]] = {"roofline": [], "measured": []}
    for one in content["results"]:
        middle = one["clock"][1]
        cells = []
        for name in off:
            error = one[name] / middle - 1
            off[name].append(abs(error))
            cells.append(f"{one[name]:.2f} ({signed(100 * error, 0)} %)")
        rows.append([one["model"], f"{one['ratio']:g}", quartiles(one["clock"]), *cells])
    heads = ["model", "ratio", "clock", "`RooflineModel`", "`MeasuredModel`"]
    medians = " and ".join(f"{100 * statistics.median(own):.1f} %" for own in off.values())
    return f"{rows_to_table(heads, rows)}\n\nMedian error: {medians}."


def budgets(content: Content) -> str:
    """Errors of the gradient at equal operations: one ratio for all layers, and budgets."""
    rows = []
    shares: dict[str, list[float]] = {"predicted": [], "measured": []}
    for one in content["results"]:
        whole = one["uniform"]["error"]
        for name, own in shares.items():
            own.append(one[name]["error"] / whole)
        rows.append(
            [
                one["model"],
                f"{one['budget']:.3f}",
                f"{whole:.3g}",
                *(f"{one[name]['error']:.3g} ({own[-1]:.2f})" for name, own in shares.items()),
                *(f"{signed(100 * (one[name]['flops'] / one['budget'] - 1))} %" for name in shares),
            ]
        )
    heads = ["network", "operations", "one ratio", "budget, predicted", "budget, measured"]
    heads += ["operations against the budget, predicted", "measured"]
    told = "; ".join(
        f"{name}: lower on {sum(share < 1 for share in own)} of {len(own)}, median {statistics.median(own):.2f}"
        for name, own in shares.items()
    )
    return f"{rows_to_table(heads, rows)}\n\nShare of the one ratio's error, {told}."


def auto(content: Content) -> str:
    """What ``Auto`` samples and gains, and the best of one ratio for all layers."""
    rows = []
    for one in content["results"]:
        other = {name: own for name, own in one["speedup"].items() if name != "auto"}
        best = max(other, key=lambda name: other[name][1])
        rows.append(
            [
                one["model"],
                str(one["batch"]),
                f"{1000 * one['seconds']:.0f}",
                f"{one['sampled']} of {one['layers']}",
                quartiles(one["speedup"]["auto"]),
                f"{quartiles(other[best])} {best.replace('site', 'layer')}",
                f"{one['decided']:.0f}",
            ]
        )
    heads = ["network", "batch", "exact, ms", "sampled", "exact / Auto", "best of one ratio", "deciding, s"]
    return rows_to_table(heads, rows)


def demand_accuracy(rows: Content) -> str:
    """Accuracy with and without a tail, by setting."""
    table = []
    for name in dict.fromkeys(one["setting"] for one in rows):
        own = [one for one in rows if one["setting"] == name]
        cells = [_mean([one[key] for one in own]) for key in ("trained", "recalibrated")]
        each = ", ".join(f"{_percent(one['recalibrated']):.1f}" for one in own)
        table.append([name, str(len(own)), *cells, each])
    return rows_to_table(["setting", "seeds", "as trained", "recalibrated", "each seed, recalibrated"], table)


def _percent(value: float) -> float:
    return 100 * value if value <= 1 else value


def _mean(values: Sequence[float]) -> str:
    own = [_percent(value) for value in values]
    return f"{own[0]:.1f} ({ONE})" if len(own) == 1 else f"{statistics.mean(own):.1f} ± {statistics.stdev(own):.1f}"
