"""Data-parallel training over limited links between 2 to 4 hosts, which are network namespaces: step time and bytes.

    python benchmarks/multinode.py --bytes-only
    python benchmarks/multinode.py --networks wrn_28_10 --hosts 2 4 --rates 100 1000 10000 --json multinode.json

Needs root, iproute2 and a Linux that allows namespaces, veth and tbf; --delay needs netem, too. Gradients, buckets,
hooks, packing and gloo are real (_replay.py); the computing of forward and backward pass is waited for: as long as an
NVIDIA V100 takes, from NVIDIA's throughput for ResNet-50 in float32 (V100_IMAGES), for other networks by their
operations, or as --step-seconds says. So the ratio of computing to communication is that of a real cluster.

Few cores cannot send 10 Gb/s from each of 4 hosts, and 100 Mb/s takes long. Time is therefore stretched (--stretch): a
link of R stands as one of R / s, computing takes s times as long, and what was measured is divided by s. Bytes are not
scaled. Processors are not slowed down, so that at s = 10 packing and gloo look 10 times as fast beside the network as
they are, and at s = 0.25 4 times as slow; their CPU time is printed as it was measured. There is no optimiser step.
Computing is equal for all variants, except for the last one's, which takes --step-ratio times less. Variants take turns
in the same processes. Before anything is timed, slices are compared with dense reduction.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _multinode_report as report
from _header import add_json_option, environment, header, store
from _namespaces import Hosts, UnavailableError, check
from _replay import NETWORKS, layers_of

V100_IMAGES = 367
"""Images a second of ResNet-50 in training on one V100 16 GB in float32: NVIDIA DeepLearningExamples,
PyTorch/Classification/ConvNets/resnet50v1.5, "Training performance: NVIDIA DGX-1 16GB"."""
V100_MACS = 4_089_184_256
"""Multiply-adds of ResNet-50's forward pass over one image."""
STRETCH = {100.0: 0.25, 1000.0: 1.0, 10000.0: 10.0}
STEP_RATIOS = {"resnet50": 1.76, "resnet152": 1.76, "wrn_28_10": 2.43}
"""Exact / sampled at ratio 0.5 and value scope, compiled, measured on CPUs: of ResNet-50, and of WRN-16-4 for the last
(docs/results.md, "Demand-driven sampling: a whole training step")."""
_RANK = Path(__file__).with_name("_multinode_rank.py")


def variants_of(options: argparse.Namespace, network: str) -> list[dict[str, Any]]:
    """What is compared; the dense one is first."""
    found: list[dict[str, Any]] = [
        {"name": "dense"},
        {"name": "dense, fp16", "hook": "fp16"},
        {"name": f"PowerSGD, rank {options.powersgd_rank}", "hook": "powersgd"},
    ]
    for ratio in options.ratios:
        name = f"ours {ratio:.3g}"
        found += [{"name": name, "ratio": ratio}, {"name": f"{name}, fp16", "ratio": ratio, "hook": "fp16"}]
    middle = options.ratios[0]
    found.append({"name": f"ours {middle:.3g}, stale", "ratio": middle, "scores": "ema"})
    ratio = options.step_ratio or STEP_RATIOS.get(network)
    if ratio is not None:
        found.append({"name": f"ours {middle:.3g}, computes {ratio:g} x faster", "ratio": middle, "compute": 1 / ratio})
    if options.variants is not None:
        found = [one for place, one in enumerate(found) if place == 0 or one["name"] in options.variants]
    return found


def seconds_of(network: str, options: argparse.Namespace) -> float:
    """Of the forward and backward pass that is stood for."""
    if options.step_seconds is not None:
        return float(options.step_seconds)
    own = NETWORKS[network]
    macs = sum(one.macs for one in layers_of(own.build(), own.size))
    return (options.batch or own.batch) / V100_IMAGES * macs / V100_MACS


def measure(network: str, hosts: int, options: argparse.Namespace) -> dict[str, Any]:
    """All rates and variants of one network on so many hosts."""
    config = {
        "network": network,
        "seconds": seconds_of(network, options),
        "variants": variants_of(options, network),
        "rates": [
            {"rate": rate, "stretch": stretch, "emulated": rate / stretch}
            for rate, stretch in zip(options.rates, options.stretch, strict=True)
        ],
        **{key: getattr(options, key) for key in ("runs", "warmup", "scope", "min_k", "powersgd_rank", "delay")},
    }
    with tempfile.TemporaryDirectory() as folder, Hosts(hosts) as made:
        path = Path(folder)
        (path / "config.json").write_text(json.dumps({**config, "addresses": made.addresses}), encoding="utf-8")
        _run(made, path, options.timeout)
        ranks = [json.loads((path / f"rank.{rank}.json").read_text(encoding="utf-8")) for rank in range(hosts)]
    return {"hosts": hosts, **config, **report.merged(config, ranks)}


