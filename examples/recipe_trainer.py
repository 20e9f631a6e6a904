"""A recipe in the Trainer of Hugging Face: a small vision transformer learns scikit-learn's digits.

    python examples/recipe_trainer.py FOLDER

needs transformers, accelerate and scikit-learn. Run again, it goes on from its last checkpoint.
"""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification
from transformers.trainer_utils import get_last_checkpoint

sys.path.append(str(Path(__file__).parents[1]))  # where the package is not installed, the sources beside this folder

import fx_approx
from fx_approx.integrations.trainer import RecipeCallback


def train(folder: str, steps: int = 600) -> Trainer:
    """Trains from the last checkpoint in ``folder``, or the beginning, to the end."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 6 - 0.8
    data = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, digits.target, strict=True)]
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes))
    batch = {"pixel_values": images[:32], "labels": torch.tensor(digits.target[:32])}
    recipe = fx_approx.recipes.finetune(model, batch, steps, check=False)
    print(recipe)
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        save_steps=steps // 2,
        eval_strategy="steps",
        eval_steps=steps // 2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    callbacks = [RecipeCallback(recipe)]
    trainer = Trainer(recipe.model, arguments, train_dataset=data[360:], eval_dataset=data[:360], callbacks=callbacks)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if Path(folder).is_dir() else None)
    recipe.finish().save_pretrained(f"{folder}/model")  # a plain model; recipe.ship() is a narrow one
    return trainer


if __name__ == "__main__":
    train(sys.argv[1])
