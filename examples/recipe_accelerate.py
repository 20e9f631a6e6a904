"""A recipe in a plain loop with accelerate: gradients of two batches, bfloat16, checkpoints.

    accelerate launch examples/recipe_accelerate.py FOLDER     # or python

needs accelerate and scikit-learn, whose digits it learns. Run again, it goes on from its last checkpoint.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))  # where the package is not installed, the sources beside this folder

import fx_approx


def train(folder: str, steps: int = 200, stop: int | None = None) -> nn.Module:
    """Trains from the last checkpoint in ``folder``, or the beginning, to the end, or up to the step ``stop``."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16")
    recipe = fx_approx.recipes.finetune(model, x[:32], steps, check=False)
    print(recipe)
    optimizer = torch.optim.AdamW(recipe.model.parameters(), 1e-3)
    network, optimizer = accelerator.prepare(recipe.model, optimizer)
    accelerator.register_for_checkpointing(recipe)  # a recipe has state_dict and load_state_dict
    if Path(folder).is_dir():
        accelerator.load_state(folder)
    chosen = torch.randint(len(x), (2 * steps, 32), generator=torch.Generator().manual_seed(0))
    for rows in chosen[2 * recipe.taken : 2 * (steps if stop is None else stop)]:
        with accelerator.accumulate(network):
            accelerator.backward(F.cross_entropy(network(x[rows]), y[rows]))
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                recipe.step()
    accelerator.save_state(folder)
    return recipe.finish() if recipe.taken == steps else recipe.model


if __name__ == "__main__":
    train(sys.argv[1])
