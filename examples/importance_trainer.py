"""An importance sampler in the Trainer of Hugging Face: from the third epoch on the examples with large losses first.

    python examples/importance_trainer.py FOLDER

needs transformers, accelerate and scikit-learn, whose digits it learns. Run again, it goes on from its last checkpoint.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

sys.path.append(str(Path(__file__).parents[1]))  # where the package is not installed, the sources beside this folder

from fx_approx.data import ImportanceSampler, Indexed


class ImportanceTrainer(Trainer):
    """Reads what ``sampler`` draws, and tells it the losses; a batch has the numbers of its examples as ``index``."""

    def __init__(self, sampler: ImportanceSampler, **options: Any) -> None:
        super().__init__(**options, callbacks=[_Keep(sampler)])
        self.sampler = sampler

    def _get_train_sampler(self, train_dataset: Any = None) -> ImportanceSampler:
        return self.sampler

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """The weighted mean."""
        index, labels = inputs.pop("index"), inputs.pop("labels")
        outputs = model(**inputs)
        losses = F.cross_entropy(outputs["logits"], labels, reduction="none")
        if model.training:
            self.sampler.update(index, losses)
            losses = losses * self.sampler.weights(index)
        return (losses.mean(), outputs) if return_outputs else losses.mean()


class _Keep(TrainerCallback):
    """The state of the sampler lies in every checkpoint, and all ranks know all losses when an epoch is drawn."""

    def __init__(self, sampler: ImportanceSampler) -> None:
        self.sampler = sampler

    def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if torch.distributed.is_initialized():
            self.sampler.synchronize()

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        torch.save(self.sampler.state_dict(), f"{args.output_dir}/checkpoint-{state.global_step}/sampler.pt")


class Net(nn.Module):
    """Two layers on 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``[N, 64]`` to logits ``[N, 10]``."""
        return {"logits": self.layers(x)}


def train(folder: str, epochs: int = 6, limit: int = 1000, save: int = 25) -> ImportanceTrainer:
    """Trains from the last checkpoint in ``folder``, or the beginning, to the end."""
    digits = load_digits()
    pixels = torch.tensor(digits.data[:limit] / 16, dtype=torch.float32)
    data = Indexed([{"x": x, "labels": y} for x, y in zip(pixels, digits.target[:limit].tolist(), strict=True)])
    # even: the Trainer takes its steps from the length of the first epoch. It gives each rank its batches of one draw.
    sampler = ImportanceSampler(data, 0.6, epochs=epochs, even=True, num_replicas=1, rank=0)
    last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
    if last is not None:
        sampler.load_state_dict(torch.load(f"{last}/sampler.pt"))
    torch.manual_seed(0)
    arguments = TrainingArguments(
        folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=1e-2,
        save_steps=save,
        use_cpu=True,
        remove_unused_columns=False,  # the model's forward takes no index
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = ImportanceTrainer(sampler, model=Net(), args=arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=last)
    return trainer


def summary(trainer: ImportanceTrainer) -> str:
    """What was read, and how the network does on the digits that it was not given."""
    digits, sampler = load_digits(), trainer.sampler
    pixels = torch.tensor(digits.data[sampler.size :] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target[sampler.size :])
    with torch.no_grad():
        right = trainer.model(pixels)["logits"].argmax(1) == labels
    steps, losses = trainer.state.global_step, sampler.state_dict()["losses"]
    return (
        f"{steps} steps in {sampler.epochs} epochs, each of {len(sampler)} of {sampler.size} digits\n"
        f"last loss of a digit: mean {losses.mean():.3f}, largest {losses.max():.2f}\n"
        f"accuracy on {len(labels)} other digits: {100 * right.float().mean():.1f} %"
    )


if __name__ == "__main__":
    print(summary(train(sys.argv[1])))
