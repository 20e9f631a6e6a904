"""One host of benchmarks/multinode.py, which starts it within a namespace: FOLDER RANK."""

from __future__ import annotations

import copy
import datetime
import faulthandler
import json
import os
import socket
import statistics
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from _multinode_variants import Reduced, Variant, averaged
from _namespaces import INTERFACE, limit, sent_bytes
from _replay import NETWORKS, Recording, Replay, layers_of, record, sampled, share_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fx_approx

PORT = 29_577
_TRANSFER_SECONDS = 0.5


def main(folder: Path, rank: int) -> None:
    """Checks, calibrates, measures at each rate, and leaves ``rank.RANK.json``."""
    faulthandler.enable()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    hosts = config["addresses"]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", fx_approx.errors.NoEffectWarning)  # a first layer of few channels is sent whole
    # Its successor, forward_sync_buffers, is not in all versions of torch that fx_approx runs on.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{hosts[0]}:{PORT}",
        rank=rank,
        world_size=len(hosts),
        timeout=datetime.timedelta(minutes=5),
    )
    trained = check_training(rank)
    variants, gradients = build(config, rank)
    difference = check_gradients(variants, gradients)
    overhead = calibrate(config, gradients, variants[0])
    found = [
        measure(config, rate, variants, overhead, hosts, rank, place == 0)
        for place, rate in enumerate(sorted(config["rates"], key=lambda one: -one["emulated"]))  # warms up quickly
    ]
    content = {
        "congestion": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text(encoding="ascii").strip(),
        "trained": trained,
        "difference": difference,
        "overhead": overhead,
        "rates": found,
        "buckets": {one.variant.name: one.buckets for one in variants},
        "small": {one.variant.name: one.small if one.traffic is not None else 0 for one in variants},
    }
    (folder / f"rank.{rank}.json").write_text(json.dumps(content), encoding="utf-8")
    dist.barrier()


