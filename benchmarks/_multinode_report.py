"""What benchmarks/multinode.py makes of its measurements: quartiles, bytes against the report, the model on paper."""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Sequence
from typing import Any

from _device import quartiles, shown, speedup
from _network_model import ALGORITHMS, Bucket, Costs, Link, factor, messages, ready_times, step_seconds
from _replay import FORWARD, NETWORKS, layers_of, sampled, seconds_of
from tabulate import tabulate

import fx_approx
from fx_approx.distributed import Traffic
from fx_approx.distributed.slices import find_slices

WORKERS = (8, 64, 256, 1024)
SCOPES = {"not demanded": ("value", False), "value": ("value", True), "group": ("group", True)}


def planned_bytes(networks: Sequence[str], ratios: Sequence[float], min_k: int) -> list[dict[str, Any]]:
    """Bytes of gradients in a step, dense and by the plan; no network is needed."""
    found = []
    for name in networks:
        network = NETWORKS[name]
        exact = network.build()
        for ratio in ratios:
            for label, (scope, demand) in SCOPES.items():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", fx_approx.errors.NoEffectWarning)
                    model = sampled(exact, ratio, network.small, scope, "weight", min_k, demand)
                sliced, whole = find_slices(model)
                traffic = Traffic(model, sliced, whole)
                own = sum(p.nbytes for p in sliced)
                saved = traffic.dense - traffic.predicted
                found.append(
                    {
                        "network": name,
                        "ratio": ratio,
                        "scope": label,
                        "dense": traffic.dense,
                        "sent": traffic.predicted,
                        "sliced": len(sliced),
                        "dense of sliced": own,
                        "sent of sliced": own - saved,
                    }
                )
    return found


def byte_cells(one: dict[str, Any]) -> list[str]:
    """A setting, its megabytes, dense and sent, and the share that is saved."""
    return [
        one["network"],
        f"{one['ratio']:.3g}",
        one["scope"],
        f"{one['dense'] / 1e6:.1f}",
        f"{one['sent'] / 1e6:.1f}",
        f"{100 * (1 - one['sent'] / one['dense']):.1f} %",
    ]


def show_bytes(found: Sequence[dict[str, Any]]) -> None:
    """Prints them."""
    lines = [
        [
            *byte_cells(one),
            f"{100 * (1 - one['sent of sliced'] / one['dense of sliced']):.1f} % ({one['sliced']})",
        ]
        for one in found
    ]
    heads = ["network", "ratio", "scope", "dense MB", "sent MB", "less", "less of sliced weights (how many)"]
    print(f"\n{tabulate(lines, heads, disable_numparse=True)}")


