"""Accuracy of demand-driven training: a small wide residual network on images, equal epochs, several seeds.

    python benchmarks/demand_accuracy.py --data folder/with/fashion-mnist --json-lines runs.jsonl
    python benchmarks/demand_accuracy.py --data folder --settings exact "value, stale" --seeds 5 --epochs 10

Every setting starts from the same weights for a seed, sees the same batches and the same one-cycle schedule. "hoisted"
computes only what is demanded; "not hoisted" takes the same selections and computes all channels, so that the two must
agree but for rounding (which training amplifies). "tail" switches sampling off for the last third of the epochs. The
BatchNorm statistics are re-estimated on 20 exact batches before the second figure. Runs that FILE holds already are
not repeated. This is not a time measurement; benchmarks/train_step.py is.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _header import header
from _models import wide_resnet
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fx_approx
from fx_approx.demo.images import idx_folder
from fx_approx.policies import Uniform

warnings.filterwarnings("ignore", category=fx_approx.errors.BatchNormWarning)

BATCH = 64
PEAK = 0.1

SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {},
    "site, online TopK": {"scores": "online", "scope": "layer"},
    "value, weight": {"scores": "weight", "scope": "value"},
    "value, stale": {"scores": "ema", "scope": "value"},
    "value, stale, not hoisted": {"scores": "ema", "scope": "value", "demand": False},
    "group, stale": {"scores": "ema", "scope": "group"},
    "value, stale, tail": {"scores": "ema", "scope": "value", "tail": True},
    "group, stale, tail": {"scores": "ema", "scope": "group", "tail": True},
}
"""What is trained: the scores, the scope, with demand or not, with an exact tail or not."""


def prepared(model: nn.Module, setting: dict[str, Any], ratio: float, inputs: Tensor, seed: int) -> nn.Module:
    """The model of a setting."""
    if not setting:
        return model
    policy = Uniform(ratio, min_k=16, scores=setting["scores"], scope=setting["scope"])
    return fx_approx.transform(model, policy, inputs, seed=seed, prune_unread=setting.get("demand", True))


def train(model: nn.Module, data: Any, setting: dict[str, Any], epochs: int, seed: int) -> None:
    """One-cycle SGD with Nesterov momentum, on random crops after padding by 2 and horizontal flips."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), PEAK, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * math.ceil(len(data.train) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=steps, pct_start=0.3)
    model.train()
    for epoch in range(epochs):
        if setting.get("tail") and epoch == epochs - epochs // 3:
            fx_approx.set_sampling(model, enabled=False)
        for chosen in torch.randperm(len(data.train), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(augmented(data.train[chosen], generator)), data.train_labels[chosen])
            loss.backward()
            optimizer.step()
            schedule.step()


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted by up to 2 pixels, and mirrored or not, all of a batch alike."""
    down, right = torch.randint(0, 5, (2,), generator=generator).tolist()
    height, width = images.shape[-2:]
    images = F.pad(images, (2, 2, 2, 2))[..., down : down + height, right : right + width]
    return images.flip(-1) if torch.rand((), generator=generator) < 0.5 else images


@torch.no_grad()
def accuracy(model: nn.Module, data: Any) -> float:
    """Per cent of the test images."""
    model.eval()
    right = sum(
        int((model(images).argmax(1) == labels).sum())
        for images, labels in zip(data.test.split(500), data.test_labels.split(500), strict=True)
    )
    return 100 * right / len(data.test)


def run(name: str, seed: int, data: Any, options: argparse.Namespace) -> dict[str, Any]:
    """One training."""
    torch.manual_seed(seed)
    model = wide_resnet(options.depth, options.width, data.classes, data.train.shape[1])
    setting = SETTINGS[name]
    model = prepared(model, setting, options.ratio, data.train[:BATCH], seed)
    train(model, data, setting, options.epochs, seed)
    trained = accuracy(model, data)
    model.train()
    fx_approx.recalibrate_batchnorm(model, data.train[: 20 * BATCH].split(BATCH))
    return {"setting": name, "seed": seed, "trained": trained, "recalibrated": accuracy(model, data)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is missing and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four IDX files")
    parser.add_argument("--limit", type=int, default=10_000, help="training and test images (10,000)")
    parser.add_argument("--epochs", type=int, default=6, help="epochs (6)")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (3)")
    parser.add_argument("--ratio", type=float, default=0.5, help="sample ratio (0.5)")
    parser.add_argument("--depth", type=int, default=10, help="of the network (10)")
    parser.add_argument("--width", type=float, default=2, help="of the network (2)")
    names = list(SETTINGS)
    parser.add_argument("--settings", nargs="+", default=names, choices=names, metavar="SETTING", help="which (all)")
    parser.add_argument("--json-lines", type=Path, metavar="FILE", help="add runs there; do not repeat those in it")
    options = parser.parse_args(arguments)
    if options.epochs < 3 or options.seeds < 2:
        parser.error("--epochs: expected 3 or more; --seeds: expected 2 or more")
    data = idx_folder(options.data, options.limit)
    network = f"WRN-{options.depth}-{options.width:g}"
    print(header(f"{network}, {len(data.train)} images, {options.epochs} epochs"), flush=True)
    runs = _stored(options.json_lines)
    wanted = [(name, seed) for seed in range(options.seeds) for name in options.settings]
    for name, seed in tqdm(wanted, unit="run"):
        if not any(one["setting"] == name and one["seed"] == seed for one in runs):
            runs.append(run(name, seed, data, options))
            if options.json_lines is not None:
                with options.json_lines.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(runs[-1]) + "\n")
    print(f"\n{tabulate(table(runs, options.settings), ['setting', 'runs', 'as trained', 'recalibrated', 'runs'])}")


def _stored(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(runs: Sequence[dict[str, Any]], settings: Sequence[str]) -> list[list[str]]:
    """Mean and standard deviation over the seeds, for each setting."""
    rows = []
    for name in settings:
        of_setting = [one for one in runs if one["setting"] == name]
        cells = [name, str(len(of_setting))]
        for figure in ("trained", "recalibrated"):
            values = [one[figure] for one in of_setting]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f}")
        rows.append([*cells, ", ".join(f"{one['recalibrated']:.1f}" for one in of_setting)])
    return rows


if __name__ == "__main__":
    main()