def check_training(rank: int) -> float:
    """The largest difference of a parameter after 4 steps of a small network, dense reduction against slices.

    Raises:
        AssertionError: It is not zero on 2 hosts, or above 1e-5 on more, where sums of other pieces round otherwise.
    """
    torch.manual_seed(0)
    model = sampled(NETWORKS["wrn_10_2"].build(), 0.5, 16, "value", "weight", 4)
    other = copy.deepcopy(model)
    dense, ours = DistributedDataParallel(model), DistributedDataParallel(other)
    fx_approx.distributed.enable_sparse_allreduce(ours, check_every=1)
    for parallel in (dense, ours):
        optimizer = torch.optim.SGD(parallel.parameters(), 0.05, momentum=0.9)
        for step in range(4):
            generator = torch.Generator().manual_seed(1000 * rank + step)
            x, y = torch.randn(8, 3, 16, 16, generator=generator), torch.randint(10, (8,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(parallel(x), y).backward()
            optimizer.step()
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    difference = max((one - two).abs().max().item() for one, two in pairs)
    if difference > (0.0 if dist.get_world_size() == 2 else 1e-5):
        raise AssertionError(f"slices train other parameters than dense reduction: they differ by {difference:g}")
    return difference


Gradients = dict[tuple[float | None, str], Recording]


def build(config: dict[str, Any], rank: int) -> tuple[list[Reduced], Gradients]:
    """All variants side by side, on one set of parameters."""
    network = NETWORKS[config["network"]]
    torch.manual_seed(0)
    exact = network.build()
    layers = layers_of(exact, network.size)
    torch.manual_seed(1 + rank)
    inputs = torch.randn(2, 3, network.small, network.small)
    recorded: Gradients = {}
    models: dict[tuple[float | None, str], nn.Module] = {}
    reduced = []
    for spec in config["variants"]:
        variant = Variant(**spec)
        key = variant.recording
        if key not in models:
            models[key] = exact if variant.ratio is None else _transformed(exact, variant, config, network.small)
            recorded[key] = record(
                models[key], inputs, lambda key=key: fx_approx.distributed.synchronize_scores(models[key])
            )
        model = copy.deepcopy(models[key])
        share_storage(model, exact)
        reduced.append(Reduced(variant, Replay(model, recorded[key], layers), config["powersgd_rank"]))
    return reduced, recorded


def _transformed(exact: nn.Module, variant: Variant, config: dict[str, Any], small: int) -> nn.Module:
    assert variant.ratio is not None
    return sampled(exact, variant.ratio, small, config["scope"], variant.scores, config["min_k"])


def check_gradients(variants: list[Reduced], recorded: Gradients) -> float:
    """The largest difference of an averaged gradient from dense reduction, of the largest entry of its parameter.

    Raises:
        AssertionError: It is above 1e-5, for a variant that sends 32 bits of slices.
    """
    worst = 0.0
    for one in variants:
        one.step()
        if one.traffic is not None and one.variant.hook == "dense":
            wanted = averaged(recorded[one.variant.recording].gradients)
            for name, parameter in one.replay.model.named_parameters():
                assert parameter.grad is not None
                scale = wanted[name].abs().max().clamp(min=1e-30)
                worst = max(worst, ((parameter.grad - wanted[name]).abs().max() / scale).item())
        one.drop()
    if worst > 1e-5:
        raise AssertionError(f"slices give other gradients than dense reduction: they differ by {worst:g}")
    return worst


def calibrate(config: dict[str, Any], recorded: Gradients, dense: Reduced) -> float:
    """Seconds by which a replayed step without a network takes longer than it waits: copies into buckets, waking up."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    network = NETWORKS[config["network"]]
    model = copy.deepcopy(dense.replay.model)
    replay = Replay(model, recorded[None, ""], layers_of(model, network.size))
    replay.compute = config["seconds"]
    alone = DistributedDataParallel(
        replay, process_group=groups[dist.get_rank()], broadcast_buffers=False, gradient_as_bucket_view=True
    )
    taken = []
    for _ in range(5):
        dist.barrier()
        start = time.perf_counter()
        alone(torch.zeros((), requires_grad=True)).backward()
        taken.append(time.perf_counter() - start - replay.compute)
        for parameter in model.parameters():
            parameter.grad = None
    slowest = torch.tensor(statistics.median(taken[2:]))
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return max(0.0, slowest.item())


def measure(
    config: dict[str, Any],
    rate: dict[str, float],
    variants: list[Reduced],
    overhead: float,
    hosts: list[str],
    rank: int,
    first: bool,
) -> dict[str, Any]:
    """All variants in turn at one rate."""
    dist.barrier()
    limit(rate["emulated"], config["delay"] * rate["stretch"])
    link = measure_link(rate["emulated"], hosts, rank)
    target = config["seconds"] * rate["stretch"]
    rows = []
    for one in variants:
        one.replay.compute = 0.0
    for _ in range(config["warmup"] if first else 1):  # PowerSGD sends all of the first two
        for one in variants:
            one.step()
            one.drop()
    for one in variants:
        one.replay.compute = max(0.0, target * one.variant.compute - overhead)
    for run in range(config["runs"]):
        shift = run % len(variants)
        for one in [*variants[shift:], *variants[:shift]]:
            rows.append({"run": run, **timed(one)})
    return {**rate, **link, "waited": max(target, overhead), "rows": rows}


def timed(one: Reduced) -> dict[str, Any]:
    """One step of one variant."""
    dist.barrier()
    sent, packing, unpacked = sent_bytes(), one.packing, len(one.unpacked)
    processor, start = time.process_time(), time.perf_counter()
    one.step()
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    dist.barrier()  # when all have all, nothing of it waits in a queue
    found = {
        "variant": one.variant.name,
        "seconds": seconds,
        "counted": sent_bytes() - sent,
        "nbytes": one.nbytes,
        "cpu": processor,
        "pack": one.packing - packing,
        "unpack": sum(one.unpacked[unpacked:]),
    }
    one.drop()
    return found


def measure_link(rate: float, hosts: list[str], rank: int) -> dict[str, float]:
    """Megabits a second of a plain transfer and of a large all-reduce, and seconds of a small one."""
    plain = transfer(int(rate * 1e6 / 8 * _TRANSFER_SECONDS), hosts[1], rank)
    dist.barrier()
    small, latencies = torch.ones(2), []
    for _ in range(30):
        start = time.perf_counter()
        dist.all_reduce(small)
        latencies.append(time.perf_counter() - start)
    size = len(hosts)
    large = torch.ones(max(2**18, int(rate * 1e6 / 8 * _TRANSFER_SECONDS / 4)))
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(large)
    seconds = time.perf_counter() - start
    return {
        "plain": plain,
        "all_reduce": 2 * (size - 1) / size * large.nbytes * 8 / seconds / 1e6,
        "small": statistics.median(latencies[5:]),
    }


def transfer(nbytes: int, address: str, rank: int) -> float:
    """Megabits a second of one TCP stream from the first host to the second; 0.0 on the others."""
    if rank == 1:
        with socket.create_server(("", PORT + 1)) as server:
            dist.barrier()
            connection, _ = server.accept()
            with connection:
                left = nbytes
                while left:
                    came = len(connection.recv(min(left, 2**20)))
                    if not came:
                        raise ConnectionError("the transfer ended early")
                    left -= came
                connection.sendall(b"!")
        return 0.0
    dist.barrier()
    if rank:
        return 0.0
    block = bytes(2**16)
    with socket.create_connection((address, PORT + 1)) as connection:
        start = time.perf_counter()
        for begin in range(0, nbytes, len(block)):
            connection.sendall(block[: nbytes - begin])
        connection.recv(1)
    return nbytes * 8 / (time.perf_counter() - start) / 1e6


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # Now and then gloo hangs when a process group that DistributedDataParallel still holds is taken down.
    os._exit(0)
