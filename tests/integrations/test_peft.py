"""Recipes on models with LoRA: adapters are exact, and frozen weights stay as they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fx_approx import recipes
from fx_approx.recipes.limits import adapters
from tests.helpers.torchvision_compat import define_missing_schemas
from tests.integrations.nets import BATCHES, STEPS, loss_of, mlp, recipe_of

pytest.importorskip("peft")
define_missing_schemas()  # PEFT imports transformers, which imports torchvision
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402


def with_lora(*layers: str, **options: Any) -> nn.Module:
    model = get_peft_model(mlp(), LoraConfig(r=4, target_modules=list(layers), **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero in the beginning
            nn.init.normal_(parameter, std=0.1)
    return model


def test_adapters_stay_exact_and_frozen_weights_whole(tmp_path: Path) -> None:
    model = with_lora("0", modules_to_save=["4"])
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    recipe = recipe_of(model)
    assert "adapters stay exact" in str(recipe) and "frozen weights are left whole" in str(recipe)
    rows = recipe.report().rows
    assert {row.reason for row in rows if "lora_" in row.name} == {"an adapter: it is small"}
    assert [row.name for row in rows if row.samples] == ["base_model.model.4.modules_to_save.default"]
    frozen = [row for row in rows if row.name in ("base_model.model.0.base_layer", "base_model.model.2")]
    assert [row.exact.grad_weight for row in frozen if row.exact is not None] == [0, 0]  # a third is not there to save
    assert frozen[1].demanded > 0  # its outputs are hidden units

    optimizer = torch.optim.AdamW([p for p in recipe.model.parameters() if p.requires_grad], 1e-2)
    for batch in BATCHES[:STEPS]:
        optimizer.zero_grad()
        loss_of(recipe.model, batch).backward()
        optimizer.step()
        recipe.step()
    trained = recipe.finish()
    assert trained is model
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value), name

    # What is saved is the adapters; on the weights as they were before they are the trained network.
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(mlp(), str(tmp_path))
    x = BATCHES[0][0]
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert not torch.allclose(with_lora("0", modules_to_save=["4"]).eval()(x), model(x))


def test_an_adapter_that_reads_hidden_units_keeps_them_unless_it_may_be_sampled() -> None:
    def fourth(**options: Any) -> dict[str, str]:
        """Of the fourth layer, why which part is exact, or empty if it is sampled."""
        rows = recipe_of(with_lora("4"), **options).report().rows
        return {
            row.name.rpartition("4.")[2]: "" if row.samples else row.reason for row in rows if "model.4." in row.name
        }

    assert fourth() == {
        "base_layer": "no layer before it could compute less",
        **dict.fromkeys(("lora_A.default", "lora_B.default"), "an adapter: it is small"),
    }
    chosen = fourth(layers=lambda name, module: True)
    assert [name for name, why in chosen.items() if not why] == ["base_layer", "lora_A.default"]


def test_adapters_are_found_by_what_peft_says_of_its_layers() -> None:
    assert adapters(mlp()) == ()
    model = with_lora("0", "2")
    found = {path for path in adapters(model) if any(True for _ in model.get_submodule(path).parameters())}
    assert found == {f"base_model.model.{layer}.lora_{part}" for layer in (0, 2) for part in "AB"}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo, at a graph break
def test_a_model_that_is_not_traced_goes_by_the_backend() -> None:
    class Untraced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp()

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            logits = self.layers(x)
            return F.cross_entropy(logits, labels) if torch.is_grad_enabled() else logits

    torch._dynamo.reset()
    model = get_peft_model(Untraced(), LoraConfig(r=4, target_modules=["layers.0"]))
    batch = {"x": BATCHES[0][0], "labels": BATCHES[0][1]}
    weights = copy.deepcopy(model.state_dict())
    recipe = recipes.finetune(model, batch, STEPS, check=False)
    assert "by a backend" in str(recipe) and "adapters stay exact" in str(recipe)
    sampled = [row.name for row in recipe.report().rows if row.samples]
    assert sampled and not any("lora_" in name for name in sampled)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        recipe.model(**batch).backward()
        optimizer.step()
        recipe.step()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])]
    assert len(changed) == 2 and all("lora_" in name for name in changed)