def merged(config: dict[str, Any], ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record of all hosts: a step is as long as on the slowest, bytes are the mean; seconds are stretched yet."""
    workers = len(ranks)
    rates = []
    for place, rate in enumerate(ranks[0]["rates"]):
        rows = [one["rates"][place]["rows"] for one in ranks]
        steps = [_merged_step(each, workers) for each in zip(*rows, strict=True)]
        link = {key: value for key, value in rate.items() if key != "rows"}
        rates.append({**link, "steps": steps})
    return {
        "congestion": ranks[0]["congestion"],
        "trained": max(one["trained"] for one in ranks),
        "difference": max(one["difference"] for one in ranks),
        "overhead": ranks[0]["overhead"],
        "measured": rates,
        "buckets": ranks[0]["buckets"],
        "small": ranks[0]["small"],
    }


def _merged_step(rows: Sequence[dict[str, Any]], workers: int) -> dict[str, Any]:
    first = rows[0]
    if any(
        (one["variant"], one["run"], one["nbytes"]) != (first["variant"], first["run"], first["nbytes"]) for one in rows
    ):
        raise ValueError("rows: expected the same step, with the same bytes, of all hosts")
    return {
        "variant": first["variant"],
        "run": first["run"],
        "seconds": max(one["seconds"] for one in rows),
        "counted": statistics.mean(one["counted"] for one in rows),
        "expected": factor(workers) * first["nbytes"],
        **{key: statistics.mean(one[key] for one in rows) for key in ("cpu", "pack", "unpack")},
    }


def show(results: Sequence[dict[str, Any]]) -> None:
    """Prints all tables."""
    print()
    for one in results:
        print(
            f"{one['network']}, {one['hosts']} hosts: {one['seconds']:.3f} s of computing; after 4 steps of training a "
            f"small network the parameters differ by {one['trained']:g}, gradients of this one from dense reduction by "
            f"{one['difference']:.1g}; a step takes {1000 * one['overhead']:.0f} ms more than it waits (taken off)"
        )
    links = [_link_line(one, rate) for one in results for rate in one["measured"]]
    heads = ["network", "hosts", "stands for Mb/s", "stretch", "set Mb/s", "one stream", "all-reduce", "small one, ms"]
    print(f"\nLinks, as measured\n{tabulate(links, heads, disable_numparse=True)}")
    lines = [_step_line(one, rate, own) for one in results for rate in one["measured"] for own in one["variants"]]
    heads = [
        "network",
        "hosts",
        "Mb/s",
        "variant",
        "ms",
        "dense / this",
        "MB sent",
        "over report",
        "CPU, hook ms",
        "paper",
    ]
    print(f"\nSteps, in the time that is stood for\n{tabulate(lines, heads, disable_numparse=True)}")
    for packing in (True, False):
        what = "as measured here, on one core" if packing else "left out"
        print(
            f"\nOn paper, time of packing {what}: seconds of the dense step, dense / this\n{_paper(results, packing)}"
        )


def _link_line(result: dict[str, Any], rate: dict[str, Any]) -> list[str]:
    head = [
        result["network"],
        str(result["hosts"]),
        f"{rate['rate']:g}",
        f"{rate['stretch']:g}",
        f"{rate['emulated']:g}",
    ]
    return [*head, f"{rate['plain']:.0f}", f"{rate['all_reduce']:.0f}", f"{1000 * rate['small']:.2f}"]


def _of(rate: dict[str, Any], variant: str, key: str) -> list[float]:
    return [one[key] for one in rate["steps"] if one["variant"] == variant]


def _step_line(result: dict[str, Any], rate: dict[str, Any], variant: dict[str, Any]) -> list[str]:
    name, stretch = variant["name"], rate["stretch"]
    seconds = _of(rate, name, "seconds")
    low, middle, high = (1000 * value / stretch for value in quartiles(seconds))
    ratios = speedup(_of(rate, result["variants"][0]["name"], "seconds"), seconds)
    counted, expected = (statistics.median(_of(rate, name, key)) for key in ("counted", "expected"))
    hook = statistics.median(_of(rate, name, "pack")) + statistics.median(_of(rate, name, "unpack"))
    error = 1000 * predicted(result, rate, variant) / stretch / middle - 1
    return [
        result["network"],
        str(result["hosts"]),
        f"{rate['rate']:g}",
        name,
        f"{middle:.0f} [{low:.0f}, {high:.0f}]",
        shown(ratios),
        f"{counted / 1e6:.2f}",
        f"{100 * (counted / expected - 1):+.2f} %",
        f"{1000 * statistics.median(_of(rate, name, 'cpu')):.0f}, {1000 * hook:.0f}",
        f"{100 * error:+.0f} %",
    ]


@functools.cache
def _backward(network: str) -> tuple[tuple[float, float], ...]:
    """(bytes, share of the step) of each layer, in backward order."""
    own = NETWORKS[network]
    layers = layers_of(own.build(), own.size)
    return tuple(zip((one.nbytes for one in layers), seconds_of(layers), strict=True))[::-1]


def buckets_of(result: dict[str, Any], variant: dict[str, Any], compute: float) -> list[Bucket]:
    """Of a step that computes for so long; the dense variant has the buckets of another one."""
    own = result["buckets"][variant["name"]]
    found = own or next((other for other in result["buckets"].values() if other), None)
    if found is None:
        whole = sum(nbytes for nbytes, _ in _backward(result["network"]))
        found = [[whole, whole, 1]]
    layers = [(nbytes, share * compute) for nbytes, share in _backward(result["network"])]
    ready = ready_times([dense for dense, _, _ in found], layers, FORWARD * compute)
    return [
        Bucket(at, sent if own else dense, calls if own else 1)
        for at, (dense, sent, calls) in zip(ready, found, strict=True)
    ]


def _costs(result: dict[str, Any], rate: dict[str, Any], variant: dict[str, Any], packing: bool) -> Costs:
    small = result["small"][variant["name"]]
    if not packing:
        return Costs(small=small)
    pack, unpack = (statistics.median(_of(rate, variant["name"], key)) for key in ("pack", "unpack"))
    # Slices are put back while the next bucket is under way, but for the last one's.
    return Costs(pack, unpack / max(1, len(result["buckets"][variant["name"]])), small)


def predicted(result: dict[str, Any], rate: dict[str, Any], variant: dict[str, Any]) -> float:
    """Seconds of a step as it was measured, stretched, by the link's measured constants."""
    workers = result["hosts"]
    link = Link(rate["small"] / messages(workers, "ring"), rate["all_reduce"] * 1e6 / 8)
    compute = max(result["seconds"] * rate["stretch"] * variant.get("compute", 1.0), result["overhead"])
    costs = _costs(result, rate, variant, True)
    return step_seconds(compute, buckets_of(result, variant, compute), workers, link, "ring", costs)


def _paper(results: Sequence[dict[str, Any]], packing: bool) -> str:
    """The table for many workers, by the bandwidth of the smallest number of hosts and the least latency of all."""
    lines, names = [], []
    alpha = min(rate["small"] / messages(one["hosts"], "ring") for one in results for rate in one["measured"])
    for result in {one["network"]: one for one in sorted(results, key=lambda one: -one["hosts"])}.values():
        names = names or [_general(one["name"]) for one in result["variants"][1:]]
        for rate in result["measured"]:
            share = rate["all_reduce"] / rate["emulated"]
            link = Link(alpha, share * rate["rate"] * 1e6 / 8)
            for workers in WORKERS:
                for algorithm in ALGORITHMS:
                    seconds = [
                        _paper_step(result, rate, own, link, workers, algorithm, packing) for own in result["variants"]
                    ]
                    head = [result["network"], f"{rate['rate']:g}", str(workers), algorithm, f"{seconds[0]:.3f}"]
                    lines.append([*head, *(f"{seconds[0] / one:.2f}" for one in seconds[1:])])
    heads = ["network", "Mb/s", "workers", "algorithm", "dense s", *names]
    return tabulate(lines, heads, disable_numparse=True)


def _general(name: str) -> str:
    """A heading that fits all networks."""
    return name.partition(" x faster")[0].rpartition(" ")[0] + " faster" if name.endswith(" x faster") else name


def _paper_step(
    result: dict[str, Any],
    rate: dict[str, Any],
    variant: dict[str, Any],
    link: Link,
    workers: int,
    algorithm: str,
    packing: bool,
) -> float:
    compute = result["seconds"] * variant.get("compute", 1.0)
    buckets = buckets_of(result, variant, compute)
    return step_seconds(compute, buckets, workers, link, algorithm, _costs(result, rate, variant, packing))
