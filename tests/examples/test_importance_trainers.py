"""The importance sampler in the trainers of others, by the examples: what a loop by hand does, and resumed, bitwise."""

from __future__ import annotations

import importlib
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from fx_approx.data import ImportanceSampler
from tests.helpers.torchvision_compat import define_missing_schemas

LIMIT, EPOCHS = 300, 4


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports a script of the folder by its name; forgotten afterwards."""
    define_missing_schemas()  # both trainers import torchvision
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    names = ("importance_trainer", "importance_lightning")
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


def by_hand(rate: Callable[[int], float], clip: float, decay: float) -> tuple[ImportanceSampler, nn.Module]:
    """The training of both examples in a plain loop, with AdamW."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    sampler = ImportanceSampler(LIMIT, 0.6, epochs=EPOCHS, even=True)
    digits = load_digits()
    x = torch.tensor(digits.data[:LIMIT] / 16, dtype=torch.float32)
    y = torch.tensor(digits.target[:LIMIT])
    optimizer = torch.optim.AdamW(layers.parameters(), 1e-2, weight_decay=decay)
    step = 0
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for index in torch.tensor(list(sampler)).split(32):
            losses = F.cross_entropy(layers(x[index]), y[index], reduction="none")
            optimizer.zero_grad()
            (losses * sampler.weights(index)).mean().backward()
            nn.utils.clip_grad_norm_(layers.parameters(), clip)
            optimizer.param_groups[0]["lr"] = rate(step)
            optimizer.step()
            sampler.update(index, losses)
            step += 1
    return sampler, layers


def assert_near(found: nn.Module, sampler: ImportanceSampler, other: ImportanceSampler, layers: nn.Module) -> None:
    """What was learnt and what is known of the examples, up to rounding; and all of them are known."""
    torch.testing.assert_close(list(found.parameters()), list(layers.parameters()), rtol=1e-4, atol=1e-5)
    one, two = sampler.state_dict(), other.state_dict()
    assert one["epoch"] == two["epoch"] == EPOCHS - 1 and not one["losses"].isnan().any()
    torch.testing.assert_close(one["losses"], two["losses"], rtol=1e-3, atol=1e-5)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Bitwise."""
    return all(torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])) for key, value in one.items())


def test_the_trainer_of_hugging_face(example: Callable[[str], Any], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    script = example("importance_trainer")
    train = script.train
    whole = train(str(tmp_path / "whole"), EPOCHS, LIMIT, save=5)
    assert script.summary(whole).startswith("24 steps in 4 epochs, each of 180 of 300 digits")
    # Six steps read 180 examples; the first two epochs are exact, and so is the last.
    assert whole.state.global_step == whole.state.max_steps == 6 * EPOCHS
    other, layers = by_hand(lambda step: 1e-2 * (1 - step / 24), clip=1.0, decay=0.0)
    assert_near(whole.model.layers, whole.sampler, other, layers)

    kept = "checkpoint-15"  # in the third epoch, which is the first that is drawn
    shutil.copytree(tmp_path / "whole" / kept, tmp_path / "broken" / kept)
    resumed = train(str(tmp_path / "broken"), EPOCHS, LIMIT, save=5)
    assert resumed.state.global_step == 24 and list(resumed.sampler) == list(whole.sampler)
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    assert same(resumed.sampler.state_dict(), whole.sampler.state_dict())


@pytest.mark.filterwarnings(
    # Lightning's own, from the newest torch on.
    "ignore:.*isinstance.treespec, LeafSpec.* is deprecated:FutureWarning",
    "ignore:The '.*dataloader' does not have many workers:UserWarning",
    "ignore:Checkpoint directory .* exists and is not empty:UserWarning",
)
def test_lightning(example: Callable[[str], Any], tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    script = example("importance_lightning")
    train = script.train
    whole = train(str(tmp_path / "whole"), EPOCHS, limit=LIMIT)
    assert script.summary(whole).startswith("24 steps in 4 epochs, each of 180 of 300 digits")
    assert whole.trainer.global_step == 6 * EPOCHS
    other, layers = by_hand(lambda step: 1e-2, clip=math.inf, decay=0.01)
    assert_near(whole.layers, whole.sampler, other, layers)

    train(str(tmp_path / "broken"), EPOCHS, 2, LIMIT)
    resumed = train(str(tmp_path / "broken"), EPOCHS, limit=LIMIT)
    assert resumed.trainer.global_step == 24 and list(resumed.sampler) == list(whole.sampler)
    assert same(resumed.state_dict(), whole.state_dict())
    assert same(resumed.sampler.state_dict(), whole.sampler.state_dict())
