"""Data-parallel training that sends the sampled part of the gradients only; resumes from its checkpoint.

    torchrun --nproc-per-node 2 examples/ddp_train.py
    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29400 examples/ddp_train.py

Scikit-learn's digits, a small CNN, gloo on CPUs and NCCL on GPUs. Rank 0 writes the checkpoint after every epoch;
started again with the same --checkpoint, with as many ranks or another number, it goes on from there. With --dense
gradients are reduced whole, to compare.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fx_approx
from fx_approx.demo.images import digits
from fx_approx.policies import Uniform


def network(classes: int) -> nn.Module:
    """Four convolutions."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 64), (64, 64), (64, 128), (128, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains as one rank of those that torchrun started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64, help="of all ranks together (64)")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--limit", type=int, help="use so many images")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--dense", action="store_true", help="reduce all gradients whole")
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    store, rank, size = next(dist.rendezvous("env://"))
    # torchrun's store outlives a restart, and gloo would look for the dead ranks at the addresses that it finds there.
    attempt = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group("nccl" if cuda else "gloo", store=attempt, rank=rank, world_size=size)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")

    torch.manual_seed(0)
    images = digits(options.limit)
    data = TensorDataset(images.train, images.train_labels)
    own = max(2, options.batch // size)
    policy = Uniform(options.ratio, min_k=8, scores="ema")
    model = fx_approx.transform(network(images.classes).to(device), policy, images.train[:own].to(device))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    epoch = 0
    if options.checkpoint is not None and options.checkpoint.exists():
        state = torch.load(options.checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        fx_approx.load_sampler_state_dict(model, state["sampling"])
        epoch = state["epoch"]
    parallel = DistributedDataParallel(model)
    traffic = None if options.dense else fx_approx.distributed.enable_sparse_allreduce(parallel)

    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(data, size, rank, seed=0, drop_last=True)
    for now in range(epoch, options.epochs):
        sampler.set_epoch(now)
        parallel.train()
        for x, y in DataLoader(data, own, sampler=sampler, drop_last=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(parallel(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
        if rank == 0:
            print(f"epoch {now + 1}: loss {loss.item():.4f}", flush=True)
            if options.checkpoint is not None:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": now + 1}
                state["sampling"] = fx_approx.sampler_state_dict(model)
                part = options.checkpoint.with_suffix(".part")
                torch.save(state, part)
                part.replace(options.checkpoint)
    if rank == 0:
        fx_approx.recalibrate_batchnorm(model, images.train[: 20 * own].to(device).split(own))
        model.eval()
        with torch.no_grad():
            right = model(images.test.to(device)).argmax(1).cpu() == images.test_labels
        print(f"test accuracy {100 * right.float().mean():.1f} %")
        print("" if traffic is None else traffic)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
