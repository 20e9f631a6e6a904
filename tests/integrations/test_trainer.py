"""A recipe in the Trainer of Hugging Face: what a loop by hand does, and resumed, bitwise."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fx_approx import recipes
from fx_approx.recipes import Recipe
from tests.helpers.quick import quick
from tests.helpers.torchvision_compat import define_missing_schemas

pytest.importorskip("transformers")
define_missing_schemas()  # transformers imports torchvision
from transformers import (  # noqa: E402
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from fx_approx.integrations.trainer import RecipeCallback  # noqa: E402

STEPS = 30  # 10 exact ones, 17 that sample, 3 exact ones
ROWS = [{"x": torch.randn(12), "labels": i % 3} for i in range(64)]
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"  # Dynamo, at a graph break
)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


class Net(nn.Module):
    """With the loss among its outputs, which the graph computes, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Untraced(Net):
    """Asks for what a graph does not know."""

    def forward(self, x: Tensor, labels: Tensor, **_: Any) -> dict[str, Tensor]:
        logits = self.layers(x)
        loss = F.cross_entropy(logits, labels) if torch.is_grad_enabled() else torch.zeros(())
        return {"loss": loss, "logits": logits}


def net(kind: type[nn.Module] = Net) -> Recipe:
    torch.manual_seed(3)
    batch = {"x": torch.stack([row["x"] for row in ROWS[:8]]), "labels": torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])}
    return recipes.finetune(kind(), batch, STEPS, check=False)


def gpt2() -> Recipe:
    torch.manual_seed(3)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=False))  # with dropout
    model.activation_checkpointing_enable()
    return recipes.finetune(model, {"input_ids": TEXT[:4], "labels": TEXT[:4]}, STEPS, check=False)


TEXT = torch.randint(50, (32, 8))
IMAGES = torch.randn(16, 3, 16, 16)
DATA: dict[str, Any] = {
    "net": ROWS,
    "gpt2": [{"input_ids": one, "labels": one} for one in TEXT],
    "vit": [{"pixel_values": one, "labels": i % 2} for i, one in enumerate(IMAGES)],
}


def vit(steps: int = STEPS) -> Recipe:
    torch.manual_seed(3)
    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, **SMALL))
    batch = {"pixel_values": IMAGES[:4], "labels": torch.tensor([0, 1, 0, 1])}
    return recipes.finetune(model, batch, steps, check=False)


