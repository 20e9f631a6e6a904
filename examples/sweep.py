"""Accuracy against time: short trainings of a small network on handwritten digits with several policies.

python examples/sweep.py
python examples/sweep.py --steps 300 --seeds 0 1 2 --directory runs --figure sweep.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from policy_sweep.sweep import sweep
from torch import Tensor, nn

from fx_approx.demo.images import digits
from fx_approx.policies import FlopBudget, Paper, Uniform

Batch = tuple[Tensor, Tensor]


def network() -> nn.Module:
    """Four convolutions of 64 channels with BatchNorm."""
    layers: list[nn.Module] = [nn.Conv2d(1, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the sweep and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="of each training (150)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="one training each (0 1)")
    parser.add_argument("--directory", type=Path, help="keep finished runs there, and go on with what is missing")
    parser.add_argument("--figure", type=Path, help="draw accuracy against time there (needs matplotlib)")
    options = parser.parse_args(arguments)
    images = digits()

    def batches(seed: int) -> list[Batch]:
        order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(seed))
        return [(images.train[own], images.train_labels[own]) for own in order.split(64) if len(own) == 64]

    def evaluate(model: nn.Module) -> float:
        return 100 * float((model(images.test).argmax(1) == images.test_labels).float().mean())

    demand = {"min_k": 8, "scores": "weight", "scope": "value"}
    found = sweep(
        network,
        batches,
        {
            "paper 0.5": Paper(0.5),
            "value 0.75": Uniform(0.75, **demand),
            "value 0.5": Uniform(0.5, **demand),
            "value 0.25": Uniform(0.25, **demand),
            "half of the FLOPs": FlopBudget(0.5),
        },
        loss=loss,
        evaluate=evaluate,
        example_inputs=images.train[:64],
        steps=options.steps,
        seeds=options.seeds,
        directory=options.directory,
        tag="digits",
    )
    print(found)
    if options.figure is not None:
        found.plot(options.figure)
        print(f"\n{options.figure} has the figure.")


if __name__ == "__main__":
    main()
