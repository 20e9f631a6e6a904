"""An importance sampler in Lightning: from the third epoch on the examples with large losses first.

    python examples/importance_lightning.py FOLDER

needs lightning and scikit-learn, whose digits it learns. Run again, it goes on from its last checkpoint.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).parents[1]))  # where the package is not installed, the sources beside this folder

import lightning

from fx_approx.data import ImportanceSampler, Indexed


class Learner(lightning.LightningModule):
    """Reads what ``sampler`` draws, and tells it the losses; its state lies in every checkpoint."""

    def __init__(self, sampler: ImportanceSampler) -> None:
        super().__init__()
        self.sampler = sampler
        self.layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], _: int) -> Tensor:
        """The weighted mean."""
        x, y, index = batch
        losses = F.cross_entropy(self.layers(x), y, reduction="none")
        self.sampler.update(index, losses)
        return (losses * self.sampler.weights(index)).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)

    def on_train_epoch_end(self) -> None:
        if torch.distributed.is_initialized():
            self.sampler.synchronize()  # all ranks know all losses when an epoch is drawn

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sampler"] = self.sampler.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.sampler.load_state_dict(checkpoint["sampler"])


def train(folder: str, epochs: int = 6, stop: int | None = None, limit: int = 1000) -> Learner:
    """Trains from the last checkpoint in ``folder``, or the beginning, to the end, or up to the epoch ``stop``."""
    digits = load_digits()
    pixels = torch.tensor(digits.data[:limit] / 16, dtype=torch.float32)
    data = Indexed(TensorDataset(pixels, torch.tensor(digits.target[:limit])))
    lightning.seed_everything(0, verbose=False)
    # even: Lightning takes the batches of all epochs from the length of the one it begins with.
    learner = Learner(ImportanceSampler(data, 0.6, epochs=epochs, even=True))
    trainer = lightning.Trainer(
        max_epochs=stop or epochs,
        accelerator="cpu",
        use_distributed_sampler=False,  # each rank reads its part of one draw already
        callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(folder, "last", enable_version_counter=False)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = Path(folder) / "last.ckpt"
    loader = DataLoader(data, batch_size=32, sampler=learner.sampler)
    trainer.fit(learner, loader, ckpt_path=last if last.exists() else None, weights_only=True)
    return learner


def summary(learner: Learner) -> str:
    """What was read, and how the network does on the digits that it was not given."""
    digits, sampler = load_digits(), learner.sampler
    pixels = torch.tensor(digits.data[sampler.size :] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target[sampler.size :])
    with torch.no_grad():
        right = learner.layers(pixels).argmax(1) == labels
    steps, losses = learner.trainer.global_step, sampler.state_dict()["losses"]
    return (
        f"{steps} steps in {sampler.epochs} epochs, each of {len(sampler)} of {sampler.size} digits\n"
        f"last loss of a digit: mean {losses.mean():.3f}, largest {losses.max():.2f}\n"
        f"accuracy on {len(labels)} other digits: {100 * right.float().mean():.1f} %"
    )


if __name__ == "__main__":
    print(summary(train(sys.argv[1])))