def trainer(
    folder: Path, recipe: Recipe, data: str, callbacks: tuple[TrainerCallback, ...] | None = None, **options: Any
) -> Trainer:
    arguments = {
        **{"max_steps": STEPS, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_steps": 15},
        **{"logging_steps": 5, "eval_strategy": "steps", "eval_steps": 12, "report_to": "none"},
        **{"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, **options},
    }
    made = [RecipeCallback(recipe)] if callbacks is None else list(callbacks)
    parts = {"train_dataset": DATA[data], "eval_dataset": DATA[data][:8], "callbacks": made}
    return Trainer(recipe.model, TrainingArguments(str(folder), **arguments), **parts)


def same(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_it_does_what_a_loop_does_with_accumulated_gradients(tmp_path: Path) -> None:
    recipe = net()
    batches: list[dict[str, Tensor]] = []

    class Seen(Trainer):
        def training_step(self, model: nn.Module, inputs: Any, *rest: Any) -> Tensor:
            batches.append({name: value.clone() for name, value in inputs.items()})
            return super().training_step(model, inputs, *rest)

    options = {"gradient_accumulation_steps": 2, "max_steps": STEPS, "learning_rate": 1e-2, "report_to": "none"}
    options |= {"use_cpu": True, "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": 7, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), dataloader_pin_memory=False, **options)
    parts = {"train_dataset": ROWS, "eval_dataset": ROWS[:8], "callbacks": [RecipeCallback(recipe)]}
    Seen(recipe.model, arguments, **parts).train()
    assert recipe.taken == STEPS and len(batches) == 2 * STEPS and recipe.unserved == ()

    by_hand = net()
    optimizer = torch.optim.AdamW(by_hand.model.parameters(), 1e-2, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / STEPS)
        optimizer.zero_grad()
        for batch in batches[2 * step : 2 * step + 2]:
            (by_hand.model(**batch)["loss"] / 2).backward()
        nn.utils.clip_grad_norm_(by_hand.model.parameters(), 1.0)
        optimizer.step()
        by_hand.step()
    found, wanted = recipe.finish(), by_hand.finish()
    torch.testing.assert_close(found.state_dict(), wanted.state_dict(), rtol=1e-4, atol=1e-6)


MIXED = {"bf16": True, "gradient_accumulation_steps": 2, "activation_checkpointing": True}


@pytest.mark.parametrize(
    ("kind", "options"), quick([("net", {}), ("untraced", {}), ("gpt2", MIXED)], lambda kind, options: kind == "net")
)
def test_a_run_goes_on_from_its_checkpoint_bitwise(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    def made(place: str) -> tuple[Recipe, Trainer]:
        recipe = {"net": net, "untraced": lambda: net(Untraced), "gpt2": gpt2}[kind]()
        return recipe, trainer(tmp_path / place, recipe, "gpt2" if kind == "gpt2" else "net", **options)

    whole, first = made("whole")
    first.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-15", tmp_path / "elsewhere")
    resumed, second = made("resumed")
    second.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    same(whole.finish(), resumed.finish())
    assert resumed.taken == STEPS
    assert ("by a backend" in str(whole)) == (kind != "net")
    if kind != "gpt2":
        same(whole.ship(), resumed.ship())
        assert whole.ship().layers[2].in_features == 32


def test_a_plain_model_is_saved_and_the_log_has_what_is_saved(tmp_path: Path) -> None:
    recipe = vit()

    reported: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            reported.append(dict(logs))

    made = trainer(tmp_path, recipe, "vit", (Reporter(),), save_steps=20)
    RecipeCallback(recipe).add_to(made)
    made.train()
    assert recipe.unserved == ()
    loaded = ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-20")
    assert type(loaded) is ViTForImageClassification
    assert json.loads((tmp_path / "checkpoint-20/config.json").read_text())["architectures"] == [
        "ViTForImageClassification"
    ]
    saved = recipe.report().totals.saved_net
    assert 0.3 < saved < 0.6
    for logs in (made.state.log_history, reported):
        steps = [one for one in logs if "loss" in one]
        assert [one["fx_approx/mean_ratio"] for one in steps] == [1.0, 1.0, 0.5, 0.5, 0.5, 1.0]
        assert [one["fx_approx/saved_flops"] for one in steps] == [0.0, 0.0, saved, saved, saved, 0.0]
    assert not any("fx_approx/mean_ratio" in one for one in made.state.log_history if "eval_loss" in one)

    made.save_model(str(tmp_path / "end"))
    images = {"pixel_values": IMAGES[:4]}
    ended = ViTForImageClassification.from_pretrained(tmp_path / "end").eval()(**images).logits
    assert torch.equal(ended, recipe.finish().eval()(**images).logits)


@pytest.mark.slow
def test_a_graph_that_autocast_does_not_fit_is_an_error_or_the_backends(tmp_path: Path) -> None:
    recipe = vit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=r"does not serve the calls .* autocast is active. Make the recipe"):
            trainer(tmp_path, recipe, "vit", bf16=True).train()
    assert recipe.taken == 10  # the exact steps, in which any way is the same
    with torch.autocast("cpu", torch.bfloat16):
        recipe = vit()
    assert "by a backend of torch.compile" in str(recipe)


def test_what_is_wrong_is_named_before_the_first_step(tmp_path: Path) -> None:
    recipe = net()
    with pytest.raises(ValueError, match="it has 30 steps, and the Trainer takes 40; make it with steps=40"):
        trainer(tmp_path, recipe, "net", max_steps=40).train()
    with pytest.raises(ValueError, match=r"the Trainer trains another model; give it recipe.model"):
        trainer(tmp_path, net(), "net", (RecipeCallback(recipe),)).train()
    exact = net()
    trainer(tmp_path, exact, "net", (), save_steps=20).train()
    with pytest.raises(ValueError, match="0 of its steps were taken, and 20 of the Trainer"):
        trainer(tmp_path, recipe, "net").train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    with pytest.raises(TypeError, match=r"recipe: expected what a function of fx_approx.recipes returns, got 3"):
        RecipeCallback(3)  # type: ignore[arg-type]
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batch = {"x": torch.randn(8, 12), "labels": torch.zeros(8, dtype=torch.long)}
    swapping = recipes.finetune(model, batch, STEPS, optimizer=optimizer, check=False)
    with pytest.raises(ValueError, match="made without optimizer="):
        RecipeCallback(swapping)
