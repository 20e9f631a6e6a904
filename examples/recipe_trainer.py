"""A recipe in the Trainer of Hugging Face: a small BERT reads scikit-learn's digits, a pixel a token.

    python examples/recipe_trainer.py FOLDER

needs transformers, accelerate and scikit-learn. Run again, it goes on from its last checkpoint.
"""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

sys.path.append(str(Path(__file__).parents[1]))  # where the package is not installed, the sources beside this folder

import fx_approx
from fx_approx.integrations.trainer import RecipeCallback


def train(folder: str, steps: int = 200) -> Trainer:
    """Trains from the last checkpoint in ``folder``, or the beginning, to the end."""
    digits = load_digits()
    pixels, labels = torch.tensor(digits.data, dtype=torch.long), torch.tensor(digits.target)
    data = [{"input_ids": x, "labels": int(y)} for x, y in zip(pixels, labels, strict=True)]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = BertConfig(vocab_size=17, max_position_embeddings=64, num_labels=10, **sizes)
    model = BertForSequenceClassification(config)
    batch = {"input_ids": pixels[:32], "labels": labels[:32]}
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
    trainer = Trainer(recipe.model, arguments, train_dataset=data[200:], eval_dataset=data[:200], callbacks=callbacks)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if Path(folder).is_dir() else None)
    recipe.finish().save_pretrained(f"{folder}/model")  # a plain model; recipe.ship() is a narrow one
    return trainer


if __name__ == "__main__":
    train(sys.argv[1])
