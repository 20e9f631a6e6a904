"""A recipe beside timm's training pieces: rates by layer, a cosine with warm-up, a moving average of the weights.

    python examples/recipe_timm.py

needs timm and scikit-learn, whose digits it learns. ``check=False`` samples without timing a step first.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.models import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

sys.path.append(str(Path(__file__).parents[1]))  # where the package is not installed, the sources beside this folder

import fx_approx
from fx_approx.integrations.timm import step_with_ema


def train(steps: int = 600) -> str:
    """Trains, and returns what came of it, in words."""
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 6 - 0.8, torch.tensor(digits.target)
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 2, "num_heads": 4}
    recipe = fx_approx.recipes.finetune(VisionTransformer(**sizes, num_classes=10), x[:32], steps, check=False)
    print(recipe)
    optimizer = create_optimizer_v2(recipe.model, "adamw", lr=2e-3, weight_decay=0.05, layer_decay=0.8)
    schedule = {"warmup_t": steps // 10, "warmup_lr_init": 1e-5, "t_in_epochs": False}
    scheduler = CosineLRScheduler(optimizer, t_initial=steps, **schedule)
    ema = ModelEmaV3(recipe.model, decay=0.95)
    sampled = 0
    for step, rows in enumerate(torch.randint(360, len(x), (steps, 32))):
        sampled += recipe.sampling
        optimizer.zero_grad()
        F.cross_entropy(recipe.model(x[rows]), y[rows]).backward()
        optimizer.step()
        step_with_ema(recipe, ema, step)
        scheduler.step_update(step + 1)
    models = recipe.finish(), ema.module
    found = [100 * (one.eval()(x[:360]).argmax(1) == y[:360]).float().mean().item() for one in models]
    saved = 100 * recipe.report().totals.saved
    return (
        f"{steps} steps: {sampled} sampled, each with {saved:.0f} % fewer operations\n"
        f"accuracy on 360 digits that were held back: {found[0]:.1f} %, of the average of the weights {found[1]:.1f} %"
    )


if __name__ == "__main__":
    print(f"\n{train()}")
