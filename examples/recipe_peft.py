"""A recipe and LoRA: adapters on the attention of a small vision transformer, hidden units of its MLPs sampled.

    python examples/recipe_peft.py

needs peft and timm. The table says what is saved: adapters stay exact, and frozen weights have no gradient.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from timm.models import VisionTransformer

sys.path.append(str(Path(__file__).parents[1]))  # where the package is not installed, the sources beside this folder

import fx_approx


def train(steps: int = 40) -> fx_approx.recipes.Recipe:
    """Trains the adapters of a network with random weights on random images."""
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    base = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=10)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["qkv", "attn.proj"], modules_to_save=["head"]))
    recipe = fx_approx.recipes.finetune(model, images, steps, check=False)
    print(recipe, recipe.report(), sep="\n\n")
    optimizer = torch.optim.AdamW([p for p in recipe.model.parameters() if p.requires_grad], 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(recipe.model(images), labels).backward()
        optimizer.step()
        recipe.step()
    recipe.finish()  # model.save_pretrained(folder) writes the adapters
    return recipe


if __name__ == "__main__":
    train()
