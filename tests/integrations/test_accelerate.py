"""A recipe in a plain loop with accelerate: no helper is needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fx_approx.recipes import Recipe
from tests.integrations.nets import BATCHES, STEPS, assert_same, loop, recipe_of

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """It has one state in a process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def train(
    recipe: Recipe, save: Path | None = None, resume: Path | None = None, accumulate: int = 1, **options: Any
) -> Any:
    """What a user types; a checkpoint after 14 steps, in the middle of those that sample."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **options)
    optimizer = torch.optim.AdamW(recipe.model.parameters(), 1e-2)
    model, optimizer = accelerator.prepare(recipe.model, optimizer)
    accelerator.register_for_checkpointing(recipe)
    if resume is not None:
        accelerator.load_state(str(resume))
    for x, y in BATCHES[accumulate * recipe.taken : accumulate * STEPS]:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                recipe.step()
        if save is not None and accelerator.sync_gradients and recipe.taken == 14:
            accelerator.save_state(str(save))
    return accelerator.unwrap_model(model, keep_fp32_wrapper=False)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_does_what_a_loop_does(accumulate: int) -> None:
    found, wanted = recipe_of(), recipe_of()
    unwrapped = train(found, accumulate=accumulate)
    loop(wanted, accumulate)
    assert unwrapped is found.model and found.taken == STEPS
    assert_same(found.finish(), wanted.finish())
    assert_same(found.ship(), wanted.ship())


def test_mixed_precision_and_what_ships(tmp_path: Path) -> None:
    recipe = recipe_of()
    whole = train(recipe, save=tmp_path, mixed_precision="bf16")
    assert recipe.unserved == ()
    x = BATCHES[0][0]
    shipped = recipe.ship().eval()
    assert shipped[2].in_features == 32 and all(p.dtype == torch.float32 for p in shipped.parameters())
    assert shipped(x).dtype == torch.float32 and "forward" not in vars(shipped)
    exact = recipe.finish().eval()
    assert "forward" not in vars(exact) and torch.equal(exact(x), whole.eval()(x))

    resumed = recipe_of()
    train(resumed, resume=tmp_path, mixed_precision="bf16")
    assert resumed.taken == STEPS
    assert_same(exact, resumed.finish())
