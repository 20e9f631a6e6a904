"""What packing and unpacking the slices of all gradients costs, without any network: the part that a rank does itself.

    python benchmarks/packing.py --models resnet50
    python benchmarks/packing.py --models wrn_28_10 resnet50 --device cuda --json packing.json

One step of the transformed model makes the selections. Then all its gradients go through the hook of
`fx_approx.distributed.enable_sparse_allreduce`, in buckets of 25 MiB as DistributedDataParallel makes them, with an
inner hook that sends nothing; first it is checked that they come back as they were. "copy" copies every gradient once,
to compare. The selection's places are looked up anew in each step, as in training; on a GPU that is one wait for the
device.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _device import Quartiles, add_device_options, quartiles, refuse_device_options, shown
from _header import add_json_option, header, store
from _models import MODELS
from tabulate import tabulate
from torch import Tensor, nn

import fx_approx
from fx_approx.distributed import Traffic
from fx_approx.distributed.hook import Packed, SliceHook
from fx_approx.distributed.slices import find_slices
from fx_approx.policies import Uniform
from fx_approx.utils.timing import in_turn

BUCKET = 25 * 2**20


@dataclasses.dataclass(frozen=True)
class Measured:
    """One setting: bytes of all gradients and of what is sent, seconds of the hook and of one copy, as quartiles."""

    model: str
    scope: str
    ratio: float
    dense: int
    sent: int
    hook: Quartiles
    copy: Quartiles


def buckets(model: nn.Module) -> list[Packed]:
    """All gradients, those of the last layers first."""
    groups: list[list[nn.Parameter]] = [[]]
    for parameter in reversed([p for p in model.parameters() if p.grad is not None]):
        if groups[-1] and sum(p.nbytes for p in groups[-1]) + parameter.nbytes > BUCKET:
            groups.append([])
        groups[-1].append(parameter)
    found = []
    for index, group in enumerate(groups):
        flat = torch.cat([p.grad.reshape(-1) for p in group if p.grad is not None])
        found.append(Packed(flat, [p.shape for p in group], group, index, index == len(groups) - 1))
    return found


def sends_nothing(_: Any, bucket: Any) -> torch.futures.Future[Tensor]:
    """An inner hook."""
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def measure(name: str, scope: str, ratio: float, options: argparse.Namespace) -> Measured:
    """Checks and times one setting."""
    torch.manual_seed(0)
    exact, inputs, _ = MODELS[name]()
    exact, inputs = exact.to(options.device), inputs[:2].to(options.device)
    policy = Uniform(ratio, min_k=16, scope=scope)
    model = fx_approx.transform(exact, policy, inputs)
    sliced, whole = find_slices(model)
    published = model._fx_approx.resample.published = model._fx_approx.resample.tracker()
    hook = SliceHook(model, sliced, sends_nothing, 10**9, None)
    traffic = Traffic(model, sliced, whole, hook)
    loss = model(inputs).float().square().mean()
    mask = published.mask.clone()
    loss.backward()
    gradients = buckets(model)
    before = [bucket.buffer().clone() for bucket in gradients]

    def reduce() -> None:
        published.mask.copy_(mask)
        for bucket in gradients:
            hook.reduce(bucket).wait()

    reduce()
    if not all(torch.equal(bucket.buffer(), own) for bucket, own in zip(gradients, before, strict=True)):
        raise AssertionError(f"{name}, {scope} {ratio:g}: gradients changed on their way")
    target = [torch.empty_like(own) for own in before]

    def copy() -> None:
        for own, other in zip(before, target, strict=True):
            other.copy_(own)

    packing, copying = in_turn([reduce, copy], torch.device(options.device), options.runs, warmup=3)
    return Measured(name, scope, ratio, traffic.dense, traffic.sent or 0, quartiles(packing), quartiles(copying))


def all_measured(options: argparse.Namespace) -> Iterator[Measured]:
    """Every setting, in a process group of one."""
    with tempfile.TemporaryDirectory() as folder:
        place = f"file://{Path(folder).as_posix()}/meet"
        backend = "nccl" if options.device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=place, rank=0, world_size=1)
        try:
            for name in options.models:
                for scope in options.scopes:
                    for ratio in options.ratios:
                        yield measure(name, scope, ratio, options)
        finally:
            dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["wrn_28_10"], choices=list(MODELS))
    parser.add_argument("--scopes", nargs="+", default=["value"], choices=["layer", "value", "group"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[1 / 3, 0.5])
    parser.add_argument("--runs", type=int, default=15, help="steps of each (15)")
    add_device_options(parser)
    add_json_option(parser)
    options = parser.parse_args(arguments)
    refuse_device_options(parser, options)
    if options.runs < 2 or not all(0 < ratio < 1 for ratio in options.ratios):
        parser.error("--runs: expected 2 or more; --ratios: expected numbers in (0, 1)")
    print(header("Packing of gradients"), flush=True)
    found = list(all_measured(options))
    lines = [
        [
            one.model,
            f"{one.scope} {one.ratio:.2f}",
            f"{one.dense / 1e6:.1f}",
            f"{one.sent / 1e6:.1f}",
            *(shown((1000 * low, 1000 * middle, 1000 * high)) for low, middle, high in (one.hook, one.copy)),
        ]
        for one in found
    ]
    heads = ["model", "", "MB", "sent MB", "hook, ms", "copy, ms"]
    print(f"\n{tabulate(lines, heads, disable_numparse=True)}")
    store(options.json, [dataclasses.asdict(one) for one in found])


if __name__ == "__main__":
    main()
