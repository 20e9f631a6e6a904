"""The rates of dropout whose noise in what a layer puts out is that of a variant that samples by Bernoulli-CRS.

    python examples/experiments/equal_noise.py examples/experiments/configs/mnist-mlp.toml --data FOLDER

Dropout at rate q of the in-features of a linear layer has the expected squared error q / (1 - q) sum_j s_j^2, where
s_j = |X_j| |W_j| is the score of a pair; Bernoulli-CRS with chances p_j has sum_j (1 - p_j) / p_j s_j^2. So both are
equal at q / (1 - q) = r, the ratio of the second to sum_j s_j^2. It is taken in steps all along an exact training, and
its mean over the training counts.

Source: "Faster Neural Network Training with Approximate Tensor Operations", NeurIPS 2021; docs/estimators.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import variants
from config import ConfigError, load, one_of
from networks import network
from records import Records
from sources import REPOSITORY, open_source
from tabulate import tabulate
from torch import Tensor, nn
from training import Budget, Run, Settings

import fx_approx
from fx_approx.policies import Exact
from fx_approx.sampling import SamplerConfig, inclusion_probabilities


def error_ratio(x: Tensor, weight: Tensor, spec: SamplerConfig) -> float:
    """``sum_j (1 - p_j) / p_j s_j^2 / sum_j s_j^2`` of ``x [N, K]`` and ``weight [M, K]``, K pairs."""
    scores = x.double().norm(dim=0) * weight.double().norm(dim=0)
    p = inclusion_probabilities(scores[None], spec.count(len(scores)), spec.effective_epsilon)[0]
    error = torch.where(scores > 0, (1 - p) / p * scores.square(), 0.0)
    return float(error.sum() / scores.square().sum())


class Watch:
    """Takes the ratio of a layer in every ``every``-th step of a training."""

    def __init__(self, layer: nn.Linear, spec: SamplerConfig, every: int) -> None:
        self._spec, self._every, self._steps = spec, every, 0
        self.found: list[float] = []
        layer.register_forward_pre_hook(self._see)

    @torch.no_grad()
    def _see(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if layer.training:
            if self._steps % self._every == 0:
                self.found.append(error_ratio(inputs[0].flatten(0, -2), layer.weight, self._spec))
            self._steps += 1


def watched(model: nn.Module, policy: fx_approx.Policy, example: Tensor, every: int) -> dict[str, Watch]:
    """A watch on each layer that the policy samples.

    Raises:
        ConfigError: It samples none, or one that is not linear or not by Bernoulli-CRS with scores of its input.
    """
    layers, found = dict(model.named_modules()), {}
    for one in fx_approx.explain(model, policy, example).plan.sampled:
        layer, spec = layers.get(one.name), one.spec
        fits = isinstance(layer, nn.Linear) and spec is not None and (spec.name, spec.scores) == ("bernoulli", "online")
        if not fits:
            told = one.name if spec is None else f"{one.name} by {spec.name} and {spec.scores} scores"
            raise ConfigError(f"--variant: expected bernoulli and online scores of linear layers, got {told}")
        found[one.name] = Watch(layer, spec, every)
    if not found:
        raise ConfigError("--variant: expected one that samples a layer, got one that leaves all exact")
    return found


def rates(ratios: Mapping[str, Sequence[float]]) -> list[list[str | float]]:
    """For each layer its mean ratio, the first, the last, and the rate of dropout that is equal to the mean."""
    rows = []
    for name, each in ratios.items():
        mean = sum(each) / len(each)
        rows.append([name, mean, each[0], each[-1], mean / (1 + mean)])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains exactly, and prints the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("config", type=Path, help="a configuration with that variant and an exact one")
    made.add_argument("--data", type=Path, default=REPOSITORY / ".data", metavar="FOLDER", help="where data sets are")
    made.add_argument("--variant", default="Bernoulli 0.5", help="which one (Bernoulli 0.5)")
    made.add_argument("--seed", type=int, default=0, help="of the training (0)")
    made.add_argument("--every", type=int, default=20, metavar="STEPS", help="between two looks (20)")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the configuration")
    options = made.parse_args(arguments)
    try:
        config = load(options.config, options.set)
        one_of("--variant", options.variant, list(config.variants))
        one_of("exact", "exact", list(config.variants))
        source = open_source(config, options.data, torch.device("cpu"), False, 0)
        kind = network(config.network, config.path.name)
        steps = config.training.full_steps(source.size)
        run = Run(config, "exact", options.seed, source, kind, Settings(probe=0, curve=False), Budget(steps, 1.0))
        policy = variants.policy_of(config, options.variant) or Exact()
        found = watched(run.model, policy, run.example[0], options.every)
    except (ConfigError, ValueError) as error:
        made.exit(2, f"{error}\n")
    with tempfile.TemporaryDirectory() as folder:
        run.train(Records(Path(folder), config.name), "exact", progress=False)
    print(f"{config.name}: {options.variant}, over an exact training of {steps} steps, seed {options.seed}\n")
    heads = ["layer", "r, mean", "first", "last", "equal rate of dropout"]
    print(tabulate(rates({name: one.found for name, one in found.items()}), heads, floatfmt=".3f"))


if __name__ == "__main__":
    main(sys.argv[1:])