def _run(hosts: Hosts, folder: Path, timeout: float) -> None:
    """One process on each host, until all are done.

    Raises:
        RuntimeError: One of them failed, with the end of what it said; or they took too long.
    """
    logs = [folder / f"rank.{rank}.log" for rank in range(len(hosts.names))]
    started: list[subprocess.Popen[str]] = []
    end = time.monotonic() + timeout
    try:
        for rank, log in enumerate(logs):
            with log.open("w", encoding="utf-8") as written:
                command = [sys.executable, str(_RANK), str(folder), str(rank)]
                started.append(hosts.start(rank, command, stdout=written, stderr=subprocess.STDOUT))
        while any(one.poll() is None for one in started):
            failed = [rank for rank, one in enumerate(started) if one.poll()]
            if failed or time.monotonic() > end:
                break
            time.sleep(0.2)
        failed = [rank for rank, one in enumerate(started) if one.poll() != 0]
        if failed:
            first = next((rank for rank in failed if started[rank].poll() is not None), None)
            what = f"host {first} failed"
            if first is None:
                first, what = 0, f"the hosts took more than {timeout:g} s (see --timeout); the first one was here"
                started[0].send_signal(signal.SIGABRT)  # which makes it say where it is
                started[0].wait()
            raise RuntimeError(f"{what}:\n{logs[first].read_text(encoding='utf-8')[-3000:]}")
    finally:
        for one in started:
            if one.poll() is None:
                one.kill()
            one.wait()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, or an error that says what is wrong with them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(NETWORKS)
    parser.add_argument("--networks", nargs="+", default=known[:3], choices=known)
    parser.add_argument("--hosts", nargs="+", type=int, default=[2, 4], help="2 to 4 (2 4)")
    parser.add_argument("--rates", nargs="+", type=float, default=list(STRETCH), help="Mb/s (100 1000 10000)")
    parser.add_argument("--stretch", nargs="+", type=float, help="of each rate (0.25 1 10, 1 for other rates)")
    parser.add_argument("--delay", type=float, default=0.0, help="ms that each packet is held back, one way (0)")
    parser.add_argument("--ratios", nargs="+", type=float, default=[1 / 2, 1 / 3], help="sample ratios (1/2 1/3)")
    parser.add_argument("--scope", default="value", choices=["layer", "value", "group"])
    parser.add_argument(
        "--minimal-k", dest="min_k", type=int, default=16, help="layers with fewer pairs stay exact (16)"
    )
    parser.add_argument("--variants", nargs="+", help="names of those beside the dense one (all)")
    parser.add_argument("--powersgd-rank", type=int, default=4)
    parser.add_argument("--batch", type=int, help="images on each worker (64, 32, 128 by network)")
    parser.add_argument("--step-seconds", type=float, help="of forward and backward pass (a V100's)")
    parser.add_argument("--step-ratio", type=float, help="exact / sampled computing of the last variant (measured)")
    parser.add_argument("--runs", type=int, default=5, help="steps of each variant (5)")
    parser.add_argument("--warmup", type=int, default=4, help="steps of each before, without waiting (4)")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for a network on so many hosts (1800)")
    parser.add_argument("--bytes-only", action="store_true", help="what each network sends; no hosts, no root")
    parser.add_argument("--from-json", type=Path, metavar="FILE", nargs="+", help="tables of earlier runs, together")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    if not all(2 <= count <= 4 for count in options.hosts):
        parser.error("--hosts: expected 2 to 4")
    if options.stretch is None:
        options.stretch = [STRETCH.get(rate, 1.0) for rate in options.rates]
    if len(options.stretch) != len(options.rates) or not all(x > 0 for x in [*options.rates, *options.stretch]):
        parser.error("--rates, --stretch: expected positive numbers, one --stretch for each rate")
    if options.runs < 2 or options.warmup < 3:
        parser.error("--runs: expected 2 or more; --warmup: 3 or more, since PowerSGD sends all of its first two steps")
    if not all(0 < ratio < 1 for ratio in options.ratios) or options.delay < 0:
        parser.error("--ratios: expected numbers in (0, 1); --delay: 0 or more")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints tables."""
    options = parse(arguments)
    if options.from_json is not None:
        contents = [json.loads(path.read_text(encoding="utf-8")) for path in options.from_json]
        results = [one for content in contents for one in content["results"]]
        report.show(results)
        store(options.json, results)  # each has the environment it was measured in
        return
    if options.bytes_only:
        print(header("Bytes of gradients"), flush=True)
        found = report.planned_bytes(options.networks, options.ratios, options.min_k)
        report.show_bytes(found)
        store(options.json, found)
        return
    try:
        check(options.delay)
    except UnavailableError as error:
        raise SystemExit(f"multinode: {error}") from None
    print(header("Data-parallel steps over limited links"), flush=True)
    results = []
    for network in options.networks:
        for hosts in options.hosts:
            results.append({"environment": environment(), **measure(network, hosts, options)})
            print(f"\n{network}, {hosts} hosts: done", flush=True)
            store(options.json, results)
    report.show(results)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that hosts are removed
    main()
