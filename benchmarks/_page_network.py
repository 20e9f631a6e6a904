"""Tables of data-parallel training over a network, from the records of benchmarks/multinode.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import _multinode_report as report
from _network_model import ALGORITHMS, Link, messages
from _page_parts import Content, rows_to_table

Result = dict[str, Any]


def bytes_of(content: Content) -> str:
    """Gradients of a step, as planned."""
    rows = [report.byte_cells(one) for one in content["results"]]
    return rows_to_table(["network", "ratio", "scope", "dense, MB", "sent, MB", "less"], rows)


def _links(result: Result) -> list[Any]:
    """The slowest first."""
    return sorted(result["measured"], key=lambda rate: rate["rate"])


def machines(content: Content) -> str:
    """Each network was measured by itself."""
    parts = []
    for one in content["results"]:
        own = one["environment"]
        parts.append(
            f"{one['network']} on {one['hosts']} hosts: {own['processor']}, {own['cores']} cores, {one['runs']} runs, "
            f"Python {own['python']}, torch {own['torch']}, fx_approx {own['fx_approx']}, {own['date']}"
        )
    return f"{'; '.join(parts)}. Congestion control: {content['results'][0]['congestion']}."


def times(content: Content) -> str:
    """Dense / this, by network and link; then what was checked, and the links."""
    results = content["results"]
    names = [_short(one["name"]) for one in results[0]["variants"][1:]]
    rows = []
    for one in results:
        for rate in _links(one):
            dense = statistics.median(report._of(rate, "dense", "seconds")) / rate["stretch"]
            lines = [report._step_line(one, rate, own) for own in one["variants"][1:]]
            rows.append(
                [
                    one["network"],
                    str(one["hosts"]),
                    f"{rate['rate']:,.0f}",
                    f"{dense:.2f}",
                    *(line[5] for line in lines),
                ]
            )
    checked = [
        f"- {one['network']}, {one['hosts']} hosts: {one['seconds']:.3f} s of computing; after 4 steps of training a "
        f"small network the parameters differ from dense reduction by {one['trained']:.1g}, the gradients of this one "
        f"by {one['difference']:.1g}; a step takes {1000 * one['overhead']:.0f} ms more than it waits, "
        "which is taken off."
        for one in results
    ]
    links = [report._link_line(one, rate) for one in results for rate in _links(one)]
    heads = ["network", "hosts", "stands for Mb/s", "stretch", "set Mb/s", "one stream, Mb/s", "all-reduce, Mb/s"]
    return "\n\n".join(
        [
            rows_to_table(["network", "hosts", "Mb/s", "dense, s", *names], rows),
            "\n".join(checked),
            "The links, as measured:",
            rows_to_table([*heads, "a small all-reduce, ms"], links),
        ]
    )


def _short(name: str) -> str:
    return f"{name.partition(', computes')[0]}, less computing" if "computes" in name else name


def sent(content: Content) -> str:
    """Bytes and processor time of a step, and the model on paper beside the measurement."""
    rows = []
    for one in content["results"]:
        middle = next(rate for rate in _links(one) if rate["rate"] == 1000)
        for own in one["variants"]:
            if "compute" in own:
                continue
            name, over, paper = own["name"], [], []
            for rate in _links(one):
                counted, expected = (statistics.median(report._of(rate, name, key)) for key in ("counted", "expected"))
                over.append(100 * (counted / expected - 1))
                paper.append(report._step_line(one, rate, own)[-1].replace("-", "−"))
            cpu, pack, unpack = (
                1000 * statistics.median(report._of(middle, name, k)) for k in ("cpu", "pack", "unpack")
            )
            counted = statistics.median(report._of(middle, name, "counted"))
            cells = [
                f"{counted / 1e6:.2f}",
                f"{min(over):.2f} to {max(over):.2f} %",
                f"{cpu:.0f}",
                f"{pack + unpack:.0f}",
            ]
            rows.append([one["network"], str(one["hosts"]), name, *cells, ", ".join(paper)])
    heads = ["network", "hosts", "variant", "sent, MB", "counted, more than reported", "CPU of a step, ms"]
    return rows_to_table([*heads, "of it in the hook, ms", "on paper, more than measured"], rows)


def paper(content: Content) -> str:
    """Many workers, by the model: ring / halving-doubling; packing left out, then packing as measured."""
    results = content["results"]
    parts = []
    for packing, told in ((False, "Packing left out:"), (True, "Packing as measured here, on one core:")):
        parts += [told, _paper(results, packing)]
    return "\n\n".join(parts)


def _paper(results: Sequence[Result], packing: bool) -> str:
    alpha = min(rate["small"] / messages(one["hosts"], "ring") for one in results for rate in _links(one))
    rows, names = [], [_short(one["name"]) for one in results[0]["variants"][1:]]
    for result in {one["network"]: one for one in sorted(results, key=lambda one: -one["hosts"])}.values():
        for rate in _links(result):
            link = Link(alpha, rate["all_reduce"] / rate["emulated"] * rate["rate"] * 1e6 / 8)
            for workers in report.WORKERS:
                each = [_seconds(result, rate, link, workers, algorithm, packing) for algorithm in ALGORITHMS]
                cells = [" / ".join(f"{own[0]:.2f}" for own in each)]
                cells += [
                    " / ".join(f"{own[0] / own[place]:.2f}" for own in each) for place in range(1, len(names) + 1)
                ]
                rows.append([result["network"], f"{rate['rate']:,.0f}", f"{workers:,}", *cells])
    return rows_to_table(["network", "Mb/s", "workers", "dense, s", *names], rows)


def _seconds(result: Result, rate: Any, link: Link, workers: int, algorithm: str, packing: bool) -> list[float]:
    return [report._paper_step(result, rate, own, link, workers, algorithm, packing) for own in result["variants"]]
