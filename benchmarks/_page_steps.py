"""Tables of training steps and of single layers and products, from the records of the benchmarks."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from _page_parts import Content, quartiles, rows_to_table

Row = dict[str, Any]


def _form(one: Row) -> str:
    return "compiled" if one["compiled"] else "eager"


def steps(*contents: Content) -> str:
    """Time, operations and memory of whole training steps; where they were profiled, where the time goes."""
    found = [one for content in contents for one in content["results"]]
    exact = {(one["model"], one["compiled"]): one for one in found if one["variant"] == "exact"}
    shared = any(not one["compiled"] for one in found)
    rows, profiles = [], []
    for one in found:
        whole = exact[one["model"], one["compiled"]]["peak"]
        low, high = (1000 * value for value in one["spread"])
        rows.append(
            [
                one["model"],
                one["variant"],
                _form(one),
                f"{1000 * one['seconds']:.0f} [{low:.0f}, {high:.0f}]",
                "" if one["flops"] is None else f"{one['flops']:.2f}",
                *([quartiles(one["speedup"])] if shared else []),
                quartiles(one["of_compiled"]),
                "" if one["peak"] is None else f"{one['peak'] / 2**20:.0f} ({one['peak'] / whole:.2f})",
            ]
        )
        if one["profile"]:
            kinds = [f"{value:.1f}" for value in one["profile"].values()]
            profiles.append([one["model"], one["variant"], _form(one), *kinds])
    heads = ["model", "variant", "", "ms", "operations, exact / this"]
    heads += ["exact / this, alike"] * shared + ["compiled exact / this", "peak MiB (share of exact)"]
    kept = [place for place in range(len(heads)) if any(row[place] for row in rows)]
    table = rows_to_table([heads[place] for place in kept], [[row[place] for place in kept] for row in rows])
    if not profiles:
        return table
    kinds = list(next(one["profile"] for one in found if one["profile"]))
    told = "Where the time goes, milliseconds by kind of work (torch's profiler):"
    return f"{table}\n\n{told}\n\n{rows_to_table(['model', 'variant', '', *kinds], profiles)}"


def selection(content: Content) -> str:
    """What choosing costs."""
    rows = [
        [
            one["model"],
            one["scores"],
            _form(one),
            f"{1000 * one['seconds']:.1f}",
            f"{1000 * one['step']:.0f}",
            "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * value for value in (one["share"], *one["quartiles"]))),
            str(one["repeats"]),
        ]
        for one in content["results"]
    ]
    heads = ["model", "scores", "", "choosing, ms", "the step, ms", "per cent of the step", "runs"]
    return rows_to_table(heads, rows)


def roles(*contents: Content) -> str:
    """Sampled gradients of one layer: eager and compiled beside one another."""
    each = [{(one["layer"], one["variant"]): one for one in content["results"]} for content in contents]
    rows = [
        [
            *key,
            *(
                f"{1000 * one[key]['seconds']:.0f} ms" if key[1] == "exact" else quartiles(one[key]["speedup"])
                for one in each
            ),
        ]
        for key in each[0]
    ]
    return rows_to_table(["layer", "sampled", "eager: exact / this", "compiled: exact / this"], rows)


def memory(content: Content) -> str:
    """Bytes kept for the backward pass, and the peak."""
    found = content["results"]
    rows = [
        [one["variant"], *(f"{one[k] / 1e6:,.0f} MB ({one[k] / found[0][k]:.2f})" for k in ("layers", "step", "peak"))]
        for one in found
    ]
    return rows_to_table(["weight gradients", "the layers keep", "the step saves", "peak of the step"], rows)


def products(content: Content) -> str:
    """Exact / this of single products: medians over the layers of a network, and how many get faster."""
    found = content["results"]["ops"]
    sampled = [one for one in found if one["variant"] == "sampled"]
    rows = []
    for network in _ordered(one["network"] for one in sampled):
        for ratio in sorted({one["ratio"] for one in sampled}, reverse=True):
            own = [one for one in sampled if (one["network"], one["ratio"]) == (network, ratio)]
            cells = [_median_of([one for one in own if one["role"] == role]) for role in _roles(sampled)]
            rows.append([network, str(len({one["layer"] for one in own})), f"{ratio:g}", *cells])
    peaks = content["results"]["peaks"]
    told = f"The roof that was measured: {peaks['flops'] / 1e9:.0f} GFLOP/s, {peaks['bytes'] / 1e9:.1f} GB/s."
    return f"{rows_to_table(['layers of', 'number', 'ratio', *_roles(sampled)], rows)}\n\n{told}"


def _roles(found: Iterable[Row]) -> list[str]:
    return _ordered(one["role"] for one in found)


def _ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _median_of(own: Sequence[Row]) -> str:
    ratios = [one["speedup"][1] for one in own]
    return f"{statistics.median(ratios):.2f} ({sum(ratio > 1 for ratio in ratios)})" if ratios else ""


def tokens(content: Content) -> str:
    """Steps that leave tokens out, with and without an optimiser."""
    rows = [
        [
            one["model"],
            str(one["batch"]),
            one["variant"],
            "" if one["variant"] == "exact" else str(one["first"]),
            _form(one),
            one["optimizer"],
            "" if one["seconds"] is None else f"{1000 * one['seconds']:.0f}",
            quartiles(one["speedup"]),
            "" if one["operations"] is None else f"{one['operations']:.2f}",
            "" if one["peak"] is None else f"{one['peak'] / 1e6:,.0f} MB ({one['of_exact']:.2f})",
            one["processor"],
        ]
        for one in content["results"]
    ]
    heads = [
        "model",
        "batch",
        "variant",
        "first",
        "",
        "optimiser",
        "ms",
        "exact / this",
        "operations",
        "peak (of exact)",
    ]
    return rows_to_table([*heads, "processor"], rows)


def kernels(content: Content) -> str:
    """Products that gather their operands, and kernels that read them in place."""
    rows = [
        [
            one["product"],
            "x".join(map(str, one["shape"])),
            f"{one['ratio']:g}",
            one["variant"],
            f"{1e6 * one['seconds']:.0f}",
            quartiles(one["speedup"]),
        ]
        for one in content["results"]
    ]
    return rows_to_table(["product", "rows x inputs x outputs", "ratio", "variant", "µs", "exact / this"], rows)
