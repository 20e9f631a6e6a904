"""A recipe in Lightning: a multi-layer perceptron learns scikit-learn's digits.

    python examples/recipe_lightning.py FOLDER

needs lightning and scikit-learn. Run again, it goes on from its last checkpoint.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).parents[1]))  # where the package is not installed, the sources beside this folder

import lightning

import fx_approx
from fx_approx.integrations.lightning import RecipeCallback


class Learner(lightning.LightningModule):
    """Trains a network that it is given."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def train(folder: str, epochs: int = 8, stop: int | None = None) -> nn.Module:
    """Trains from the last checkpoint in ``folder``, or the beginning, to the end, or up to the epoch ``stop``."""
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
    lightning.seed_everything(0, verbose=False)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    loader = DataLoader(data, batch_size=64)
    recipe = fx_approx.recipes.finetune(model, next(iter(loader))[0], epochs * len(loader), check=False)
    print(recipe)
    keep = lightning.pytorch.callbacks.ModelCheckpoint(folder, "last", enable_version_counter=False)
    last = Path(folder) / "last.ckpt"
    callbacks = [RecipeCallback(recipe), keep]
    if stop is not None:
        callbacks.append(Until(stop))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, **quiet)
    trainer.fit(Learner(recipe.model), loader, ckpt_path=last if last.exists() else None, weights_only=True)
    return recipe.finish() if recipe.taken == recipe.steps else recipe.model


class Until(lightning.Callback):
    """Ends a training early, as a machine may that is taken away."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epoch


if __name__ == "__main__":
    train(sys.argv[1])
