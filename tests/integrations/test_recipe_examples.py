"""The examples of recipes in the trainers of others: they learn, and go on from their checkpoints."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits

from tests.helpers.torchvision_compat import define_missing_schemas
from tests.integrations.nets import assert_same

NAMES = ("trainer", "lightning", "accelerate", "peft", "timm")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """The function ``train`` of a script; forgotten afterwards."""
    define_missing_schemas()  # all but accelerate import torchvision
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    yield lambda name: importlib.import_module(f"recipe_{name}").train
    for name in NAMES:
        sys.modules.pop(f"recipe_{name}", None)


def accuracy(model: torch.nn.Module) -> float:
    digits = load_digits()
    x = torch.tensor(digits.data / 16, dtype=torch.float32)
    return (model.eval()(x).argmax(1) == torch.tensor(digits.target)).float().mean().item()


@pytest.mark.slow
def test_trainer(example: Callable[[str], Any], tmp_path: Path) -> None:
    whole = example("trainer")(str(tmp_path / "whole"), 40)
    losses = [one["eval_loss"] for one in whole.state.log_history if "eval_loss" in one]
    assert losses[-1] < losses[0]
    shutil.copytree(tmp_path / "whole" / "checkpoint-20", tmp_path / "broken" / "checkpoint-20")
    assert_same(whole.model, example("trainer")(str(tmp_path / "broken"), 40).model)
    assert (tmp_path / "whole" / "model" / "config.json").exists()


@pytest.mark.filterwarnings(
    # Lightning's own, the first from the newest torch on.
    "ignore:.*isinstance.treespec, LeafSpec.* is deprecated:FutureWarning",
    "ignore:The '.*dataloader' does not have many workers:UserWarning",
    "ignore:Checkpoint directory .* exists and is not empty:UserWarning",
    "ignore:Trainer was signaled to stop:UserWarning",
)
def test_lightning(example: Callable[[str], Any], tmp_path: Path) -> None:
    whole = example("lightning")(str(tmp_path / "whole"), 4)
    example("lightning")(str(tmp_path / "broken"), 4, 2)
    assert_same(whole, example("lightning")(str(tmp_path / "broken"), 4))
    assert accuracy(whole) > 0.9


@pytest.mark.slow
def test_accelerate(example: Callable[[str], Any], tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    # The Trainer of another test may have made the state of this process already.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    train = example("accelerate")
    whole = train(str(tmp_path / "whole"), 100)
    train(str(tmp_path / "broken"), 100, 50)
    assert_same(whole, train(str(tmp_path / "broken"), 100))
    assert accuracy(whole) > 0.9
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_peft(example: Callable[[str], Any]) -> None:
    report = example("peft")().report()
    sampled = [row.name for row in report.rows if row.samples]
    assert sampled and all(name.endswith("mlp.fc2") for name in sampled)
    assert 0.15 < report.totals.saved < 0.5


@pytest.mark.slow
def test_timm(example: Callable[[str], Any]) -> None:
    network, average = map(float, re.findall(r"([\d.]+) %", example("timm")(200).splitlines()[-1]))
    assert network > 30 and average > 25  # chance is 10
